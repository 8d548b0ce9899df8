"""From a refusal to the answer that tells of it: one table to HTTP statuses, one to WebSocket close codes.

Every error that leaves the service, over whichever route, has the body made here. What cannot be foreseen
answers `internal_error`, which tells nothing of the inside, and is logged with its traceback.
"""

import re
import uuid
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException
from litestar.openapi import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import ParameterKwarg

from app.errors import PayloadTooLarge, Refusal, UnsupportedMediaType, ValidationFailed

log = structlog.get_logger()

STATUS: dict[str, int] = {
    "validation_failed": 422,
    "session_not_found": 404,
    "session_already_completed": 409,
    "session_not_awaiting_input": 409,
    "session_not_retryable": 409,
    "prompt_not_open": 409,
    "too_late_to_cancel": 409,
    "cursor_ahead": 409,
    "input_invalid": 422,
    "idempotency_key_reused": 422,
    "cursor_invalid": 422,
    "setup_incomplete": 503,
    "shutting_down": 503,
    "store_unavailable": 503,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "internal_error": 500,
}

CLOSE_CODES: dict[str, int] = {
    "cursor_invalid": 4400,
    "forbidden": 4403,
    "session_not_found": 4404,
    "cursor_ahead": 4409,
}
"""The close code of a WebSocket that is refused; any other refusal is 1011."""

BUG = "The service failed; its log says why, under this trace id."

RETRY_AFTER = {"store_unavailable": "5"}
"""Seconds after which to come again, as the header says them."""


class NotFound(Refusal):
    """There is nothing at this address."""

    code = "not_found"


class MethodNotAllowed(Refusal):
    """This address does not take this method."""

    code = "method_not_allowed"


_OF_LITESTAR: dict[int, type[Refusal]] = {
    404: NotFound,
    405: MethodNotAllowed,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
}
_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_NAMED = re.compile(r"(?:unknown|required) field `(.*)`")


class Wrong(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is wrong. `trace_id` is in the log lines of this request, too."""

    code: str
    message: str
    field: str | None = None
    details: dict[str, object] | None = None
    trace_id: str


class Envelope(msgspec.Struct, frozen=True):
    """The body of every answer that is an error."""

    error: Wrong


_ANYWHERE = ("forbidden", "internal_error")
_WITH_A_BODY = ("validation_failed", "payload_too_large", "unsupported_media_type")


def responses(*codes: str, changes: bool = False) -> dict[int, ResponseSpec]:
    """What the API's document says of an operation that is refused with `codes`, besides those of every one."""
    own = {*codes, *_ANYWHERE, *(_WITH_A_BODY if changes else ())}
    by_status: dict[int, list[str]] = {}
    for code in sorted(own):
        by_status.setdefault(STATUS[code], []).append(code)
    return {status: _described(told) for status, told in sorted(by_status.items())}


def _described(codes: list[str]) -> ResponseSpec:
    wrongs = [Wrong(code=code, message=_message(code), trace_id=uuid.UUID(int=0).hex) for code in codes]
    examples = [
        Example(id=wrong.code, summary=wrong.code, value=msgspec.to_builtins(Envelope(wrong)))
        for wrong in wrongs
    ]
    description = "\n\n".join(f"`{wrong.code}`: {wrong.message}" for wrong in wrongs)
    return ResponseSpec(Envelope, generate_examples=False, description=description, examples=examples)


def _message(code: str) -> str:
    """What the refusal with `code` says where it has nothing particular to say."""
    known = {kind.code: kind for kind in Refusal.__subclasses__()}
    return known[code]().message if code in known else BUG


def envelope(refusal: Refusal, trace_id: str) -> Envelope:
    error = Wrong(
        code=refusal.code,
        message=refusal.message,
        field=refusal.field,
        details=_details(refusal),
        trace_id=trace_id,
    )
    return Envelope(error)


def _details(refusal: Refusal) -> dict[str, object] | None:
    if not isinstance(refusal, ValidationFailed) or "errors" in (refusal.details or {}):
        return refusal.details
    found = {"message": refusal.message} | ({"field": refusal.field} if refusal.field else {})
    return {**(refusal.details or {}), "errors": [found]}


def misshapen(message: str) -> ValidationFailed:
    """The refusal of a body for which msgspec has this `message`, which alone holds the name of the field."""
    place = _PLACE.search(message)
    named = _NAMED.search(message)
    parts = [found[1] for found in (place, named) if found and found[1]]
    return ValidationFailed(_PLACE.sub("", message), field=".".join(parts) or None)


def close_code(refusal: Refusal) -> int:
    return CLOSE_CODES.get(refusal.code, 1011)


def _refused(request: Request[Any, Any, Any], refusal: Refusal) -> Response[Envelope]:
    if isinstance(refusal, ValidationFailed) and refusal.field is None:
        refusal = misshapen(refusal.message)
    if STATUS[refusal.code] == HTTPStatus.INTERNAL_SERVER_ERROR:
        return _broken(request, refusal)
    return _answer(request, refusal)


def _of_litestar(request: Request[Any, Any, Any], error: HTTPException) -> Response[Envelope]:
    """Litestar's own refusals; those of parameters are told with the parameter's name."""
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _broken(request, error)
    if error.status_code not in _OF_LITESTAR:
        return _answer(request, _unfit(request, error))
    return _answer(request, _OF_LITESTAR[error.status_code](), error.headers)


def _unfit(request: Request[Any, Any, Any], error: HTTPException) -> ValidationFailed:
    told = [item for item in error.extra or () if isinstance(item, dict)]
    found = [
        {"message": str(item["message"]), "field": _name(request, str(item.get("key", "")))} for item in told
    ]
    if not found:
        return ValidationFailed(error.detail)
    first = found[0]
    return ValidationFailed(
        f"{first['field']}: {first['message']}", field=first["field"] or None, details={"errors": found}
    )


def _name(request: Request[Any, Any, Any], key: str) -> str:
    """What the client calls the parameter that the handler knows as `key`."""
    parameter = request.scope["route_handler"].parsed_fn_signature.parameters.get(key)
    described = parameter.kwarg_definition if parameter else None
    return described.name if isinstance(described, ParameterKwarg) and described.name else key


def _broken(request: Request[Any, Any, Any], error: Exception) -> Response[Envelope]:
    log.error(
        "A request met a bug of the service.",
        event_id="http.internal_error",
        method=request.method,
        path=request.url.path,
        exc_info=error,
    )
    return _answer(request, Refusal(BUG))


def _answer(
    request: Request[Any, Any, Any], refusal: Refusal, headers: dict[str, str] | None = None
) -> Response[Envelope]:
    told = dict(headers or {})
    if refusal.code in RETRY_AFTER:
        told["Retry-After"] = RETRY_AFTER[refusal.code]
    return Response(
        envelope(refusal, request.scope["state"]["trace_id"]),
        status_code=STATUS[refusal.code],
        media_type=MediaType.JSON,
        headers=told,
    )


HANDLERS: dict[int | type[Exception], Any] = {
    Refusal: _refused,
    HTTPException: _of_litestar,
    Exception: _broken,
}
