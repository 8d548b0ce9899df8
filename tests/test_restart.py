"""Taking up what a service left behind, from each state, in one process and without a server."""

import shutil
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from app.demo import laboratory
from app.sessions import lifecycle, requests
from app.sessions.lifecycle import State
from app.sessions.moves import Moved
from app.sessions.pinned import pinned_by
from app.sessions.requests import CancelBody
from app.steps.gate import Planned
from tests.house import CALLER, living, run_body, stopped_in, until
from tests.service import PATIENCE, Service, body


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    laboratory.build(tmp_path)
    return tmp_path


ROAD = (
    State.VALIDATING,
    State.RENDERING,
    State.PLUGIN_PASS,
    State.CACHE_WRITE,
    State.POST_VALIDATE,
    State.SYNC_QUEUED,
)


@pytest.mark.parametrize("state", ROAD)
async def test_a_session_is_taken_up_from_any_state_and_finishes(
    lab: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, state, monkeypatch)
    assert before.state is state
    async with living(lab) as house:
        after = await until(house.store, before.session_id, State.DONE)
        frames = await house.store.frames_after(before.session_id, 0, 100)
    kinds = [frame.kind for frame in frames]
    assert after.recoveries == 1
    assert kinds.count("recovered") == 1
    assert kinds[-1] == "done"
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    assert after.destination is not None and (after.destination / "README.md").is_file()
    assert list((lab / "data" / ".exlab-sessions").iterdir()) == []


async def test_a_session_that_was_only_recorded_is_taken_up(lab: Path) -> None:
    async with living(lab):
        pass
    pending = requests.encode(run_body(lab))
    with sqlite3.connect(lab / "state" / "sessions.sqlite3") as shell:
        shell.execute(
            "INSERT INTO sessions (session_id, kind, run_kind, state, label, operator, equipment_id, template_path,"
            " created_at, updated_at, principal, trace_id, request) VALUES"
            " ('01a20a05-adf4-738d-9e10-f9ca5b286df5', 'run', 'experimental', 'pending', 'l', 'o', 'CONFOCAL_01',"
            " 'confocal_run', ?1, ?1, 'local', 't', ?2)",
            (datetime.now(UTC).isoformat(), pending),
        )
    shell.close()
    async with living(lab) as house:
        await until(house.store, "01a20a05-adf4-738d-9e10-f9ca5b286df5", State.DONE)


@pytest.mark.parametrize("state", [State.PLUGIN_PASS, State.CACHE_WRITE, State.POST_VALIDATE])
async def test_a_tree_that_somebody_meddled_with_is_not_published(
    lab: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, state, monkeypatch)
    assert before.tree is not None and before.destination is not None
    files = sorted(path for path in before.tree.rglob("*") if path.is_file())
    victim = next(path for path in files if path.name != "README.md" and ".exlab-wizard" not in path.parts)
    victim.write_bytes(victim.read_bytes() + b"!")
    async with living(lab) as house:
        after = await until(house.store, before.session_id, State.FAILED)
    assert after.error is not None and after.error.code == "staging_lost"
    assert not before.destination.exists()
    assert after.partial_path is not None and after.partial_path.is_dir()


async def test_a_template_whose_copy_is_gone_is_not_looked_for_elsewhere(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.RENDERING, monkeypatch)
    shutil.rmtree(lab / "data" / ".exlab-sessions" / before.session_id / "template")
    async with living(lab) as house:
        after = await until(house.store, before.session_id, State.FAILED)
    assert after.error is not None and after.error.code == "staging_lost"


async def test_a_question_waits_through_a_restart_as_it_was_asked(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.PLUGIN_PASS, monkeypatch)
    field = msgspec.Raw(b'{"id": "lot", "label": "Lot", "type": "string", "required": true}')
    asked = lifecycle.Asked(prompt_id="p-1", plugin="form", file=None, reason="no lot", fields=(field,))
    async with living(lab, held=True) as house:
        await house.store.record(before, asked)
    async with living(lab) as house:
        waiting = await house.store.get(before.session_id)
        assert waiting.state is State.INPUT_REQUIRED
        assert waiting.prompt is not None and waiting.prompt.prompt_id == "p-1"
        assert waiting.recoveries == 0
        answer = requests.ResumeBody(extra_inputs={"lot": "L7"}, prompt_id="p-1")
        answered = await house.store.answer(before.session_id, answer, CALLER)
        assert answered.state is State.PLUGIN_PASS and answered.prompt is None
        house.runner.wake(before.session_id)
        await until(house.store, before.session_id, State.DONE)


