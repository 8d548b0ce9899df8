"""A cancel in every state, against answers, publishing and death: one winner, one receipt, nothing left running."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.demo import laboratory
from app.errors import SessionNotAwaitingInput, TooLateToCancel
from app.sessions import lifecycle
from app.sessions.lifecycle import State
from app.sessions.moves import Moved
from app.sessions.requests import CancelBody, ResumeBody
from app.sessions.session import Session
from app.sessions.store import Store
from app.steps import publish
from tests.conftest import CALLER, cancelled, run_body, walk
from tests.house import living, stopped_in, until
from tests.offspring import running as runs
from tests.service import bare_run, ended, eventually, plugin, running, template, waiting

CANCELLABLE = (
    State.VALIDATING,
    State.RENDERING,
    State.PLUGIN_PASS,
    State.CACHE_WRITE,
    State.POST_VALIDATE,
)
WITH_TREE = (State.PLUGIN_PASS, State.CACHE_WRITE, State.POST_VALIDATE)
RACES = 500
"""Of each of two kinds."""

STUBBORN = """
def transform(self, file_path, ctx):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (ctx.dst_root / "half.txt").write_text("half")
    if os.fork() == 0:
        os.setsid()
        time.sleep(900)
    time.sleep(600)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    laboratory.build(tmp_path)
    return tmp_path


def receipt(session: Session) -> dict[str, Any]:
    assert session.error is not None and session.error.code == "cancelled"
    return session.error.details or {}


@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("state", CANCELLABLE)
async def test_a_cancel_in_any_state_tells_what_became_of_the_files(
    lab: Path, state: State, discard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, state, monkeypatch)
    async with living(lab, held=True) as house:
        after = await house.runner.cancel(before.session_id, CancelBody(discard_files=discard), CALLER)
    assert after.state is State.ABORTED
    _check_receipt(lab, after, kept=state in WITH_TREE and not discard)


@pytest.mark.parametrize("discard", [True, False])
@pytest.mark.parametrize("state", CANCELLABLE)
async def test_a_cancel_is_finished_by_the_next_start_when_the_service_dies_after_its_commit(
    lab: Path, state: State, discard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, state, monkeypatch)
    async with living(lab, held=True) as house:
        await house.store.request_cancel(before.session_id, CancelBody(discard_files=discard), CALLER)
    async with living(lab) as house:
        after = await until(house.store, before.session_id, State.ABORTED)
    _check_receipt(lab, after, kept=state in WITH_TREE and not discard)


def _check_receipt(lab: Path, after: Session, *, kept: bool) -> None:
    told = receipt(after)
    assert after.destination is None or not after.destination.exists()
    if kept:
        assert told["discarded"] is False
        assert Path(told["partial_path"], "acquisition/settings.yaml").is_file()
    else:
        assert told["partial_path"] is None
        assert publish.residents(lab / "data") == ()


@pytest.mark.parametrize("discard", [True, False])
def test_a_cancel_of_a_plugin_ends_all_its_processes_within_two_seconds(lab: Path, discard: bool) -> None:
    plugin(lab, "stubborn", STUBBORN, isolation={"timeout_seconds": 300})
    name = template(lab, "stuck", {"one.txt": "1"}, _exlab_plugins=["stubborn"])
    with running(lab / "config.yaml") as service, service.http() as http:
        session_id = _created(http, name)
        halves = eventually(lambda: list((lab / "data/.exlab-sessions").glob("*/*/tree/half.txt")))
        mine = eventually(lambda: _processes_in(halves[0].parent))
        begun = time.monotonic()
        answer = http.post(f"/sessions/{session_id}/cancel", json={"discard_files": discard}).json()
        assert time.monotonic() - begun < 2
        assert answer["state"] == "aborted"
        assert [pid for pid in mine if runs(pid)] == []
        details = answer["error"]["details"]
        assert details["stopped"] == ["plugin_pass"]
    if discard:
        assert publish.residents(lab / "data") == ()
    else:
        assert [path.name for path in Path(details["partial_path"]).iterdir()] == ["one.txt"]


def test_a_cancel_while_the_operator_is_asked_answers_at_once(lab: Path) -> None:
    ask = 'raise PluginInputRequired([{"id": "x", "label": "X", "type": "string"}], "why")'
    plugin(lab, "asks", f"def transform(self, file_path, ctx):\n    {ask}\n")
    name = template(lab, "asking", {"one.txt": "1"}, _exlab_plugins=["asks"])
    with running(lab / "config.yaml") as service, service.http() as http:
        handle = waiting(http, _created(http, name))
        answer = http.post(f"/sessions/{handle['session_id']}/cancel", json={}).json()
        assert (answer["state"], answer["pending_input"]) == ("aborted", None)
        assert Path(answer["error"]["details"]["partial_path"], "one.txt").read_text() == "1"
        late = {"extra_inputs": {"x": "y"}, "prompt_id": handle["pending_input"]["prompt_id"]}
        refused = http.post(f"/sessions/{handle['session_id']}/resume", json=late)
        assert refused.json()["error"]["code"] == "session_already_completed"


