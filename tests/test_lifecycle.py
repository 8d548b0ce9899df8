"""The table of the state machine: what it allows, and that the store carries the same one."""

import itertools
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Integer, Text

from app import database
from app.sessions import lifecycle
from app.sessions.lifecycle import EDGES, LIVE, PHASES, TERMINAL, IllegalMove, Outcome, State
from app.sessions.store import Store
from tests.conftest import asked, cancelled, failed, lead_to, rows, walk

DIAGRAM = """
pending -> validating -> rendering -> plugin_pass -> input_required -> plugin_pass -> cache_write
cache_write -> post_validate -> sync_queued -> done
pending -> failed
validating -> failed
rendering -> failed
plugin_pass -> failed
input_required -> failed
cache_write -> failed
post_validate -> failed
sync_queued -> failed
pending -> aborted
validating -> aborted
rendering -> aborted
plugin_pass -> aborted
input_required -> aborted
cache_write -> aborted
post_validate -> aborted
"""
ON_THE_WIRE = {
    "validating": "validating_inputs",
    "rendering": "rendering_template",
    "plugin_pass": "running_plugins",
    "input_required": "input_required",
    "cache_write": "writing_cache",
    "post_validate": "validating_post_creation",
    "sync_queued": "queueing_nas_sync",
    "done": "done",
}
OUTSIDE_THE_VERBS = {"states", "edges", "alembic_version"}


def drawn() -> set[tuple[str, str]]:
    """The edges of the diagram."""
    chains = [line.split(" -> ") for line in DIAGRAM.strip().splitlines()]
    return {pair for chain in chains for pair in itertools.pairwise(chain)}


def moves() -> set[tuple[str, str]]:
    return {(str(before), str(after)) for (before, _), after in EDGES.items() if before is not after}


def answer(prompt_id: str) -> lifecycle.Answered:
    return lifecycle.Answered(
        prompt_id=prompt_id, plugin="staining", operator="asmith", values={}, digest="0" * 64
    )


def happenings(prompt_id: str = "?") -> tuple[Outcome, ...]:
    """One of each thing that can happen to a session; the answer is to `prompt_id`."""
    blocked = lifecycle.Blocked(code="disk_full", message="Full.", since="2026-01-01", retry_at="2026-01-02")
    answered = answer(prompt_id)
    remarks = (
        lifecycle.Recovered(),
        lifecycle.Progressed(current=1, total=2),
        lifecycle.Warned(message="Careful.", code="careful"),
        blocked,
    )
    ran = lifecycle.PluginRan(ordinal=1, total=1, plugin="staining", version="1", status="success")
    road = tuple(lead_to(state) for state in LIVE if state not in (State.PENDING, State.VALIDATING))
    return (lifecycle.Begun(), *road, lead_to(State.DONE), ran, answered, failed(), cancelled(), *remarks)


@pytest.fixture
def migrated(tmp_path: Path) -> Path:
    path = tmp_path / "fresh.sqlite3"
    database.prepare(path)
    return path


def test_the_table_draws_the_diagram() -> None:
    assert moves() == drawn()


def test_one_of_each_thing_that_can_happen_is_tried() -> None:
    assert {type(happening) for happening in happenings()} == set(lifecycle.Outcome.__subclasses__())


def test_every_state_has_the_name_that_clients_know() -> None:
    assert {str(state): phase for state, phase in PHASES.items()} == ON_THE_WIRE


def test_a_terminal_state_is_left_by_nothing() -> None:
    assert not [state for state, _ in EDGES if state in TERMINAL]
    assert {str(state) for state in TERMINAL} == {"done", "failed", "aborted"}


def test_a_remark_moves_nothing_and_can_be_made_in_every_live_state() -> None:
    remarks = (lifecycle.Recovered, lifecycle.Progressed, lifecycle.Warned, lifecycle.Blocked)
    assert all(EDGES[state, remark] is state for state in LIVE for remark in remarks)


