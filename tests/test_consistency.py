"""The examination of a store: it is silent on a good one, and finds what was done past its guards."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from app.errors import Failure
from app.sessions import consistency, lifecycle, requests
from app.sessions.consistency import Complaint
from app.sessions.session import Caller, Session
from app.sessions.store import Store
from app.steps import publish

CALLER = Caller(principal="test", trace_id="trace")
FIELDS = (msgspec.Raw(b'{"id":"stain","label":"Stain"}'),)


class Lab(NamedTuple):
    """A stopped service's store and data root, with one session of each sort."""

    path: Path
    root: Path
    rendering: Session
    waiting: Session
    queued: Session
    done: Session
    failed: Session
    aborted: Session

    def found(self) -> list[Complaint]:
        return consistency.examine(self.path, self.root)


@pytest.fixture
async def lab(tmp_path: Path) -> Lab:
    root = tmp_path / "data"
    root.mkdir()
    publish.found_root(root)
    store = Store(f"sqlite:///{tmp_path / 'store'}", on_broken=lambda broken: None)
    await store.open()
    rendering = await _rendering(store, root, "PROJ-1")
    waiting = await _asking(store, await _built(store, root, "PROJ-2"))
    queued = await _queued(store, await _built(store, root, "PROJ-3"))
    done = await _published(store, await _queued(store, await _built(store, root, "PROJ-4")))
    failed = await _failed(store, await _built(store, root, "PROJ-5"))
    aborted = await _aborted(store, await _asking(store, await _built(store, root, "PROJ-6")))
    await store.close()
    return Lab(tmp_path / "store", root, rendering, waiting, queued, done, failed, aborted)


async def _rendering(store: Store, root: Path, project: str) -> Session:
    body = requests.ProjectBody(
        equipment_id="EQ", template_path="t", label=project, operator="o", objective="x"
    )
    session, _ = await store.create(body, CALLER)
    (publish.session_folder(root, session.session_id) / "template").mkdir(parents=True)
    accepted = lifecycle.Accepted(
        destination=root / "EQ" / project,
        destination_key=project,
        project_key=project,
        project_short_id=project,
        local_root=root,
        pinned=msgspec.Raw(b"{}"),
    )
    return await store.record(session, accepted)


async def _built(store: Store, root: Path, project: str) -> Session:
    session = await _rendering(store, root, project)
    tree = publish.session_folder(root, session.session_id) / "0badcafe" / "tree"
    (tree / ".exlab-wizard").mkdir(parents=True)
    creation = {"session_id": session.session_id}
    (tree / ".exlab-wizard" / "creation.json").write_text(json.dumps(creation))
    return await store.record(
        session, lifecycle.Rendered(tree=tree, manifest="0" * 64, rendered=(), answers={}, log=())
    )


async def _asking(store: Store, session: Session) -> Session:
    for number in (1, 2):
        prompt_id = f"{session.label}.{number}"
        asked = lifecycle.Asked(prompt_id=prompt_id, plugin="p", file=None, reason="r", fields=FIELDS)
        session = await store.record(session, asked)
        if number == 1:
            body = requests.ResumeBody(extra_inputs={"stain": "HE"}, prompt_id=prompt_id)
            session = await store.answer(session.session_id, body, CALLER)
    return session


async def _queued(store: Store, session: Session) -> Session:
    checked = lifecycle.Checked(findings=())
    return await store.record(session, lifecycle.Transformed(), lifecycle.Documented(), checked)


async def _published(store: Store, session: Session) -> Session:
    assert session.destination is not None
    assert session.tree is not None
    session.destination.parent.mkdir(exist_ok=True)
    session.tree.rename(session.destination)
    shutil.rmtree(session.tree.parent.parent)
    result: dict[str, object] = {"path": str(session.destination), "sync_status": "pending"}
    return await store.record(session, lifecycle.Published(result=result, nas_path=""))


async def _failed(store: Store, session: Session) -> Session:
    failure = Failure(code="render_failed", message="m", details={"partial_path": str(session.tree)})
    return await store.record(session, lifecycle.Failed(error=failure))


async def _aborted(store: Store, session: Session) -> Session:
    cancelled = await store.request_cancel(
        session.session_id, requests.CancelBody(discard_files=True), CALLER
    )
    assert session.tree is not None
    shutil.rmtree(session.tree.parent.parent)
    return await store.record(
        cancelled, lifecycle.Cancelled(error=Failure(code="cancelled", message="cancelled"))
    )


