"""The contract of sessions, as a checker: what must be true of a laboratory, whatever was done to it.

It promises to find what contradicts sections 4, 5 and 7 of the contract: in the store (`invariants_store.py`), on
the disk (`invariants_disk.py`), and, here, in what clients were answered and sent. Edges, phases and rules stand in
`histories.py` once more, and the store is read with plain SQL, so that a bug in the product's own reading cannot
hide here; the product's own examination is asked besides. It only looks. How a laboratory came to be as it is, and
when it has come to rest, is left to those who ask.
"""

import hashlib
import os
import sqlite3
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from app.sessions import consistency
from tests.survival.histories import (
    PHASES,
    TERMINAL,
    Event,
    Prompt,
    Session,
    Store,
    as_dict,
    as_list,
    of_session,
    parsed,
    prompts_told,
    read_store,
    short,
    whole_body,
)
from tests.survival.invariants_disk import Ground, looked, on_disk
from tests.survival.invariants_store import in_store, not_at_rest

_MARKERS = ("hello", "caught_up")
_STATUS = {
    "session_not_found": 404,
    "not_found": 404,
    "session_already_completed": 409,
    "session_not_awaiting_input": 409,
    "session_not_retryable": 409,
    "prompt_not_open": 409,
    "too_late_to_cancel": 409,
    "cursor_ahead": 409,
    "validation_failed": 422,
    "input_invalid": 422,
    "idempotency_key_reused": 422,
    "cursor_invalid": 422,
    "internal_error": 500,
    "setup_incomplete": 503,
    "shutting_down": 503,
    "store_unavailable": 503,
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for, below /api/v1, and what it was answered; no `status` where no answer came."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    key: str | None = None
    status: int | None = None
    answer: Any = None


class Watched(msgspec.Struct, frozen=True, kw_only=True):
    """What one WebSocket connection was sent."""

    session_id: str
    after: int | None
    frames: tuple[bytes, ...]
    close_code: int | None


class Log:
    """What all clients of one laboratory, one principal, have seen over all restarts; it only grows."""

    def __init__(self) -> None:
        self._guard = Lock()
        self.requests: list[Request] = []
        self.watched: list[Watched] = []

    def note(self, request: Request) -> None:
        with self._guard:
            self.requests.append(request)

    def saw(self, watched: Watched) -> None:
        with self._guard:
            self.watched.append(watched)


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a laboratory must look like besides what its store says.

    `complete` are the files, relative, of the folder at each destination, without the runs below a project;
    `untouched` are fingerprints that were taken before; `foreign` are folders that somebody else made.
    """

    local_root: Path
    complete: Mapping[str, frozenset[str]] = {}
    untouched: Mapping[Path, str] = {}
    foreign: frozenset[str] = frozenset()


def fingerprint(path: Path) -> str:
    """Names, types, modes and contents of a file or a tree, as a digest; `absent` where nothing is."""
    if not os.path.lexists(path):
        return "absent"
    entries = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    digest = hashlib.sha256()
    for entry in sorted(entries):
        status = entry.lstat()
        told = (str(entry.relative_to(path)), stat.filemode(status.st_mode), _content(entry, status))
        digest.update(msgspec.json.encode(told))
    return digest.hexdigest()


def _content(path: Path, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    return hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""


class _Seen(msgspec.Struct, frozen=True):
    """The log as it was before the store was read: what came to it later may not be in the store yet."""

    requests: tuple[Request, ...]
    watched: tuple[Watched, ...]


def violations(store: Path, log: Log, expected: Expected, *, live: bool = False) -> list[str]:
    """All that contradicts the contract, in sentences; none is what there should be.

    Unless a service is `live` and at work beside it, every session must have ended or wait for its operator, and
    what a service clears after a commit, or sweeps at its next start, must be gone: ask again until it had its time.
    """
    seen = _Seen(tuple(log.requests), tuple(log.watched))
    try:
        read = read_store(store)
        found = [*in_store(read), *_in_clients(read, seen)]
        if not live:
            found += [*not_at_rest(read), *_unasked(read, seen)]
        found += _on_disk_for_good(store, read, expected, live=live)
    except sqlite3.Error as error:
        return [_unreadable(store, error)]
    return [*found, *looked(_by_the_product(store, expected.local_root))]


def violations_of_clients(store: Path, log: Log) -> list[str]:
    """Those of them that need no data root: what clients were told, and the histories that they were told of.

    A service may run beside it, and sessions may be there that nobody in the log has asked for.
    """
    seen = _Seen(tuple(log.requests), tuple(log.watched))
    try:
        read = read_store(store)
    except sqlite3.Error as error:
        return [_unreadable(store, error)]
    return [*in_store(read), *_in_clients(read, seen)]


def _unreadable(store: Path, error: sqlite3.Error) -> str:
    return f"the store {store} cannot be read: {error}"


def _by_the_product(store: Path, local_root: Path) -> Iterator[str]:
    for complaint in consistency.examine(store, local_root):
        if complaint.level in ("error", "warning"):
            yield f"check: {complaint.where}: {complaint.what}"


# The disk


def _on_disk_for_good(path: Path, read: Store, expected: Expected, *, live: bool) -> list[str]:
    """While a service runs, what is wrong at one look may be right at the next; what stays is wrong."""
    found = list(_on_disk(read, expected, live=live))
    if not live or not found:
        return found
    again = set(_on_disk(read_store(path), expected, live=live))
    return [each for each in found if each in again]


def _on_disk(store: Store, expected: Expected, *, live: bool) -> Iterator[str]:
    ground = Ground(
        store=store,
        root=expected.local_root,
        complete=expected.complete,
        foreign=expected.foreign,
        untouched=frozenset(map(str, expected.untouched)),
        live=live,
    )
    yield from on_disk(ground)
    yield from looked(_changed(expected))


def _changed(expected: Expected) -> Iterator[str]:
    for path, before in expected.untouched.items():
        if fingerprint(path) != before:
            yield f"{path} was to be left alone, and is not what it was"


# The store against what clients were answered


def _in_clients(store: Store, seen: _Seen) -> Iterator[str]:
    for number, request in enumerate(seen.requests, 1):
        facts = _in_request(store, request)
        yield from (f"request {number} ({request.method} {request.path}): {fact}" for fact in facts)
    yield from _in_openings(store, seen)
    for number, watched in enumerate(seen.watched, 1):
        name = f"session {watched.session_id}: connection {number} (after {watched.after})"
        yield from (f"{name} {fact}" for fact in _in_watched(store, watched))
        yield from (f"{name} {fact}" for fact in _in_close(store, watched, seen.watched[: number - 1]))


def _aim(request: Request) -> tuple[str, str | None, str | None]:
    """The collection, the session and the verb of a path."""
    parts = [*urlsplit(request.path).path.strip("/").split("/"), None, None]
    return str(parts[0]), parts[1], parts[2]


def _in_request(store: Store, request: Request) -> Iterator[str]:
    if request.status is None or _aim(request)[0] != "sessions":
        return
    if request.status >= 400:
        yield from _in_refusal(store, request)
        return
    answer = as_dict(request.answer)
    verb = _aim(request)[2]
    if verb == "events":
        yield from _in_page(store, request, answer)
    elif verb != "log":
        for handle in as_list(answer["sessions"]) if "sessions" in answer else [answer]:
            yield from _in_handle(store, as_dict(handle))
    match verb:
        case "resume":
            yield from _in_resumed(store, request)
        case "cancel":
            yield from _in_cancelled(store, request, answer)


def _in_handle(store: Store, handle: dict[str, Any]) -> Iterator[str]:
    """A handle is a session as it was committed: what it says is still so, or was at its head_seq."""
    name = handle.get("session_id")
    session = store.sessions.get(str(name))
    if session is None:
        yield f"was answered with the session {name}, which the store does not have"
        return
    head, state = handle.get("head_seq"), handle.get("state")
    true = session.history.states.get(head) if isinstance(head, int) else None
    if true is None:
        yield f"was answered with head_seq {head} of {name}, of which the store has {session.head_seq} events"
    elif state != true:
        yield f"was answered that {name} was {state} at event {head}, where it was {true}"
    if handle.get("epoch") != store.epoch:
        yield f"was answered with the epoch {handle.get('epoch')}, and the store's is {store.epoch}"
    if handle.get("current_phase") != PHASES.get(str(state)):
        yield f"was answered with the phase {handle.get('current_phase')} of {name}, which was {state}"
    yield from _in_asking_handle(session, handle)
    constant = ("kind", "run_kind", "label", "equipment_id", "operator", "created_at", "retry_of")
    pinned = ("destination",) if handle.get("destination") is not None else ()
    final = ("error", "result") if state in TERMINAL else ()
    for each in (*constant, *pinned, *final):
        if handle.get(each) != getattr(session, each):
            claimed = short(getattr(session, each))
            yield f"was answered that {each} of {name} is {short(handle.get(each))}; in the store it is {claimed}"


def _in_asking_handle(session: Session, handle: dict[str, Any]) -> Iterator[str]:
    head = handle.get("head_seq")
    asked = [
        event.frame.get("prompt_id")
        for event in session.events
        if event.kind == "input_required" and isinstance(head, int) and event.seq <= head
    ]
    shown = as_dict(handle.get("pending_input")).get("prompt_id")
    wanted = (asked or ["none"])[-1] if handle.get("state") == "input_required" else None
    if shown != wanted or (handle.get("next_action") == "awaiting_input") != (wanted is not None):
        state = handle.get("state")
        yield f"was answered with the prompt {shown} of {session.session_id}, which was {state} with {wanted}"


def _in_page(store: Store, request: Request, page: dict[str, Any]) -> Iterator[str]:
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        yield "was answered with the events of a session that the store does not have"
        return
    after = int(parse_qs(urlsplit(request.path).query).get("after", ["0"])[0])
    stored = {event.seq: event.frame for event in session.events}
    for seq, frame in enumerate(as_list(page.get("events")), after + 1):
        if stored.get(seq) != frame:
            yield f"was answered with {short(frame)} as event {seq}, which in the store is {short(stored.get(seq))}"


def _in_resumed(store: Store, request: Request) -> Iterator[str]:
    """A 200 means that this very answer was taken, now or before."""
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        return
    told = prompts_told(session)
    named = as_dict(request.body).get("prompt_id")
    taken = [
        prompt
        for prompt in session.prompts
        if named in (None, prompt.prompt_id) and told.get(prompt.prompt_id, ("",))[0] == "answered"
    ]
    if not taken:
        yield f"was answered 200, but no event says that the prompt {named} was answered"
    elif not any(_gave(request, prompt) for prompt in taken):
        kept = [prompt.answer for prompt in taken]
        yield f"was answered 200, but the answer in the store is another one: {short(kept)}"


def _gave(request: Request, prompt: Prompt) -> bool:
    """Whether what is kept of an answer is what this request said."""
    said = as_dict(as_dict(request.body).get("extra_inputs"))
    kept = as_dict(prompt.answer)
    for field in prompt.fields:
        name = as_dict(field).get("id")
        value = said.get(str(name), as_dict(field).get("default"))
        if not as_dict(field).get("secret") and kept.get(str(name)) != (None if value == "" else value):
            return False
    return True


def _in_cancelled(store: Store, request: Request, answer: dict[str, Any]) -> Iterator[str]:
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        return
    if session.state != "aborted" or answer.get("state") != "aborted":
        yield f"was answered 200 and {answer.get('state')}, and the session is {session.state}, not aborted"
    operator = as_dict(request.body).get("operator")
    said = [command.operator for command in session.audit if command.command == "cancel"]
    if operator not in said:
        yield f"was answered 200, but the audit has no cancel by {operator}: {said}"


def _in_refusal(store: Store, request: Request) -> Iterator[str]:
    error = as_dict(as_dict(request.answer).get("error"))
    code, details = error.get("code"), as_dict(error.get("details"))
    if not {"code", "message", "trace_id"} <= error.keys():
        yield f"was answered {request.status} without a code, a message and a trace_id"
    if _STATUS.get(str(code), request.status) != request.status:
        yield f"was answered {request.status} with the code {code}"
    if request.status == 500:
        yield f"was answered 500, which is a bug: {error.get('message')}"
    session = store.sessions.get(str(_aim(request)[1]))
    if session is not None:
        yield from _in_refused(session, str(code), details)
    if code == "idempotency_key_reused":
        yield from _in_reused(store, request)


def _in_refused(session: Session, code: str, details: dict[str, Any]) -> Iterator[str]:
    """What a refusal said of a session must be so, or have been so."""
    match code:
        case "session_not_found":
            yield "was told that there is no such session, and it is in the store"
        case "session_already_completed" if not session.terminal:
            yield f"was told that the session is terminal, and it is {session.state}"
        case "too_late_to_cancel" if not session.passed("sync_queued"):
            yield "was told that it is too late to cancel, and the session never came to sync_queued"
        case "session_not_retryable" if not session.passed(str(details.get("state"))):
            yield f"was told that the session is {details.get('state')}, and it never was"
        case "prompt_not_open" if details.get("prompt_id") not in prompts_told(session):
            yield f"was told that {details.get('prompt_id')} is open, which the session never asked"


def _in_reused(store: Store, request: Request) -> Iterator[str]:
    owner = next((each for each in store.sessions.values() if request.key in each.keys), None)
    if owner is None:
        yield f"was told that the key {request.key} was used, and the store does not have it"
    elif (owner.retry_of, owner.asked_for) == _opening(store, request):
        yield f"was told that the key {request.key} came with another body, and it came with the same"


def _opens(request: Request) -> bool:
    collection, session_id, verb = _aim(request)
    opening = session_id is None or verb == "retry"
    return request.method == "POST" and collection == "sessions" and opening


def _opening(store: Store, request: Request) -> tuple[str | None, bytes]:
    """Which session a request wants to try again, and what the session that it opens is asked for."""
    retry_of = _aim(request)[1]
    if retry_of is None:
        return None, whole_body(request.body)
    tried = store.sessions.get(retry_of)
    changes = as_dict(request.body).get("changes", {})
    return retry_of, whole_body(_patched(tried.request if tried else None, changes))


def _patched(target: object, patch: object) -> object:
    """The merge patch of RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(as_dict(target))
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _patched(merged.get(name), value)
    return merged


def _in_openings(store: Store, seen: _Seen) -> Iterator[str]:
    """A key opens one session, and what has no key opens one each."""
    opened = defaultdict(list)
    for request in seen.requests:
        if _opens(request) and request.status in (200, 201):
            session_id = str(as_dict(request.answer).get("session_id"))
            opened[request.key].append(session_id)
            session = store.sessions.get(session_id)
            if session is not None and (session.retry_of, session.asked_for) != _opening(store, request):
                yield f"session {session_id}: it was the answer to a request for something else"
            if session is not None and request.key is not None and request.key not in session.keys:
                yield f"session {session_id}: the key {request.key} was answered with it, and is not its own"
    for key, sessions in opened.items():
        if key is not None and len(set(sessions)) > 1:
            yield f"the idempotency key {key} was answered with several sessions: {sorted(set(sessions))}"
    for session_id, times in Counter(opened[None]).items():
        if times > 1:
            yield f"session {session_id}: it was the answer to {times} requests without a key"


def _unasked(store: Store, seen: _Seen) -> Iterator[str]:
    """What has happened without a request that was taken, or may have been when no answer came."""
    may = [each for each in seen.requests if each.status is None or each.status < 300]
    openings = Counter((each.key, *_opening(store, each)) for each in may if _opens(each))
    keyless: Counter[tuple[None, str | None, bytes]] = Counter()
    for session in store.sessions.values():
        for key in session.keys:
            if not openings[key, session.retry_of, session.asked_for]:
                yield f"session {session.session_id}: no request that was taken asked for it with the key {key}"
        if not session.keys:
            asked = (None, session.retry_of, session.asked_for)
            keyless[asked] += 1
            if keyless[asked] > openings[asked]:
                times = openings[asked]
                yield f"session {session.session_id}: no request asked for it; {times} did without a key"
        yield from of_session(session, _unasked_commands(session, may, seen.requests))


def _unasked_commands(session: Session, may: Sequence[Request], every: Sequence[Request]) -> Iterator[str]:
    answers = [each for each in may if _aim(each)[1:] == (session.session_id, "resume")]
    told = prompts_told(session)
    for prompt in session.prompts:
        if told.get(prompt.prompt_id, ("",))[0] == "answered" and not any(
            _may_answer(each, prompt) for each in answers
        ):
            yield f"the prompt {prompt.prompt_id} was answered by {prompt.operator}, and nobody's request said so"
    cancels = [each for each in every if _aim(each)[1:] == (session.session_id, "cancel")]
    takeable = [each for each in cancels if each.status is None or each.status < 300 or each.status >= 500]
    if session.cancel_requested_at is not None and not takeable:
        yield "its cancel was recorded, and no request that was taken asked for it"


def _may_answer(request: Request, prompt: Prompt) -> bool:
    body = as_dict(request.body)
    named = body.get("prompt_id") in (None, prompt.prompt_id)
    return named and body.get("operator") == prompt.operator and _gave(request, prompt)


# The store against what clients were sent


def _in_watched(store: Store, watched: Watched) -> Iterator[str]:
    session = store.sessions.get(watched.session_id)
    events = {event.seq: event for event in session.events} if session else {}
    cursor, markers = watched.after or 0, []
    for data in watched.frames:
        frame = as_dict(parsed(data))
        seq = frame.get("seq")
        if frame.get("kind") in _MARKERS:
            markers.append(str(frame["kind"]))
            yield from _in_marker(store, frame, watched, cursor)
            continue
        if seq != _next(events, cursor, seq, session if watched.after is None else None):
            yield f"was sent event {seq} after event {cursor}"
        if seq not in events:
            yield f"was sent event {seq}, which the store does not have"
        elif data != events[seq].data:
            yield f"was sent as event {seq} {short(data)}, and stored is {short(events[seq].data)}"
        cursor = seq if isinstance(seq, int) else cursor
    if markers not in ([], ["hello"], ["hello", "caught_up"]):
        yield f"was sent these markers: {markers}"


def _next(events: Mapping[int, Event], cursor: int, sent: object, of_old: Session | None) -> int:
    """The seq that must come; a client of the replaced service is spared prompts that are settled."""
    settled = {prompt.prompt_id for prompt in of_old.prompts if prompt.status != "open"} if of_old else set()
    due = cursor + 1
    while due != sent and due in events and events[due].kind == "input_required":
        if events[due].frame.get("prompt_id") not in settled:
            break
        due += 1
    return due


def _in_marker(store: Store, frame: dict[str, Any], watched: Watched, cursor: int) -> Iterator[str]:
    if frame["kind"] == "hello" and frame.get("epoch") != store.epoch:
        yield f"was told the epoch {frame.get('epoch')}, and the store's is {store.epoch}"
    if frame["kind"] == "hello" and frame.get("after") != (watched.after or 0):
        yield f"was told that it is served after {frame.get('after')}"
    if frame["kind"] == "caught_up":
        told = frame.get("seq")
        spared = watched.after is None and isinstance(told, int) and told > cursor
        if told != cursor and not spared:
            yield f"was told that it is caught up at {told}, having been sent all up to {cursor}"


def _in_close(store: Store, watched: Watched, earlier: Sequence[Watched]) -> Iterator[str]:
    session = store.sessions.get(watched.session_id)
    sent = [frame for data in watched.frames if (frame := as_dict(parsed(data))).get("kind") not in _MARKERS]
    match watched.close_code:
        case 1000 if sent and sent[-1].get("kind") not in ("done", "failed"):
            yield f"was closed with 1000 after {short(sent[-1])}, which is not the end"
        case 1000 if not sent and not (session and session.terminal and watched.after == session.head_seq):
            yield "was closed with 1000 without the end"
        case 4404 if session is not None:
            yield "was told that there is no such session, and it is in the store"
        case 4400:
            yield "was told that its cursor is malformed, and it is a number"
        case 4409 if (watched.after or 0) <= max((_last(each) for each in _of(watched, earlier)), default=0):
            yield "was told that its cursor is ahead of the history, and it had been sent that event"


def _of(watched: Watched, earlier: Sequence[Watched]) -> Iterator[Watched]:
    return (each for each in earlier if each.session_id == watched.session_id)


def _last(watched: Watched) -> int:
    """The newest event that a connection was sent."""
    frames = (as_dict(parsed(data)) for data in watched.frames)
    numbers = (frame.get("seq") for frame in frames if frame.get("kind") not in _MARKERS)
    return max((seq for seq in numbers if isinstance(seq, int)), default=0)
