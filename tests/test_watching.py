"""What a client that watches is sent: over a WebSocket, as server-sent events, and in pages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from app.demo import laboratory
from app.sessions.session import Session
from app.web import events
from tests.held import Held, accepted, frames, heard, holding
from tests.service import body, running

SSE = {"Accept": "text/event-stream"}


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[Held]:
    async with holding(tmp_path) as service:
        yield service


def of(session: Session, query: str = "") -> str:
    return f"/sessions/{session.session_id}/events{query}"


def seqs(found: list[dict[str, Any]]) -> list[int]:
    return [frame["seq"] for frame in found]


async def close_of(socket: ClientConnection) -> tuple[int | None, str | None]:
    async with asyncio.timeout(20):
        await socket.wait_closed()
    return socket.close_code, socket.close_reason


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_viewer_gets_the_history_then_the_live_events_and_a_normal_close(held: Held) -> None:
    session = await held.at_plugins()
    async with held.socket(of(session, "?after=0")) as socket:
        history = await heard(socket, session.head_seq)
        await held.done(session)
        live = await frames(socket)
    assert seqs(history + live) == list(range(1, len(history + live) + 1))
    assert [frame["phase"] for frame in history] == [
        "validating_inputs",
        "rendering_template",
        "running_plugins",
    ]
    assert live[-1]["kind"] == "done" and socket.close_code == 1000


async def test_a_viewer_who_comes_late_to_an_ended_session_gets_all_of_it(held: Held) -> None:
    session = await held.failed(await held.at_plugins())
    async with held.socket(of(session, "?after=0")) as socket:
        found = await frames(socket)
    assert seqs(found) == list(range(1, session.head_seq + 1)) and socket.close_code == 1000
    assert found[-1]["kind"] == "failed" and found[-1]["phase"] == "running_plugins"


async def test_a_client_that_comes_back_goes_on_exactly_after_its_cursor(held: Held) -> None:
    session = await held.done(await held.progressed(await held.at_plugins(), 1500))
    found: list[int] = []
    for _ in range(3):
        async with held.socket(of(session, f"?after={len(found)}")) as socket:
            found += seqs(await heard(socket, 333))
            socket.transport.abort()
    async with held.socket(of(session, f"?after={len(found)}")) as socket:
        found += seqs(await frames(socket))
    assert found == list(range(1, session.head_seq + 1))


async def test_frames_are_sent_byte_for_byte_as_they_were_stored(held: Held) -> None:
    session = await held.done(await held.at_plugins())
    stored = [frame.data for frame in await held.store.frames_after(session.session_id, 0, 100)]
    async with held.socket(of(session)) as socket:
        assert [frame async for frame in socket] == stored
    async with held.http() as http:
        page = (await http.get(of(session))).content
    assert page.startswith(b'{"events":[' + b",".join(stored) + b"]")


async def test_frames_come_as_text_for_a_client_that_asks_for_it(held: Held) -> None:
    session = await held.failed(await held.created())
    async with held.socket(of(session, "?frames=text")) as socket:
        assert all(isinstance(frame, str) for frame in [frame async for frame in socket])


async def test_markers_say_hello_first_and_caught_up_once_before_the_live_events(held: Held) -> None:
    session = await held.at_plugins()
    async with held.socket(of(session, "?after=1&markers=true")) as socket:
        first = await heard(socket, 4)
        await held.done(session)
        rest = await frames(socket)
    epoch = held.store.epoch
    assert first[0] == {"kind": "hello", "epoch": epoch, "head_seq": 3, "after": 1}
    assert seqs(first[1:3]) == [2, 3] and first[3] == {"kind": "caught_up", "seq": 3}
    assert "caught_up" not in {frame["kind"] for frame in rest}


async def test_markers_say_caught_up_at_the_end_of_an_ended_session_too(held: Held) -> None:
    session = await held.failed(await held.created())
    async with held.socket(of(session, "?after=0&markers=true")) as socket:
        found = await frames(socket)
    assert [frame["kind"] for frame in found] == ["hello", "phase", "failed", "caught_up"]


async def test_a_client_that_has_had_the_terminal_event_is_closed_at_once(held: Held) -> None:
    session = await held.failed(await held.created())
    async with held.socket(of(session, f"?after={session.head_seq}&markers=true")) as socket:
        found = await frames(socket)
    assert [frame["kind"] for frame in found] == ["hello", "caught_up"] and socket.close_code == 1000


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("?after=-1", 4400),
        ("?after=", 4400),
        ("?after=two", 4400),
        ("?after=1.0", 4400),
        ("?after=%D9%A1", 4400),
        ("?after=2", 4409),
        ("?after=" + "9" * 4000, 4409),
        ("?after=" + "9" * 5000, 4400),
        ("?after=0&epoch=another", 4409),
    ],
)
async def test_a_cursor_that_cannot_be_is_refused_after_the_handshake(
    held: Held, query: str, code: int
) -> None:
    session = await held.created()
    async with held.socket(of(session, query)) as socket:
        found, reason = await close_of(socket)
    assert found == code and reason


async def test_an_unknown_session_is_told_by_4404(held: Held) -> None:
    async with held.socket("/sessions/0198c6a0-0000-7000-8000-000000000000/events") as socket:
        assert await close_of(socket) == (4404, "No session has this id.")


async def test_the_epoch_that_a_client_sends_back_is_accepted(held: Held) -> None:
    session = await held.failed(await held.created())
    async with held.socket(of(session, f"?after=1&epoch={held.store.epoch}")) as socket:
        assert seqs(await frames(socket)) == [2]


async def test_a_client_without_a_cursor_is_not_asked_what_was_answered(held: Held) -> None:
    session = await held.answered(await held.asking(prompt_id="settled"))
    session = await held.failed(await held.asking(session, prompt_id="withdrawn"))
    async with held.socket(of(session)) as old, held.socket(of(session, "?after=0")) as new:
        without, whole = await frames(old), await frames(new)
    assert [frame["kind"] for frame in whole].count("input_required") == 2
    assert without == [frame for frame in whole if frame["kind"] != "input_required"]


async def test_a_client_without_a_cursor_is_asked_what_is_open(held: Held) -> None:
    session = await held.answered(await held.asking(prompt_id="settled"))
    session = await held.asking(session, prompt_id="open")
    async with held.socket(of(session)) as socket:
        found = await heard(socket, session.head_seq - 1)
    assert [frame.get("prompt_id") for frame in found if frame["kind"] == "input_required"] == ["open"]


async def test_every_one_of_many_viewers_sees_all_of_it(held: Held) -> None:
    session = await held.at_plugins()

    async def watch() -> list[int]:
        async with held.socket(of(session, "?after=0")) as socket:
            return seqs(await frames(socket))

    watching = [asyncio.create_task(watch()) for _ in range(20)]
    for _ in range(50):
        session = await held.progressed(session, 5)
    session = await held.done(session)
    assert await asyncio.gather(*watching) == [list(range(1, session.head_seq + 1))] * 20


async def test_a_slow_viewer_loses_nothing_and_holds_nobody_up(held: Held) -> None:
    session = await held.at_plugins()
    async with held.socket(of(session, "?after=0"), max_queue=1) as slow:
        await slow.recv()
        session = await held.done(await held.warned(session, 5000))
        async with held.socket(of(session, "?after=0")) as quick:
            assert len(await frames(quick)) == session.head_seq
        assert seqs(await frames(slow)) == list(range(2, session.head_seq + 1))


async def test_a_client_that_leaves_is_noticed(held: Held) -> None:
    session = await held.created()
    async with held.socket(of(session)) as socket:
        await socket.recv()
        await until(lambda: held.feed.followers == 1)
        socket.transport.abort()
        await until(lambda: held.feed.followers == 0)


async def test_what_a_client_says_is_of_no_interest(held: Held) -> None:
    session = await held.created()
    async with held.socket(of(session)) as socket:
        await socket.send("hello")
        await socket.send(b"\x00")
        await held.failed(session)
        assert seqs(await frames(socket)) == [1, 2]


async def test_a_stopping_service_closes_with_1012(held: Held) -> None:
    session = await held.created()
    async with held.socket(of(session)) as one, held.socket("/events") as all_:
        await one.recv()
        held.feed.stop()
        assert [(await close_of(socket))[0] for socket in (one, all_)] == [1012, 1012]


async def test_a_store_that_cannot_be_read_closes_with_1011(held: Held) -> None:
    session = await held.created()
    with held.unreadable():
        async with held.socket(of(session)) as socket:
            code, reason = await close_of(socket)
    assert code == 1011 and reason


async def test_a_bug_in_a_stream_closes_with_1011_and_tells_nothing(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> list[object]:
        raise RuntimeError("/etc/secret")

    session = await held.created()
    monkeypatch.setattr(held.store, "frames_after", broken)
    async with held.socket(of(session)) as socket:
        assert await close_of(socket) == (1011, "The service failed.")


async def test_the_overview_tells_of_all_sessions_in_the_order_of_their_commits(held: Held) -> None:
    before = await held.created()
    async with held.socket("/events") as socket:
        await until(lambda: held.feed.followers == 1)
        first = await held.created()
        await held.failed(before)
        found = await heard(socket, 2)
    assert [each["session_id"] for each in found] == [first.session_id, before.session_id]
    assert [each["frame"]["kind"] for each in found] == ["phase", "failed"]
    assert found[1]["position"] > found[0]["position"]


async def test_the_overview_goes_on_after_a_position(held: Held) -> None:
    for _ in range(3):
        await held.created()
    async with held.socket("/events?after=0") as socket:
        found = await heard(socket, 3)
    async with held.socket(f"/events?after={found[1]['position']}&frames=text") as socket:
        again = await socket.recv()
    assert isinstance(again, str) and msgspec.json.decode(again) == found[2]


@pytest.mark.parametrize(("query", "code"), [("?after=x", 4400), ("?after=1", 4409), ("?epoch=x", 4409)])
async def test_the_overview_refuses_a_position_that_cannot_be(held: Held, query: str, code: int) -> None:
    async with held.socket(f"/events{query}") as socket:
        assert (await close_of(socket))[0] == code


async def test_a_page_has_at_most_so_many_events_and_says_where_the_head_is(held: Held) -> None:
    session = await held.done(await held.progressed(await held.at_plugins(), 1200))
    async with held.http() as http:
        first = (await http.get(of(session))).json()
        second = (
            await http.get(of(session), params={"after": first["events"][-1]["seq"], "limit": 7})
        ).json()
    assert seqs(first["events"]) == list(range(1, 1001))
    assert seqs(second["events"]) == list(range(1001, 1008))
    assert second["head_seq"] == session.head_seq and second["epoch"] == held.store.epoch


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("?after=-1", 422, "cursor_invalid"),
        ("?after=x", 422, "cursor_invalid"),
        ("?after=2", 409, "cursor_ahead"),
        ("?limit=0", 422, "validation_failed"),
        ("?limit=1001", 422, "validation_failed"),
        ("?limit=x", 422, "validation_failed"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(held: Held, query: str, status: int, code: str) -> None:
    session = await held.created()
    async with held.http() as http:
        answer = await http.get(of(session, query))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def streamed(http: httpx.AsyncClient, session: Session, cursor: str = "") -> tuple[int, list[str]]:
    """The status, and the lines of the stream until its end."""
    headers = SSE | ({"Last-Event-ID": cursor} if cursor else {})
    async with http.stream("GET", of(session), headers=headers) as answer:
        return answer.status_code, [line async for line in answer.aiter_lines()]


def ids(lines: list[str]) -> list[int]:
    return [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]


async def test_a_browser_is_told_by_server_sent_events_up_to_the_end(held: Held) -> None:
    session = await held.at_plugins()
    async with held.http() as http:
        watching = asyncio.create_task(streamed(http, session))
        await until(lambda: held.feed.followers == 1)
        session = await held.done(session)
        status, lines = await watching
    assert status == 200 and ids(lines) == list(range(1, session.head_seq + 1))
    told = [msgspec.json.decode(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert seqs(told) == ids(lines) and not any(line.startswith("event:") for line in lines)


async def test_a_browser_that_comes_back_goes_on_and_is_sent_away_at_the_end(held: Held) -> None:
    session = await held.done(await held.at_plugins())
    async with held.http() as http:
        assert ids((await streamed(http, session, "4"))[1]) == list(range(5, session.head_seq + 1))
        assert await streamed(http, session, str(session.head_seq)) == (204, [])


@pytest.mark.parametrize(
    ("cursor", "status", "code"), [("x", 422, "cursor_invalid"), ("9", 409, "cursor_ahead")]
)
async def test_a_stream_from_a_cursor_that_cannot_be_is_refused(
    held: Held, cursor: str, status: int, code: str
) -> None:
    async with held.http() as http:
        answer = await streamed(http, await held.created(), cursor)
    assert answer[0] == status and code in answer[1][0]


async def test_a_stream_on_which_nothing_happens_is_kept_alive(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE_SECONDS", 0.02)
    session = await held.created()
    async with held.http() as http, http.stream("GET", of(session), headers=SSE) as answer:
        lines = answer.aiter_lines()
        while await anext(lines) != ": still here":
            pass
        await held.failed(session)
        assert ids([line async for line in lines]) == [2]


async def test_a_browser_that_leaves_is_noticed(held: Held) -> None:
    session = await held.created()
    async with held.http() as http, http.stream("GET", of(session), headers=SSE):
        await until(lambda: held.feed.followers == 1)
    await until(lambda: held.feed.followers == 0)


async def test_a_stopping_service_ends_its_streams(held: Held) -> None:
    session = await held.created()
    async with held.http() as http:
        watching = asyncio.create_task(streamed(http, session))
        await until(lambda: held.feed.followers == 1)
        held.feed.stop()
        assert ids((await watching)[1]) == [1]


async def test_head_of_a_stream_ends_with_its_headers(held: Held) -> None:
    session = await held.created()
    async with held.http() as http:
        answer = await http.head(of(session), headers=SSE)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    await until(lambda: held.feed.followers == 0)


async def test_a_session_that_is_let_in_while_it_is_watched_is_told_at_once(held: Held) -> None:
    session = await held.created()
    async with held.socket(of(session, "?after=1")) as socket:
        await until(lambda: held.feed.followers == 1)
        await held.store.record(session, accepted())
        assert (await heard(socket, 1))[0]["phase"] == "rendering_template"


def test_a_service_that_is_terminated_tells_its_viewers_to_come_back(tmp_path: Path) -> None:
    with running(laboratory.build(tmp_path), "--hold") as service, service.http() as http:
        session_id = http.post("/sessions", json=body(tmp_path, "project")).json()["session_id"]
        path = f"/sessions/{session_id}/events"
        url = service.url.replace("http", "ws", 1) + "/api/v1" + path
        with connect(url, proxy=None) as viewer, http.stream("GET", path, headers=SSE) as stream:
            viewer.recv(timeout=20)
            lines = stream.iter_lines()
            assert next(lines) == "id: 1"
            assert service.stop() == 0
            assert "id: 2" not in list(lines)
            with pytest.raises(ConnectionClosed):
                viewer.recv(timeout=20)
            assert viewer.close_code in (1001, 1012)


def test_a_real_creation_is_told_from_its_first_event_to_its_last(tmp_path: Path) -> None:
    with running(laboratory.build(tmp_path)) as service, service.http() as http:
        url = service.url.replace("http", "ws", 1) + "/api/v1"
        with connect(f"{url}/events", proxy=None) as overview:
            session_id = http.post("/sessions", json=body(tmp_path, "project")).json()["session_id"]
            with connect(f"{url}/sessions/{session_id}/events", proxy=None) as viewer:
                told = [msgspec.json.decode(frame) for frame in viewer]
            assert viewer.close_code == 1000 and seqs(told) == list(range(1, len(told) + 1))
            seen = [msgspec.json.decode(overview.recv(timeout=20)) for _ in told]
    phases = [frame["phase"] for frame in told if frame["kind"] == "phase"]
    assert phases == [
        "validating_inputs",
        "rendering_template",
        "running_plugins",
        "writing_cache",
        "validating_post_creation",
        "queueing_nas_sync",
    ]
    assert told[-1]["kind"] == "done" and Path(told[-1]["result"]["path"]).is_dir()
    assert [each["frame"] for each in seen] == told
