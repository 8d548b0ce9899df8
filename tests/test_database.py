"""The file of the store: what opening refuses, what a commit promises, and what is done when it cannot be kept.

Most of what is tried here was measured once to go wrong; the docstrings say what.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, insert, select, text, update

from app import connections, database
from app.database import store_facts
from app.errors import StoreBroken, StoreRefused, StoreUnavailable
from app.sessions.lifecycle import State
from app.sessions.requests import RunBody
from app.sessions.session import Query, Session
from app.sessions.store import Store
from tests.conftest import CALLER, SECONDS, rows, run_body, soon, walk

ROOT = Path(__file__).parent.parent

strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
as_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small disk"
)


@pytest.fixture
async def writer(store_path: Path, broken: list[StoreBroken]) -> AsyncIterator[connections.Writer]:
    """A writer of a new store, without the store's verbs on top."""
    database.prepare(store_path)
    writer = connections.Writer(store_path, on_broken=broken.append)
    writer.start()
    yield writer
    await asyncio.to_thread(writer.close)


def fact(name: str, value: str = "x") -> Callable[[Connection], None]:
    """A unit that writes one row."""

    def unit(db: Connection) -> None:
        db.execute(insert(store_facts), {"name": name, "value": value})

    return unit


def facts(path: Path) -> set[str]:
    """The names of the facts that another program finds in the file."""
    return {name for (name,) in rows(path, "SELECT name FROM store_facts")} - {"epoch"}


async def written(writer: connections.Writer, *units: Callable[[Connection], Any]) -> list[Any]:
    """What the units came to, all of them committed in one group."""
    held, go_on = threading.Event(), threading.Event()

    def hold(_: Connection) -> None:
        held.set()
        assert go_on.wait(SECONDS)

    first = asyncio.create_task(writer.write(hold, _ignore))
    assert await asyncio.to_thread(held.wait, SECONDS)
    waiting = [asyncio.create_task(writer.write(unit, _ignore)) for unit in units]
    await asyncio.sleep(0)
    go_on.set()
    await soon(first)
    return await soon(asyncio.gather(*waiting, return_exceptions=True))


def _same(number: int, _: Connection) -> int:
    return number


def _ignore(_: object) -> None:
    """Nobody is to be told."""


