"""A hand on the SQLite shell, while the service has the store open: what it may read, and what it is refused."""

import shutil
import subprocess
from pathlib import Path

import pytest

from app.sessions import lifecycle, requests
from app.sessions.lifecycle import EDGES, State
from app.sessions.session import Session
from app.sessions.store import Store
from tests.conftest import CALLER, accepted, asked, lead_to, rows, run_body, walk

pytestmark = pytest.mark.skipif(shutil.which("sqlite3") is None, reason="needs the sqlite3 shell")

VIEWS = ("live_sessions", "finished_sessions", "timeline", "open_prompts", "copies")
COMPANIONS = ("events", "prompts", "snapshots", "plugin_runs", "copy_jobs", "idempotency_keys", "log_lines")
TABLES = ("sessions", *COMPANIONS, "audit", "states", "edges", "store_facts")
STATES = tuple(state for state in State if state is not State.PENDING)
RAN = lifecycle.PluginRan(ordinal=1, total=2, plugin="staining", version="1", status="success")
AT = "2026-01-02T03:04:05.678Z"


def shell(path: Path, statements: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What the sqlite3 program makes of `statements`; it stops at the first that is refused."""
    command = ["sqlite3", "-bail", *options, "-cmd", ".timeout 5000", str(path)]
    return subprocess.run(command, input=statements, capture_output=True, text=True, check=False, timeout=30)


def contents(path: Path) -> dict[str, list[tuple[object, ...]]]:
    return {table: rows(path, f"SELECT * FROM {table}") for table in TABLES}


def refused(path: Path, statements: str) -> str:
    """What the shell complains of; nothing was changed."""
    before = contents(path)
    done = shell(path, statements)
    assert done.returncode != 0, f"it was accepted: {statements}"
    assert contents(path) == before
    return done.stderr


def event(session: Session, kind: str, rest: str = "", *, seq: int | None = None) -> str:
    """The statement that a hand would write to add an event."""
    number = seq if seq is not None else session.head_seq + 1
    frame = f'{{"kind":"{kind}","seq":{number},"at":"{AT}"{rest}}}'
    return (
        "INSERT INTO events (session_id, seq, kind, at, frame)"
        f" VALUES ('{session.session_id}', {number}, '{kind}', '{AT}', '{frame}');"
    )


def named(session: Session) -> str:
    return f"WHERE session_id = '{session.session_id}'"


@pytest.mark.parametrize("view", VIEWS)
async def test_every_view_answers(store: Store, view: str) -> None:
    for state in STATES:
        await walk(store, state)
    done = shell(store.path, f"SELECT * FROM {view};", "-readonly", "-header")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 1


async def test_the_views_tell_what_a_session_waits_for(store: Store) -> None:
    blocking = await walk(store, State.INPUT_REQUIRED)
    await store.request_cancel((await walk(store, State.RENDERING)).session_id, requests.CancelBody(), CALLER)
    said = shell(store.path, "SELECT waits_for FROM live_sessions;", "-readonly").stdout.splitlines()
    assert said == [
        "operator: staining asks: The plan names no dose.",
        "cancel: its processes are being stopped",
    ]
    prompt = shell(store.path, "SELECT session_id, fields_asked FROM open_prompts;", "-readonly")
    assert prompt.stdout == f"{blocking.session_id}|1\n"


async def test_the_timeline_tells_a_whole_life(store: Store) -> None:
    session = await walk(store, State.DONE)
    said = shell(store.path, f"SELECT what FROM timeline {named(session)} ORDER BY seq;", "-readonly")
    assert said.stdout.splitlines() == [
        "validating_inputs",
        "rendering_template",
        "running_plugins",
        "writing_cache",
        "validating_post_creation",
        "queueing_nas_sync",
        "published as /data/run",
    ]


async def test_a_hand_that_reads_does_not_stop_the_service(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    assert shell(store.path, "BEGIN; SELECT count(*) FROM events;", "-readonly").returncode == 0
    assert (await store.record(session, lead_to(State.PLUGIN_PASS))).state is State.PLUGIN_PASS


@pytest.mark.parametrize("state", STATES)
async def test_no_state_can_be_assigned(store: Store, state: State) -> None:
    session = await walk(store, state)
    for other in State:
        if other is not state:
            complaint = refused(store.path, f"UPDATE sessions SET state = '{other}' {named(session)};")
            legal = other in {after for (before, _), after in EDGES.items() if before is state}
            assert legal or "illegal edge" in complaint


@pytest.mark.parametrize("state", [state for state in STATES if state in {edge[0] for edge in EDGES}])
async def test_no_event_moves_a_session_over_an_edge_that_is_not_there(store: Store, state: State) -> None:
    session = await walk(store, state)
    reachable = {after for (before, _), after in EDGES.items() if before is state} | {state}
    phases = {
        State.VALIDATING: "validating_inputs",
        State.RENDERING: "rendering_template",
        State.PLUGIN_PASS: "running_plugins",
        State.CACHE_WRITE: "writing_cache",
        State.POST_VALIDATE: "validating_post_creation",
        State.SYNC_QUEUED: "queueing_nas_sync",
    }
    for other in set(phases) - reachable:
        told = event(session, "phase", f',"phase":"{phases[other]}"')
        assert "illegal edge" in refused(store.path, told)


@pytest.mark.parametrize("phase", ["done", "input_required", "no such phase", ""])
async def test_a_phase_event_moves_to_a_phase_only(store: Store, phase: str) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    refused(store.path, event(session, "phase", f',"phase":"{phase}"'))


async def test_an_event_that_is_inserted_moves_its_session(store: Store) -> None:
    """The one way to move a session by hand is the way of the service."""
    session = await walk(store, State.CACHE_WRITE)
    told = event(session, "phase", ',"phase":"validating_post_creation"')
    assert shell(store.path, told).returncode == 0
    assert (await store.get(session.session_id)).state is State.POST_VALIDATE


@pytest.mark.parametrize("step", [-1, 0, 2, 5])
async def test_a_gap_or_a_repeat_in_seq_is_refused(store: Store, step: int) -> None:
    session = await walk(store, State.CACHE_WRITE)
    warning = ',"phase":"writing_cache","message":"m","code":"c"'
    complaint = refused(store.path, event(session, "warning", warning, seq=session.head_seq + step))
    assert "next seq" in complaint


@pytest.mark.parametrize(
    "frame",
    [
        '{"kind":"phase","seq":%d,"at":"%s","phase":"x"}',
        '{"kind":"warning","seq":99,"at":"%.0s2026"}',
        "no json %d %s",
        '{"kind":"warning"} %d %s',
    ],
)
async def test_a_frame_says_what_its_row_says(store: Store, frame: str) -> None:
    session = await walk(store, State.RENDERING)
    seq = session.head_seq + 1
    text = frame % (seq, AT) if "%d" in frame else frame % AT
    refused(
        store.path,
        "INSERT INTO events (session_id, seq, kind, at, frame)"
        f" VALUES ('{session.session_id}', {seq}, 'warning', '{AT}', '{text}');",
    )


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.ABORTED])
async def test_nothing_comes_after_the_terminal_event(store: Store, state: State) -> None:
    session = await walk(store, state)
    told = event(session, "warning", ',"phase":"x","message":"m","code":"c"')
    assert "closed" in refused(store.path, told)


async def test_a_failure_that_a_hand_tells_is_the_end(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    told = event(session, "failed", ',"phase":"rendering_template","error":{"code":"c","message":"m"}')
    assert shell(store.path, told).returncode == 0
    stands = await store.get(session.session_id)
    assert stands.state is State.FAILED and stands.error is not None and stands.ended_at == AT


async def test_an_event_is_not_changed(store: Store) -> None:
    session = await walk(store, State.DONE)
    for change in ("frame = frame", "seq = seq + 10", "kind = 'warning'", "session_id = 'x'"):
        assert "does not change" in refused(store.path, f"UPDATE events SET {change} {named(session)};")


@pytest.mark.parametrize("state", [State.RENDERING, State.DONE])
async def test_an_event_is_not_deleted(store: Store, state: State) -> None:
    session = await walk(store, state)
    refused(store.path, f"DELETE FROM events {named(session)};")
    refused(store.path, f"DELETE FROM events {named(session)} AND seq = {session.head_seq};")


async def test_head_seq_is_not_assigned(store: Store) -> None:
    session = await walk(store, State.CACHE_WRITE)
    for value in ("head_seq + 1", "head_seq - 1", "0", "99"):
        complaint = refused(store.path, f"UPDATE sessions SET head_seq = {value} {named(session)};")
        assert "head_seq" in complaint


ASKED_FOR = (
    "session_id kind label operator equipment_id template_path created_at retry_of principal trace_id request"
)
PINNED = "destination destination_key project_key local_root project_short_id pinned"
ENDED = "error result ended_at tree findings blocked_on rendered"


@pytest.mark.parametrize("state", [State.VALIDATING, State.DONE])
async def test_what_was_asked_for_does_not_change(store: Store, state: State) -> None:
    session = await walk(store, state)
    for column in ASKED_FOR.split():
        refused(store.path, f"UPDATE sessions SET {column} = '\"x\"' {named(session)};")


@pytest.mark.parametrize("value", ["'\"x\"'", "NULL"])
async def test_what_was_pinned_does_not_change(store: Store, value: str) -> None:
    session = await walk(store, State.RENDERING)
    for column in PINNED.split():
        complaint = refused(store.path, f"UPDATE sessions SET {column} = {value} {named(session)};")
        assert "pinned" in complaint


@pytest.mark.parametrize("state", [state for state in STATES if state in {edge[0] for edge in EDGES}])
async def test_a_live_session_is_not_deleted(store: Store, state: State) -> None:
    session = await walk(store, state)
    for statement in (f"DELETE FROM sessions {named(session)};", "DELETE FROM sessions;"):
        assert "only a terminal session" in refused(store.path, statement)


@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.ABORTED])
async def test_a_terminal_session_does_not_change(store: Store, state: State) -> None:
    session = await walk(store, state)
    for column in ENDED.split():
        refused(store.path, f"UPDATE sessions SET {column} = '{{}}' {named(session)};")


@pytest.mark.parametrize("table", ["states", "edges"])
async def test_the_table_of_the_machine_is_closed(store: Store, table: str) -> None:
    column = "state" if table == "states" else "to_state"
    values = "'limbo', NULL, 0" if table == "states" else "'done', 'rendering'"
    for statement in (
        f"INSERT INTO {table} VALUES ({values});",
        f"INSERT OR REPLACE INTO {table} VALUES ({values});",
        f"UPDATE {table} SET {column} = 'limbo';",
        f"DELETE FROM {table};",
    ):
        assert "part of the schema" in refused(store.path, statement)


async def test_the_audit_is_only_added_to(store: Store) -> None:
    await walk(store, State.RENDERING)
    assert "does not change" in refused(store.path, "UPDATE audit SET principal = 'nobody';")
    assert "is kept" in refused(store.path, "DELETE FROM audit;")


async def test_a_cancel_is_not_taken_back(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    await store.request_cancel(session.session_id, requests.CancelBody(), CALLER)
    refused(store.path, f"UPDATE sessions SET cancel_requested_at = NULL, cancel = NULL {named(session)};")
    told = event(session, "phase", ',"phase":"running_plugins"')
    assert "only be aborted" in refused(store.path, told)


async def test_a_session_has_one_open_prompt(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    refused(
        store.path,
        "INSERT INTO prompts (prompt_id, session_id, plugin, reason, fields, status, asked_at)"
        f" VALUES ('second', '{session.session_id}', 'p', 'r', '[]', 'open', '{AT}');",
    )


async def test_a_question_does_not_change(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    for change in ("fields = '[]'", "plugin = 'x'", "reason = 'x'", "prompt_id = 'x'"):
        refused(store.path, f"UPDATE prompts SET {change} {named(session)};")


async def test_a_session_begins_at_the_beginning(store: Store) -> None:
    columns = (
        "session_id, kind, label, operator, equipment_id, template_path, created_at, updated_at, principal,"
        " trace_id, request"
    )
    values = f"'{'0' * 36}', 'project', 'l', 'o', 'e', 't', '{AT}', '{AT}', 'p', 't', '{{}}'"
    for extra, value in (("state", "'rendering'"), ("state, head_seq", "'pending', 3")):
        complaint = refused(
            store.path, f"INSERT INTO sessions ({columns}, {extra}) VALUES ({values}, {value});"
        )
        assert "begins as pending" in complaint


async def test_two_live_sessions_do_not_hold_one_destination(store: Store) -> None:
    first = await walk(store, State.RENDERING)
    second = await walk(store, State.VALIDATING)
    complaint = refused(
        store.path,
        f"UPDATE sessions SET pinned = '{{}}', destination = 'x', destination_key ="
        f" (SELECT destination_key FROM sessions {named(first)}) {named(second)};",
    )
    assert "destination" in complaint


# An INSERT OR REPLACE deletes what is in its way without asking the guards of DELETE.


async def test_a_session_is_not_replaced(store: Store) -> None:
    for state in (State.RENDERING, State.DONE):
        session = await walk(store, state)
        columns = (
            "session_id, kind, run_kind, label, operator, equipment_id, template_path, created_at, updated_at,"
            " principal, trace_id, request"
        )
        refused(
            store.path,
            f"INSERT OR REPLACE INTO sessions ({columns}, state)"
            f" SELECT {columns}, 'pending' FROM sessions {named(session)};",
        )


async def test_a_session_is_not_pushed_from_its_destination(store: Store) -> None:
    holder = await walk(store, State.RENDERING)
    other = await walk(store, State.VALIDATING)
    key = f"(SELECT destination_key FROM sessions {named(holder)})"
    refused(store.path, f"UPDATE OR REPLACE sessions SET destination_key = {key} {named(other)};")
    columns = (
        "kind, run_kind, label, operator, equipment_id, template_path, created_at, updated_at, principal,"
        " trace_id, request"
    )
    refused(
        store.path,
        f"INSERT OR REPLACE INTO sessions (session_id, state, destination_key, {columns})"
        f" SELECT '{'0' * 36}', 'pending', {key}, {columns} FROM sessions {named(holder)};",
    )


async def test_an_event_is_not_replaced(store: Store) -> None:
    victim = await walk(store, State.RENDERING)
    session = await walk(store, State.CACHE_WRITE)
    told = event(session, "warning", ',"phase":"writing_cache","message":"m","code":"c"')
    refused(
        store.path,
        told.replace("INSERT INTO events (", "INSERT OR REPLACE INTO events (position, ").replace(
            "VALUES (", f"VALUES ((SELECT min(position) FROM events {named(victim)}), "
        ),
    )


async def test_a_prompt_is_not_replaced(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    assert session.prompt is not None
    for prompt_id in (session.prompt.prompt_id, "another"):
        refused(
            store.path,
            "INSERT OR REPLACE INTO prompts (prompt_id, session_id, plugin, reason, fields, status, asked_at)"
            f" VALUES ('{prompt_id}', '{session.session_id}', 'p', 'r', '[]', 'open', '{AT}');",
        )


async def test_a_line_of_the_audit_is_not_replaced(store: Store) -> None:
    await walk(store, State.RENDERING)
    refused(
        store.path,
        "INSERT OR REPLACE INTO audit (entry, at, principal, command, trace_id, details)"
        " SELECT entry, at, 'nobody', command, trace_id, details FROM audit;",
    )


def _again(verb: str, ordinal: int) -> str:
    """The statement that tells of a plugin once more."""
    rest = "version, status, message, files_affected, duration_ms, exit_code, peak_memory_mb, ended_at"
    return f"{verb} INTO plugin_runs SELECT session_id, {ordinal}, 'other', {rest} FROM plugin_runs"


async def _with_a_plugin_through(store: Store) -> Session:
    return await store.record(await walk(store, State.PLUGIN_PASS), RAN)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE plugin_runs SET status = 'failed'",
        "DELETE FROM plugin_runs",
        _again("INSERT OR REPLACE", 1),
        _again("INSERT", 3),
    ],
)
async def test_what_became_of_a_plugin_is_not_changed(store: Store, statement: str) -> None:
    await _with_a_plugin_through(store)
    refused(store.path, f"{statement};")


async def test_a_plugin_is_through_in_the_plugin_pass_only(store: Store) -> None:
    session = await _with_a_plugin_through(store)
    await store.record(session, lifecycle.Transformed())
    assert "plugin_pass" in refused(store.path, _again("INSERT", 2) + ";")


async def test_an_open_question_is_not_deleted(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    refused(store.path, f"DELETE FROM prompts {named(session)};")


async def test_a_session_that_does_not_ask_gets_no_question(store: Store) -> None:
    for state in (State.RENDERING, State.SYNC_QUEUED, State.DONE):
        session = await walk(store, state)
        refused(
            store.path,
            "INSERT INTO prompts (prompt_id, session_id, plugin, reason, fields, status, asked_at)"
            f" VALUES ('{state}', '{session.session_id}', 'p', 'r', '[]', 'open', '{AT}');",
        )


async def test_a_session_does_not_ask_without_a_question(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    refused(store.path, event(session, "input_required", ',"fields":[],"reason":"r","plugin":"p"'))


async def test_a_session_does_not_go_on_with_an_open_question(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    refused(store.path, event(session, "phase", ',"phase":"running_plugins"'))


async def test_an_answer_is_to_a_question_that_is_open(store: Store) -> None:
    for state in (State.PLUGIN_PASS, State.INPUT_REQUIRED):
        session = await walk(store, state)
        refused(store.path, event(session, "input_received", ',"prompt_id":"another","plugin":"p"'))


@pytest.mark.parametrize("status", ["answered", "withdrawn"])
async def test_a_question_is_not_closed_while_its_session_waits(store: Store, status: str) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    closed = f"status = '{status}', answered_at = iif('{status}' = 'answered', '{AT}', NULL)"
    refused(store.path, f"UPDATE prompts SET {closed} {named(session)};")


@pytest.mark.parametrize("keys", ["ON", "OFF"])
@pytest.mark.parametrize("state", [State.DONE, State.FAILED, State.ABORTED])
async def test_pruning_a_terminal_session_takes_its_companions(store: Store, state: State, keys: str) -> None:
    session, _ = await store.create(run_body(), CALLER, idempotency_key="key")
    session = await store.record(session, accepted())
    session = await store.record(session, lead_to(State.PLUGIN_PASS))
    session = await store.record(session, RAN)
    session = await store.record(session, asked())
    if state is State.DONE:
        assert session.prompt is not None
        body = requests.ResumeBody(extra_inputs={"dose": 1}, prompt_id=session.prompt.prompt_id)
        session = await store.answer(session.session_id, body, CALLER)
        for step in (State.CACHE_WRITE, State.POST_VALIDATE, State.SYNC_QUEUED):
            session = await store.record(session, lead_to(step))
    await store.record(session, lead_to(state))
    neighbour = await walk(store, State.DONE)
    there = [table for table in COMPANIONS if rows(store.path, f"SELECT 1 FROM {table} {named(session)}")]
    assert set(COMPANIONS) - set(there) <= ({"copy_jobs"} if state is not State.DONE else set())
    kept = len(rows(store.path, f"SELECT 1 FROM events {named(neighbour)}"))
    done = shell(store.path, f"PRAGMA foreign_keys={keys}; DELETE FROM sessions {named(session)};")
    assert (done.returncode, done.stderr) == (0, "")
    assert not [
        table
        for table in ("sessions", *COMPANIONS)
        if rows(store.path, f"SELECT 1 FROM {table} {named(session)}")
    ]
    assert len(rows(store.path, f"SELECT 1 FROM events {named(neighbour)}")) == kept
    assert rows(store.path, f"SELECT 1 FROM audit {named(session)}")
    assert rows(store.path, "PRAGMA foreign_key_check") == []


async def test_the_read_only_shell_cannot_write(store: Store) -> None:
    assert "readonly" in shell(store.path, "INSERT INTO store_facts VALUES ('a', 'b');", "-readonly").stderr
