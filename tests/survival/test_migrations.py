"""A migration that is killed, or that the disk fails, at any call of the start that runs it.

A laboratory whose service was killed, with sessions that ended in every way and one that waits for its operator, is
started by a coming release: this one, and one more migration that makes the table of the sessions anew. Whatever
becomes of that start, the store is the old one or the new one, whole; and the next start makes it the new one, with
a backup of the old one beside it, and every session as it was. What a start does besides, and what sessions do
afterwards, is left to the tests of deaths and errors.
"""

import errno
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from typing import Any, NamedTuple

import pytest
from alembic.script import ScriptDirectory

from app import database
from app.sessions import consistency
from tests.service import ROOT, bare_run, eventually
from tests.survival.knife import AVAILABLE, Call, Verdict
from tests.survival.scenarios import ANSWERS, SCENARIOS, Lab, Operator
from tests.survival.shares import LANES, SEED, SHARE
from tests.survival.stage import START_SECONDS, Life, Stage, staged

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernel of another system decides on no calls")

TRIED = SHARE if SHARE == 1 else SHARE / 3
"""Which part of all points; what a share of one tries takes a quarter of an hour."""
AGAIN = f"SURVIVAL_SHARE={SHARE} SURVIVAL_SEED={SEED} pytest -s tests/survival/test_migrations.py"

HEAD = str(ScriptDirectory(database.migrations_folder()).get_current_head())
COMING = "9999"
MIGRATION = f"""
from alembic import op

revision, down_revision = "{COMING}", "{HEAD}"
AROUND = "type IN ('trigger', 'view') OR (type = 'index' AND tbl_name = 'sessions')"


def upgrade():
    bind = op.get_bind()
    told = "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND"
    kept = bind.exec_driver_sql(f"{{told}} ({{AROUND}})").all()
    [[_, _, old]] = bind.exec_driver_sql(f"{{told}} name = 'sessions'").all()
    columns = ", ".join(row[1] for row in bind.exec_driver_sql("PRAGMA table_info(sessions)"))
    for kind, name, _ in kept:
        bind.exec_driver_sql(f"DROP {{kind}} {{name}}")
    bind.exec_driver_sql(old.replace("sessions (", "coming (room TEXT, ", 1))
    bind.exec_driver_sql(f"INSERT INTO coming (room, {{columns}}) SELECT 'of ' || label, {{columns}} FROM sessions")
    bind.exec_driver_sql("DROP TABLE sessions")
    bind.exec_driver_sql("ALTER TABLE coming RENAME TO sessions")
    for _, _, statement in kept:
        bind.exec_driver_sql(statement)
"""
ENDED = ("project", "plain", "asking", "failing", "cancelled")

VERDICTS: dict[str, Verdict] = {
    "nothing": "go on",
    "death": "die",
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
}


class Point(NamedTuple):
    """What happens to a start, and at which of its calls."""

    fate: str
    call: int


class Trial(NamedTuple):
    """What became of a point: the call that it fell on, whether the start came to its end, and what was wrong."""

    point: Point
    fell: str | None
    started: bool
    calls: int
    wrong: tuple[str, ...]


class Fate:
    """Counts the calls of a start, and has one of them meet its fate."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self.count = 0
        self.fell: str | None = None
        self.over = False

    @property
    def died(self) -> bool:
        return self.fell is not None and self._point.fate == "death"

    def __call__(self, call: Call) -> Verdict:
        if not self.over:
            self.count += 1
        if self.over or self.count != self._point.call or self.fell is not None:
            return "go on"
        self.fell = f"{'' if call.own else 'child '}{call.name} {call.path}"
        return VERDICTS[self._point.fate]


class Read(NamedTuple):
    """What a store holds that a migration must not change, and what is wrong with its file."""

    revision: str
    epoch: str
    rows: dict[str, list[tuple[Any, ...]]]
    faults: list[str]


class Older:
    """A laboratory of this release, as its killed service has left it; it can be had so again and again."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.lab = Lab(folder)
        self.store = self.lab.store
        life = stage.start(self.lab.config)
        assert life.await_ready()
        operator = Operator(self.lab, life)
        for name in ENDED:
            SCENARIOS[name].begin(self.lab).go(operator)
        self.waiting = _asked(operator)
        self.handles = _handles(life)
        life.kill()
        operator.close()
        self._left = {path: path.read_bytes() for path in self.store.parent.iterdir()}
        self.before = _read(self.store)

    def put_back(self) -> None:
        """Every file as it was left, and the same ones: another inode would be another history."""
        for path in set(self.store.parent.iterdir()) - self._left.keys():
            path.unlink()
        for path, data in self._left.items():
            path.write_bytes(data)

    def said(self) -> str:
        """The log of all its services."""
        return Path(f"{self.lab.folder}.log").read_text()

    def backups(self) -> list[Path]:
        return sorted(self.store.parent.glob(f"{self.store.name}.before-*"))

    def strange(self) -> list[str]:
        """What lies beside the store, and neither did before nor is a backup."""
        found = {*self.store.parent.iterdir()} - self._left.keys() - {*self.backups()}
        return sorted(path.name for path in found)