@contextmanager
def outside(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program, which does not wait for a lock."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as db:
        yield db


def store_at(path: Path, broken: list[StoreBroken] | None = None) -> Store:
    return Store(f"sqlite:///{path}", on_broken=(broken if broken is not None else []).append)


async def made(path: Path, *, sessions: int = 1) -> str:
    """A store that was closed in good order; its epoch."""
    store = store_at(path)
    opened = await store.open()
    for _ in range(sessions):
        await store.create(run_body(), CALLER)
    await store.close()
    return opened.epoch


async def reopened(path: Path) -> database.Opened:
    store = store_at(path)
    opened = await store.open()
    await store.close()
    return opened


def script(text: str, *arguments: object, tracer: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A program on the store at its first argument, in a process of its own."""
    head = """
        import asyncio, os, sys
        from pathlib import Path
        from app.errors import StoreUnavailable
        from app.sessions.store import Query, Store
        from tests.conftest import CALLER, run_body
        path = Path(sys.argv[1])
        broken = []
        store = Store(f"sqlite:///{path}", on_broken=broken.append)
        def say(text):
            os.write(1, f"{text}\\n".encode())
    """
    program = textwrap.dedent(head) + textwrap.dedent(text)
    return subprocess.Popen(
        [*tracer, sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


HOLD = """
    async def main():
        await store.open()
        session, _ = await store.create(run_body(), CALLER)
        say(session.session_id)
        await asyncio.to_thread(sys.stdin.read)
        await store.close()
    asyncio.run(main())
"""


@contextmanager
def service_elsewhere(path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that has the store open, and the session that it made."""
    process = script(HOLD, path)
    try:
        assert process.stdout is not None
        session_id = process.stdout.readline().strip()
        assert session_id
        yield process, session_id
    finally:
        process.kill()
        process.communicate()


# What a file must be


async def test_a_new_store_says_whose_it_is(store: Store) -> None:
    assert rows(store.path, "PRAGMA application_id") == [(database.APPLICATION_ID,)]
    assert rows(store.path, "PRAGMA journal_mode") == [("wal",)]


@pytest.mark.parametrize("mode", ["delete", "wal"])
async def test_the_database_of_another_program_is_refused_untouched(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "theirs.sqlite3"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute("CREATE TABLE theirs (a)")
    before = path.read_bytes()
    with pytest.raises(StoreRefused, match="another program"):
        await store_at(path).open()
    assert path.read_bytes() == before


async def test_a_newer_schema_is_refused_untouched(store_path: Path, planted: "Plant") -> None:
    planted("op.execute(\"INSERT INTO store_facts (name, value) VALUES ('new', 'x')\")")
    await made(store_path)
    before = store_path.read_bytes()
    planted.remove()
    with pytest.raises(StoreRefused, match=rf"newer release \(schema {COMING}; this one knows {HEAD}\)"):
        await store_at(store_path).open()
    assert store_path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"not a database at all, but long enough for a header" * 50, b"short"])
async def test_a_file_that_is_no_database_is_refused_untouched(store_path: Path, damage: bytes) -> None:
    store_path.write_bytes(damage)
    with pytest.raises(StoreRefused, match="cannot be read as a database"):
        await store_at(store_path).open()
    assert store_path.read_bytes() == damage


async def test_a_truncated_store_is_refused(store_path: Path) -> None:
    await made(store_path)
    os.truncate(store_path, 8192)
    with pytest.raises(StoreRefused):
        await store_at(store_path).open()


async def test_a_refused_store_can_be_opened_once_it_is_mended(store_path: Path) -> None:
    store_path.write_bytes(b"no database")
    store = store_at(store_path)
    with pytest.raises(StoreRefused):
        await store.open()
    store_path.unlink()
    await store.open()
    await store.close()


def test_another_kind_of_database_is_refused() -> None:
    with pytest.raises(StoreRefused, match="must name an SQLite file"):
        Store("postgresql://host/sessions", on_broken=_ignore)


@pytest.mark.parametrize("name", ["a folder", "a#b", "a?b=c&d", "100%25", "Präparate 50°", "it's"])
async def test_the_folder_of_the_store_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "sessions.sqlite3"
    path.parent.mkdir()
    database.prepare(path)
    writer, readers = connections.Writer(path, on_broken=_ignore), connections.Readers(path)
    writer.start()
    await soon(writer.write(fact("here"), _ignore))
    [found] = await readers.all(select(store_facts.c.name).where(store_facts.c.name == "here"))
    assert len(found) == 1
    await readers.close()
    await asyncio.to_thread(writer.close)
    database.prepare(path)
    assert facts(path) == {"here"}
    assert os.listdir(tmp_path) == [name]


async def test_a_closed_store_is_one_file(store_path: Path) -> None:
    await made(store_path)
    beside = {path.name.removeprefix(store_path.name) for path in store_path.parent.iterdir()}
    assert beside - {".lock", ".note"} == {""}


# One service per store


async def test_a_second_service_is_refused_with_the_pid_of_the_first(store_path: Path) -> None:
    with service_elsewhere(store_path) as (process, _), pytest.raises(StoreRefused) as refused:
        await store_at(store_path).open()
    assert f"is held by another service (pid {process.pid})" in str(refused.value)


async def test_a_second_name_of_the_same_file_is_no_second_store(tmp_path: Path, store: Store) -> None:
    (tmp_path / "alias").symlink_to(store.path)
    with pytest.raises(StoreRefused, match="another service"):
        await store_at(tmp_path / "alias").open()


async def test_a_killed_service_leaves_its_store_to_the_next_one(store_path: Path) -> None:
    with service_elsewhere(store_path) as (process, session_id):
        process.send_signal(signal.SIGKILL)
        process.wait()
        store = store_at(store_path)
        await store.open()
        assert (await store.get(session_id)).state is State.VALIDATING
        await store.close()


async def test_a_store_is_free_again_after_its_close(store_path: Path, store: Store) -> None:
    other = store_path.with_name("other.sqlite3")
    first = store_at(other)
    await first.open()
    await first.close()
    with service_elsewhere(other):
        pass


# Migrations


HEAD = str(ScriptDirectory(database.migrations_folder()).get_current_head())
COMING = "9999"


class Plant:
    """Migrations as a coming release would have them: those that are there, and one more."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(database.migrations_folder(), folder)
        self._folder = folder
        self._monkeypatch = monkeypatch

    def __call__(self, upgrade: str) -> None:
        revisions = f'revision = "{COMING}"\ndown_revision = "{HEAD}"'
        head = f"from alembic import op\nimport sqlalchemy as sa\n{revisions}\n"
        body = textwrap.indent(textwrap.dedent(upgrade), "    ")
        text = f"{head}\n\ndef upgrade() -> None:\n{body}\n"
        (self._folder / "versions" / f"{COMING}_planted.py").write_text(text)
        self._monkeypatch.setattr(database, "migrations_folder", lambda: self._folder)

    def remove(self) -> None:
        self._monkeypatch.undo()


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    return Plant(tmp_path / "migrations", monkeypatch)


REBUILD = """
    for view in ("live_sessions", "finished_sessions", "timeline", "open_prompts", "copies"):
        op.execute(f"DROP VIEW {view}")
    for (name,) in op.get_bind().exec_driver_sql("SELECT name FROM sqlite_schema WHERE type = 'trigger'").all():
        op.execute(f"DROP TRIGGER {name}")
    with op.batch_alter_table("sessions", recreate="always") as batch:
        batch.add_column(sa.Column("room", sa.Text))
"""


async def test_an_older_store_is_backed_up_before_it_is_migrated(store_path: Path, planted: Plant) -> None:
    await made(store_path, sessions=3)
    planted('op.execute("ALTER TABLE sessions ADD COLUMN room TEXT")')
    opened = await reopened(store_path)
    assert opened.revision == COMING and opened.backup is not None
    assert rows(store_path, "SELECT count(*) FROM sessions WHERE room IS NULL") == [(3,)]
    assert rows(opened.backup, "SELECT version_num FROM alembic_version") == [(HEAD,)]
    assert rows(opened.backup, "SELECT count(*) FROM sessions") == [(3,)]
    assert rows(opened.backup, "PRAGMA application_id") == [(database.APPLICATION_ID,)]


async def test_a_store_of_this_release_is_not_backed_up(store_path: Path) -> None:
    await made(store_path)
    assert (await reopened(store_path)).backup is None
    assert not [path for path in store_path.parent.iterdir() if "before" in path.name]


async def test_rebuilding_a_parent_table_keeps_its_children(store_path: Path, planted: Plant) -> None:
    """A batch migration of a parent table with foreign keys on deletes the children by cascade."""
    store = store_at(store_path)
    await store.open()
    await walk(store, State.DONE)
    await walk(store, State.INPUT_REQUIRED)
    await store.close()
    children = ("events", "prompts", "snapshots", "copy_jobs", "log_lines")
    count = " UNION ALL ".join(f"SELECT '{table}', count(*) FROM {table}" for table in children)
    before = rows(store_path, count)
    assert all(number > 0 for _, number in before)
    # The children of the real schema have no cascade, but those of a coming one may.
    cascade = """
        op.execute("CREATE TABLE pets (session_id TEXT REFERENCES sessions (session_id) ON DELETE CASCADE)")
        op.execute("INSERT INTO pets SELECT session_id FROM sessions")
    """
    planted(textwrap.dedent(cascade) + textwrap.dedent(REBUILD))
    await reopened(store_path)
    assert rows(store_path, count) == before
    assert rows(store_path, "SELECT count(*) FROM pets") == [(2,)]
    assert rows(store_path, "PRAGMA foreign_key_check") == []


async def test_a_migration_that_leaves_orphans_is_refused_and_undone(
    store_path: Path, planted: Plant
) -> None:
    await made(store_path)
    planted("""
        op.execute("DROP TRIGGER sessions_prune")
        op.execute("DROP TRIGGER sessions_pruned")
        op.execute("DELETE FROM sessions")
    """)
    with pytest.raises(StoreRefused, match="without their parent; nothing was changed"):
        await store_at(store_path).open()
    planted.remove()
    await reopened(store_path)
    assert rows(store_path, "SELECT count(*) FROM sessions") == [(1,)]


async def test_a_migration_that_fails_leaves_the_store_as_it_was(store_path: Path, planted: Plant) -> None:
    await made(store_path)
    planted("""
        op.execute("ALTER TABLE sessions ADD COLUMN room TEXT")
        op.execute("INSERT INTO no_such_table VALUES (1)")
    """)
    with pytest.raises(StoreRefused, match="no_such_table"):
        await store_at(store_path).open()
    assert [path for path in store_path.parent.iterdir() if f".before-{HEAD}-" in path.name]
    planted.remove()
    assert (await reopened(store_path)).revision == HEAD
    assert rows(store_path, "SELECT count(*) FROM pragma_table_info('sessions') WHERE name = 'room'") == [
        (0,)
    ]


# The epoch


async def test_the_epoch_of_a_store_stays(store_path: Path) -> None:
    epoch = await made(store_path)
    assert (await reopened(store_path)).epoch == epoch


async def test_the_epoch_stays_when_the_service_was_killed(store_path: Path) -> None:
    epoch = await made(store_path)
    with service_elsewhere(store_path):
        pass
    assert (await reopened(store_path)).epoch == epoch


async def test_a_store_that_was_exchanged_has_another_epoch(store_path: Path) -> None:
    epoch = await made(store_path)
    shutil.copy(store_path, store_path.with_name("copy"))
    os.replace(store_path.with_name("copy"), store_path)
    renewed = (await reopened(store_path)).epoch
    assert renewed != epoch
    assert (await reopened(store_path)).epoch == renewed


async def test_a_store_that_went_back_to_an_older_copy_has_another_epoch(store_path: Path) -> None:
    await made(store_path)
    shutil.copy(store_path, store_path.with_name("copy"))
    epoch = await made(store_path)
    store_path.write_bytes(store_path.with_name("copy").read_bytes())
    assert (await reopened(store_path)).epoch != epoch


async def test_a_copy_in_another_place_has_another_epoch(store_path: Path) -> None:
    epoch = await made(store_path)
    elsewhere = store_path.with_name("elsewhere.sqlite3")
    shutil.copy(store_path, elsewhere)
    assert (await reopened(elsewhere)).epoch != epoch


async def test_a_store_that_was_exchanged_while_open_has_another_epoch(store_path: Path) -> None:
    broken: list[StoreBroken] = []
    store = store_at(store_path, broken)
    epoch = (await store.open()).epoch
    exchange(store_path)
    with pytest.raises(StoreUnavailable):
        await soon(store.create(run_body(), CALLER))
    await store.close()
    assert broken
    assert (await reopened(store_path)).epoch != epoch


# One writer, many readers


async def test_a_reader_cannot_write(store_path: Path) -> None:
    """Versions up to 3.51.2 can corrupt the file when two connections write or checkpoint at once."""
    database.prepare(store_path)
    readers = connections.Readers(store_path)
    with pytest.raises(StoreUnavailable, match="readonly"):
        await readers.all(update(store_facts).values(value="y"))
    await readers.close()


async def test_a_commit_never_checkpoints_by_itself(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `wal_autocheckpoint` as SQLite has it, any connection checkpoints after 1000 pages."""
    monkeypatch.setattr(connections, "CHECKPOINT_BYTES", 1 << 30)
    database.prepare(store_path)
    small = store_path.stat().st_size
    writer = connections.Writer(store_path, on_broken=_ignore)
    writer.start()
    for number in range(60):
        await writer.write(fact(f"{number}", "x" * 100_000), _ignore)
    assert writer.wal_bytes() > 6_000_000
    assert store_path.stat().st_size == small
    await asyncio.to_thread(writer.close)
    assert store_path.stat().st_size > 6_000_000


async def test_a_log_that_grows_is_folded_into_the_file(writer: connections.Writer, store_path: Path) -> None:
    for number in range(200):
        await writer.write(fact(f"{number}", "x" * 100_000), _ignore)
    assert store_path.stat().st_size > 10_000_000
    assert writer.wal_bytes() < 2 * connections.CHECKPOINT_BYTES


async def test_a_log_that_was_folded_is_not_folded_again_at_each_commit(writer: connections.Writer) -> None:
    """A passive checkpoint leaves the file of the log as long as it was."""
    number = 0
    while writer.wal_bytes() <= connections.CHECKPOINT_BYTES:
        await writer.write(fact(f"large {number}", "x" * 100_000), _ignore)
        number += 1
    await writer.write(fact("small 1"), _ignore)
    await writer.write(fact("small 2"), _ignore)
    assert writer.wal_bytes() <= connections.CHECKPOINT_BYTES


async def test_a_reader_who_stays_does_not_stop_the_writer(
    writer: connections.Writer, store_path: Path
) -> None:
    """One reader that stays open lets the log grow without end; writes must go on, and shrink it after."""
    with closing(sqlite3.connect(store_path, isolation_level=None)) as stays:
        stays.execute("BEGIN")
        stays.execute("SELECT count(*) FROM store_facts").fetchone()
        for number in range(100):
            await soon(writer.write(fact(f"{number}", "x" * 100_000), _ignore))
        assert writer.wal_bytes() > 2 * connections.CHECKPOINT_BYTES
    await writer.write(fact("after"), _ignore)
    await writer.write(fact("and after"), _ignore)
    assert writer.wal_bytes() <= connections.CHECKPOINT_BYTES


async def test_the_live_file_is_opened_by_nobody_but_sqlite(store_path: Path) -> None:
    """Opening and closing the live file in the same process drops SQLite's locks."""
    await made(store_path)
    opened: list[str] = []
    armed = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    try:
        await made(store_path)
    finally:
        armed = False
    live = {str(store_path), f"{store_path}-wal", f"{store_path}-shm"}
    assert opened and not live & set(opened)


TRACED = """
    async def main():
        await store.open()
        say("START")
        for number in range(5):
            session, _ = await store.create(run_body(), CALLER)
            say("ACK")
            await asyncio.gather(*(store.search(Query()) for _ in range(4)))
        say("END")
        await store.close()
    asyncio.run(main())
"""
CALL = re.compile(r"^(?P<pid>\d+) +(?P<call>\w+)\((?P<rest>.*)$")
RESUMED = re.compile(r"^(?P<pid>\d+) +<\.\.\. (?P<call>\w+) resumed>")


def traced(path: Path) -> list[tuple[str, str]]:
    """What a store did to the disk from START to END: (thread, written | synced | acknowledged)."""
    trace = path.with_name("trace")
    calls = "trace=write,pwrite64,fsync,fdatasync,ftruncate"
    process = script(TRACED, path, tracer=("strace", "-f", "-y", "-e", calls, "-o", str(trace)))
    _, errors = process.communicate(timeout=SECONDS * 2)
    assert process.returncode == 0, errors
    done: list[tuple[str, str]] = []
    syncing: set[str] = set()
    for line in trace.read_text().splitlines():
        if resumed := RESUMED.match(line):
            if resumed["pid"] in syncing and "sync" in resumed["call"]:
                syncing.discard(resumed["pid"])
                done.append((resumed["pid"], "synced"))
        elif found := CALL.match(line):
            pid, call, rest = found["pid"], found["call"], found["rest"]
            if call == "write":
                done += [(pid, word) for word in ("START", "ACK", "END") if f'"{word}\\n"' in rest]
            elif "sessions.sqlite3" not in rest:
                continue
            elif call == "pwrite64":
                done.append((pid, "written"))
            elif "unfinished" in rest:
                syncing.add(pid)
            else:
                done.append((pid, "synced"))
    words = [word for _, word in done]
    return done[words.index("START") + 1 : words.index("END")]


@strace
def test_what_was_acknowledged_had_been_synced(store_path: Path) -> None:
    """In a simulated power cut `synchronous=NORMAL` lost 50 of 50 acknowledged commits, `FULL` none."""
    letters = {"written": "w", "synced": "s", "ACK": "a"}
    course = "".join(letters[word] for _, word in traced(store_path))
    assert re.fullmatch(r"(w+s+a){5}", re.sub("(?<=s)(w+s+)+", "", course)), course


@strace
def test_one_thread_does_all_writing(store_path: Path) -> None:
    """Two connections that write or checkpoint at once can corrupt the file."""
    assert len({pid for pid, word in traced(store_path) if word in ("written", "synced")}) == 1


async def test_a_unit_sees_what_it_read_until_it_has_written(
    writer: connections.Writer, store_path: Path
) -> None:
    """A deferred transaction that turns into a write fails at once with BUSY_SNAPSHOT."""
    interference: list[str] = []

    def read_then_write(db: Connection) -> None:
        db.execute(select(func.count()).select_from(store_facts)).scalar_one()
        with outside(store_path) as other:
            try:
                other.execute("INSERT INTO store_facts (name, value) VALUES ('outside', 'x')")
            except sqlite3.OperationalError as error:
                interference.append(str(error))
        fact("inside")(db)

    await soon(writer.write(read_then_write, _ignore))
    assert interference == ["database is locked"]
    assert facts(store_path) == {"inside"}


async def test_a_hundred_increments_at_once_count_to_a_hundred(
    writer: connections.Writer, store_path: Path
) -> None:
    """The default transactions of sqlite3 lose updates: such a counter stood at 2."""
    own = store_facts.c.name == "counter"

    def increment(db: Connection) -> None:
        value = int(db.execute(select(store_facts.c.value).where(own)).scalar_one())
        db.execute(update(store_facts).where(own).values(value=str(value + 1)))

    await writer.write(fact("counter", "0"), _ignore)
    await soon(asyncio.gather(*(writer.write(increment, _ignore) for _ in range(100))))
    assert rows(store_path, "SELECT value FROM store_facts WHERE name = 'counter'") == [("100",)]


async def test_cancelled_readers_leave_nothing_locked(store_path: Path) -> None:
    """A task that was cancelled inside a SELECT left the database locked in 11 of 250 tries."""
    await made(store_path)
    readers = connections.Readers(store_path)
    counting = "WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 5000)"
    slow = text(f"{counting} SELECT n, (SELECT count(*) FROM sessions) FROM c")
    chosen = random.Random(3)
    for _ in range(100):
        reading = asyncio.create_task(readers.all(slow, slow))
        await asyncio.wait({reading}, timeout=chosen.random() / 100)
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled() or not reading.exception()
    assert len((await soon(readers.all(slow)))[0]) == 5000
    with outside(store_path) as other:
        other.execute("INSERT INTO store_facts (name, value) VALUES ('outside', 'x')")
        # It waits for nobody, so it says 1 (busy) while a reader still looks at an older moment.
        async with asyncio.timeout(SECONDS):
            while other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 1:
                await asyncio.sleep(0)
        await readers.close()
        assert other.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)


