"""Followers of a history: whenever they come and however slow they are, all see the same, whole and in order."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest

from app.sessions import lifecycle
from app.sessions import store as store_module
from app.sessions.feed import PAGE, PAGE_BYTES, Feed, Stopping
from app.sessions.lifecycle import State
from app.sessions.session import Frame, Session
from app.sessions.store import Store
from tests.conftest import CALLER, SECONDS, accepted, lead_to, rows, run_body, soon, walk


@pytest.fixture
def feed(store: Store) -> Feed:
    return Feed(store)


async def seen(pages: AsyncIterator[list[Frame]]) -> list[Frame]:
    """All that a follower gets until its stream ends."""
    return [frame async for page in pages for frame in page]


async def watched(feed: Feed, session: Session, cursor: int = 0) -> list[Frame]:
    return await seen(feed.follow(session.session_id, cursor))


async def caught_up(pages: AsyncIterator[list[Frame]]) -> list[Frame]:
    """The frames until the page that says that the history has been told."""
    frames: list[Frame] = []
    async for page in pages:
        if not page:
            return frames
        frames += page
    raise AssertionError("the stream ended before it had caught up")


async def progress(store: Store, session: Session, steps: int) -> Session:
    for number in range(steps):
        session = await store.record(session, lifecycle.Progressed(current=number, total=steps))
    return session


async def waiting(feed: Feed, followers: int) -> None:
    """Until so many follow."""
    async with asyncio.timeout(SECONDS):
        while feed.followers != followers:
            await asyncio.sleep(0)


def stored(store: Store, session: Session) -> list[bytes]:
    told = rows(store.path, "SELECT frame FROM events WHERE session_id = ? ORDER BY seq", session.session_id)
    return [frame.encode() for (frame,) in told]


async def test_early_middle_and_late_followers_see_the_same(store: Store, feed: Feed) -> None:
    session, _ = await store.create(run_body(), CALLER)
    early = [asyncio.create_task(watched(feed, session)) for _ in range(5)]
    await waiting(feed, 5)
    session = await progress(store, await store.record(session, accepted()), 20)
    middle = [asyncio.create_task(watched(feed, session)) for _ in range(5)]
    await waiting(feed, 10)
    session = await progress(store, session, 20)
    session = await store.record(session, lead_to(State.FAILED))
    late = [asyncio.create_task(watched(feed, session)) for _ in range(5)]
    histories = await soon(asyncio.gather(*early, *middle, *late))
    told = stored(store, session)
    assert len(told) == 43
    assert all([frame.data for frame in history] == told for history in histories)
    assert feed.followers == 0


@pytest.mark.parametrize("goal", [State.DONE, State.FAILED, State.ABORTED])
async def test_a_stream_ends_after_the_terminal_event(store: Store, feed: Feed, goal: State) -> None:
    """A viewer of a failed session of the replaced service waited for ever."""
    session = await walk(store, goal)
    frames = await soon(watched(feed, session))
    assert frames[-1].kind == ("done" if goal is State.DONE else "failed")
    assert [frame.seq for frame in frames] == list(range(1, session.head_seq + 1))


async def test_who_comes_back_goes_on_exactly_there(store: Store, feed: Feed) -> None:
    session = await store.record(
        await progress(store, await walk(store, State.RENDERING), 30), lead_to(State.FAILED)
    )
    whole = await soon(watched(feed, session))
    for cursor in range(session.head_seq):
        assert await soon(watched(feed, session, cursor)) == whole[cursor:]


async def test_the_end_of_the_history_is_said_once(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    async with aclosing(feed.follow(session.session_id, 0)) as pages:
        assert [frame.seq for frame in await soon(caught_up(pages))] == [1, 2]
        await store.record(session, lead_to(State.FAILED))
        rest = [page async for page in pages]
    assert [[frame.seq for frame in page] for page in rest] == [[3]]


async def test_a_long_history_comes_in_pages(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    steps = [lifecycle.Progressed(current=number, total=1200) for number in range(1200)]
    session = await store.record(session, *steps)
    session = await store.record(session, lead_to(State.FAILED))
    pages = [page async for page in feed.follow(session.session_id, 0)]
    assert all(len(page) <= PAGE for page in pages)
    assert [frame.seq for page in pages for frame in page] == list(range(1, 1204))


async def test_no_more_is_held_for_a_follower_than_a_page_has_room_for(store: Store, feed: Feed) -> None:
    question = msgspec.Raw(b'{"id": "lot", "label": "%s"}' % (b"x" * 100_000))
    for number in range(30):
        session = await walk(store, State.PLUGIN_PASS)
        asked = lifecycle.Asked(prompt_id=str(number), plugin="p", file=None, reason="?", fields=(question,))
        await store.record(session, asked)
    told = rows(store.path, "SELECT frame FROM events ORDER BY position")
    pages = list[list[Frame]]()
    async with aclosing(feed.follow_all(0)) as following:
        while sum(map(len, pages)) < len(told):
            pages.append(await anext(following))
    sizes = [sum(len(frame.data) for frame in page) for page in pages]
    assert max(sizes) < PAGE_BYTES + 101_000
    assert [frame.data.decode() for page in pages for frame in page] == [frame for (frame,) in told]


@pytest.mark.parametrize("cached", [store_module.CACHED_BYTES, 3000], ids=["from memory", "from disk"])
async def test_there_is_no_gap_under_load(
    store: Store, feed: Feed, monkeypatch: pytest.MonkeyPatch, cached: int
) -> None:
    """Some come late, some dawdle, and eight sessions are written at once."""
    monkeypatch.setattr(store_module, "CACHED_BYTES", cached)
    chosen = random.Random(11)
    lives = [await walk(store, State.RENDERING) for _ in range(8)]

    async def live(session: Session) -> None:
        await store.record(await progress(store, session, 40), lead_to(State.FAILED))

    async def dawdle(session: Session, turns: int) -> list[Frame]:
        for _ in range(turns):
            await asyncio.sleep(0)
        frames: list[Frame] = []
        async for page in feed.follow(session.session_id, 0):
            frames += page
            for _ in range(turns):
                await asyncio.sleep(0)
        return frames

    viewers = [dawdle(session, chosen.randrange(60)) for session in lives for _ in range(4)]
    watching = asyncio.gather(*viewers)
    await soon(asyncio.gather(*(live(session) for session in lives)))
    for history in await soon(watching):
        assert [frame.seq for frame in history] == list(range(1, 44))
        assert len({frame.session_id for frame in history}) == 1


async def test_what_is_committed_while_a_follower_reads_is_not_slept_through(
    store: Store, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await walk(store, State.RENDERING)
    read = store.frames_after
    in_vain = 0

    async def read_and_be_overtaken(session_id: str, cursor: int, limit: int) -> list[Frame]:
        nonlocal in_vain
        page = await read(session_id, cursor, limit)
        if not page:
            in_vain += 1
            if in_vain == 2:  # the first time, the end of the history is said
                await store.record(session, lead_to(State.FAILED))
        return page

    monkeypatch.setattr(store, "frames_after", read_and_be_overtaken)
    assert [frame.seq for frame in await soon(watched(feed, session, 2))] == [3]


async def test_a_slow_follower_holds_up_nobody_and_misses_nothing(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    async with aclosing(feed.follow(session.session_id, 0)) as slow:
        first = await anext(slow)
        quick = asyncio.create_task(watched(feed, session))
        session = await store.record(await progress(store, session, 100), lead_to(State.FAILED))
        assert len(await soon(quick)) == session.head_seq
        assert first + [frame async for page in slow for frame in page] == await quick


async def test_who_leaves_is_forgotten(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    followers = [asyncio.create_task(watched(feed, session)) for _ in range(10)]
    await waiting(feed, 10)
    for follower in followers:
        follower.cancel()
    await asyncio.wait(followers)
    await waiting(feed, 0)
    ended = await store.record(session, lead_to(State.FAILED))
    assert len(await soon(watched(feed, ended))) == 3


async def test_stopping_ends_those_who_wait(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    followers = [asyncio.create_task(watched(feed, session)) for _ in range(5)]
    overview = asyncio.create_task(seen(feed.follow_all(0)))
    await waiting(feed, 6)
    feed.stop()
    outcomes = await soon(asyncio.gather(*followers, overview, return_exceptions=True))
    assert [type(outcome) for outcome in outcomes] == [Stopping] * 6
    assert feed.followers == 0


async def test_stopping_does_not_wait_for_the_whole_history(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    steps = [lifecycle.Progressed(current=number, total=1) for number in range(3 * PAGE)]
    session = await store.record(session, *steps)
    async with aclosing(feed.follow(session.session_id, 0)) as pages:
        assert len(await anext(pages)) == PAGE
        feed.stop()
        with pytest.raises(Stopping):
            await anext(pages)


async def test_who_comes_while_the_service_stops_is_turned_away(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)
    feed.stop()
    with pytest.raises(Stopping):
        await soon(watched(feed, session))
    with pytest.raises(Stopping):
        await soon(seen(feed.follow_all(0)))


async def test_the_overview_tells_every_session_in_commit_order(store: Store, feed: Feed) -> None:
    before = await walk(store, State.DONE)
    start = store.head_position
    overview = feed.follow_all(start)
    watching = asyncio.create_task(take(overview, 10 * 7))
    await waiting(feed, 1)
    await soon(asyncio.gather(*(walk(store, State.DONE) for _ in range(10))))
    frames = await soon(watching)
    assert [frame.position for frame in frames] == list(range(start + 1, start + 71))
    assert before.session_id not in {frame.session_id for frame in frames}
    for session_id in {frame.session_id for frame in frames}:
        seqs = [frame.seq for frame in frames if frame.session_id == session_id]
        assert seqs == list(range(1, 8))


async def take(pages: AsyncIterator[list[Frame]], count: int) -> list[Frame]:
    frames: list[Frame] = []
    async for page in pages:
        frames += page
        if len(frames) >= count:
            return frames
    raise AssertionError("the stream ended")


async def test_nothing_is_seen_before_it_is_on_disk(store: Store, feed: Feed) -> None:
    session = await walk(store, State.RENDERING)

    async def compare() -> int:
        count = 0
        async for page in feed.follow(session.session_id, 0):
            on_disk = stored(store, session)
            for frame in page:
                assert on_disk[frame.seq - 1] == frame.data
                count += 1
        return count

    watching = asyncio.create_task(compare())
    ended = await store.record(await progress(store, session, 20), lead_to(State.FAILED))
    assert await soon(watching) == ended.head_seq
