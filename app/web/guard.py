"""The guard before the application: who may come in, over HTTP and WebSocket alike.

It promises that nothing reaches a route whose Host is not ours, whose Origin is neither ours nor one that
the config names, or that another site would change something with; that every request has a trace id, in
the log lines and the answer; and that HEAD works wherever GET does. What a body may be is `bodies.py`'s.
"""

import asyncio
import re
import time
import uuid
from collections.abc import Iterable
from typing import cast

import msgspec
import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, ReceiveMessage, Scope, Send

from app.errors import Forbidden
from app.settings import ConfigFile
from app.web import errors

log = structlog.get_logger()

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
_TRACE_ID = re.compile(r"[\x20-\x7e]{1,128}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}

_ALLOWED = [
    (b"access-control-allow-methods", b"GET, HEAD, POST"),
    (b"access-control-allow-headers", b"Content-Type, Idempotency-Key, Last-Event-ID, X-Trace-Id"),
    (b"access-control-allow-private-network", b"true"),
    (b"access-control-max-age", b"600"),
]

Headers = list[tuple[bytes, bytes]]


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard looks at of one request or handshake.

    `method` is empty for a WebSocket; `address` is where the connection came in.
    """

    method: str
    host: tuple[str, ...]
    origin: tuple[str, ...]
    fetch_site: str
    asks_leave: bool
    trace_id: str
    scheme: str
    address: tuple[str, int | None]

    @property
    def preflight(self) -> bool:
        return self.method == "OPTIONS" and bool(self.origin) and self.asks_leave


class Guard:
    """The ASGI application that a server is given: the guard, and behind it the routes."""

    def __init__(self, app: ASGIApp, config: ConfigFile) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in (ScopeType.HTTP, ScopeType.WEBSOCKET):
            await self._app(scope, receive, send)
            return
        call = _call(scope)
        with structlog.contextvars.bound_contextvars(trace_id=call.trace_id):
            scope.setdefault("state", {})["trace_id"] = call.trace_id
            foreign = call.origin[0].lower() if call.origin and self._is_named(call.origin) else None
            send = _signed(send, call.trace_id, foreign)
            try:
                self._judge(call, foreign)
            except Forbidden as refusal:
                log.warning(refusal.message, event_id="http.forbidden", **_where(scope))
                await _refuse(scope, receive, send, refusal, call.trace_id)
                return
            await self._let_in(call, scope, receive, send)

    async def _let_in(self, call: _Call, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
        elif call.preflight:
            await send({"type": "http.response.start", "status": 204, "headers": _ALLOWED})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if scope["method"] == "HEAD":
            await _serve_head(self._app, scope, noting)
        else:
            await self._app(scope, receive, noting)
        took = round((time.perf_counter() - started) * 1000, 1)
        log.info("Answered.", event_id="http.answered", **_where(scope), status=status, milliseconds=took)

    def _is_named(self, origin: tuple[str, ...]) -> bool:
        return len(origin) == 1 and origin[0].lower() in self._config.current.service.origins

    def _judge(self, call: _Call, foreign: str | None) -> None:
        """Forbidden, unless the request came to us, from us or from where the config says."""
        names = (self._config.current.service.host, call.address[0])
        hosts = _LOOPBACK | {_bracketed(name.lower()) for name in names}
        host = _HOST.fullmatch(call.host[0].lower()) if len(call.host) == 1 else None
        if host is None or host[1] not in hosts:
            raise Forbidden("The Host header names another service.")
        if foreign is not None:
            return
        ports = {call.address[1], int(host[2] or _PORTS[call.scheme])}
        if call.origin and not _is_ours(call.origin, hosts, ports):
            raise Forbidden("The request comes from a page of another origin.")
        if call.method not in SAFE_METHODS and call.fetch_site == "cross-site":
            raise Forbidden("The request comes from another site.")


def _is_ours(origin: tuple[str, ...], hosts: frozenset[str], ports: set[int | None]) -> bool:
    parts = _ORIGIN.fullmatch(origin[0].lower()) if len(origin) == 1 else None
    return parts is not None and parts[2] in hosts and int(parts[3] or _PORTS[parts[1]]) in ports


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _call(scope: Scope) -> _Call:
    headers: Headers = list(scope["headers"])
    given = _values(headers, b"x-trace-id")
    sane = len(given) == 1 and _TRACE_ID.fullmatch(given[0]) is not None
    return _Call(
        method=_method(scope),
        host=_values(headers, b"host"),
        origin=_values(headers, b"origin"),
        fetch_site=next(iter(_values(headers, b"sec-fetch-site")), "").lower(),
        asks_leave=bool(_values(headers, b"access-control-request-method")),
        trace_id=given[0] if sane else uuid.uuid4().hex,
        scheme=scope["scheme"],
        address=scope.get("server") or ("", None),
    )


def _method(scope: Scope) -> str:
    return scope["method"] if scope["type"] == ScopeType.HTTP else ""


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> tuple[str, ...]:
    return tuple(value.decode("latin-1") for key, value in headers if key.lower() == name)


def _where(scope: Scope) -> dict[str, str]:
    return {"method": _method(scope) or "WS", "path": scope["path"]}


def _signed(send: Send, trace_id: str, foreign: str | None) -> Send:
    """`send` with the headers that every answer has, and leave to read it for a page of `foreign`."""
    headers: Headers = [(b"x-trace-id", trace_id.encode()), (b"x-content-type-options", b"nosniff")]
    if foreign is not None:
        headers += [
            (b"access-control-allow-origin", foreign.encode()),
            (b"access-control-expose-headers", b"X-Trace-Id, Retry-After"),
            (b"vary", b"Origin"),
        ]

    async def signing(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            message = cast("Message", {**message, "headers": [*message.get("headers", ()), *headers]})
        await send(message)

    return signing


async def _refuse(scope: Scope, receive: Receive, send: Send, refusal: Forbidden, trace_id: str) -> None:
    if scope["type"] == ScopeType.HTTP:
        body = msgspec.json.encode(errors.envelope(refusal, trace_id))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": errors.STATUS[refusal.code], "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        return
    # A browser sees the close code only of a handshake that was accepted.
    await receive()
    await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
    await send({"type": "websocket.close", "code": errors.close_code(refusal), "reason": refusal.message})


async def _serve_head(app: ASGIApp, scope: HTTPScope, send: Send) -> None:
    """The answer of GET without its body; a stream ends with its headers."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def receiving() -> ReceiveMessage:
        if not begun.is_set():
            begun.set()
            return {"type": "http.request", "body": b"", "more_body": False}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def heading(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            ended.set()

    await app(cast("HTTPScope", {**scope, "method": "GET"}), receiving, heading)