def test_a_process_whose_readers_were_cancelled_ends(store_path: Path) -> None:
    process = script(
        """
        async def main():
            await store.open()
            await store.create(run_body(), CALLER)
            tasks = [asyncio.create_task(store.search(Query())) for _ in range(30)]
            for task in tasks:
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait(tasks)
            await store.close()
            say("closed")
        asyncio.run(main())
        """,
        store_path,
    )
    output, errors = process.communicate(timeout=SECONDS)
    assert (output, errors, process.returncode) == ("closed\n", "", 0)
    assert not store_path.with_name(store_path.name + "-wal").exists()


async def test_two_hundred_readers_at_once_are_all_answered(store_path: Path) -> None:
    await made(store_path, sessions=5)
    readers = connections.Readers(store_path)
    page = select(database.sessions)
    found = await soon(asyncio.gather(*(readers.all(page, page) for _ in range(200))))
    assert all(len(first) == len(second) == 5 for first, second in found)
    await readers.close()


async def test_the_statements_of_one_read_see_one_moment(
    writer: connections.Writer, store_path: Path
) -> None:
    readers = connections.Readers(store_path)
    count = select(func.count()).select_from(store_facts)
    writing = [asyncio.create_task(writer.write(fact(f"{number}"), _ignore)) for number in range(200)]
    while not all(task.done() for task in writing):
        [[before], *_, [after]] = await readers.all(count, *(count,) * 5)
        assert before == after
    await readers.close()


