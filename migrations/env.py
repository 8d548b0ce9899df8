"""Runs the migrations on the connection that the service hands over, inside its transaction."""

from alembic import context

from app.database import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit(
        "the service migrates its own store when it starts; to look at the steps: alembic history"
    )
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=False)
context.run_migrations()