def test_a_death_in_the_middle_of_a_plugin_leaves_nothing_of_it(lab: Path) -> None:
    plugin(
        lab,
        "first",
        'def transform(self, file_path, ctx):\n    file_path.write_text(file_path.read_text() + "+")\n',
    )
    plugin(lab, "stubborn", STUBBORN.replace("time.sleep(600)", _WAIT), isolation={"timeout_seconds": 300})
    name = template(lab, "stuck", {"one.txt": "1"}, _exlab_plugins=["first", "stubborn"])
    with running(lab / "config.yaml") as service, service.http() as http:
        session_id = _created(http, name)
        halves = eventually(lambda: list((lab / "data/.exlab-sessions").glob("*/*/tree/half.txt")))
        mine = eventually(lambda: _processes_in(halves[0].parent))
        os.kill(service.process.pid, signal.SIGKILL)
        eventually(lambda: not [pid for pid in mine if runs(pid)], within=5)
    (lab / "data" / "go").touch()
    with running(lab / "config.yaml") as service, service.http() as http:
        done = ended(http, session_id)
    assert done["state"] == "done" and done["recoveries"] == 1, done
    folder = Path(done["result"]["path"])
    assert {path.name: path.read_text() for path in folder.glob("*.txt")} == {
        "one.txt": "1+",
        "half.txt": "half",
    }


_WAIT = """while not (ctx.dst_root.parents[3] / "go").exists():
        time.sleep(0.05)"""


def _created(http: httpx.Client, name: str) -> str:
    answer = http.post("/sessions", json=bare_run(name)).json()
    assert answer["state"] == "rendering", answer
    return str(answer["session_id"])


def _processes_in(folder: Path) -> list[int]:
    """Those that work in `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == folder:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def test_an_answer_and_a_cancel_race_and_the_history_tells_one_story(store: Store) -> None:
    async def race(number: int) -> None:
        session = await walk(store, State.INPUT_REQUIRED, run_body(label=f"{number}"))
        answer = ResumeBody(extra_inputs={"dose": 1})
        pair = [store.answer(session.session_id, answer, CALLER)]
        pair.insert(random.randrange(2), store.request_cancel(session.session_id, CancelBody(), CALLER))
        results = await asyncio.gather(*pair, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(result, SessionNotAwaitingInput) for result in refused)
        now = await store.get(session.session_id)
        assert now.cancel is not None  # either came first; a cancel comes too late for neither
        assert now.state is (State.INPUT_REQUIRED if refused else State.PLUGIN_PASS)
        with pytest.raises(Moved):
            await store.record(session, lifecycle.Transformed())
        over = await store.record(now, cancelled())
        kinds = [frame.kind for frame in await store.frames_after(session.session_id, 0, 100)]
        assert over.state is State.ABORTED
        assert kinds.count("input_received") == (0 if refused else 1)
        assert [kind for kind in kinds if kind in ("done", "failed")] == kinds[-1:] == ["failed"]

    await _many(race)


async def test_a_cancel_and_the_publishing_race_and_one_wins(store: Store) -> None:
    won: list[str] = []

    async def race(number: int) -> None:
        session = await walk(store, State.POST_VALIDATE, run_body(label=f"{number}"))
        pair = [store.record(session, lifecycle.Checked(findings=()))]
        pair.insert(random.randrange(2), store.request_cancel(session.session_id, CancelBody(), CALLER))
        results = await asyncio.gather(*pair, return_exceptions=True)
        [lost] = [result for result in results if isinstance(result, BaseException)]
        now = await store.get(session.session_id)
        if isinstance(lost, TooLateToCancel):
            assert now.state is State.SYNC_QUEUED and now.cancel is None
            published = {"path": "/x", "sync_status": "pending", "blocked": False}
            over = await store.record(now, lifecycle.Published(result=published, nas_path=""))
        else:
            assert isinstance(lost, Moved)
            assert now.state is State.POST_VALIDATE and now.cancel is not None
            over = await store.record(now, cancelled())
        won.append(over.state)
        kinds = [frame.kind for frame in await store.frames_after(session.session_id, 0, 100)]
        assert [kind for kind in kinds if kind in ("done", "failed")] == kinds[-1:]

    await _many(race)
    assert set(won) == {State.DONE, State.ABORTED}


async def _many(race: Any) -> None:
    for begin in range(0, RACES, 25):
        await asyncio.gather(*(race(number) for number in range(begin, begin + 25)))
