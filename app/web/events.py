"""The history of one session: as a WebSocket, as server-sent events, or in pages.

All three send the stored frames, byte for byte. A client names the last `seq` that it has dealt with and
gets what came after it.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, cast

import msgspec
from litestar import Controller, MediaType, Request, Response, get, websocket
from litestar.di import NamedDependency
from litestar.params import FromPath, HeaderParameter, QueryParameter
from litestar.response import Stream

from app.errors import CursorAhead, CursorInvalid, StoreUnavailable
from app.sessions import events
from app.sessions.events import TERMINAL_KINDS
from app.sessions.feed import Feed, Stopping
from app.sessions.session import Frame, Session
from app.sessions.store import Store
from app.web import errors, sockets
from app.web.sockets import Frames, Socket

KEEP_ALIVE_SECONDS = 15.0

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

After = Annotated[
    str | None, QueryParameter(description="The last `seq` that the client has dealt with; 0 for none.")
]
LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID", description="What a browser says when it comes back; before `after`."
    ),
]
Limit = Annotated[int, QueryParameter(ge=1, le=1000, description="Events on the page.")]

AnyEvent = (
    events.Phase
    | events.Progress
    | events.InputRequired
    | events.InputReceived
    | events.Warning
    | events.Recovered
    | events.Done
    | events.Failed
)


class Page(msgspec.Struct, frozen=True):
    """Events in order. `head_seq` is the newest there is; `epoch` names this history of the store."""

    events: list[AnyEvent]
    head_seq: int
    epoch: str


class _StoredPage(msgspec.Struct, frozen=True):
    events: list[msgspec.Raw]
    head_seq: int
    epoch: str


class _Hello(msgspec.Struct, frozen=True, tag_field="kind", tag="hello"):
    epoch: str
    head_seq: int
    after: int


class _CaughtUp(msgspec.Struct, frozen=True, tag_field="kind", tag="caught_up"):
    seq: int


class _Prompted(msgspec.Struct, frozen=True):
    prompt_id: str


class Events(Controller):
    path = "/sessions/{session_id:str}/events"
    tags = ("events",)

    @websocket()
    async def watch(
        self,
        socket: Socket,
        session_id: FromPath[str],
        store: NamedDependency[Store],
        feed: NamedDependency[Feed],
    ) -> None:
        await sockets.serve(socket, _watched(socket, store, feed, session_id))

    @get(
        operation_id="read_events",
        responses=errors.responses(
            "validation_failed", "session_not_found", "cursor_invalid", "cursor_ahead", "store_unavailable"
        ),
    )
    async def read(
        self,
        request: Request[Any, Any, Any],
        session_id: FromPath[str],
        store: NamedDependency[Store],
        feed: NamedDependency[Feed],
        after: After = None,
        last_event_id: LastEventId = None,
        limit: Limit = 1000,
    ) -> Response[Page]:
        """A page of events; or, with `Accept: text/event-stream`, these and all that come, as server-sent events.

        The stream answers 204 when the client has had the terminal event already.
        """
        streamed = "text/event-stream" in request.headers.get("accept", "").lower()
        seq = cursor((last_event_id or after) if streamed else after) or 0
        session = await store.get(session_id)
        head = store.head_seq(session, seq)
        if streamed:
            return cast("Response[Page]", _stream(session, feed, seq))
        frames = await store.frames_after(session_id, seq, limit)
        newest = max([head, *(frame.seq for frame in frames)])
        page = _StoredPage([msgspec.Raw(frame.data) for frame in frames], newest, store.epoch)
        # The frames are not read to be written again: what was stored is what is sent.
        return cast("Response[Page]", Response(msgspec.json.encode(page), media_type=MediaType.JSON))


def cursor(given: str | None) -> int | None:
    """The cursor that a client names, None for none; CursorInvalid where it is no whole number."""
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,4000}", given):
        raise CursorInvalid
    return int(given)


def require_epoch(given: str | None, store: Store) -> None:
    if given is not None and given != store.epoch:
        raise CursorAhead("The history is another than the one of this epoch; start again from 0.")


def _is_over(session: Session, seq: int) -> bool:
    """Whether the client has had the terminal event; there will be no other."""
    return session.terminal and seq >= session.head_seq


async def _watched(socket: Socket, store: Store, feed: Feed, session_id: str) -> Frames:
    asked = socket.query_params
    after = cursor(asked.get("after"))
    marked = asked.get("markers") == "true"
    seq = after or 0
    require_epoch(asked.get("epoch"), store)
    session = await store.get(session_id)
    head = store.head_seq(session, seq)
    if marked:
        yield msgspec.json.encode(_Hello(store.epoch, head, seq))
    async with aclosing(_pages(feed, session, seq)) as pages:
        async for page in pages:
            for frame in page if after is not None else await _unsettled(store, page):
                yield frame.data
            seq = page[-1].seq if page else seq
            if marked and not page:
                yield msgspec.json.encode(_CaughtUp(seq))


async def _pages(feed: Feed, session: Session, seq: int) -> AsyncGenerator[list[Frame], None]:
    """What comes after `seq`, with an empty page, once, where the history ends, also if it ends for good."""
    caught_up = False
    if not _is_over(session, seq):
        async with aclosing(feed.follow(session.session_id, seq)) as pages:
            async for page in pages:
                caught_up = caught_up or not page
                yield page
    if not caught_up:
        yield []


async def _unsettled(store: Store, page: list[Frame]) -> list[Frame]:
    """`page` without the prompts that wait for no answer any more.

    For a client of the replaced service, which opens a dialog for each.
    """
    if all(frame.kind != "input_required" for frame in page):
        return page
    settled = await store.settled_prompts(page[0].session_id)
    return [frame for frame in page if frame.kind != "input_required" or _prompt_id(frame) not in settled]


def _prompt_id(frame: Frame) -> str:
    return msgspec.json.decode(frame.data, type=_Prompted).prompt_id


def _stream(session: Session, feed: Feed, seq: int) -> Response[Any]:
    if _is_over(session, seq):
        return Response(None, status_code=204)
    return Stream(
        _told(feed, session.session_id, seq), media_type="text/event-stream", headers=_STREAM_HEADERS
    )


async def _told(feed: Feed, session_id: str, seq: int) -> AsyncGenerator[bytes, None]:
    """The frames after `seq` as server-sent events, with a comment where nothing else was said for long.

    The stream just ends when the service stops or the store cannot be read: the client comes back.
    """
    async with aclosing(feed.follow(session_id, seq)) as pages:
        following = asyncio.ensure_future(anext(pages))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
                if not done:
                    yield b": still here\n\n"
                    continue
                page = following.result()
                for sent, frame in enumerate(page, 1):
                    yield b"id: %d\ndata: %s\n\n" % (frame.seq, frame.data)
                    if sent % sockets.YIELD_EVERY == 0:
                        await asyncio.sleep(0)
                if page and page[-1].kind in TERMINAL_KINDS:
                    return
                following = asyncio.ensure_future(anext(pages))
        except (Stopping, StoreUnavailable):
            return
        finally:
            following.cancel()
            await asyncio.wait({following})