def _asked(operator: Operator) -> str:
    """A session that waits for its operator."""
    body = bare_run("asked", project_short_id=operator.lab.fresh(), run_date="2026-04-17T14:32:05")
    _, handle = operator.post("/sessions", body, "waiting")
    session_id: str = handle["session_id"]
    eventually(lambda: operator.look(session_id)["pending_input"])
    return session_id


def _handles(life: Life) -> list[dict[str, Any]]:
    with life.http() as http:
        told: list[dict[str, Any]] = http.get("/sessions").json()["sessions"]
    return told


def _read(store: Path) -> Read:
    """Of a copy, so that what is only in the log stays there."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (store, store.with_name(f"{store.name}-wal")):
            if path.exists():
                shutil.copyfile(path, Path(folder) / path.name)
        with closing(sqlite3.connect(Path(folder) / store.name)) as db:
            [[revision]] = db.execute("SELECT version_num FROM alembic_version")
            [[epoch]] = db.execute("SELECT value FROM store_facts WHERE name = 'epoch'")
            faults = [fault for [fault] in db.execute("PRAGMA integrity_check") if fault != "ok"]
            return Read(revision, epoch, dict(_rows(db)), faults)


def _rows(db: sqlite3.Connection) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    for table in database.metadata.tables.values():
        if table is not database.store_facts:
            columns = ", ".join(table.columns.keys())
            keys = ", ".join(column.name for column in table.primary_key)
            yield table.name, db.execute(f"SELECT {columns} FROM {table.name} ORDER BY {keys}").fetchall()


# What must hold


def _as_it_was(older: Older, store: Path, *revisions: str) -> Iterator[str]:
    """A store of one of these revisions that holds all that there was."""
    try:
        found = _read(store)
    except sqlite3.Error as error:
        yield f"{store.name} cannot be read: {error}"
        return
    yield from (f"{store.name} is damaged: {fault}" for fault in found.faults)
    if found.revision not in revisions:
        yield f"{store.name} has the schema {found.revision}"
    if found.epoch != older.before.epoch:
        yield f"{store.name} has another epoch, and is the same file"
    for table, rows in older.before.rows.items():
        if found.rows[table] != rows:
            yield f"{store.name} has other rows in {table}: {len(found.rows[table])}, and there were {len(rows)}"


def _served(older: Older, life: Life) -> Iterator[str]:
    found = _handles(life)
    if found != older.handles:
        yield f"the sessions are {found}, and they were {older.handles}"


def _ended(status: int, said: str, fate: Fate) -> Iterator[str]:
    """A start that comes to nothing says why, in one last line."""
    if status == -9 and fate.died:
        return
    last = ([line for line in said.splitlines() if line.strip()] or ["nothing"])[-1]
    if status not in (1, 70) or not last.startswith("exlab-sessions: ") or "Traceback" in said:
        yield f"the start ended with {status}, and its last word was {last!r} of {len(said)} characters"


def _migrated(older: Older) -> Iterator[str]:
    """The new store in order, and nothing beside it but the old one as a backup, whole."""
    yield from _as_it_was(older, older.store, COMING)
    with closing(sqlite3.connect(older.store)) as db:
        rooms = db.execute("SELECT count(*) FROM sessions WHERE room = 'of ' || label").fetchone()[0]
    if rooms != len(older.handles):
        yield f"the migration has reached {rooms} of {len(older.handles)} sessions"
    if not older.backups():
        yield "there is no backup"
    for backup in older.backups():
        yield from _as_it_was(older, backup, HEAD)
    yield from (f"{name} was left over" for name in older.strange())
    yield from older.lab.wrong()


# The trials


@contextmanager
def _bounded(life: Life) -> Iterator[None]:
    """A start that takes for ever is ended, and has no last word."""
    timer = Timer(START_SECONDS, life.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Trials:
    """Starts of the coming release on laboratories of this one, as many beside each other as there are lanes."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self._free: SimpleQueue[Older] = SimpleQueue()
        folders = [folder / f"lab{number}" for number in range(LANES)]
        with staged() as now, ThreadPoolExecutor(LANES) as hands:
            for older in hands.map(lambda each: Older(now, each), folders):
                self._free.put(older)

    def run(self, *fates: str) -> list[Trial]:
        """Some of the points with these fates, or all."""
        calls = self.one(Point("nothing", 0)).calls
        every = [Point(fate, call) for call in range(1, calls + 1) for fate in fates]
        chosen = random.Random(SEED).sample(every, max(1, round(len(every) * TRIED)))
        print(f"\nseed {SEED}: {len(chosen)} of {len(every)} points, at the {calls} calls of a start")
        print(f"the same again: {AGAIN}")
        with ThreadPoolExecutor(LANES) as hands:
            trials = list(hands.map(self.one, chosen))
        fell = Counter(trial.fell.removeprefix("child ").split()[0] for trial in trials if trial.fell)
        print(
            f"{sum(trial.started for trial in trials)} starts came to their end; they were met at {dict(fell)}"
        )
        return trials

    def one(self, point: Point) -> Trial:
        with self.older() as older:
            fate = Fate(point)
            started, wrong = self._first(older, fate)
            wrong += _as_it_was(older, older.store, HEAD, COMING)
            wrong += self._again(older)
        return Trial(point, fate.fell, started, fate.count, tuple(wrong))

    @contextmanager
    def older(self) -> Iterator[Older]:
        """A laboratory that nobody else has, as it was left."""
        one = self._free.get()
        try:
            one.put_back()
            yield one
        finally:
            self._free.put(one)

    def _first(self, older: Older, fate: Fate) -> tuple[bool, list[str]]:
        """Whether the start came to its end, and what was wrong with it."""
        before = len(older.said())
        life = self.stage.start(older.lab.config, decide=fate)
        with _bounded(life):
            started = life.await_ready()
        fate.over = True
        wrong = list(_served(older, life)) if started else []
        status = life.stop() if started else life.end()
        if not started or status != 0:
            wrong += _ended(status, older.said()[before:], fate)
        return started, wrong

    def _again(self, older: Older) -> list[str]:
        """What is wrong after another start."""
        life = self.stage.start(older.lab.config)
        with _bounded(life):
            started = life.await_ready()
        wrong = list(_served(older, life)) if started else ["it does not start again"]
        life.kill()
        return wrong + list(_migrated(older))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of the coming release."""
    root = tmp_path_factory.mktemp("release")
    for part in ("app", "exlab_sessions", "migrations", "tests"):
        shutil.copytree(ROOT / part, root / part)
    (root / "migrations" / "versions" / f"{COMING}_rooms.py").write_text(MIGRATION)
    return root


@pytest.fixture(scope="module")
def trials(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    with staged(release) as stage:
        yield Trials(stage, tmp_path_factory.mktemp("labs"))


@pytest.fixture(autouse=True)
def coming(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own examination knows the schema of the coming release."""
    monkeypatch.setattr(database, "migrations_folder", lambda: release / "migrations")
    made = consistency._made.__wrapped__  # noqa: SLF001
    monkeypatch.setattr("app.sessions.consistency._made", cache(made))