# Groups


async def test_what_waits_at_the_same_time_is_committed_together(
    writer: connections.Writer, store_path: Path
) -> None:
    """32 sessions at once: 2.2 k/s in groups, 65 one by one."""
    await written(writer, *(fact(f"{number}") for number in range(32)))
    assert writer.units == 33
    assert writer.commits == 2
    assert len(facts(store_path)) == 32


async def test_a_large_crowd_is_committed_in_groups(writer: connections.Writer) -> None:
    await soon(
        asyncio.gather(
            *(writer.write(fact(f"{number}"), _ignore) for number in range(3 * connections.GROUP_LIMIT))
        )
    )
    assert writer.commits < 100


async def test_a_refused_unit_does_not_hurt_its_neighbours(
    writer: connections.Writer, store_path: Path
) -> None:
    def fails_late(db: Connection) -> None:
        fact("half done")(db)
        raise LookupError("no such thing")

    outcomes = await written(writer, fact("a"), fact("a"), fails_late, fact("b"))
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "NoneType",
        "IntegrityError",
        "LookupError",
        "NoneType",
    ]
    assert facts(store_path) == {"a", "b"}
    assert writer.commits == 2


async def test_a_unit_that_a_trigger_refuses_is_refused_alone(
    writer: connections.Writer, store_path: Path
) -> None:
    def illegal(db: Connection) -> None:
        fact("before the trigger")(db)
        db.exec_driver_sql("DELETE FROM edges")

    outcomes = await written(writer, fact("a"), illegal, fact("b"))
    assert "part of the schema" in str(outcomes[1])
    assert facts(store_path) == {"a", "b"}


