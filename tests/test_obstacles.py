"""What stands in the way, and what must not be lost or held up by it."""

import asyncio
import errno
import os
import shutil
import sqlite3
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app import disk
from app.demo import laboratory
from app.errors import StoreBroken, StoreUnavailable
from app.sessions import lifecycle, requests
from app.sessions.lifecycle import State
from app.sessions.requests import CancelBody
from app.sessions.session import Session
from app.sessions.store import Store
from app.steps import check, pinning, provenance, publish
from app.steps.render import Renderer
from tests.conftest import asked, walk
from tests.conftest import run_body as plain_body
from tests.house import CALLER, living, run_body, stopped_in, until
from tests.service import PATIENCE


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    laboratory.build(tmp_path)
    return tmp_path


async def blocked(store: Store, session_id: str) -> Session:
    async with asyncio.timeout(PATIENCE):
        with store.bell(session_id) as bell:
            while True:
                bell.clear()
                session = await store.get(session_id)
                if session.blocked_on is not None:
                    return session
                await bell.wait()


async def test_an_unmounted_root_is_waited_for_and_the_session_goes_on_when_it_is_back(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.CACHE_WRITE, monkeypatch)
    (lab / "data").rename(lab / "away")
    (lab / "data").mkdir()
    async with living(lab) as house:
        waiting = await blocked(house.store, before.session_id)
        assert waiting.blocked_on is not None and waiting.blocked_on["code"] == "not_mounted"
        assert list((lab / "data").iterdir()) == []
        (lab / "data").rmdir()
        (lab / "away").rename(lab / "data")
        await until(house.store, before.session_id, State.DONE)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(pinning, "pin"), (Renderer, "render"), (provenance, "write"), (check, "check"), (publish, "publish")],
)
async def test_a_root_that_goes_away_in_the_middle_of_a_step_is_waited_for(
    lab: Path, owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    does = getattr(owner, name)

    def pulled(*args: object, **named: object) -> object:
        if not (lab / "away").exists():
            (lab / "data").rename(lab / "away")
            (lab / "data").mkdir()
        return does(*args, **named)

    monkeypatch.setattr(owner, name, pulled)
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(session)
        waiting = await blocked(house.store, session.session_id)
        assert waiting.blocked_on is not None and waiting.blocked_on["code"] == "not_mounted"
        monkeypatch.setattr(owner, name, does)
        assert list((lab / "data").iterdir()) == []
        (lab / "data").rmdir()
        (lab / "away").rename(lab / "data")
        await until(house.store, session.session_id, State.DONE)


async def test_a_tree_that_the_disk_cannot_read_any_more_is_given_up_where_no_cancel_is_possible(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(tree: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tree))

    with monkeypatch.context() as unpublished:
        unpublished.setattr(publish, "publish", unreadable)
        before = await stopped_in(lab, State.SYNC_QUEUED, monkeypatch)
    monkeypatch.setattr(publish, "verify", unreadable)
    async with living(lab) as house:
        waiting = await blocked(house.store, before.session_id)
        assert waiting.blocked_on is not None and waiting.blocked_on["code"] == "disk_error"
        monkeypatch.setattr("app.sessions.pipeline.UNREADABLE_AFTER", timedelta())
        after = await until(house.store, before.session_id, State.FAILED)
    assert after.error is not None and after.error.code == "staging_lost"


async def test_a_disk_that_answers_nothing_but_errors_is_waited_for(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.RENDERING, monkeypatch)
    down = errno.EHOSTDOWN

    def no_answer(path: Path) -> os.stat_result:
        if ".exlab-sessions" in path.parts:
            raise OSError(down, os.strerror(down), str(path))
        return os.stat(path)

    async with living(lab) as house:
        with monkeypatch.context() as broken:
            broken.setattr(Path, "stat", lambda path, **_: no_answer(path))
            broken.setattr(os.path, "isdir", lambda path: ".exlab-sessions" not in str(path))
            waiting = await blocked(house.store, before.session_id)
        assert waiting.blocked_on is not None and waiting.blocked_on["code"] == "not_mounted"
        await until(house.store, before.session_id, State.DONE)


async def test_a_cancel_while_the_root_is_away_keeps_what_was_built(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.CACHE_WRITE, monkeypatch)
    (lab / "data").rename(lab / "away")
    (lab / "data").mkdir()
    async with living(lab) as house:
        await blocked(house.store, before.session_id)
        aborted = await house.runner.cancel(before.session_id, CancelBody(), CALLER)
        (lab / "data").rmdir()
        (lab / "away").rename(lab / "data")
        await house.runner.sweep(lab / "data")
    assert aborted.error is not None and aborted.error.details is not None
    assert aborted.error.details["discarded"] is False
    assert aborted.partial_path is not None and aborted.partial_path == before.tree
    assert aborted.partial_path.is_dir()


async def test_a_root_that_was_found_with_its_mark_is_known_as_ours(lab: Path) -> None:
    publish.found_root(lab / "data")
    async with living(lab) as house:
        first, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(first)
        await until(house.store, first.session_id, State.DONE)
        shutil.rmtree(lab / "data")
        (lab / "data").mkdir()
        second, _ = await house.store.create(run_body(lab), CALLER)
        waiting = await house.runner.admit(second)
    assert waiting.blocked_on is not None and waiting.blocked_on["code"] == "not_mounted"


async def test_one_session_that_cannot_be_ended_does_not_hold_up_the_others(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guilty = await stopped_in(lab, State.RENDERING, monkeypatch)
    with sqlite3.connect(lab / "state" / "sessions.sqlite3") as shell:
        shell.execute("UPDATE sessions SET step_deaths = 2, driven = 1, alone = 1")
    shell.close()
    mended = threading.Event()
    discard = publish.discard

    def read_only(folder: Path) -> None:
        if folder.name == guilty.session_id and not mended.is_set():
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        discard(folder)

    monkeypatch.setattr(publish, "discard", read_only)
    async with living(lab) as house:
        failed = await until(house.store, guilty.session_id, State.FAILED)
        other, _ = await house.store.create(run_body(lab, label="other"), CALLER)
        await house.runner.admit(other)
        await until(house.store, other.session_id, State.DONE)
        assert publish.residents(lab / "data") == (guilty.session_id,)
        mended.set()
        await house.runner.sweep(lab / "data")
    assert publish.residents(lab / "data") == ()
    assert failed.error is not None and failed.error.code == "recovery_limit_exceeded"


async def test_a_published_folder_is_done_even_if_its_equipment_cannot_be_noted(lab: Path) -> None:
    (lab / "data" / "CONFOCAL_01" / ".exlab-wizard" / "equipment.json").mkdir(parents=True)
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(session)
        done = await until(house.store, session.session_id, State.DONE)
    assert done.result is not None
    [warning] = msgspec.convert(done.result["warnings"], type=list[dict[str, Any]])
    assert warning["code"] == "equipment_not_noted"


async def test_a_cancel_is_answered_when_the_step_has_really_ended(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended: list[str] = []
    write = provenance.write

    def slowly(tree: Path, facts: provenance.Facts) -> None:
        begun.set()
        go_on.wait(PATIENCE)
        write(tree, facts)
        ended.append("written")

    monkeypatch.setattr(provenance, "write", slowly)
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(session)
        await asyncio.to_thread(begun.wait, PATIENCE)
        cancelling = asyncio.create_task(house.runner.cancel(session.session_id, CancelBody(), CALLER))
        with house.store.bell(session.session_id):
            assert not (await asyncio.wait({cancelling}, timeout=0.2))[0]
        go_on.set()
        aborted = await cancelling
    assert ended == ["written"]
    assert aborted.state is State.ABORTED


async def test_a_tree_that_is_to_be_published_is_checked_once_more_after_a_restart(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.POST_VALIDATE, monkeypatch)
    async with living(lab, held=True) as house:
        await house.store.record(before, lifecycle.Checked(findings=()))
    assert before.tree is not None and before.destination is not None
    victim = next(path for path in sorted(before.tree.rglob("*.yaml")) if path.is_file())
    victim.write_bytes(b"")
    async with living(lab) as house:
        failed = await until(house.store, before.session_id, State.FAILED)
    assert failed.error is not None and failed.error.code == "staging_lost"
    assert not before.destination.exists()


async def test_a_creation_that_meets_the_end_of_the_service_is_answered(lab: Path) -> None:
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.drain()
        async with asyncio.timeout(PATIENCE):
            assert (await house.runner.admit(session)).state is State.VALIDATING


async def test_a_row_that_cannot_be_read_hides_no_other(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = await stopped_in(lab, State.RENDERING, monkeypatch)
    with sqlite3.connect(lab / "state" / "sessions.sqlite3") as shell:
        shell.execute("UPDATE sessions SET blocked_on = '[]'")
    shell.close()
    async with living(lab) as house:
        good, _ = await house.store.create(run_body(lab, label="good"), CALLER)
        await house.runner.admit(good)
        await until(house.store, good.session_id, State.DONE)
        listed = await house.store.operations()
    assert bad.session_id not in {session.session_id for session in listed}


async def test_a_deleted_write_ahead_log_stops_the_store(tmp_path: Path) -> None:
    broken: list[StoreBroken] = []
    store = Store(f"sqlite+aiosqlite:///{tmp_path}/sessions.sqlite3", on_broken=broken.append)
    await store.open()
    await store.create(plain_body(), CALLER)
    (tmp_path / "sessions.sqlite3-wal").unlink()
    with pytest.raises(StoreUnavailable):
        await store.create(plain_body(), CALLER)
    await store.close()
    assert len(broken) == 1 and "-wal" in str(broken[0])


async def test_what_is_kept_of_an_answer_tells_nothing_of_its_secrets(store: Store, store_path: Path) -> None:
    secret = {"id": "pin", "label": "PIN", "type": "string", "required": True, "secret": True}
    digests = []
    for pin in ("0000", "1234"):
        session = await walk(store, State.PLUGIN_PASS)
        prompt_id = f"p-{pin}"
        await store.record(session, asked(prompt_id, secret))
        answer = requests.ResumeBody(extra_inputs={"pin": pin}, prompt_id=prompt_id)
        await store.answer(session.session_id, answer, CALLER)
        with sqlite3.connect(f"file:{store_path}?mode=ro", uri=True) as shell:
            query = "SELECT answer, answer_digest FROM prompts WHERE prompt_id = ?"
            digests.append(shell.execute(query, (prompt_id,)).fetchone())
        shell.close()
    assert digests[0] == digests[1]


async def test_a_death_while_a_failed_session_is_cleared_spoils_no_second_try(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is on disk before its files go: the step is not done again on half of its template."""
    stored: list[State] = []
    clear = publish.discard

    def looking(folder: Path) -> None:
        with sqlite3.connect(f"file:{lab}/state/sessions.sqlite3?mode=ro", uri=True) as shell:
            query = "SELECT state FROM sessions WHERE session_id = ?"
            stored.extend(State(state) for (state,) in shell.execute(query, (folder.name,)))
        shell.close()
        clear(folder)

    monkeypatch.setattr(publish, "discard", looking)
    (lab / "templates" / "confocal_run" / "broken.txt.jinja").write_text("{% for %}")
    async with living(lab) as house:
        session, _ = await house.store.create(run_body(lab), CALLER)
        await house.runner.admit(session)
        failed = await until(house.store, session.session_id, State.FAILED)
    assert failed.error is not None and failed.error.code == "render_failed"
    assert stored == [State.VALIDATING, State.FAILED]
    assert publish.residents(lab / "data") == ()


async def test_a_death_while_provenance_is_written_leaves_a_tree_that_is_still_good(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await stopped_in(lab, State.CACHE_WRITE, monkeypatch)
    assert before.tree is not None
    for file in (before.tree / "README.md", before.tree / ".exlab-wizard" / "creation.json"):
        file.parent.mkdir(exist_ok=True)  # the death came before or after it was made
        disk.temporary(file).write_text("half of a fi")
    async with living(lab) as house:
        done = await until(house.store, before.session_id, State.DONE)
    assert done.destination is not None
    assert not [path for path in done.destination.rglob("*") if path.name.endswith(".tmp")]
