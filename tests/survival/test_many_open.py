"""A thousand open sessions: the service is ready at once, and takes up all that a dead one was driving.

Nine hundred wait for an answer; a hundred stand where the death of a service left them, in four states, with the
folders that they had by then.
"""

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from app.main import House
from app.sessions.lifecycle import State
from app.sessions.pipeline import Pipeline
from app.sessions.plugin_pass import PluginPass
from app.sessions.requests import RunBody
from app.sessions.store import Store
from app.settings import ConfigFile
from tests.conftest import lead_to, run_body
from tests.house import CALLER
from tests.service import Service, bare_run, eventually, plugin, template
from tests.survival.test_faults import made

pytestmark = pytest.mark.sweep

WAITING = 900
DRIVEN = 100
STATES = (State.RENDERING, State.PLUGIN_PASS, State.CACHE_WRITE, State.SYNC_QUEUED)
READY_SECONDS = 3.0
TAKEN_UP_SECONDS = 10.0
STARTS = 2


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a laboratory whose service has died among its sessions, kept beside to be put back."""
    folder = tmp_path_factory.mktemp("crowd")
    config = made(folder / "lab")
    marks = "def transform(self, file_path, ctx):\n    file_path.write_text('through')\n"
    plugin(config.parent, "marks", marks)
    template(config.parent, "marked", {"one.txt": "1"}, _exlab_plugins=["marks"])
    asyncio.run(_died(config))
    shutil.copytree(config.parent, folder / "kept", symlinks=True)
    return config


async def _died(config: Path) -> None:
    house = House(ConfigFile(config), held=True)
    async with house.living():
        await asyncio.gather(*(_waiting(house.store) for _ in range(WAITING)))
        left = asyncio.Semaphore(8)

        async def leave(number: int) -> None:
            async with left:
                await _left_in(house, STATES[number % len(STATES)], number)

        await asyncio.gather(*(leave(number) for number in range(DRIVEN)))
        counts = await house.store.counts()
        counts = {state: counts.get(state, 0) for state in STATES}
    assert [counts[state] for state in STATES] == [DRIVEN // len(STATES)] * len(STATES), counts


async def _waiting(store: Store) -> None:
    session, _ = await store.create(run_body(), CALLER)
    way = (State.RENDERING, State.PLUGIN_PASS, State.INPUT_REQUIRED)
    await store.record(session, *(lead_to(state) for state in way))


async def _left_in(house: House, goal: State, number: int) -> None:
    """Drive a session by the real steps until it stands in `goal`, and let it lie."""
    name = "marked" if goal is State.PLUGIN_PASS else "plain"
    asked = bare_run(name, run_date=f"2026-04-17T{number // 60:02}:{number % 60:02}:00")
    session, _ = await house.store.create(msgspec.convert(asked, type=RunBody), CALLER)
    plugins = PluginPass(house.store, house.plugins, house.config)
    road = Pipeline(house.store, house.renderer, plugins, house.config).drive(session)
    async for step in road:
        if step.state is goal:
            break
        assert not step.terminal, step.error
    await road.aclose()


@pytest.fixture
def lab(crowded: Path) -> Path:
    """As the dead service left it, at the place where it was."""
    shutil.rmtree(crowded.parent)
    shutil.copytree(crowded.parent.parent / "kept", crowded.parent, symlinks=True)
    return crowded


class Took(NamedTuple):
    """Seconds until the ready line: by the clock on the wall, and of the processor, which no neighbour lengthens."""

    wall: float
    processor: float


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def started(config: Path) -> Iterator[tuple[Service, Took]]:
    """A service, and what it took until its ready line."""
    before = time.monotonic()
    service = Service(config)
    took = Took(time.monotonic() - before, _cpu_seconds(service.process.pid))
    try:
        assert service.ready, service.errors.read_text()
        yield service, took
    finally:
        service.kill()


def test_a_thousand_open_sessions_do_not_hold_up_the_ready_line(lab: Path, tmp_path: Path) -> None:
    empty, full = list[Took](), list[Took]()
    bare = made(tmp_path / "bare")
    for number in range(STARTS):
        with started(bare) as (service, took):
            empty.append(took)
            assert number or service.stop() == 0
        with started(lab) as (service, took), service.http() as http:
            full.append(took)
            for path in ("/ready", "/sessions?limit=200", "/operations", "/health"):
                before = time.monotonic()
                assert http.get(path).status_code == 200
                print(f"\n{path} answered after {time.monotonic() - before:.2f} s", end="")
        shutil.rmtree(lab.parent)
        shutil.copytree(lab.parent.parent / "kept", lab.parent, symlinks=True)
    for what, those in (("an empty store", empty), (f"{WAITING + DRIVEN} open sessions", full)):
        told = ", ".join(f"{took.wall:.2f} s ({took.processor:.2f} s of processor)" for took in those)
        print(f"\nready with {what} after {told}", end="")
    assert min(took.processor for took in full) < READY_SECONDS
    # On a machine with nothing else to do, that is all it takes; on a busy one, an empty store takes as long.
    quickest = min(took.wall for took in full)
    assert quickest < max(READY_SECONDS, min(took.wall for took in empty) + 1)


def test_a_thousand_open_sessions_are_all_taken_up_in_time_and_those_that_can_end_do(lab: Path) -> None:
    store = lab.parent / "state" / "sessions.sqlite3"
    with started(lab), closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as db:
        up = time.monotonic()

        def counted(statement: str) -> int:
            return int(db.execute(f"SELECT count(*) {statement}").fetchone()[0])

        eventually(lambda: counted("FROM events WHERE kind = 'recovered'") == DRIVEN)
        taken_up = time.monotonic() - up
        eventually(lambda: counted("FROM sessions WHERE state NOT IN ('done', 'input_required')") == 0)
        print(
            f"\ntaken up within {taken_up:.1f} s of the ready line, done within {time.monotonic() - up:.1f} s"
        )
        assert taken_up < TAKEN_UP_SECONDS
        states = dict(db.execute("SELECT state, count(*) FROM sessions GROUP BY state").fetchall())
        assert states == {"done": DRIVEN, "input_required": WAITING}
        assert counted("FROM sessions WHERE state = 'input_required' AND recoveries > 0") == 0
        assert (
            counted(
                "FROM sessions WHERE head_seq <> (SELECT count(*) FROM events e WHERE"
                " e.session_id = sessions.session_id)"
            )
            == 0
        )
        for (destination,) in db.execute("SELECT destination FROM sessions WHERE state = 'done'"):
            assert (Path(destination) / "one.txt").read_text() in ("1", "through")
