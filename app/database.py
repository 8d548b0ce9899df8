"""The SQLite file of the store: how it is opened, guarded, migrated, written and read.

It promises one writer: a thread with the only connection that writes or checkpoints, which commits what
waits at the same time with one sync to disk, and answers nobody before. Readers are read-only. What is
particular to SQLite stands here and in the migrations; what a session is stands in `sessions/store.py`.
"""

import asyncio
import os
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
import msgspec
import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Executable,
    Integer,
    MetaData,
    Row,
    Table,
    Text,
    create_engine,
    event,
    make_url,
    pool,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app import disk
from app.errors import StoreBroken, StoreRefused, StoreUnavailable

log = structlog.get_logger()

APPLICATION_ID = 0x45584C53
"""The four bytes "EXLS" in the header of every database of this service."""

BUSY_MS = 5000
CHECKPOINT_BYTES = 4 * 1024 * 1024
GROUP_LIMIT = 256

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
    " cancel_requested_at cancel partial_path sync_status error result retry_of principal trace_id request pinned",
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

T = TypeVar("T")


class Unit(NamedTuple):
    """What one caller wants written: run in a savepoint, `committed` called once it is on disk."""

    run: Callable[[Connection], Any]
    committed: Callable[[Any], None]
    future: Future[Any]


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
    engine = _engine(path)
    try:
        with engine.connect() as connection:
            _sql(connection, "PRAGMA journal_mode=WAL")
            if found is not None and found != script.get_current_head():
                backup = _backup(connection, path, found)
            if found != script.get_current_head():
                _migrate(connection)
            epoch = _epoch(connection, path)
            _sql(connection, "PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        raise StoreRefused(f"{path}: {error}") from error
    except DBAPIError as error:
        raise StoreRefused(f"{path}: {error.orig}") from error
    finally:
        engine.dispose()
    disk.sync_folder(path.parent)
    return Opened(epoch=epoch, revision=str(script.get_current_head()), backup=backup)


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
    if not path.exists() or path.stat().st_size == 0:
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
        raise StoreRefused(f"{path} cannot be read as a database: {error}; it was not touched") from error
    revision = str(found[0]) if found else None
    if revision not in {known.revision for known in script.walk_revisions()}:
        raise StoreRefused(
            f"{path} was written by a newer release (schema {revision}; this one knows {script.get_current_head()});"
            " it was not touched"
        )
    return revision


def _backup(connection: Connection, path: Path, revision: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.before-{revision}-{stamp}-{secrets.token_hex(2)}")
    connection.exec_driver_sql("VACUUM INTO ?", (str(target),))
    disk.sync_file(target)
    disk.sync_folder(path.parent)
    log.info("The database was backed up before its migration.", event_id="store.backup", backup=str(target))
    return target


def _migrate(connection: Connection) -> None:
    # Off outside the transaction, where the pragma counts: rebuilding a parent table would delete
    # its children by cascade.
    _sql(connection, "PRAGMA foreign_keys=OFF")
    _sql(connection, "BEGIN EXCLUSIVE")
    command.upgrade(_alembic(connection), "head")
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        _sql(connection, "ROLLBACK")
        raise StoreRefused(
            f"the migration would leave {len(broken)} rows without their parent; nothing was changed"
        )
    _sql(connection, f"PRAGMA application_id={APPLICATION_ID}")
    _sql(connection, "COMMIT")


def _epoch(connection: Connection, path: Path) -> str:
    """The random id of this history; renewed when the file is not the one that was closed last.

    The note beside the database names its inode and the newest position it had: another inode, a file that
    is behind its note, or one that has none, was put there by hand or from a backup.
    """
    row = connection.exec_driver_sql("SELECT value FROM store_facts WHERE name = 'epoch'").first()
    head = connection.exec_driver_sql("SELECT coalesce(max(position), 0) FROM events").scalar_one()
    note = _read_note(path)
    inode = path.stat().st_ino
    same = note is not None and note["inode"] == inode and int(str(note["position"])) <= head
    if row is not None and same:
        epoch = str(row[0])
    else:
        epoch = secrets.token_hex(8)
        _sql(connection, "BEGIN IMMEDIATE")
        connection.exec_driver_sql(
            "INSERT INTO store_facts (name, value) VALUES ('epoch', ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (epoch,),
        )
        _sql(connection, "COMMIT")
    try:
        write_note(path, inode, head)
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


def write_note(path: Path, inode: int | None, position: int) -> None:
    """Leave word beside the database of which file was open, and how far it had come."""
    disk.write_whole(_note(path), msgspec.json.encode({"inode": inode, "position": position}))


def _engine(path: Path) -> Engine:
    """A synchronous engine whose connections say BEGIN and COMMIT themselves."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=pool.NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"timeout": BUSY_MS / 1000},
    )
    event.listen(engine, "connect", _write_pragmas)
    return engine


_WRITING = (
    "synchronous=FULL",
    "foreign_keys=ON",
    "wal_autocheckpoint=0",
    # A log that was folded in is cut to this size, so that its size tells how much there is to fold in.
    f"journal_size_limit={CHECKPOINT_BYTES}",
    f"busy_timeout={BUSY_MS}",
)
_READING = ("query_only=ON", "wal_autocheckpoint=0", f"busy_timeout={BUSY_MS}")


def _write_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in _WRITING:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _read_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in _READING:
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _sql(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)


class Readers:
    """Read-only connections for listing, searching and history pages."""

    def __init__(self, path: Path) -> None:
        self._engine: AsyncEngine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(path)),
            isolation_level="AUTOCOMMIT",
            pool_size=4,
            max_overflow=4,
        )
        event.listen(self._engine.sync_engine, "connect", _read_pragmas)
        self._reading: set[asyncio.Task[list[Sequence[Row[Any]]]]] = set()
        self._closed = False

    async def all(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        """The rows of each statement, all of them seen in one snapshot.

        In a task of its own: a caller that is cancelled leaves the connection in order.
        """
        if self._closed:
            raise StoreUnavailable("the store is closed")
        reading = asyncio.create_task(self._all(statements))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return await asyncio.shield(reading)

    async def _all(self, statements: tuple[Executable, ...]) -> list[Sequence[Row[Any]]]:
        try:
            async with self._engine.connect() as connection:
                if len(statements) == 1:
                    return [(await connection.execute(statements[0])).all()]
                await connection.exec_driver_sql("BEGIN DEFERRED")
                try:
                    return [(await connection.execute(statement)).all() for statement in statements]
                finally:
                    await connection.exec_driver_sql("ROLLBACK")
        except DBAPIError as error:
            raise StoreUnavailable(f"the database cannot be read now: {error.orig}") from error

    async def close(self) -> None:
        """Let what is being read come to its end, also for callers that have gone."""
        self._closed = True
        await asyncio.gather(*self._reading, return_exceptions=True)
        await self._engine.dispose()


class Writer:
    """The thread with the only writing connection; what waits at the same time is committed together."""

    def __init__(self, path: Path, *, on_broken: Callable[[StoreBroken], None]) -> None:
        self._path = path
        self._on_broken = on_broken
        self._waiting: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._log_identity: tuple[int, int] | None = None
        self._broken: StoreBroken | None = None
        self._door = threading.Lock()
        self._closed = False
        self.commit_seconds = 0.0
        self.commits = 0
        self.units = 0

    def start(self) -> None:
        self._identity = _identity(self._path)
        self._connection = _engine(self._path).connect()
        self._thread.start()

    async def write(self, run: Callable[[Connection], T], committed: Callable[[T], None]) -> T:
        """Run `run` in a savepoint of the next group; returns when the group is on disk.

        `committed` gets the result, in the writer's thread and in the order of the commits. Raises what
        `run` raised, its writes undone; StoreUnavailable when the group could not be committed. A caller
        that is cancelled undoes nothing.
        """
        if self._broken is not None:
            raise StoreUnavailable("the store is broken and the service is stopping")
        future: Future[T] = Future()
        with self._door:  # nothing may wait behind the end, where nobody comes for it
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._waiting.put(Unit(run, committed, future))
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """Let what waits be committed, fold the log into the file, and end the thread."""
        with self._door:
            self._closed = True
            self._waiting.put(None)
        self._thread.join()

    @property
    def inode(self) -> int | None:
        """Of the file that is open, whatever stands in its place by now."""
        return self._identity[1] if self._identity else None

    def wal_bytes(self) -> int:
        try:
            return os.stat(f"{self._path}-wal").st_size
        except OSError:
            return 0

    def _run(self) -> None:
        going_on = True
        while going_on:
            group, going_on = self._next_group()
            if group:
                self._settle(group)
            if going_on and self.wal_bytes() > CHECKPOINT_BYTES:
                self._checkpoint("PASSIVE")
        if self._broken is None:
            self._checkpoint("TRUNCATE")
        self._connection.close()

    def _next_group(self) -> tuple[list[Unit], bool]:
        group = []
        entry = self._waiting.get()
        while entry is not None:
            group.append(entry)
            if len(group) == GROUP_LIMIT:
                return group, True
            try:
                entry = self._waiting.get_nowait()
            except queue.Empty:
                return group, True
        return group, False

    def _settle(self, group: list[Unit]) -> None:
        try:
            if self._broken is not None:
                raise StoreUnavailable("the store is broken and the service is stopping")
            outcomes = self._commit(group)
        except StoreUnavailable as unavailable:
            outcomes = [(None, unavailable)] * len(group)
        except StoreBroken as broken:
            self._broken = broken
            self._on_broken(broken)
            refused = StoreUnavailable("the store is broken and the service is stopping")
            outcomes = [(None, refused)] * len(group)
        for unit, (value, error) in zip(group, outcomes, strict=True):
            if error is not None:
                unit.future.set_exception(error)
            else:
                unit.committed(value)
                unit.future.set_result(value)

    def _commit(self, group: list[Unit]) -> list[tuple[Any, Exception | None]]:
        if _identity(self._path) != self._identity:
            raise StoreBroken(f"{self._path} was moved, deleted or replaced while the service ran")
        if self._log_identity is not None and _identity(f"{self._path}-wal") != self._log_identity:
            raise StoreBroken(f"{self._path}-wal was moved, deleted or replaced while the service ran")
        started = time.perf_counter()
        try:
            _sql(self._connection, "BEGIN IMMEDIATE")
            outcomes = [self._attempt(unit) for unit in group]
            _sql(self._connection, "COMMIT")
        except DBAPIError as error:
            self._abandon()
            raise _translated(error) from error
        self.commit_seconds += time.perf_counter() - started
        if self._log_identity is None:
            self._log_identity = _identity(f"{self._path}-wal")
        self.commits += 1
        self.units += len(group)
        return outcomes

    def _attempt(self, unit: Unit) -> tuple[Any, Exception | None]:
        """The result of one unit, or what it raised, with its own writes undone."""
        _sql(self._connection, "SAVEPOINT unit")
        outcome: tuple[Any, Exception | None]
        try:
            outcome = unit.run(self._connection), None
        except DBAPIError as error:
            if not _is_refusal(error):
                raise
            outcome = None, error
        except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it
            outcome = None, error
        if outcome[1] is not None:
            _sql(self._connection, "ROLLBACK TO unit")
        _sql(self._connection, "RELEASE unit")
        return outcome

    def _abandon(self) -> None:
        # A full disk has rolled the transaction back already; then there is nothing to undo, and the
        # next statement would run by itself.
        raw = self._connection.connection.dbapi_connection
        if isinstance(raw, sqlite3.Connection) and raw.in_transaction:
            raw.rollback()

    def _checkpoint(self, mode: str) -> None:
        try:
            _sql(self._connection, f"PRAGMA wal_checkpoint({mode})")
        except DBAPIError as error:
            translated = _translated(error)
            if isinstance(translated, StoreBroken):
                self._broken = translated
                self._on_broken(translated)


def _identity(path: Path | str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


_PASSING_CODES = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
    }
)


def _primary_code(error: DBAPIError) -> int:
    return int(getattr(error.orig, "sqlite_errorcode", 0)) & 0xFF


def _is_refusal(error: DBAPIError) -> bool:
    """A constraint or a trigger said no: the unit's own affair, its neighbours go on."""
    return _primary_code(error) in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG)


def _translated(error: DBAPIError) -> StoreUnavailable | StoreBroken:
    code = _primary_code(error)
    if code in _PASSING_CODES:
        return StoreUnavailable(f"the database cannot take a write now: {error.orig}")
    return StoreBroken(f"the database failed: {error.orig}")