async def test_a_cancel_that_was_recorded_is_finished_by_the_restart(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.CACHE_WRITE, monkeypatch)
    async with living(lab, held=True) as house:
        await house.store.request_cancel(before.session_id, CancelBody(discard_files=True), CALLER)
        with pytest.raises(Moved):
            await house.store.record(before, lifecycle.Documented())
    async with living(lab) as house:
        after = await until(house.store, before.session_id, State.ABORTED)
    assert after.error is not None and after.error.code == "cancelled"
    assert after.error.details is not None and after.error.details["discarded"] is True
    assert list((lab / "data" / ".exlab-sessions").iterdir()) == []
    assert before.destination is not None and not before.destination.exists()


async def test_a_step_that_ends_the_service_three_times_fails_its_session_and_no_other(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guilty = await stopped_in(lab, State.RENDERING, monkeypatch)
    with sqlite3.connect(lab / "state" / "sessions.sqlite3") as shell:
        shell.execute("UPDATE sessions SET step_deaths = 2, driven = 1, alone = 1")
    shell.close()
    async with living(lab, held=True) as house:
        innocent, _ = await house.store.create(run_body(lab, label="innocent"), CALLER)
    async with living(lab) as house:
        failed = await until(house.store, guilty.session_id, State.FAILED)
        assert failed.error is not None and failed.error.code == "recovery_limit_exceeded"
        done = await until(house.store, innocent.session_id, State.DONE)
        assert done.recoveries == 1


async def test_a_suspect_is_driven_alone(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suspect = await stopped_in(lab, State.RENDERING, monkeypatch)
    with sqlite3.connect(lab / "state" / "sessions.sqlite3") as shell:
        shell.execute("UPDATE sessions SET step_deaths = 1, driven = 1")
    shell.close()
    async with living(lab, held=True) as house:
        other, _ = await house.store.create(run_body(lab, label="other"), CALLER)
    async with living(lab) as house:
        await until(house.store, other.session_id, State.DONE)
        frames = await house.store.feed_after(0, 1000)
    ended = next(
        frame.position for frame in frames if frame.session_id == suspect.session_id and frame.kind == "done"
    )
    begun = next(
        frame.position
        for frame in frames
        if frame.session_id == other.session_id and frame.kind == "recovered"
    )
    assert ended < begun


async def test_a_service_that_stops_in_good_order_counts_no_death(lab: Path) -> None:
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        house.runner.wake(session.session_id)
        await until(house.store, session.session_id, State.RENDERING)
    async with living(lab) as house:
        done = await until(house.store, session.session_id, State.DONE)
    assert done.step_deaths == 0


async def test_a_held_service_drives_nothing(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await stopped_in(lab, State.RENDERING, monkeypatch)
    async with living(lab, held=True) as house:
        session = await house.store.get(before.session_id)
        house.runner.wake(before.session_id)
        aborted = await house.runner.cancel(before.session_id, CancelBody(), CALLER)
    assert session.state is State.RENDERING
    assert aborted.state is State.ABORTED


def test_a_service_that_guessed_its_store_leaves_it_when_the_config_names_another(
    lab: Path, tmp_path: Path
) -> None:
    config = lab / "config.yaml"
    whole = config.read_text()
    config.write_text("paths: [")
    home = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "default")}
    service = Service(config, environment=home)
    try:
        assert service.ready
        with service.http() as http:
            assert http.post("/sessions", json=body(lab, "project")).status_code == 503
        config.write_text(whole)
        assert service.process.wait(PATIENCE) == 75
    finally:
        service.kill()


async def test_plugins_that_the_first_schema_knew_by_their_names_are_still_known(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await stopped_in(lab, State.RENDERING, monkeypatch)
    assert session.pinned is not None
    older = bytes(session.pinned).replace(b'"plugins":[]', b'"plugins":["staining"]')
    assert older != bytes(session.pinned)
    taken_up = msgspec.structs.replace(session, pinned=msgspec.Raw(older))
    assert pinned_by(taken_up).plugins == (Planned("staining", None),)


async def test_a_held_service_leaves_no_session_as_if_it_had_died_with_it(lab: Path) -> None:
    async with living(lab, held=True) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(session)
    async with living(lab, held=True) as house:
        [found] = await house.store.take_stock()
    assert found.step_deaths == 0