def _failed(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.wrong]


@pytest.mark.slow
def test_a_migration_that_was_killed_anywhere_is_made_by_the_next_start(trials: Trials) -> None:
    tried = trials.run("death")
    assert _failed(tried) == []
    assert all(trial.started == (trial.fell is None) for trial in tried)


@pytest.mark.slow
def test_a_migration_that_the_disk_failed_anywhere_is_made_now_or_by_the_next_start(trials: Trials) -> None:
    tried = trials.run("ENOSPC", "EIO")
    assert _failed(tried) == []
    assert any(trial.fell for trial in tried)


@pytest.mark.slow
def test_a_session_that_waited_before_a_migration_goes_on_after_it(trials: Trials) -> None:
    with trials.older() as older:
        life = trials.stage.start(older.lab.config)
        assert life.await_ready()
        operator = Operator(older.lab, life)
        for _ in ANSWERS:
            prompt = eventually(lambda: operator.look(older.waiting)["pending_input"])
            given = {field["id"]: ANSWERS[field["id"]] for field in prompt["fields"]}
            answer = {"extra_inputs": given, "prompt_id": prompt["prompt_id"]}
            operator.post(f"/sessions/{older.waiting}/resume", answer)
        eventually(lambda: operator.look(older.waiting)["state"] == "done")
        operator.close()
        assert life.stop() == 0
        assert older.lab.wrong() == []
