"""A client of a running service, for programs and for the command line.

It promises that whatever is not a success is one of two exceptions, with the service's own words; that a
creation whose answer got lost is asked for again without making a second session; and that `follow` gives
each frame of a history exactly once and in order, through lost connections and restarts of the service. It needs
nothing of the service's code, and what comes from the service is handed on as it came, unknown keys
included. A client belongs to one thread.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.sync.client import ClientConnection, connect

Json = dict[str, Any]

TERMINAL_KINDS = ("done", "failed")

_MARKERS = ("hello", "caught_up")
_FIRST_DELAY = 0.25
_LONGEST_DELAY = 2.0
_FRAME_LIMIT = 1024 * 1024
# The close codes after which coming back with the same cursor would end in the same place.
_REFUSALS = {
    4400: (422, "cursor_invalid"),
    4401: (401, "unauthorized"),
    4403: (403, "forbidden"),
    4404: (404, "session_not_found"),
    4409: (409, "cursor_ahead"),
}
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class ClientError(Exception):
    """The service refused. `status` is the HTTP status, or the one that a close code stands for."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        details: Json | None = None,
        trace_id: str | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.field = field
        self.details = details
        self.trace_id = trace_id
        super().__init__(f"{code}: {message}")


class Unreachable(Exception):
    """No service answers. `sent`: the request may have reached it all the same."""

    def __init__(self, message: str, *, sent: bool = False) -> None:
        self.sent = sent
        super().__init__(message)


def address(state_dir: Path, host: str = "127.0.0.1") -> str:
    """The URL of the service that keeps its state in `state_dir`, as its `server.json` says."""
    note = state_dir / "server.json"
    try:
        port = json.loads(note.read_text(encoding="utf-8"))["port"]
    except FileNotFoundError:
        raise Unreachable(f"no service is running: there is no {note}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unreachable(f"{note} does not say where the service is: {error}") from error
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Client:
    """One service, by its URL. `timeout` in seconds bounds each request, not how long a session is followed."""

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"expected a URL such as http://127.0.0.1:8321, not {url!r}")
        self.url = url.rstrip("/")
        # A workstation's own service is never behind the proxy that its environment names for the web.
        self._http = httpx.Client(
            base_url=self.url + "/api/v1", timeout=httpx.Timeout(timeout, connect=5), trust_env=False
        )
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def create(self, body: Mapping[str, object], *, key: str | None = None) -> Json:
        """A new session. With the `key` of an earlier call it is that call's session, as it stands now."""
        return self._make("/sessions", body, key)

    def retry(
        self, session_id: str, changes: Mapping[str, object] | None = None, *, key: str | None = None
    ) -> Json:
        """A new session with the body of a failed or aborted one, under the merge patch `changes`."""
        return self._make(f"/sessions/{session_id}/retry", {"changes": dict(changes or {})}, key)

    def resume(
        self,
        session_id: str,
        inputs: Mapping[str, object],
        *,
        prompt_id: str | None = None,
        operator: str | None = None,
    ) -> Json:
        """Answer the open prompt. With `prompt_id` the answer can reach no other question."""
        body = _given(prompt_id=prompt_id, operator=operator) | {"extra_inputs": dict(inputs)}
        return self._ask("POST", f"/sessions/{session_id}/resume", body=body)

    def cancel(self, session_id: str, *, discard_files: bool = False, operator: str | None = None) -> Json:
        """Returns when the work has stopped and the session is aborted."""
        body = _given(operator=operator) | {"discard_files": discard_files}
        return self._ask("POST", f"/sessions/{session_id}/cancel", body=body)

    def get(self, session_id: str) -> Json:
        return self._ask("GET", f"/sessions/{session_id}")

    def list(
        self,
        *,
        state: Iterable[str] = (),
        kind: str | None = None,
        equipment: str | None = None,
        project: str | None = None,
        operator: str | None = None,
        label: str | None = None,
        since: str | None = None,
        until: str | None = None,
        before: str | None = None,
        page: int = 50,
    ) -> Iterator[Json]:
        """Handles, newest first, as many as are taken; `page` at a time are asked for.

        `label` is how a label begins, `since` and `until` bound the time of creation (RFC 3339), `before` is a
        session id from which to go on towards older ones.
        """
        filters = _given(kind=kind, equipment=equipment, project=project, operator=operator, label=label)
        asked = filters | _given(since=since, until=until, next=before) | {"limit": page}
        states = [*state]
        while True:
            found = self._ask("GET", "/sessions", query=asked | ({"state": states} if states else {}))
            yield from found["sessions"]
            if not found["next"]:
                return
            asked["next"] = found["next"]

    def find(self, beginning: str) -> str:
        """The id that begins so, with 8 characters or more, whether written with dashes or without.

        ValueError if it is no beginning of an id, or that of several; ClientError if there is no such session.
        """
        digits = beginning.lower().replace("-", "")
        if not re.fullmatch(r"[0-9a-f]{8,32}", digits):
            raise ValueError(f"expected an id or its first 8 characters or more, not {beginning!r}")
        if len(digits) == 32:
            return _dashed(digits)
        # Ids are listed downwards: those that begin so come first below the highest that could.
        listed = islice(self.list(before=_dashed(digits.ljust(32, "f")), page=2), 2)
        found = [each["session_id"] for each in listed if each["session_id"].startswith(_dashed(digits))]
        if not found:
            raise ClientError(404, "session_not_found", f"no session's id begins with {_dashed(digits)}")
        if len(found) > 1:
            raise ValueError(f"{beginning} begins {found[0]} and {found[1]}; more of it is needed")
        return str(found[0])

    def events(self, session_id: str, after: int = 0, limit: int = 1000) -> Json:
        """One page of a history: `events`, `head_seq`, `epoch`."""
        return self._ask("GET", f"/sessions/{session_id}/events", query={"after": after, "limit": limit})

    def log(self, session_id: str) -> Json:
        return self._ask("GET", f"/sessions/{session_id}/log")

    def templates(self) -> Json:
        return self._ask("GET", "/templates")

    def health(self) -> Json:
        return self._ask("GET", "/health")

    def setup_status(self) -> Json:
        return self._ask("GET", "/setup/status")

    def follow(
        self, session_id: str, after: int = 0, *, lost: Callable[[str], None] | None = None
    ) -> Iterator[Json]:
        """The frames with `seq` above `after`, each exactly once, until the terminal one.

        A connection that ends before is made again from where it ended, for as long as it takes; `lost` is told
        why, each time. ClientError when the history is not the one that was begun (`cursor_ahead`), when there
        is no such session, or when it may not be watched; Unreachable only if the first connection fails.
        """
        following = _Following(self.url, session_id, after, self._timeout)
        delay = _FIRST_DELAY
        while True:
            try:
                for frame in following.frames():
                    delay = _FIRST_DELAY
                    yield frame
                return
            except Unreachable as error:
                if following.epoch is None:
                    raise
                if lost is not None:
                    lost(str(error))
            time.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY)

    def _make(self, path: str, body: Mapping[str, object], key: str | None) -> Json:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        try:
            return self._ask("POST", path, body=body, headers=headers)
        except Unreachable as error:
            if not error.sent:
                raise
        # It may have been made; under the same key it is not made twice.
        return self._ask("POST", path, body=body, headers=headers)

    def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Json | None = None,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        try:
            answer = self._http.request(method, path, params=query, json=body, headers=headers)
        except httpx.TransportError as error:
            sent = not isinstance(error, _NEVER_SENT)
            raise Unreachable(_no_answer(self.url, error), sent=sent) from error
        if not answer.is_success:
            raise _refused(self.url, answer.status_code, answer.content)
        return _decoded(self.url, answer.content)


