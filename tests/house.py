"""The parts of a service in the test's own process, without a server; and one that died at a given state."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from app.main import House
from app.sessions import lifecycle
from app.sessions.lifecycle import State
from app.sessions.requests import CreateBody
from app.sessions.session import Caller, Session
from app.sessions.store import Store
from app.settings import ConfigFile
from tests.service import PATIENCE, body

CALLER = Caller(principal="local", trace_id="test")


@asynccontextmanager
async def living(lab: Path, *, held: bool = False) -> AsyncIterator[House]:
    house = House(ConfigFile(lab / "config.yaml"), held=held)
    async with house.living():
        yield house


def run_body(lab: Path, **changes: object) -> CreateBody:
    shaped: CreateBody = msgspec.convert(body(lab, "confocal_run", **changes), type=CreateBody)
    return shaped


async def until(store: Store, session_id: str, *states: State) -> Session:
    async with asyncio.timeout(PATIENCE):
        with store.bell(session_id) as bell:
            while True:
                bell.clear()
                session = await store.get(session_id)
                if session.state in states:
                    return session
                await bell.wait()


async def stopped_in(lab: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that a service brought to `state` and was driving when it died: its marks are still there."""
    record = Store.record

    async def record_until(store: Store, session: Session, *outcomes: lifecycle.Outcome) -> Session:
        if session.state is state and not isinstance(outcomes[0], lifecycle.Recovered):
            await asyncio.Event().wait()
        if state is State.PLUGIN_PASS and isinstance(outcomes[0], lifecycle.Rendered):
            outcomes = outcomes[:1]
        return await record(store, session, *outcomes)

    async def forget(_: Store) -> None:
        return None

    with monkeypatch.context() as dying:
        dying.setattr(Store, "record", record_until)
        dying.setattr(Store, "mark_all_idle", forget)
        dying.setattr("app.main.House.drain", _halt)
        async with living(lab) as house:
            session, _ = await house.store.create(run_body(lab), CALLER)
            house.runner.wake(session.session_id)
            return await until(house.store, session.session_id, state)


async def _halt(house: House) -> None:
    house.feed.stop()
    await house.runner.drain(0)
