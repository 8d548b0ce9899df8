"""The document of the API and its page, without a word from the internet.

What Litestar leaves out is added in one place: which field tells the members of a union apart, that unknown
fields are refused, the codes of the errors, and what has no place in OpenAPI but in words: the WebSockets.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import msgspec
from litestar import Request, Response, Router
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.static_files import create_static_files_router

from app.sessions.requests import CancelBody, CreateBody, ResumeBody, RetryBody
from app.web import errors
from app.web.events import AnyEvent
from app.web.health import version

PATH = "/schema"

_VENDORED = Path(__file__).parent / "vendor" / "swagger-ui"
_TAGGED = (*get_args(CreateBody), *get_args(AnyEvent))
_CLOSED = (*get_args(CreateBody), ResumeBody, CancelBody, RetryBody)

_DESCRIPTION = """
Creation sessions for lab acquisition workstations. HEAD answers wherever GET does.

Every answer that is an error has the body `{"error": {"code", "message", "field"?, "details"?, "trace_id"}}`.
`trace_id` echoes the request's `X-Trace-Id`, if it is at most 128 printable ASCII characters, and stands in the
header of every answer. A request that changes something carries `application/json`, at most 256 KiB and 32 levels
deep. An unknown address answers 404 `not_found`, an unknown method 405 `method_not_allowed`.

## WS /api/v1/sessions/{session_id}/events

First sends every event with `seq` above the cursor, then each new one as it is committed, one JSON object a
message. On one connection `seq` rises by exactly one from frame to frame; a client comes back with the last `seq`
that it has dealt with.

| query | meaning |
|---|---|
| `after` | the cursor: the last `seq` that the client has; 0 for all |
| `markers=true` | two more frames: `hello` {epoch, head_seq, after} first, `caught_up` {seq} after the history |
| `frames=text` | text messages; else binary ones |
| `epoch` | the history that the cursor is of, as `hello` told it |

Without `after` the client gets the history from the beginning, but for the prompts that have been settled since.

## WS /api/v1/events

All sessions' events in the order of their commits, as `{"position", "session_id", "frame"}`. `after` is a position;
without it: from now. `frames` and `epoch` as above.

## Close codes

| code | meaning |
|---|---|
| 1000 | after the terminal event |
| 1001, 1012 | the service stops or restarts; come back with your cursor |
| 1011 | the service is not able to serve the stream |
| 4400 | the cursor is malformed or negative |
| 4403 | not allowed, or a foreign origin |
| 4404 | no such session |
| 4409 | the cursor is ahead of the history, or the epoch is another: start again from 0 |
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>exlab-sessions</title>
    <link rel="icon" href="data:,">
    <link rel="stylesheet" href="{path}/vendor/swagger-ui.css">
  </head>
  <body>
    <div id="page"></div>
    <script src="{path}/vendor/swagger-ui-bundle.js"></script>
    <script src="{path}/vendor/swagger-ui-standalone-preset.js"></script>
    <script>
      SwaggerUIBundle({{
        url: "{path}/openapi.json",
        dom_id: "#page",
        validatorUrl: null,
        deepLinking: true,
        presets: [SwaggerUIBundle.presets.apis],
      }});
    </script>
  </body>
</html>
"""


def config() -> OpenAPIConfig:
    docs = Router(PATH, route_handlers=[], include_in_schema=False, after_request=_refuse_unknown)
    return OpenAPIConfig(
        title="exlab-sessions",
        version=version(),
        description=_DESCRIPTION,
        use_handler_docstrings=True,
        render_plugins=[_Page(path="/swagger"), _Document()],
        openapi_router=docs,
    )


def assets() -> Router:
    return create_static_files_router(f"{PATH}/vendor", [_VENDORED], include_in_schema=False, name="vendor")


async def _refuse_unknown(response: Response[Any]) -> Response[Any]:
    # Litestar answers what it does not know below its own path with a page of HTML.
    if response.status_code == errors.STATUS["not_found"]:
        raise errors.NotFound
    return response


class _Page(OpenAPIRenderPlugin):
    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        return _PAGE.format(path=PATH).encode()


class _Document(JsonRenderPlugin):
    """The JSON document; it is completed when it is asked for first."""

    _completed: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._completed is None:
            self._completed = self.render_json(request, completed(openapi_schema))
        return self._completed


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """`document` with what Litestar leaves out of it."""
    schemas = document["components"]["schemas"]
    for kind in _CLOSED:
        schemas[kind.__name__]["additionalProperties"] = False
    schemas["Wrong"]["properties"]["code"]["enum"] = list(errors.STATUS)
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("400", None)  # Litestar's own, which is answered as 422
            _name_examples(operation["responses"].values())
    _add_stream(document["paths"]["/api/v1/sessions/{session_id}/events"]["get"]["responses"])
    _tell_apart(document)
    return document


def _name_examples(answers: Iterable[dict[str, Any]]) -> None:
    """Leave the names of examples where they belong: they are keys, and no part of what they name."""
    for answer in answers:
        for content in answer.get("content", {}).values():
            for example in content.get("examples", {}).values():
                example.pop("id", None)


def _add_stream(answers: dict[str, Any]) -> None:
    answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    answers["204"] = {"description": "The stream's client has had the terminal event."}


def _tell_apart(node: object) -> None:
    """Add the discriminator to every union of tagged records below `node`."""
    if isinstance(node, dict):
        if tags := _tags(node.get("oneOf")):
            node["discriminator"] = {"propertyName": "kind", "mapping": tags}
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _tell_apart(child)


def _tags(members: list[dict[str, Any]] | None) -> dict[str, str]:
    """The tag of each member of a union; none where one of them is no tagged record."""
    named = {f"#/components/schemas/{kind.__name__}": _tag(kind) for kind in _TAGGED}
    references = [str(member.get("$ref")) for member in members or ()]
    if not all(reference in named for reference in references):
        return {}
    return {named[reference]: reference for reference in references}


def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)
