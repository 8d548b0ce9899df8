"""${message}"""

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "raise RuntimeError('an empty migration')"}


def downgrade() -> None:
    raise RuntimeError("the store goes back by its backup, not by a downgrade")