def _past_the_guards(path: Path, *statements: str) -> None:
    """Change the store as a hand does that takes its triggers away, and puts them back."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA ignore_check_constraints=ON")
        guards = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in guards:
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)
        for _, sql in guards:
            db.execute(sql)
        db.commit()


def _graver(found: list[Complaint]) -> list[Complaint]:
    return [complaint for complaint in found if complaint.level != "note"]


def _only(found: list[Complaint], level: str, session: Session, words: str) -> None:
    """Exactly one complaint besides notes of the good store, and it is this one."""
    [complaint] = [each for each in found if "partial trees" not in each.what]
    assert (complaint.level, complaint.where) == (level, f"session {session.session_id}")
    assert words in complaint.what
    assert complaint.advice


def test_a_good_store_has_nothing_but_a_note_of_the_partial_tree_it_keeps(lab: Lab) -> None:
    [note] = lab.found()
    assert (note.level, note.what) == ("note", "partial trees that are kept: 1")


def test_a_store_that_is_not_there_yet_is_a_note(tmp_path: Path) -> None:
    [note] = consistency.examine(tmp_path / "none", None)
    assert note.level == "note"
    assert not (tmp_path / "none").exists()


def test_an_examination_changes_no_byte_of_the_store(lab: Lab) -> None:
    before = lab.path.read_bytes()
    lab.found()
    assert lab.path.read_bytes() == before


def test_a_store_may_be_examined_while_it_is_written_to(lab: Lab) -> None:
    with closing(sqlite3.connect(lab.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE sessions SET recoveries = 1")
        assert _graver(lab.found()) == []


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE sessions (session_id)")
    [complaint] = consistency.examine(path, None)
    assert (complaint.level, complaint.where) == ("error", str(path))


def test_a_store_of_another_release_is_not_read(lab: Lab) -> None:
    _past_the_guards(lab.path, "UPDATE alembic_version SET version_num = '9999'")
    [complaint] = lab.found()
    assert "9999" in complaint.what


def test_a_damaged_page_is_an_error(lab: Lab) -> None:
    raw = bytearray(lab.path.read_bytes())
    for page in range(2, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 16] = b"\xff" * 16
    lab.path.write_bytes(raw)
    assert "error" in {complaint.level for complaint in lab.found()}


def test_a_dropped_guard_is_named(lab: Lab) -> None:
    with closing(sqlite3.connect(lab.path)) as db:
        db.execute("DROP TRIGGER events_constant")
    [complaint] = _graver(lab.found())
    assert "trigger events_constant" in complaint.what


def test_a_state_that_was_assigned_by_hand_is_found(lab: Lab) -> None:
    _past_the_guards(
        lab.path, f"UPDATE sessions SET state = 'cache_write' WHERE session_id = '{lab.waiting.session_id}'"
    )
    found = " ".join(complaint.what for complaint in _graver(lab.found()))
    assert "state cache_write, its events say input_required" in found


def test_a_missing_event_is_found(lab: Lab) -> None:
    _past_the_guards(lab.path, f"DELETE FROM events WHERE session_id = '{lab.done.session_id}' AND seq = 1")
    found = [complaint.what for complaint in _graver(lab.found())]
    assert "after event 0 comes event 2" in found


def test_an_event_after_the_terminal_one_is_found(lab: Lab) -> None:
    seq = lab.done.head_seq + 1
    frame = json.dumps({"kind": "recovered", "seq": seq, "at": lab.done.updated_at, "state": "done"})
    _past_the_guards(
        lab.path,
        "INSERT INTO events (session_id, seq, kind, at, frame)"
        f" VALUES ('{lab.done.session_id}', {seq}, 'recovered', '{lab.done.updated_at}', '{frame}')",
        f"UPDATE sessions SET head_seq = {seq} WHERE session_id = '{lab.done.session_id}'",
    )
    _only(lab.found(), "error", lab.done, "comes after the terminal one")


def test_a_terminal_session_without_its_terminal_event_is_found(lab: Lab) -> None:
    _past_the_guards(
        lab.path, f"DELETE FROM events WHERE session_id = '{lab.failed.session_id}' AND kind = 'failed'"
    )
    found = " ".join(complaint.what for complaint in _graver(lab.found()))
    assert "state failed, its events say plugin_pass" in found


def test_a_history_that_leaves_the_table_of_edges_is_found(lab: Lab) -> None:
    _past_the_guards(
        lab.path,
        "UPDATE events SET frame = json_set(frame, '$.phase', 'writing_cache') WHERE seq = 2"
        f" AND session_id = '{lab.rendering.session_id}'",
        f"UPDATE sessions SET state = 'cache_write', tree = '{lab.waiting.tree}'"
        f" WHERE session_id = '{lab.rendering.session_id}'",
    )
    _only(lab.found(), "error", lab.rendering, "from validating to cache_write, where there is no edge")


@pytest.mark.parametrize(("who", "column"), [("failed", "error"), ("done", "result")])
def test_an_outcome_that_differs_from_its_event_is_found(lab: Lab, who: str, column: str) -> None:
    session: Session = getattr(lab, who)
    changed = f"json_set({column}, '$.changed', 1)"
    _past_the_guards(
        lab.path, f"UPDATE sessions SET {column} = {changed} WHERE session_id = '{session.session_id}'"
    )
    _only(lab.found(), "error", session, f"the row says {column}")


@pytest.mark.parametrize(
    ("number", "statement", "words"),
    [
        (
            1,
            "UPDATE prompts SET status = 'withdrawn', answered_at = NULL",
            "is withdrawn; by the events of the",
        ),
        (
            2,
            "UPDATE prompts SET status = 'withdrawn'",
            "is withdrawn; by the events of the session it is open",
        ),
        (2, "DELETE FROM prompts", "is missing; by the events of the session it is open"),
    ],
)
def test_a_prompt_that_is_not_as_its_events_tell_is_found(
    lab: Lab, number: int, statement: str, words: str
) -> None:
    _past_the_guards(lab.path, f"{statement} WHERE prompt_id = 'PROJ-2.{number}'")
    _only(lab.found(), "error", lab.waiting, words)


def test_a_published_folder_that_was_moved_away_is_a_note(lab: Lab) -> None:
    assert lab.done.destination is not None
    lab.done.destination.rename(lab.root / "archive")
    _only(lab.found(), "note", lab.done, "is not there any more")


def test_a_folder_in_the_place_of_a_published_one_is_a_warning(lab: Lab) -> None:
    assert lab.done.destination is not None
    (lab.done.destination / ".exlab-wizard" / "creation.json").write_text('{"session_id": "another"}')
    _only(lab.found(), "warning", lab.done, "creation.json")


@pytest.mark.parametrize("who", ["waiting", "queued"])
def test_a_live_session_without_its_tree_is_an_error(lab: Lab, who: str) -> None:
    session: Session = getattr(lab, who)
    assert session.tree is not None
    shutil.rmtree(session.tree)
    _only(lab.found(), "error", session, str(session.tree))


def test_a_session_that_moves_on_meanwhile_is_not_accused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lab.waiting.tree is not None
    shutil.rmtree(lab.waiting.tree)
    root_present = publish.root_present

    def moves_on_meanwhile(root: Path) -> bool:
        """The first look at the disk, with the snapshot taken already."""
        monkeypatch.undo()
        moved = "UPDATE sessions SET updated_at = '2030-01-01T00:00:00.000Z'"
        _past_the_guards(lab.path, f"{moved} WHERE session_id = '{lab.waiting.session_id}'")
        return root_present(root)

    residents = publish.residents(lab.root)
    monkeypatch.setattr(publish, "residents", lambda root: residents)
    monkeypatch.setattr(publish, "root_present", moves_on_meanwhile)
    assert _graver(lab.found()) == []


def test_a_tree_that_was_published_just_before_a_crash_is_nothing_wrong(lab: Lab) -> None:
    assert lab.queued.tree is not None
    assert lab.queued.destination is not None
    lab.queued.tree.rename(lab.queued.destination)
    assert _graver(lab.found()) == []


def test_a_rendering_session_without_its_copy_of_the_template_is_an_error(lab: Lab) -> None:
    shutil.rmtree(publish.session_folder(lab.root, lab.rendering.session_id))
    _only(lab.found(), "error", lab.rendering, "its copy of the template is gone")


def test_a_partial_tree_that_somebody_removed_is_a_warning(lab: Lab) -> None:
    shutil.rmtree(publish.session_folder(lab.root, lab.failed.session_id))
    _only(lab.found(), "warning", lab.failed, "the partial tree")


def test_a_folder_of_nobody_is_a_warning(lab: Lab) -> None:
    stranger = lab.root / publish.STAGING / "01a20a12-0000-7000-8000-000000000000"
    stranger.mkdir()
    [complaint] = _graver(lab.found())
    assert (complaint.level, complaint.where) == ("warning", str(stranger))


def test_what_an_ended_session_left_is_a_note(lab: Lab) -> None:
    left = publish.session_folder(lab.root, lab.aborted.session_id)
    left.mkdir()
    assert (left.name, "note") in [(Path(each.where).name, each.level) for each in lab.found()]


def test_a_data_root_that_is_not_mounted_is_one_warning_and_no_loss(lab: Lab) -> None:
    lab.root.rename(lab.root.with_name("elsewhere"))
    lab.root.mkdir()
    [complaint] = lab.found()
    assert (complaint.level, complaint.where) == ("warning", str(lab.root))


def test_a_tree_that_is_not_the_one_sealed_last_is_found(lab: Lab) -> None:
    elsewhere = f"UPDATE sessions SET tree = '/elsewhere' WHERE session_id = '{lab.done.session_id}'"
    _past_the_guards(lab.path, elsewhere)
    _only(lab.found(), "error", lab.done, "was sealed last")
