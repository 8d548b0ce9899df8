"""What became of each plugin of a session, the values that plugins work with, and whose progress is told."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

STATEMENTS = (
    # The variables of the request, completed by what the template says of those that were not given.
    "ALTER TABLE sessions ADD COLUMN answers TEXT CHECK (answers IS NULL OR json_valid(answers))",
    """
    CREATE TABLE plugin_runs (
        session_id TEXT NOT NULL REFERENCES sessions (session_id),
        ordinal INTEGER NOT NULL CHECK (ordinal >= 1),
        plugin TEXT NOT NULL,
        version TEXT,
        status TEXT NOT NULL CHECK (status IN ('success', 'skipped', 'failed', 'timeout', 'policy_violation')),
        message TEXT,
        files_affected TEXT NOT NULL CHECK (json_valid(files_affected)),
        duration_ms INTEGER,
        exit_code INTEGER,
        peak_memory_mb INTEGER,
        ended_at TEXT NOT NULL,
        PRIMARY KEY (session_id, ordinal)
    ) STRICT, WITHOUT ROWID
    """,
    """
    CREATE TRIGGER plugin_runs_follow BEFORE INSERT ON plugin_runs
    WHEN NEW.ordinal <> (SELECT count(*) + 1 FROM plugin_runs WHERE session_id = NEW.session_id)
        OR NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = NEW.session_id AND state = 'plugin_pass')
    BEGIN SELECT RAISE(ABORT, 'plugins run one after the other, in plugin_pass, and each is through once'); END
    """,
    """
    CREATE TRIGGER plugin_runs_constant BEFORE UPDATE ON plugin_runs
    BEGIN SELECT RAISE(ABORT, 'what became of a plugin does not change'); END
    """,
    """
    CREATE TRIGGER plugin_runs_kept BEFORE DELETE ON plugin_runs
    WHEN EXISTS (SELECT 1 FROM sessions WHERE session_id = OLD.session_id)
    BEGIN SELECT RAISE(ABORT, 'what became of a plugin goes with its session only'); END
    """,
    """
    CREATE TRIGGER sessions_pruned_plugins AFTER DELETE ON sessions
    BEGIN DELETE FROM plugin_runs WHERE session_id = OLD.session_id; END
    """,
    "DROP VIEW timeline",
    """
    CREATE VIEW timeline AS
    SELECT session_id, seq, at, kind,
        CASE kind
            WHEN 'phase' THEN json_extract(frame, '$.phase')
            WHEN 'progress' THEN
                coalesce(json_extract(frame, '$.file') || ': ', json_extract(frame, '$.plugin') || ': ', '')
                || json_extract(frame, '$.current') || ' of ' || json_extract(frame, '$.total')
            WHEN 'input_required' THEN
                json_extract(frame, '$.plugin') || ' asks: ' || json_extract(frame, '$.reason')
            WHEN 'input_received' THEN 'answered: ' || json_extract(frame, '$.plugin')
            WHEN 'warning' THEN json_extract(frame, '$.code') || ': ' || json_extract(frame, '$.message')
            WHEN 'recovered' THEN 'taken up again in ' || json_extract(frame, '$.state')
            WHEN 'done' THEN 'published as ' || json_extract(frame, '$.result.path')
            WHEN 'failed' THEN
                json_extract(frame, '$.error.code') || ': ' || json_extract(frame, '$.error.message')
        END AS what,
        round((julianday(at) - julianday(lag(at) OVER (PARTITION BY session_id ORDER BY seq))) * 86400, 3)
            AS seconds_since_previous
    FROM events ORDER BY session_id, seq
    """,
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.get_bind().exec_driver_sql(statement)


def downgrade() -> None:
    raise RuntimeError("the store goes back by its backup, not by a downgrade")
