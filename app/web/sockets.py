"""Serving one WebSocket: a reader that notices when the client leaves, and a sender.

The handshake is always accepted, since a browser sees the close code of no other; then the frames are
sent until they end, and their end, good or bad, is the close code. A client that left is no error.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import structlog
from litestar import WebSocket
from litestar.exceptions import WebSocketDisconnect

from app.errors import Refusal
from app.sessions.feed import Stopping
from app.web import errors

log = structlog.get_logger()

Socket = WebSocket[Any, Any, Any]
Frames = AsyncGenerator[bytes, None]

YIELD_EVERY = 100
"""Frames after which others get their turn: a send does not wait while the connection takes data."""

REASON_BYTES = 123


class _Close(msgspec.Struct, frozen=True):
    code: int
    reason: str = ""


class _Left(Exception):
    """The client is gone."""


async def serve(socket: Socket, frames: Frames) -> None:
    """Send `frames`, as text if the client asks for `frames=text`, and close."""
    try:
        await socket.accept()
    except OSError:
        await frames.aclose()
        return  # it left before it was let in
    async with asyncio.TaskGroup() as group:
        sender = group.create_task(_send(socket, frames))
        reader = group.create_task(_read(socket, sender))
        sender.add_done_callback(lambda _: reader.cancel())
    if not sender.cancelled() and (close := sender.result()) is not None:
        await _close(socket, close)


async def _read(socket: Socket, sender: asyncio.Task[_Close | None]) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass  # what a client says is of no interest
    sender.cancel()


async def _send(socket: Socket, frames: Frames) -> _Close | None:
    """Why the frames ended; None where the client did not stay to the end."""
    send = _as_text if socket.query_params.get("frames") == "text" else _as_binary
    try:
        async with aclosing(frames):
            sent = 0
            async for frame in frames:
                await send(socket, frame)
                sent += 1
                if sent % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
    except _Left:
        return None
    except Stopping:
        return _Close(1012, "The service stops; come back with your cursor.")
    except Refusal as refusal:
        return _Close(errors.close_code(refusal), refusal.message)
    except Exception:  # the edge of the task: the client is to be told, and the log to know
        log.exception(
            "A stream met a bug of the service.", event_id="ws.internal_error", path=socket.url.path
        )
        return _Close(1011, "The service failed.")
    return _Close(1000)


async def _as_text(socket: Socket, frame: bytes) -> None:
    try:
        await socket.send_data(frame.decode(), mode="text")
    except (WebSocketDisconnect, OSError) as error:
        raise _Left from error


async def _as_binary(socket: Socket, frame: bytes) -> None:
    try:
        await socket.send_data(frame, mode="binary")
    except (WebSocketDisconnect, OSError) as error:
        raise _Left from error


async def _close(socket: Socket, close: _Close) -> None:
    log.info("A stream ended.", event_id="ws.closed", path=socket.url.path, code=close.code)
    reason = close.reason.encode()[:REASON_BYTES].decode(errors="ignore")
    try:
        await socket.close(close.code, reason)
    except (WebSocketDisconnect, OSError):
        return  # it left before it could be told