async def test_a_group_is_told_of_in_the_order_of_its_commit(writer: connections.Writer) -> None:
    told: list[int] = []
    units = [partial(_same, number) for number in range(500)]
    await soon(asyncio.gather(*(writer.write(unit, told.append) for unit in units)))
    assert told == list(range(500))


async def test_a_caller_who_is_cancelled_undoes_nothing(writer: connections.Writer, store_path: Path) -> None:
    held, go_on = threading.Event(), threading.Event()

    def slow(db: Connection) -> None:
        held.set()
        assert go_on.wait(SECONDS)
        fact("slow")(db)

    task = asyncio.create_task(writer.write(slow, _ignore))
    assert await asyncio.to_thread(held.wait, SECONDS)
    task.cancel()
    await asyncio.wait({task})
    go_on.set()
    await soon(writer.write(fact("next"), _ignore))
    assert facts(store_path) == {"slow", "next"}


async def test_who_writes_after_the_close_is_refused(store_path: Path) -> None:
    database.prepare(store_path)
    writer = connections.Writer(store_path, on_broken=_ignore)
    writer.start()
    waiting = [asyncio.create_task(writer.write(fact(f"{number}"), _ignore)) for number in range(5)]
    await asyncio.sleep(0)
    await asyncio.to_thread(writer.close)
    await soon(asyncio.gather(*waiting))
    with pytest.raises(StoreUnavailable):
        await soon(writer.write(fact("late"), _ignore))
    assert len(facts(store_path)) == 5


