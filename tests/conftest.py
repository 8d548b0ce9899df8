"""What the tests of the store share: an open one, and a way to bring a session into any state."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec
import pytest

from app.errors import Failure, StoreBroken
from app.sessions import lifecycle, requests
from app.sessions.lifecycle import Outcome, State
from app.sessions.session import Caller, Session
from app.sessions.store import Store

T = TypeVar("T")

CALLER = Caller(principal="local", trace_id="trace-1")
SECONDS = 30.0
"""How long a test waits for what should happen at once."""

ROAD: tuple[State, ...] = (
    State.VALIDATING,
    State.RENDERING,
    State.PLUGIN_PASS,
    State.CACHE_WRITE,
    State.POST_VALIDATE,
    State.SYNC_QUEUED,
    State.DONE,
)


@pytest.fixture
def caller() -> Caller:
    return CALLER


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.sqlite3"


@pytest.fixture
def broken() -> list[StoreBroken]:
    """What the store said when it found itself broken."""
    return []


@pytest.fixture
async def store(store_path: Path, broken: list[StoreBroken]) -> AsyncIterator[Store]:
    opened = Store(f"sqlite:///{store_path}", on_broken=broken.append)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


def run_body(**changes: Any) -> requests.RunBody:
    body = requests.RunBody(
        equipment_id="CONFOCAL_01",
        project_short_id="PROJ-1",
        template_path="confocal_run",
        run_kind="experimental",
        label="Embryos, day 3",
        operator="asmith",
        objective="See them divide.",
    )
    return msgspec.structs.replace(body, **changes)


def project_body(**changes: Any) -> requests.ProjectBody:
    body = requests.ProjectBody(
        equipment_id="CONFOCAL_01",
        template_path="project",
        label="Zebrafish",
        operator="asmith",
        objective="Learn how they grow.",
        lims_project={"short_id": "PROJ-1"},
    )
    return msgspec.structs.replace(body, **changes)


def accepted(destination: str | None = None, *, project: str = "/data/confocal_01/proj-1") -> Outcome:
    """The gate's yes to a folder that nobody else has, or to `destination`."""
    folder = destination or f"{project}/run_{uuid4().hex}"
    return lifecycle.Accepted(
        destination=Path(folder),
        destination_key=folder,
        project_key=project,
        project_short_id="PROJ-1",
        local_root=Path("/data"),
        pinned=msgspec.Raw(b'{"template":"confocal_run"}'),
    )


def asked(prompt_id: str | None = None, *fields: dict[str, object]) -> lifecycle.Asked:
    fields = fields or ({"id": "dose", "label": "Dose", "type": "number"},)
    return lifecycle.Asked(
        prompt_id=prompt_id or uuid4().hex,
        plugin="staining",
        file="plan.csv",
        reason="The plan names no dose.",
        fields=tuple(msgspec.Raw(msgspec.json.encode(field)) for field in fields),
    )


def failed(code: str = "render_failed", **details: object) -> lifecycle.Failed:
    return lifecycle.Failed(error=Failure(code=code, message="It did not work.", details=details or None))


def cancelled() -> lifecycle.Cancelled:
    return lifecycle.Cancelled(error=Failure(code="cancelled", message="Cancelled by asmith."))


def lead_to(state: State) -> Outcome:
    """What brings a session into `state`, from the state before it on the straight road."""
    match state:
        case State.RENDERING:
            return accepted()
        case State.PLUGIN_PASS:
            tree = Path("/data/.exlab-sessions/tree")
            return lifecycle.Rendered(
                tree=tree, manifest="0" * 64, rendered=("a.csv",), answers={}, log=("rendered",)
            )
        case State.INPUT_REQUIRED:
            return asked()
        case State.CACHE_WRITE:
            return lifecycle.Transformed()
        case State.POST_VALIDATE:
            return lifecycle.Documented()
        case State.SYNC_QUEUED:
            return lifecycle.Checked(findings=())
        case State.DONE:
            result: dict[str, object] = {"path": "/data/run", "sync_status": "pending", "blocked": False}
            return lifecycle.Published(result=result, nas_path="nas:/run")
        case State.FAILED:
            return failed()
        case State.ABORTED:
            return cancelled()
        case _:
            raise AssertionError(f"nothing leads a stored session to {state}")


async def walk(store: Store, goal: State, body: requests.CreateBody | None = None) -> Session:
    """A new session that has come to `goal`; it failed or was cancelled at the gate if that is the goal."""
    session, _ = await store.create(body or run_body(), CALLER)
    way = ROAD[1 : ROAD.index(goal) + 1] if goal in ROAD else (goal,)
    if goal is State.INPUT_REQUIRED:
        way = (State.RENDERING, State.PLUGIN_PASS, State.INPUT_REQUIRED)
    for state in way:
        session = await store.record(session, lead_to(state))
    return session


async def soon(work: Awaitable[T]) -> T:
    """What `work` gives; a failure if it hangs."""
    return await asyncio.wait_for(work, SECONDS)


def rows(path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """What another program reads in the store at `path`."""
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(statement, values).fetchall()
