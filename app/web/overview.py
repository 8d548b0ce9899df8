"""All sessions' events on one WebSocket, in the order of their commits, for an overview screen."""

from contextlib import aclosing

from litestar import websocket
from litestar.di import NamedDependency

from app.errors import CursorAhead
from app.sessions.feed import Feed
from app.sessions.session import Frame
from app.sessions.store import Store
from app.web import sockets
from app.web.events import cursor, require_epoch
from app.web.sockets import Frames, Socket


@websocket("/events")
async def overview(socket: Socket, store: NamedDependency[Store], feed: NamedDependency[Feed]) -> None:
    await sockets.serve(socket, _told(socket, store, feed))


async def _told(socket: Socket, store: Store, feed: Feed) -> Frames:
    after = cursor(socket.query_params.get("after"))
    require_epoch(socket.query_params.get("epoch"), store)
    head = store.head_position
    if after is not None and after > head:
        raise CursorAhead
    async with aclosing(feed.follow_all(head if after is None else after)) as pages:
        async for page in pages:
            for frame in page:
                yield _placed(frame)


def _placed(frame: Frame) -> bytes:
    start = b'{"position":%d,"session_id":"%s","frame":' % (frame.position, frame.session_id.encode())
    return start + frame.data + b"}"