# What passes


def limit_pages(extra: int) -> Callable[[Connection], None]:
    """A unit after which the file may grow by `extra` pages only."""

    def unit(db: Connection) -> None:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar_one()
        db.exec_driver_sql(f"PRAGMA max_page_count={pages + extra}")

    return unit


async def test_a_full_disk_abandons_the_whole_group(
    writer: connections.Writer, store_path: Path, broken: list[StoreBroken]
) -> None:
    """After SQLITE_FULL the transaction is rolled back, and the next statement runs in autocommit."""
    await writer.write(limit_pages(3), _ignore)
    outcomes = await written(writer, fact("before"), fact("large", "x" * 1_000_000), fact("after"))
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 3
    assert facts(store_path) == set()
    await writer.write(limit_pages(1000), _ignore)
    assert await written(writer, fact("healed")) == [None]
    assert facts(store_path) == {"healed"}
    assert broken == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(ballast: Path) -> None:
    """Write to `ballast` until the disk takes no more."""
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


async def until_refused(store: Store, body: RunBody, kept: list[Session]) -> None:
    while True:
        session, _ = await soon(store.create(body, CALLER))
        kept.append(session)


@as_root
async def test_a_full_disk_refuses_writes_and_keeps_reading_until_there_is_room(small_disk: Path) -> None:
    broken: list[StoreBroken] = []
    store = store_at(small_disk / "sessions.sqlite3", broken)
    await store.open()
    kept = [(await store.create(run_body(), CALLER))[0]]
    fill(small_disk / "ballast")
    large = run_body(variables={"notes": "x" * 20_000})
    with pytest.raises(StoreUnavailable, match="full"):
        await until_refused(store, large, kept)
    found, _ = await soon(store.search(Query(limit=1000)))
    assert {session.session_id for session in found} == {session.session_id for session in kept}
    with pytest.raises(StoreUnavailable):
        await soon(store.create(large, CALLER))
    (small_disk / "ballast").unlink()
    kept.append((await soon(store.create(large, CALLER)))[0])
    assert await store.frames_after(kept[-1].session_id, 0, 10)
    await store.close()
    assert broken == []
    assert rows(store.path, "PRAGMA integrity_check") == [("ok",)]
    assert rows(store.path, "SELECT count(*) FROM sessions") == [(len(kept),)]


