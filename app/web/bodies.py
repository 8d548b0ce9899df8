"""What a body may be: its type, its size, its depth, and exactly the shape that its route takes.

The check stands behind the routing, so that an unknown address is told as such, and before the handler,
which then meets only bodies of the right shape. Litestar by itself would take `"true"` for true.
"""

import re

import msgspec
from litestar.enums import ScopeType
from litestar.middleware import ASGIMiddleware
from litestar.types import ASGIApp, HTTPScope, Receive, ReceiveMessage, Scope, Send

from app.errors import PayloadTooLarge, UnsupportedMediaType, ValidationFailed
from app.web.errors import misshapen
from app.web.guard import SAFE_METHODS

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

# A string, which may hold brackets that mean nothing, or a bracket. A string without an end reaches to the
# end of the body; else the search would begin anew at each quote in it.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


class BodyCheck(ASGIMiddleware):
    scopes = (ScopeType.HTTP,)

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        if scope["type"] != ScopeType.HTTP or scope["method"] in SAFE_METHODS:
            await next_app(scope, receive, send)
            return
        _check_type(scope)
        body = await _read(scope, receive)
        _check_shape(scope, body)
        await next_app(scope, _again(body, receive), send)


def _header(scope: HTTPScope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), "")


def _check_type(scope: HTTPScope) -> None:
    essence, _, parameters = _header(scope, b"content-type").lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters)
    if essence.strip() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8")):
        raise UnsupportedMediaType


async def _read(scope: HTTPScope, receive: Receive) -> bytes:
    told = _header(scope, b"content-length")
    if told.isdecimal() and int(told[:20]) > MAX_BYTES:
        raise PayloadTooLarge
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ValidationFailed("The connection ended before the body did.")
        body += message["body"]
        if len(body) > MAX_BYTES:
            raise PayloadTooLarge
        more = message["more_body"]
    return bytes(body)


def _check_shape(scope: HTTPScope, body: bytes) -> None:
    if _depth_exceeded(body):
        raise ValidationFailed(f"The body is nested deeper than {MAX_DEPTH} levels.")
    field = scope["route_handler"].parsed_data_field
    try:
        msgspec.json.decode(body, type=field.annotation if field else object)
    except msgspec.DecodeError as error:
        raise misshapen(str(error)) from error
    except UnicodeDecodeError as error:
        raise ValidationFailed(f"The body is not UTF-8 text: {error}.") from error


def _depth_exceeded(body: bytes) -> bool:
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(body):
        mark = found[0]
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth > MAX_DEPTH:
            return True
    return False


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    given = False

    async def receiving() -> ReceiveMessage:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
