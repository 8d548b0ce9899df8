"""The connections to the store's file while a service runs: one that writes, and those that read.

It promises one writer: a thread with the only connection that writes or checkpoints, which commits what
waits at the same time with one sync to disk, and answers nobody before. A database that may be lying is
broken for good and said to be so, once; one that cannot take a write now refuses and heals. Readers are
read-only. The file itself, before and after, is the affair of `database.py`.
"""

import asyncio
import os
import queue
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import structlog
from sqlalchemy import URL, Connection, Engine, Executable, Row, create_engine, event, pool
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app import disk
from app.errors import StoreBroken, StoreUnavailable

log = structlog.get_logger()

BUSY_MS = 5000
CHECKPOINT_BYTES = 4 * 1024 * 1024
GROUP_LIMIT = 256

T = TypeVar("T")


class Unit(NamedTuple):
    """What one caller wants written: run in a savepoint, `committed` called once it is on disk."""

    run: Callable[[Connection], Any]
    committed: Callable[[Any], None]
    future: Future[Any]


def engine(path: Path) -> Engine:
    """A synchronous engine whose connections may write, and say BEGIN and COMMIT themselves."""
    writing = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=pool.NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"timeout": BUSY_MS / 1000},
    )
    event.listen(writing, "connect", _write_pragmas)
    return writing


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
        except PoolTimeout as error:
            raise StoreUnavailable("too much of the database is being read at once") from error

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
        try:
            self._connection = engine(self._path).connect()
        except DBAPIError as error:
            raise StoreUnavailable(f"{self._path} cannot be opened now: {error.orig}") from error
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
            self._put_back_log()
            raise StoreBroken(f"{self._path}-wal was moved, deleted or replaced while the service ran")
        started = time.perf_counter()
        try:
            self._connection.exec_driver_sql("BEGIN IMMEDIATE")
            outcomes = [self._attempt(unit) for unit in group]
            self._connection.exec_driver_sql("COMMIT")
        except DBAPIError as error:
            self._abandon()
            raise _translated(error) from error
        self.commit_seconds += time.perf_counter() - started
        if self._log_identity is None:
            self._log_identity = _identity(f"{self._path}-wal")
        self.commits += 1
        self.units += len(group)
        return outcomes

    def _put_back_log(self) -> None:
        """Give a log that was deleted, and is still open here, a copy under its name, for the next start to recover.

        Not in the place of another log; an empty one is made by any reader that comes. It is not folded into the
        file: where that stopped halfway, nothing would be left that it could be done again from. Only Linux still
        shows what has no name.
        """
        place = Path(f"{self._path}-wal")
        try:
            if place.exists() and place.stat().st_size:
                return
            opened = Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ()
            held = next((each for each in opened if _identity(each) == self._log_identity), None)
            if held is not None:
                disk.write_whole(place, held.read_bytes())
                disk.sync_folder(place.parent)
        except OSError as error:
            log.error("The deleted log could not be put back.", why=str(error))

    def _attempt(self, unit: Unit) -> tuple[Any, Exception | None]:
        """The result of one unit, or what it raised, with its own writes undone."""
        self._connection.exec_driver_sql("SAVEPOINT unit")
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
            self._connection.exec_driver_sql("ROLLBACK TO unit")
        self._connection.exec_driver_sql("RELEASE unit")
        return outcome

    def _abandon(self) -> None:
        # A full disk has rolled the transaction back already; then there is nothing to undo, and the
        # next statement would run by itself.
        raw = self._connection.connection.dbapi_connection
        if isinstance(raw, sqlite3.Connection) and raw.in_transaction:
            raw.rollback()

    def _checkpoint(self, mode: str) -> None:
        try:
            self._connection.exec_driver_sql(f"PRAGMA wal_checkpoint({mode})")
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