async def test_a_lock_from_outside_is_waited_for(
    writer: connections.Writer, store_path: Path, broken: list[StoreBroken]
) -> None:
    with outside(store_path) as other:
        other.execute("BEGIN IMMEDIATE")
        task = asyncio.create_task(writer.write(fact("patient"), _ignore))
        assert (await asyncio.wait({task}, timeout=0.5))[1] == {task}
        other.execute("ROLLBACK")
    await soon(writer.write(fact("next"), _ignore))
    await task
    assert broken == []
    assert facts(store_path) == {"patient", "next"}


async def test_a_lock_that_stays_refuses_writes_and_heals(store_path: Path) -> None:
    broken: list[StoreBroken] = []
    store = store_at(store_path, broken)
    await store.open()
    session, _ = await store.create(run_body(), CALLER)
    with outside(store_path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await soon(store.create(run_body(), CALLER))
        assert await store.get(session.session_id) == session
        other.execute("ROLLBACK")
    await soon(store.create(run_body(), CALLER))
    assert await store.counts() == {"validating": 2, "partial": 0, "blocked": 0}
    await store.close()
    assert broken == []


# What does not pass


def unlink(path: Path) -> None:
    path.unlink()


def exchange(path: Path) -> None:
    """Put a copy that holds the same in the place of the file."""
    copy = path.with_name("copy")
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM INTO ?", (str(copy),))
    copy.replace(path)


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lose_the_folder(path: Path) -> None:
    """The folder of the store is away, and a file stands where it was."""
    path.parent.rename(path.parent.with_name("away"))
    path.parent.write_bytes(b"")


@pytest.mark.parametrize("mishap", [unlink, exchange, move, make_a_folder, lose_the_folder])
async def test_a_file_that_is_not_in_its_place_takes_no_write(
    tmp_path: Path, mishap: Callable[[Path], None]
) -> None:
    """An unlinked or replaced file takes writes happily, and they vanish."""
    broken: list[StoreBroken] = []
    path = tmp_path / "state" / "sessions.sqlite3"
    path.parent.mkdir()
    database.prepare(path)
    writer = connections.Writer(path, on_broken=broken.append)
    writer.start()
    await writer.write(fact("before"), _ignore)
    mishap(path)
    outcomes = await soon(
        asyncio.gather(
            writer.write(fact("a"), _ignore), writer.write(fact("b"), _ignore), return_exceptions=True
        )
    )
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * 2
    with pytest.raises(StoreUnavailable, match="broken"):
        await soon(writer.write(fact("c"), _ignore))
    assert len(broken) == 1 and "moved, deleted or replaced" in str(broken[0])
    await asyncio.to_thread(writer.close)


async def test_a_broken_store_can_be_closed_and_is_free(store_path: Path) -> None:
    store = store_at(store_path)
    await store.open()
    exchange(store_path)
    with pytest.raises(StoreUnavailable):
        await soon(store.create(run_body(), CALLER))
    await store.close()
    await reopened(store_path)


async def test_a_store_that_is_gone_is_not_begun_anew_without_a_word(store_path: Path) -> None:
    store = store_at(store_path)
    await store.open()
    await store.create(run_body(), CALLER)
    await store.close()
    aside = store_path.rename(store_path.with_name("aside"))
    with pytest.raises(StoreRefused, match=r"is gone, and .*note says that it was here: put it back"):
        database.prepare(store_path)
    assert not store_path.exists()
    aside.rename(store_path)
    await reopened(store_path)


FAILING_SYNCS = """
    async def main():
        await store.open()
        kept = []
        try:
            for _ in range(200):
                kept.append((await store.create(run_body(), CALLER))[0].session_id)
        except StoreUnavailable:
            pass
        try:
            await store.create(run_body(), CALLER)
            again = "written"
        except StoreUnavailable:
            again = "refused"
        import json
        say(json.dumps({"kept": kept, "again": again, "broken": [str(error) for error in broken]}))
        os._exit(0)
    asyncio.run(main())
"""


@strace
async def test_a_failed_sync_stops_the_store_at_once(store_path: Path) -> None:
    await made(store_path)
    # The calls are counted by thread; opening needs some of them, in a thread of its own.
    fault = "inject=fdatasync,fsync:error=EIO:when=50+"
    trace = ("strace", "-f", "-e", "trace=fdatasync,fsync", "-e", fault, "-o", "/dev/null")
    output, errors = script(FAILING_SYNCS, store_path, tracer=trace).communicate(timeout=SECONDS * 2)
    assert output, errors
    said = json.loads(output)
    assert 10 < len(said["kept"]) < 200
    assert said["again"] == "refused"
    assert len(said["broken"]) == 1 and "disk I/O error" in said["broken"][0]
    await reopened(store_path)
    stored = {session_id for (session_id,) in rows(store_path, "SELECT session_id FROM sessions")}
    assert set(said["kept"]) <= stored