def test_an_illegal_move_says_what_cannot_happen_where() -> None:
    with pytest.raises(IllegalMove, match="Published cannot happen in rendering"):
        lifecycle.after(State.RENDERING, lead_to(State.DONE))


def test_a_cancel_comes_too_late_once_publishing_is_committed() -> None:
    assert [str(state) for state in State if not lifecycle.cancellable(state)] == [
        "sync_queued",
        "done",
        "failed",
        "aborted",
    ]


def test_the_store_carries_the_same_edges(migrated: Path) -> None:
    assert set(rows(migrated, "SELECT from_state, to_state FROM edges")) == moves()


def test_the_store_carries_the_same_states_and_phases(migrated: Path) -> None:
    told = {(str(state), PHASES.get(state), int(state in TERMINAL)) for state in State}
    assert set(rows(migrated, "SELECT state, phase, terminal FROM states")) == told


def test_the_columns_that_the_code_names_are_those_of_the_migrated_schema(migrated: Path) -> None:
    named = {
        table.name: {
            (column.name, "TEXT" if isinstance(column.type, Text) else "INTEGER", column.primary_key)
            for column in table.columns
            if isinstance(column.type, Text | Integer)
        }
        for table in database.metadata.sorted_tables
    }
    with closing(sqlite3.connect(migrated)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM pragma_table_list WHERE type = 'table'")]
        there = {
            table: {
                (name, kind, key > 0)
                for name, kind, key in db.execute("SELECT name, type, pk FROM pragma_table_info(?)", (table,))
            }
            for table in tables
            if not table.startswith("sqlite_") and table not in OUTSIDE_THE_VERBS
        }
    assert named == there


def test_every_table_is_strict(migrated: Path) -> None:
    loose = "SELECT name FROM pragma_table_list WHERE type = 'table' AND strict = 0 AND schema = 'main'"
    kept = {name for (name,) in rows(migrated, loose) if not name.startswith("sqlite_")}
    assert kept == {"alembic_version"}


@pytest.mark.parametrize("state", [state for state in State if state is not State.PENDING])
async def test_whatever_happens_leads_where_the_table_says(store: Store, state: State) -> None:
    for number in range(len(happenings())):
        session = await walk(store, state)
        happening = happenings(session.prompt.prompt_id if session.prompt else "?")[number]
        if (state, type(happening)) in EDGES:
            moved = await store.record(session, happening)
            assert moved.state is EDGES[state, type(happening)]
            assert moved.state is state or moved.head_seq > session.head_seq


@pytest.mark.parametrize("state", [state for state in State if state is not State.PENDING])
async def test_what_cannot_happen_leaves_no_trace(store: Store, state: State) -> None:
    session = await walk(store, state)
    for happening in happenings():
        if (state, type(happening)) not in EDGES:
            with pytest.raises(IllegalMove):
                await store.record(session, happening)
    assert await store.get(session.session_id) == session
    assert len(await store.frames_after(session.session_id, 0, 100)) == session.head_seq


@pytest.mark.parametrize("state", [state for state in State if state is not State.PENDING])
async def test_what_is_told_of_a_state_is_its_phase(store: Store, state: State) -> None:
    session = await walk(store, state)
    [(frame,)] = rows(
        store.path,
        "SELECT frame FROM events WHERE session_id = ? ORDER BY seq DESC LIMIT 1",
        session.session_id,
    )
    newest = '"phase":"validating_inputs"' if state in (State.FAILED, State.ABORTED) else None
    assert (newest or f'"{PHASES[state]}"') in frame


async def test_a_prompt_leaves_and_comes_back_to_the_plugins(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    for prompt_id in ("first", "second"):
        session = await store.record(session, asked(prompt_id))
        assert session.prompt is not None and session.prompt.prompt_id == prompt_id
        session = await store.record(session, answer(prompt_id))
        assert session.state is State.PLUGIN_PASS and session.prompt is None
