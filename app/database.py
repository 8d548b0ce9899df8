"""The SQLite file of the store: its tables, who holds it, how it is migrated, and whether it is still the same.

It promises that a file is brought to this code's schema whole or refused untouched, that no two services hold
it, and that a history which is not the one that was closed last gets another epoch. What is particular to
SQLite stands here, in `connections.py` and in the migrations; what a session is stands in `sessions/store.py`.
"""

import os
import secrets
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import msgspec
import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    Text,
    make_url,
)
from sqlalchemy.exc import DBAPIError

from app import connections, disk
from app.errors import StoreRefused

log = structlog.get_logger()

APPLICATION_ID = 0x45584C53
"""The four bytes "EXLS" in the header of every database of this service."""

metadata = MetaData()


def _table(name: str, key: tuple[str, ...], texts: str, integers: str = "") -> Table:
    columns: list[Column[Any]] = [Column(text, Text, primary_key=text in key) for text in texts.split()]
    columns += [Column(number, Integer, primary_key=number in key) for number in integers.split()]
    return Table(name, metadata, *columns)


sessions = _table(
    "sessions",
    ("session_id",),
    "session_id kind run_kind state label operator equipment_id project_short_id template_path destination"
    " destination_key project_key local_root created_at updated_at ended_at tree rendered findings blocked_on"
    " cancel_requested_at cancel partial_path sync_status error result retry_of principal trace_id request pinned"
    " answers",
    "head_seq recoveries step_deaths driven alone",
)
events = _table("events", ("position",), "session_id kind at frame", "position seq")
prompts = _table(
    "prompts",
    ("prompt_id",),
    "prompt_id session_id plugin file reason fields status asked_at answered_at operator answer answer_digest",
)
snapshots = _table(
    "snapshots", ("session_id", "ordinal"), "session_id step plugin tree manifest taken_at", "ordinal"
)
plugin_runs = _table(
    "plugin_runs",
    ("session_id", "ordinal"),
    "session_id plugin version status message files_affected ended_at",
    "ordinal duration_ms exit_code peak_memory_mb",
)
copy_jobs = _table(
    "copy_jobs",
    ("session_id",),
    "session_id source target status error next_at created_at updated_at",
    "attempts",
)
idempotency_keys = _table(
    "idempotency_keys", ("principal", "key"), "principal key body_digest session_id created_at"
)
audit = _table("audit", ("entry",), "at principal operator command session_id trace_id details", "entry")
log_lines = _table("log_lines", ("line",), "session_id at source level text", "line")
store_facts = _table("store_facts", ("name",), "name value")


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What opening found: the epoch of this history, and whether the last service ended uncleanly."""

    epoch: str
    revision: str
    backup: Path | None


def path_of(url: str) -> Path:
    """The file that a database URL names; StoreRefused for any other database than SQLite."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise StoreRefused(f"database_url must name an SQLite file, not {parsed.render_as_string()}")
    return Path(parsed.database).resolve()


class Lock:
    """Held for the life of a service, beside the file, so that no second one opens the same store."""

    def __init__(self, path: Path) -> None:
        self._lock = filelock.FileLock(f"{path}.lock", timeout=0, thread_local=False)
        self._holder = Path(f"{path}.lock.pid")
        self._path = path

    def acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise StoreRefused(f"{self._path} is held by another service (pid {self.holder()})") from None
        self._holder.write_text(f"{os.getpid()}\n")

    def holder(self) -> str:
        try:
            return self._holder.read_text().strip() or "unknown"
        except FileNotFoundError:
            return "unknown"

    def release(self) -> None:
        self._holder.unlink(missing_ok=True)
        self._lock.release()


def prepare(path: Path) -> Opened:
    """Bring the file to this code's schema, or refuse it untouched. The lock is held.

    1. A file of another program, or of a newer release, is refused before anything is written.
    2. A file of an older release is backed up beside itself.
    3. The migrations run in one transaction, with foreign keys off, and are checked before its end.
    4. The epoch is renewed if this is not the file that was closed last.
    """
    script = ScriptDirectory.from_config(_alembic(None))
    found = _revision_found(path, script)
    backup = None
    engine = connections.engine(path)
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            if found is not None and found != script.get_current_head():
                backup = _backup(connection, path, found)
            if found != script.get_current_head():
                _migrate(connection)
            epoch = _epoch(connection, path)
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        raise StoreRefused(f"{path}: {error}{_advice(error)}") from error
    except DBAPIError as error:
        raise StoreRefused(f"{path}: {error.orig}{_advice(error.orig)}") from error
    finally:
        engine.dispose()
    disk.sync_folder(path.parent)
    return Opened(epoch=epoch, revision=str(script.get_current_head()), backup=backup)


