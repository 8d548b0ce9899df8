"""The verbs of the store: a move and its events are one, races have one winner, and what was told stays told."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from app.errors import (
    CursorAhead,
    IdempotencyKeyReused,
    SessionAlreadyCompleted,
    SessionNotFound,
    SessionNotRetryable,
    TooLateToCancel,
)
from app.sessions import lifecycle
from app.sessions import store as store_module
from app.sessions.lifecycle import LIVE, State
from app.sessions.moves import DestinationHeld, Moved
from app.sessions.requests import CancelBody, CreateBody
from app.sessions.session import Caller, Frame, Query, Session
from app.sessions.store import Store
from tests.conftest import CALLER, accepted, asked, failed, lead_to, project_body, rows, run_body, soon, walk

PROJECT = "/data/confocal_01/proj-1"
MINUTE = timedelta(minutes=1)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def timed(tmp_path: Path, clock: Clock) -> AsyncIterator[Store]:
    """A store that lives by `clock`."""
    store = Store(f"sqlite:///{tmp_path / 'timed.sqlite3'}", on_broken=lambda broken: None, clock=clock)
    await store.open()
    yield store
    await store.close()


async def restarted(store: Store) -> None:
    await store.close()
    await store.open()


@asynccontextmanager
async def another(store: Store) -> AsyncIterator[Store]:
    """A store that remembers nothing, on the same file."""
    await store.close()
    fresh = Store(f"sqlite:///{store.path}", on_broken=lambda broken: None)
    await fresh.open()
    try:
        yield fresh
    finally:
        await fresh.close()
        await store.open()


def ids(sessions: list[Session]) -> list[str]:
    return [session.session_id for session in sessions]


async def create(store: Store, body: CreateBody | None = None) -> Session:
    return (await store.create(body or run_body(), CALLER))[0]


# Creating


async def test_a_new_session_stands_at_the_gate_and_says_so(timed: Store) -> None:
    session, is_new = await timed.create(run_body(), CALLER)
    assert is_new and session.state is State.VALIDATING
    [frame] = await timed.frames_after(session.session_id, 0, 10)
    assert frame.data == (
        b'{"kind":"phase","seq":1,"at":"2026-01-02T03:04:05.678Z","phase":"validating_inputs"}'
    )


@pytest.mark.parametrize("body", [run_body(run_date="2026-01-02"), project_body()], ids=["run", "project"])
async def test_a_session_keeps_what_was_asked_for(store: Store, body: CreateBody) -> None:
    session = await create(store, body)
    assert session.request == body
    assert (session.label, session.operator, session.equipment_id) == (
        body.label,
        body.operator,
        body.equipment_id,
    )


@pytest.mark.parametrize(
    "text",
    ["", "a\x00b", "'; DROP TABLE sessions; --", "\u202egnp.exe", "🧫" * 50, "x" * 100_000, "%_\\", "\r\n\t"],
    ids=["empty", "nul", "quote", "rtl", "emoji", "long", "like", "white"],
)
async def test_any_text_comes_back_as_it_was(store: Store, text: str) -> None:
    values: dict[str, object] = {text: [text, {"deep": text}], "number": 10**30, "half": 0.5, "none": None}
    body = run_body(label=text, operator=text, objective=text, equipment_id=text, variables=values)
    session = await create(store, body)
    assert (session.request, session.label, session.operator) == (body, text, text)
    await restarted(store)
    assert await store.get(session.session_id) == session


async def test_ids_sort_by_the_time_of_creation(store: Store) -> None:
    made = [await create(store) for _ in range(20)]
    assert ids(made) == sorted(ids(made))


async def test_an_accepted_command_is_in_the_audit(store: Store, caller: Caller) -> None:
    session, _ = await store.create(run_body(), caller)
    audited = rows(store.path, "SELECT command, principal, operator, session_id, trace_id FROM audit")
    assert audited == [("create", caller.principal, "asmith", session.session_id, caller.trace_id)]


async def test_a_key_gives_the_same_session_as_it_stands_now(store: Store) -> None:
    first, _ = await store.create(run_body(), CALLER, idempotency_key="k")
    moved = await store.record(first, accepted())
    await restarted(store)
    assert await store.create(run_body(), CALLER, idempotency_key="k") == (moved, False)
    assert rows(store.path, "SELECT count(*) FROM audit") == [(1,)]


async def test_a_key_belongs_to_its_principal(store: Store) -> None:
    first, _ = await store.create(run_body(), CALLER, idempotency_key="k")
    other = Caller(principal="another", trace_id="t")
    second, is_new = await store.create(run_body(), other, idempotency_key="k")
    assert is_new and second.session_id != first.session_id


async def test_a_key_with_another_body_is_refused(store: Store) -> None:
    first, _ = await store.create(run_body(), CALLER, idempotency_key="k")
    for body in (run_body(label="Other"), run_body(variables={"a": None}), project_body()):
        with pytest.raises(IdempotencyKeyReused) as refused:
            await store.create(body, CALLER, idempotency_key="k")
        assert refused.value.details == {"session_id": first.session_id}
    assert rows(store.path, "SELECT count(*) FROM sessions") == [(1,)]


async def test_a_body_is_the_same_in_whatever_order_it_came(store: Store) -> None:
    first, _ = await store.create(run_body(variables={"a": 1, "b": 2}), CALLER, idempotency_key="k")
    second, _ = await store.create(run_body(variables={"b": 2, "a": 1}), CALLER, idempotency_key="k")
    assert first == second


async def test_twenty_creations_with_one_key_make_one_session(store: Store) -> None:
    outcomes = await soon(
        asyncio.gather(*(store.create(run_body(), CALLER, idempotency_key="k") for _ in range(20)))
    )
    assert len({session.session_id for session, _ in outcomes}) == 1
    assert [is_new for _, is_new in outcomes].count(True) == 1


# Moving


async def test_what_is_answered_is_what_is_stored(store: Store) -> None:
    for state in State:
        if state is not State.PENDING:
            session = await walk(store, state)
            assert await store.get(session.session_id) == session
            assert session.state is state


async def test_who_saw_an_older_state_is_told_so(store: Store) -> None:
    seen = await walk(store, State.RENDERING)
    moved = await store.record(seen, lead_to(State.PLUGIN_PASS))
    for outcome in (lead_to(State.PLUGIN_PASS), failed(), lifecycle.Warned(message="m", code="c")):
        with pytest.raises(Moved):
            await store.record(seen, outcome)
    assert await store.get(seen.session_id) == moved


async def test_a_recorded_cancel_stops_who_has_not_seen_it(store: Store) -> None:
    seen = await walk(store, State.RENDERING)
    cancelling = await store.request_cancel(seen.session_id, CancelBody(), CALLER)
    with pytest.raises(Moved):
        await store.record(seen, lead_to(State.PLUGIN_PASS))
    assert (await store.record(cancelling, lead_to(State.ABORTED))).state is State.ABORTED


async def test_of_twenty_moves_at_once_one_wins(store: Store) -> None:
    seen = await walk(store, State.RENDERING)
    moves = [store.record(seen, lead_to(State.PLUGIN_PASS)) for _ in range(20)]
    outcomes = await soon(asyncio.gather(*moves, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes].count(Session) == 1
    assert [type(outcome) for outcome in outcomes].count(Moved) == 19
    assert (await store.get(seen.session_id)).head_seq == seen.head_seq + 1


async def test_losers_do_not_hurt_those_who_are_written_with_them(store: Store) -> None:
    stale = await walk(store, State.RENDERING)
    await store.record(stale, lead_to(State.PLUGIN_PASS))
    fresh = [await walk(store, State.RENDERING) for _ in range(10)]
    crowd = [session for pair in zip(fresh, [stale] * 10, strict=True) for session in pair]
    moves = [store.record(session, lead_to(State.PLUGIN_PASS)) for session in crowd]
    outcomes = await soon(asyncio.gather(*moves, return_exceptions=True))
    assert [isinstance(outcome, Session) for outcome in outcomes] == [True, False] * 10


async def test_moves_that_are_recorded_together_stand_or_fall_together(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    with pytest.raises(lifecycle.IllegalMove):
        await store.record(session, lifecycle.Transformed(), lifecycle.Documented(), lifecycle.Transformed())
    assert await store.get(session.session_id) == session
    checked = lifecycle.Checked(findings=())
    session = await store.record(session, lifecycle.Transformed(), lifecycle.Documented(), checked)
    assert (session.state, session.head_seq) == (State.SYNC_QUEUED, 6)


async def test_a_move_of_nobody_is_refused(store: Store) -> None:
    session = await create(store)
    ghost = msgspec.structs.replace(session, session_id="0" * 36)
    with pytest.raises(Moved):
        await store.record(ghost, failed())
    with pytest.raises(SessionNotFound):
        await store.get(ghost.session_id)


async def test_a_move_ends_the_waiting_and_clears_the_deaths(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    blocked = lifecycle.Blocked(code="disk_full", message="Full.", since="a", retry_at="b")
    session = await store.record(session, blocked)
    assert session.blocked_on == {"code": "disk_full", "message": "Full.", "since": "a", "retry_at": "b"}
    again = msgspec.structs.replace(blocked, retry_at="c", again=True)
    silent = await store.record(session, again)
    assert silent.head_seq == session.head_seq
    assert silent.blocked_on is not None and silent.blocked_on["retry_at"] == "c"
    await restarted(store)
    [session] = await store.take_stock()
    assert session.step_deaths == 0, "what only waits has ended no service"
    await store.mark_driven(session.session_id)
    await restarted(store)
    [session] = await store.take_stock()
    assert session.step_deaths == 1
    moved = await store.record(session, lead_to(State.PLUGIN_PASS))
    assert (moved.blocked_on, moved.step_deaths) == (None, 0)


async def test_a_failure_says_where_the_rest_is(store: Store) -> None:
    session = await store.record(await walk(store, State.CACHE_WRITE), failed(partial_path="/data/rest"))
    assert session.partial_path == Path("/data/rest")
    assert session.error is not None and session.error.code == "render_failed"
    assert ids(await store.partials(ended_before="9999")) == [session.session_id]
    assert await store.partials(ended_before="2000") == []
    await store.forget_partial(session.session_id)
    assert await store.partials(ended_before="9999") == []


async def test_the_log_of_the_render_can_be_read(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    [line] = await store.log_after(session.session_id, 0, 10)
    assert (line.source, line.level, line.text) == ("render", "info", "rendered")
    assert await store.log_after(session.session_id, line.line, 10) == []


async def test_the_manifest_is_that_of_the_newest_rendering(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    assert await store.manifest(session.session_id) == "0" * 64


# Destinations


async def test_two_live_sessions_do_not_share_a_folder(store: Store) -> None:
    holder = await store.record(await create(store), accepted(f"{PROJECT}/run_1"))
    other = await create(store)
    with pytest.raises(DestinationHeld) as held:
        await store.record(other, accepted(f"{PROJECT}/run_1"))
    assert held.value.session_id == holder.session_id
    assert await store.get(other.session_id) == other
    assert (await store.record(other, accepted(f"{PROJECT}/run_2"))).state is State.RENDERING


async def test_of_ten_who_want_a_folder_at_once_one_gets_it(store: Store) -> None:
    wanting = [await create(store) for _ in range(10)]
    outcomes = await soon(
        asyncio.gather(
            *(store.record(session, accepted(f"{PROJECT}/run_1")) for session in wanting),
            return_exceptions=True,
        )
    )
    assert [type(outcome) for outcome in outcomes].count(Session) == 1
    assert [type(outcome) for outcome in outcomes].count(DestinationHeld) == 9


async def test_a_project_that_is_being_made_is_closed_to_runs(store: Store) -> None:
    await store.record(await create(store, project_body()), accepted(PROJECT, project=PROJECT))
    with pytest.raises(DestinationHeld):
        await store.record(await create(store), accepted(f"{PROJECT}/run_1"))


async def test_a_project_is_not_made_over_a_run_that_is(store: Store) -> None:
    await store.record(await create(store), accepted(f"{PROJECT}/run_1"))
    with pytest.raises(DestinationHeld):
        await store.record(await create(store, project_body()), accepted(PROJECT, project=PROJECT))


async def test_a_name_with_signs_of_a_pattern_holds_only_itself(store: Store) -> None:
    await store.record(await create(store), accepted("/data/proj_1/run", project="/data/proj_1"))
    other = await create(store, project_body())
    outcome = accepted("/data/proj-1", project="/data/proj-1")
    assert (await store.record(other, outcome)).state is State.RENDERING


@pytest.mark.parametrize("goal", [State.FAILED, State.ABORTED])
async def test_a_session_that_did_not_succeed_lets_its_folder_go(store: Store, goal: State) -> None:
    holder = await store.record(await create(store), accepted(f"{PROJECT}/run_1"))
    assert await store.held() == {f"{PROJECT}/run_1"}
    await store.record(holder, lead_to(goal))
    assert await store.held() == frozenset()
    other = await store.record(await create(store), accepted(f"{PROJECT}/run_1"))
    assert await store.holder(holder.session_id, f"{PROJECT}/run_1", PROJECT) == other.session_id
    assert await store.holder(other.session_id, f"{PROJECT}/run_1", PROJECT) is None


# Cancelling


async def test_a_second_cancel_joins_the_first(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    first = await store.request_cancel(session.session_id, CancelBody(discard_files=True), CALLER)
    second = await store.request_cancel(session.session_id, CancelBody(operator="other"), CALLER)
    assert first.cancel is not None and first.cancel.discard_files
    assert second == first
    assert rows(store.path, "SELECT count(*) FROM audit WHERE command = 'cancel'") == [(2,)]


async def test_a_cancel_comes_too_late_for_what_is_being_published(store: Store) -> None:
    session = await walk(store, State.SYNC_QUEUED)
    with pytest.raises(TooLateToCancel):
        await store.request_cancel(session.session_id, CancelBody(), CALLER)
    assert await store.get(session.session_id) == session


@pytest.mark.parametrize("goal", [State.DONE, State.FAILED, State.ABORTED])
async def test_what_has_ended_is_not_cancelled(store: Store, goal: State) -> None:
    session = await walk(store, goal)
    with pytest.raises(SessionAlreadyCompleted):
        await store.request_cancel(session.session_id, CancelBody(), CALLER)


async def test_a_cancel_survives_a_restart(store: Store) -> None:
    session = await walk(store, State.INPUT_REQUIRED)
    cancelling = await store.request_cancel(session.session_id, CancelBody(discard_files=True), CALLER)
    await restarted(store)
    [found] = await store.take_stock()
    assert found.cancel == cancelling.cancel and found.prompt is not None
    aborted = await store.record(found, lead_to(State.ABORTED))
    assert aborted.state is State.ABORTED and aborted.prompt is None


async def test_only_what_did_not_succeed_can_be_tried_again(store: Store) -> None:
    for state in State:
        if state is not State.PENDING:
            session = await walk(store, state)
            if state in (State.FAILED, State.ABORTED):
                assert await store.retryable(session.session_id) == session
            else:
                with pytest.raises(SessionNotRetryable):
                    await store.retryable(session.session_id)


# Restarts


async def test_a_restart_finds_every_live_session_oldest_first(store: Store) -> None:
    walked = [await walk(store, state) for state in State if state is not State.PENDING]
    await restarted(store)
    found = await store.take_stock()
    assert ids(found) == [session.session_id for session in walked if session.state in LIVE]


async def test_a_death_counts_for_those_that_were_driven(store: Store) -> None:
    running, waiting = await walk(store, State.RENDERING), await walk(store, State.INPUT_REQUIRED)
    await restarted(store)
    deaths = {session.session_id: session.step_deaths for session in await store.take_stock()}
    assert deaths == {running.session_id: 1, waiting.session_id: 0}
    await restarted(store)
    assert {session.step_deaths for session in await store.take_stock()} == {0, 1}


async def test_a_good_end_counts_for_nobody(store: Store) -> None:
    await walk(store, State.RENDERING)
    await store.mark_all_idle()
    await restarted(store)
    assert [session.step_deaths for session in await store.take_stock()] == [0]


async def test_who_was_driven_alone_is_the_only_suspect(store: Store) -> None:
    guilty, innocent = await walk(store, State.RENDERING), await walk(store, State.RENDERING)
    await store.record(guilty, lifecycle.Recovered(alone=True))
    await restarted(store)
    deaths = {session.session_id: session.step_deaths for session in await store.take_stock()}
    assert deaths == {guilty.session_id: 1, innocent.session_id: 0}


async def test_a_recovery_is_told_and_counted(store: Store) -> None:
    session = await store.record(await walk(store, State.RENDERING), lifecycle.Recovered())
    assert (session.state, session.recoveries, session.driven) == (State.RENDERING, 1, True)
    [frame] = await store.frames_after(session.session_id, session.head_seq - 1, 10)
    assert frame.kind == "recovered" and b'"state":"rendering"' in frame.data


async def test_a_root_that_was_noted_is_known(store: Store) -> None:
    assert not await store.knows_root(Path("/data"))
    await store.note_root(Path("/data"))
    await store.note_root(Path("/data"))
    await restarted(store)
    assert await store.knows_root(Path("/data")) and not await store.knows_root(Path("/other"))


# Looking


async def test_pages_hold_every_session_once_newest_first(store: Store) -> None:
    made = [await create(store) for _ in range(23)]
    found: list[str] = []
    before: str | None = None
    for size in (10, 10, 3):
        page, before = await store.search(Query(limit=10, before=before))
        assert len(page) == size
        found += ids(page)
    assert found == ids(made)[::-1] and before is None


async def test_a_page_that_is_full_and_last_has_no_next(store: Store) -> None:
    for _ in range(5):
        await create(store)
    assert (await store.search(Query(limit=5)))[1] is None


async def test_a_session_that_comes_while_paging_disturbs_nothing(store: Store) -> None:
    made = [await create(store) for _ in range(4)]
    _, following = await store.search(Query(limit=2))
    await create(store)
    page, _ = await store.search(Query(limit=2, before=following))
    assert ids(page) == ids(made)[1::-1]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (Query(state=(State.RENDERING,)), {"other project"}),
        (Query(state=(State.RENDERING, State.FAILED)), {"other project", "100% done"}),
        (Query(kind="project"), {"100_ done"}),
        (Query(equipment="EQ2"), {"100% done"}),
        (Query(project="PROJ-2"), {"other project"}),
        (Query(operator="bjones"), {"100_ done", "Label"}),
        (Query(label_prefix="100"), {"100% done", "100_ done"}),
        (Query(label_prefix="100%"), {"100% done"}),
        (Query(label_prefix="100_"), {"100_ done"}),
        (Query(label_prefix="%"), set()),
        (Query(label_prefix="Lab", operator="bjones"), {"Label"}),
        (Query(since="2026-01-02T03:07"), {"100_ done", "Label"}),
        (Query(until="2026-01-02T03:06"), {"100% done"}),
        (Query(since="2026-01-02T03:06", until="2026-01-02T03:08"), {"other project", "100_ done"}),
    ],
)
async def test_a_listing_is_narrowed_by_what_is_asked(
    timed: Store, clock: Clock, query: Query, found: set[str]
) -> None:
    clock.now += MINUTE
    await walk(timed, State.FAILED, run_body(label="100% done", equipment_id="EQ2"))
    clock.now += MINUTE
    body = run_body(label="other project", project_short_id="PROJ-2")
    session = await create(timed, body)
    other = lead_to(State.RENDERING)
    assert isinstance(other, lifecycle.Accepted)
    await timed.record(session, msgspec.structs.replace(other, project_short_id="PROJ-2"))
    clock.now += MINUTE
    await create(timed, project_body(label="100_ done", operator="bjones"))
    clock.now += MINUTE
    await create(timed, run_body(label="Label", operator="bjones", project_short_id="PROJ-9"))
    assert {session.label for session in (await timed.search(query))[0]} == found


async def test_operations_are_what_lives_and_what_failed_today(timed: Store, clock: Clock) -> None:
    await walk(timed, State.FAILED)
    clock.now += timedelta(hours=25)
    waiting = await walk(timed, State.INPUT_REQUIRED)
    failed_today = await walk(timed, State.FAILED)
    await walk(timed, State.DONE)
    await walk(timed, State.ABORTED)
    running = await walk(timed, State.RENDERING)
    clock.now += timedelta(hours=23)
    assert ids(await timed.operations()) == ids([waiting, failed_today, running])


async def test_sessions_are_counted_by_state(store: Store) -> None:
    for state in (State.RENDERING, State.RENDERING, State.DONE):
        await walk(store, state)
    await store.record(await walk(store, State.CACHE_WRITE), failed(partial_path="/data/rest"))
    blocked = lifecycle.Blocked(code="c", message="m", since="a", retry_at="b")
    await store.record(await walk(store, State.VALIDATING), blocked)
    assert await store.counts() == {
        "rendering": 2,
        "done": 1,
        "failed": 1,
        "validating": 1,
        "partial": 1,
        "blocked": 1,
    }


async def test_what_is_known_of_some_ids(store: Store) -> None:
    session = await create(store)
    assert await store.known([session.session_id, "0" * 36]) == {session.session_id: session}


async def test_warnings_are_told_again_in_the_result(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    for number in range(3):
        warned = lifecycle.Warned(message=f"m{number}", code="c", plugin="p" if number else None)
        session = await store.record(session, warned)
    assert await store.warnings(session.session_id, 2) == [
        {"code": "c", "message": "m0"},
        {"code": "c", "message": "m1", "plugin": "p"},
    ]


# Histories


async def test_a_cursor_beyond_the_history_is_noticed(store: Store) -> None:
    session = await walk(store, State.RENDERING)
    assert store.head_seq(session, 2) == 2
    with pytest.raises(CursorAhead) as ahead:
        store.head_seq(session, 3)
    assert ahead.value.details == {"head_seq": 2, "epoch": store.epoch}


async def long_history(store: Store, length: int) -> Session:
    session = await walk(store, State.RENDERING)
    progress = [lifecycle.Progressed(current=number, total=length) for number in range(length)]
    return await store.record(session, *progress)


async def slices(store: Store, session: Session) -> list[list[Frame]]:
    chosen = random.Random(7)
    cursors = [chosen.randrange(session.head_seq + 2) for _ in range(30)]
    return [await store.frames_after(session.session_id, cursor, 17) for cursor in (0, *cursors)]


async def test_memory_and_disk_tell_the_same_history(store: Store) -> None:
    session = await long_history(store, 60)
    from_memory = await slices(store, session)
    async with another(store) as fresh:
        assert await slices(fresh, session) == from_memory
    assert [frame.seq for frame in from_memory[0]] == list(range(1, 18))


async def test_what_memory_has_let_go_is_read_from_the_disk(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CACHED_BYTES", 2000)
    session, other = await long_history(store, 100), await long_history(store, 100)
    session = await store.record(session, lifecycle.Warned(message="late", code="c"))
    for one in (session, other):
        frames = await store.frames_after(one.session_id, 0, 1000)
        assert [frame.seq for frame in frames] == list(range(1, one.head_seq + 1))
        nearly = await store.frames_after(one.session_id, one.head_seq - 2, 1000)
        assert nearly == frames[-2:]


async def test_a_restarted_store_has_no_hole_between_disk_and_memory(store: Store) -> None:
    session = await long_history(store, 5)
    async with another(store) as fresh:
        session = await fresh.record(session, lifecycle.Warned(message="after", code="c"))
        frames = await fresh.frames_after(session.session_id, 0, 100)
    assert [frame.seq for frame in frames] == list(range(1, session.head_seq + 1))


async def test_all_histories_are_told_in_the_order_of_their_commits(store: Store) -> None:
    await soon(asyncio.gather(*(walk(store, State.DONE) for _ in range(10))))
    frames = await store.feed_after(0, 1000)
    assert [frame.position for frame in frames] == sorted(frame.position for frame in frames)
    assert len(frames) == 70 and store.head_position == frames[-1].position
    assert await store.feed_after(frames[30].position, 10) == frames[31:41]
    await restarted(store)
    assert store.head_position == frames[-1].position


async def test_a_bell_rings_for_its_session_and_for_those_who_hear_all(store: Store) -> None:
    first, second = await create(store), await create(store)
    with (
        store.bell(first.session_id) as one,
        store.bell(second.session_id) as other,
        store.bell(None) as all_,
    ):
        await store.record(first, accepted())
        assert (one.is_set(), other.is_set(), all_.is_set()) == (True, False, True)


async def test_no_bell_rings_for_what_was_refused(store: Store) -> None:
    seen = await create(store)
    await store.record(seen, accepted())
    with store.bell(None) as bell:
        with pytest.raises(Moved):
            await store.record(seen, accepted())
        assert not bell.is_set()


async def test_settled_prompts_are_those_that_wait_for_nothing(store: Store) -> None:
    session = await store.record(await walk(store, State.PLUGIN_PASS), asked("first"))
    assert await store.settled_prompts(session.session_id) == frozenset()
    await store.record(session, lead_to(State.FAILED))
    assert await store.settled_prompts(session.session_id) == {"first"}


async def test_a_frame_over_the_limit_leaves_nothing_behind(store: Store) -> None:
    session = await walk(store, State.PLUGIN_PASS)
    fields: list[dict[str, object]] = [{"id": f"f{number}", "label": "x" * 10_000} for number in range(30)]
    huge = asked("huge", *fields)
    with pytest.raises(Exception, match="CHECK constraint failed"):
        await store.record(session, huge)
    assert await store.get(session.session_id) == session


async def test_sixty_lives_at_once_leave_whole_histories(store: Store) -> None:
    states = [state for state in State if state is not State.PENDING] * 6
    walked = await soon(asyncio.gather(*(walk(store, state) for state in states)))
    for session in walked:
        frames = await store.frames_after(session.session_id, 0, 1000)
        assert [frame.seq for frame in frames] == list(range(1, session.head_seq + 1))
    assert rows(store.path, "SELECT sum(head_seq) - (SELECT count(*) FROM events) FROM sessions") == [(0,)]