class _Following:
    """How far one follower has come, from connection to connection."""

    def __init__(self, url: str, session_id: str, cursor: int, timeout: float) -> None:
        self.epoch: str | None = None
        self._url = url
        self._path = f"/api/v1/sessions/{session_id}/events"
        self._cursor = cursor
        self._timeout = timeout

    def frames(self) -> Iterator[Json]:
        """What one connection gives; Unreachable when it ends before the terminal frame."""
        try:
            with self._connected() as connection:
                for frame in self._received(connection):
                    yield frame
                    if frame["kind"] in TERMINAL_KINDS:
                        return
        except ConnectionClosed as error:
            self._ended(error)
        except InvalidStatus as error:
            answer = error.response
            raise _refused(self._url, answer.status_code, bytes(answer.body or b"")) from error
        except (OSError, InvalidHandshake, InvalidMessage) as error:
            raise Unreachable(_no_answer(self._url, error)) from error

    def _connected(self) -> ClientConnection:
        query = {"after": self._cursor, "markers": "true"} | _given(epoch=self.epoch)
        target = httpx.URL(self._url + self._path, params=query)
        scheme = {"http": "ws", "https": "wss"}[target.scheme]
        return connect(
            str(target.copy_with(scheme=scheme)),
            compression=None,
            proxy=None,
            open_timeout=self._timeout,
            close_timeout=1,
            max_size=_FRAME_LIMIT,
        )

    def _received(self, connection: ClientConnection) -> Iterator[Json]:
        while True:
            frame = _decoded(self._url, connection.recv())
            if frame["kind"] == "hello":
                self.epoch = frame["epoch"]
            if frame["kind"] in _MARKERS or frame.get("seq", 0) <= self._cursor:
                continue
            self._cursor = frame["seq"]
            yield frame

    def _ended(self, closed: ConnectionClosed) -> None:
        """Returns if the history had come to its end before this connection was made."""
        code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        if code in _REFUSALS:
            status, name = _REFUSALS[code]
            raise ClientError(status, name, reason or f"the stream was closed with {code}") from closed
        if code != 1000:
            raise Unreachable(
                f"{self._url} closed the stream ({code}{' ' + reason if reason else ''})"
            ) from closed


def _dashed(digits: str) -> str:
    """The digits of an id, or of its beginning, with the dashes of a UUID between them."""
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "-".join(part for part in parts if part)


def _given(**values: str | None) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _no_answer(url: str, error: Exception) -> str:
    return f"{url} does not answer: {str(error) or type(error).__name__}"


def _decoded(url: str, content: bytes | str) -> Json:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise Unreachable(f"what answers at {url} is not this service", sent=True) from error
    if not isinstance(value, dict):
        raise Unreachable(f"what answers at {url} is not this service", sent=True)
    return value


def _refused(url: str, status: int, content: bytes) -> ClientError | Unreachable:
    error = _decoded(url, content).get("error")
    if not isinstance(error, dict) or "code" not in error:
        return Unreachable(f"what answers at {url} is not this service (status {status})", sent=True)
    return ClientError(
        status,
        error["code"],
        error.get("message", ""),
        field=error.get("field"),
        details=error.get("details"),
        trace_id=error.get("trace_id"),
    )