def _advice(error: BaseException | None) -> str:
    """What to do about a damaged file; nothing about one that is only held or has no room."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ""
    return "; keep the file and those beside it aside, and put a backup in its place"


def migrations_folder() -> Path:
    """Beside `app/` in a checkout, inside it in an installed wheel."""
    beside = Path(__file__).parent.parent / "migrations"
    return beside if beside.is_dir() else Path(__file__).parent / "migrations"


def _alembic(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _revision_found(path: Path, script: ScriptDirectory) -> str | None:
    """The revision of the file, None for a new one. Opens nothing for writing."""
    if not path.exists():
        _require_new(path)
        return None
    if path.stat().st_size == 0:
        return None
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if application == 0 and tables == 0:
                return None
            if application != APPLICATION_ID:
                raise StoreRefused(f"{path} is a database of another program; it was not touched")
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        why = f"{path} cannot be read as a database: {error}{_advice(error)}; it was not touched"
        raise StoreRefused(why) from error
    revision = str(found[0]) if found else None
    if revision not in {known.revision for known in script.walk_revisions()}:
        raise StoreRefused(
            f"{path} was written by a newer release (schema {revision}; this one knows {script.get_current_head()});"
            " it was not touched"
        )
    return revision


def _require_new(path: Path) -> None:
    """A store that was here and is gone must not begin anew without a word, nor its log be thrown away."""
    for left in (_note(path), path.with_name(f"{path.name}-wal")):
        if left.exists():
            raise StoreRefused(
                f"{path} is gone, and {left.name} says that it was here: put it back, or a backup in its place;"
                f" to begin with an empty store, remove {left.name}"
            )


def _backup(connection: Connection, path: Path, revision: str) -> Path:
    """A copy that is whole wherever it has its name; what a death left of another one goes first."""
    draft = path.with_name(f"{path.name}.backup")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.before-{revision}-{stamp}-{secrets.token_hex(2)}")
    _remove_draft(draft)
    try:
        connection.exec_driver_sql("VACUUM INTO ?", (str(draft),))
        disk.sync_file(draft)
        draft.rename(target)
    except BaseException:
        _remove_draft(draft)
        raise
    disk.sync_folder(path.parent)
    log.info("The database was backed up before its migration.", event_id="store.backup", backup=str(target))
    return target


def _remove_draft(draft: Path) -> None:
    for left in (draft, draft.with_name(f"{draft.name}-journal")):
        left.unlink(missing_ok=True)


def _migrate(connection: Connection) -> None:
    # Off outside the transaction, where the pragma counts: rebuilding a parent table would delete
    # its children by cascade.
    connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
    connection.exec_driver_sql("BEGIN EXCLUSIVE")
    command.upgrade(_alembic(connection), "head")
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        connection.exec_driver_sql("ROLLBACK")
        raise StoreRefused(
            f"the migration would leave {len(broken)} rows without their parent; nothing was changed"
        )
    connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
    connection.exec_driver_sql("COMMIT")


def _epoch(connection: Connection, path: Path) -> str:
    """The random id of this history; renewed when the file is not the one that was closed last.

    The note beside the database names its inode, its epoch and the newest position it had: another inode or
    epoch, a file that is behind its note, or one that has none, was put there by hand or from a backup.
    """
    row = connection.exec_driver_sql("SELECT value FROM store_facts WHERE name = 'epoch'").first()
    head = connection.exec_driver_sql("SELECT coalesce(max(position), 0) FROM events").scalar_one()
    note = _read_note(path)
    inode = path.stat().st_ino
    found = str(row[0]) if row is not None else None
    same = note is not None and (note["inode"], note.get("epoch")) == (inode, found)
    if found is not None and note is not None and same and int(str(note["position"])) <= head:
        epoch = found
    else:
        if note is not None and int(str(note["position"])) > head:
            log.warning(
                "The store is older than it was: its newest events are gone. A backup was put back, or its log"
                " was removed.",
                store=str(path),
                event_id="store.went_back",
                events_gone=int(str(note["position"])) - head,
            )
        epoch = secrets.token_hex(8)
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql(
            "INSERT INTO store_facts (name, value) VALUES ('epoch', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (epoch,),
        )
        connection.exec_driver_sql("COMMIT")
    try:
        write_note(path, inode, epoch, head)
    except OSError as error:  # a full disk: an older note is a safe one
        log.warning("The note beside the database could not be written.", why=str(error))
    return epoch


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".note")


def _read_note(path: Path) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(_note(path).read_bytes(), type=dict[str, object])
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_note(path: Path, inode: int | None, epoch: str, position: int) -> None:
    """Leave word beside the database of which file was open, and how far its history had come."""
    told = {"inode": inode, "epoch": epoch, "position": position}
    disk.write_whole(_note(path), msgspec.json.encode(told))
