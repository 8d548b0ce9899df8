"""The contract of sessions, as a checker: what must be true of a laboratory, whatever was done to it.

It promises to find what contradicts sections 4, 5 and 7 of the contract: in the store, in what clients were
answered and sent, and on the disk. Edges, phases and rules stand here once more, and the store is read with plain
SQL, so that a bug in the product's own reading cannot hide here; the product's own examination is asked besides.
It only looks. How a laboratory came to be as it is, and when it has come to rest, is left to those who ask.
"""

import hashlib
import itertools
import os
import re
import sqlite3
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from app.sessions import consistency


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


def violations(store: Path, log: Log, expected: Expected, *, live: bool = False) -> list[str]:
    """All that contradicts the contract, in sentences; none is what there should be.

    Unless a service is `live` and at work beside it, every session must have ended or wait for its operator, and
    what a service clears after a commit, or sweeps at its next start, must be gone: ask again until it had its time.
    """
    seen = _Seen(tuple(log.requests), tuple(log.watched))
    try:
        read = _read(store)
        found = [*_in_store(read), *_in_clients(read, seen)]
        if not live:
            found += [*_not_at_rest(read), *_unasked(read, seen)]
        found += _on_disk_for_good(store, read, expected, live=live)
    except sqlite3.Error as error:
        return [_unreadable(store, error)]
    return [*found, *_looked(_by_the_product(store, expected.local_root))]


def violations_of_clients(store: Path, log: Log) -> list[str]:
    """Those of them that need no data root: what clients were told, and the histories that they were told of.

    A service may run beside it, and sessions may be there that nobody in the log has asked for.
    """
    seen = _Seen(tuple(log.requests), tuple(log.watched))
    try:
        read = _read(store)
    except sqlite3.Error as error:
        return [_unreadable(store, error)]
    return [*_in_store(read), *_in_clients(read, seen)]


def _unreadable(store: Path, error: sqlite3.Error) -> str:
    return f"the store {store} cannot be read: {error}"


def _by_the_product(store: Path, local_root: Path) -> Iterator[str]:
    for complaint in consistency.examine(store, local_root):
        if complaint.level in ("error", "warning"):
            yield f"check: {complaint.where}: {complaint.what}"


# The contract

PHASES = {
    "validating": "validating_inputs",
    "rendering": "rendering_template",
    "plugin_pass": "running_plugins",
    "input_required": "input_required",
    "cache_write": "writing_cache",
    "post_validate": "validating_post_creation",
    "sync_queued": "queueing_nas_sync",
    "done": "done",
}
TERMINAL = ("done", "failed", "aborted")
_LIVE = ("pending", *(state for state in PHASES if state != "done"))
_STRAIGHT = [state for state in _LIVE if state != "input_required"]
EDGES = {
    *itertools.pairwise([*_STRAIGHT, "done"]),
    ("plugin_pass", "input_required"),
    ("input_required", "plugin_pass"),
    *((state, "failed") for state in _LIVE),
    *((state, "aborted") for state in _LIVE if state != "sync_queued"),
}
_STATE_OF = {PHASES[state]: state for state in _STRAIGHT if state in PHASES}
_WORDS = {
    "phase": ("phase",),
    "progress": ("phase", "current", "total"),
    "input_required": ("fields", "reason", "plugin", "prompt_id"),
    "input_received": ("prompt_id", "plugin"),
    "warning": ("phase", "message", "code"),
    "recovered": ("state",),
    "done": ("result",),
    "failed": ("phase", "error"),
}
_OF_AN_ANSWER = {"kind", "seq", "at", "prompt_id", "plugin", "operator"}
_OF_A_RESULT = {"path", "sync_status", "blocked", "findings"}
_FRAME_BYTES = 256 * 1024
_MARKERS = ("hello", "caught_up")
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SECOND = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"
_SCHEMA = "1.9"
_OURS = ".exlab-wizard"
_STAGING = ".exlab-sessions"
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
_LEFT_OUT: dict[str, object] = {"lims_project": {}, "variables": {}, "readme_extra": {}}
"""What a body says that does not say it; a run, besides, has no date."""


# What is in the store


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    position: int
    seq: int
    kind: str
    at: str
    data: bytes
    frame: dict[str, Any]


class _Prompt(msgspec.Struct, frozen=True, kw_only=True):
    prompt_id: str
    plugin: str
    file: str | None
    reason: str
    fields: list[Any]
    status: str
    answered_at: str | None
    operator: str | None
    answer: Any


class _Run(msgspec.Struct, frozen=True, kw_only=True):
    ordinal: int
    plugin: str
    version: str | None
    status: str
    files: Any


class _Command(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the audit."""

    at: str
    operator: str | None
    command: str
    details: dict[str, Any]


class _Job(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    status: str


class _History:
    """The states that a session has passed through, by its events alone, and what is wrong with the path."""

    def __init__(self, events: Sequence[_Event]) -> None:
        self.state = "pending"
        self.states = {0: self.state}
        self.faults: list[str] = []
        self.end: _Event | None = None
        for before, event in itertools.pairwise([None, *events]):
            if event is not None:
                self._add(event, before)
        if events and events[-1].kind == "input_received":
            self.faults.append("its history ends with an answer, without the phase running_plugins after it")

    def _add(self, event: _Event, before: _Event | None) -> None:
        self._must_agree(event)
        answered = before is not None and before.kind == "input_received"
        goes_on = event.kind == "phase" and event.frame.get("phase") == PHASES["plugin_pass"]
        if answered and not goes_on:
            self.faults.append(f"event {event.seq} ({event.kind}) comes where the answer leads to a phase")
        elif not answered:
            self._move(event)
        self.states[event.seq] = self.state

    def _move(self, event: _Event) -> None:
        lead = _lead(event)
        if self.state in TERMINAL:
            self.faults.append(f"event {event.seq} ({event.kind}) comes after the end")
        if lead is None:
            return
        no_answer = self.state == "input_required" and event.kind == "phase"
        no_question = self.state != "input_required" and event.kind == "input_received"
        if (self.state, lead) not in EDGES or no_answer or no_question:
            what = (
                f"event {event.seq} ({event.kind}) leads from {self.state} to {lead}, where there is no edge"
            )
            self.faults.append(what)
        self.state = lead
        if lead in TERMINAL:
            self.end = event

    def _must_agree(self, event: _Event) -> None:
        """An event tells of the state that it happens in; the first happens before there is any phase."""
        told: str | None = None
        if event.kind in ("progress", "warning", "failed"):
            told, true = event.frame.get("phase"), PHASES.get(self.state, PHASES["validating"])
        elif event.kind == "recovered":
            told, true = event.frame.get("state"), self.state
        else:
            return
        if told != true:
            self.faults.append(
                f"event {event.seq} ({event.kind}) speaks of {told} while it is in {self.state}"
            )


def _lead(event: _Event) -> str | None:
    """Where an event takes its session, None for one that does not."""
    match event.kind:
        case "phase":
            return _STATE_OF.get(str(event.frame.get("phase")), "no state")
        case "input_required" | "done":
            return event.kind
        case "input_received":
            return "plugin_pass"
        case "failed":
            return "aborted" if _dict(event.frame.get("error")).get("code") == "cancelled" else "failed"
        case _:
            return None


class _Session(msgspec.Struct, frozen=True, kw_only=True):
    """One row, with all that belongs to it."""

    session_id: str
    kind: str
    run_kind: str | None
    state: str
    label: str
    operator: str
    equipment_id: str
    project_short_id: str | None
    destination: str | None
    destination_key: str | None
    local_root: str | None
    created_at: str
    ended_at: str | None
    head_seq: int
    tree: str | None
    blocked_on: str | None
    cancel_requested_at: str | None
    partial_path: str | None
    sync_status: str | None
    retry_of: str | None
    error: Any
    result: Any
    cancel: Any
    request: Any
    pinned: Any
    events: list[_Event]
    history: _History
    prompts: list[_Prompt]
    runs: list[_Run]
    sealed: list[str]
    jobs: list[_Job]
    audit: list[_Command]
    keys: list[str]

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def asked_for(self) -> bytes:
        return _whole_body(self.request)

    def passed(self, state: str) -> bool:
        return state in self.history.states.values()


class _Store(msgspec.Struct, frozen=True, kw_only=True):
    sessions: dict[str, _Session]
    epoch: str | None
    strays: list[str]


class _Seen(msgspec.Struct, frozen=True):
    """The log as it was before the store was read: what came to it later may not be in the store yet."""

    requests: tuple[Request, ...]
    watched: tuple[Watched, ...]


_PLAIN = (
    "session_id kind run_kind state label operator equipment_id project_short_id destination destination_key"
    " local_root created_at ended_at head_seq tree blocked_on cancel_requested_at partial_path sync_status retry_of"
)
_JSON = ("error", "result", "cancel", "request", "pinned")

Rows = Mapping[str, list[sqlite3.Row]]


def _read(path: Path) -> _Store:
    """All of the store, in one snapshot."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)) as db:
        db.row_factory = sqlite3.Row
        db.execute("BEGIN")
        rows = {
            table: _grouped(db.execute(f"SELECT * FROM {table} ORDER BY {order}"))
            for table, order in {
                "events": "seq",
                "prompts": "asked_at, answered_at",
                "plugin_runs": "ordinal",
                "snapshots": "ordinal",
                "copy_jobs": "created_at",
                "audit": "entry",
                "idempotency_keys": "key",
            }.items()
        }
        found = [_session(row, rows) for row in db.execute("SELECT * FROM sessions ORDER BY session_id")]
        epoch = db.execute("SELECT value FROM store_facts WHERE name = 'epoch'").fetchone()
    sessions = {session.session_id: session for session in found}
    return _Store(sessions=sessions, epoch=epoch[0] if epoch else None, strays=list(_strays(rows, sessions)))


def _grouped(rows: Iterable[sqlite3.Row]) -> Rows:
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["session_id"]].append(row)
    return grouped


def _strays(rows: Mapping[str, Rows], sessions: Mapping[str, object]) -> Iterator[str]:
    for table, grouped in rows.items():
        for session_id in grouped.keys() - sessions.keys() - {None}:
            if not any(row["command"] == "prune" for row in rows["audit"].get(session_id, ())):
                yield f"session {session_id}: there is none, but {len(grouped[session_id])} rows of {table} name it"


def _session(row: sqlite3.Row, rows: Mapping[str, Rows]) -> _Session:
    own = {table: grouped.get(row["session_id"], []) for table, grouped in rows.items()}
    events = [_event(each) for each in own["events"]]
    return _Session(
        **{name: row[name] for name in _PLAIN.split()},
        **{name: _json(row[name]) for name in _JSON},
        events=events,
        history=_History(events),
        prompts=[_prompt(each) for each in own["prompts"]],
        runs=[_run(each) for each in own["plugin_runs"]],
        sealed=[each["tree"] for each in own["snapshots"]],
        jobs=[_Job(source=each["source"], status=each["status"]) for each in own["copy_jobs"]],
        audit=[_command(each) for each in own["audit"]],
        keys=[each["key"] for each in own["idempotency_keys"]],
    )


def _event(row: sqlite3.Row) -> _Event:
    plain = {name: row[name] for name in ("position", "seq", "kind", "at")}
    return _Event(**plain, data=row["frame"].encode(), frame=_dict(_json(row["frame"])))


def _prompt(row: sqlite3.Row) -> _Prompt:
    names = ("prompt_id", "plugin", "file", "reason", "status", "answered_at", "operator")
    told = {name: _json(row[name]) for name in ("fields", "answer")}
    return _Prompt(**{name: row[name] for name in names}, fields=_list(told["fields"]), answer=told["answer"])


def _run(row: sqlite3.Row) -> _Run:
    plain = {name: row[name] for name in ("ordinal", "plugin", "version", "status")}
    return _Run(**plain, files=_json(row["files_affected"]))


def _command(row: sqlite3.Row) -> _Command:
    plain = {name: row[name] for name in ("at", "operator", "command")}
    return _Command(**plain, details=_dict(_json(row["details"])))


def _json(text: str | bytes | None) -> Any:
    """What a text says; one that is no JSON is like nothing that it should be."""
    try:
        return None if text is None else msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"no JSON: {text!r}"


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _named(session: _Session, facts: Iterable[str]) -> Iterator[str]:
    return (f"session {session.session_id}: {fact}" for fact in facts)


# The store against itself


def _in_store(store: _Store) -> Iterator[str]:
    yield from store.strays
    looks: tuple[Callable[[_Session], Iterator[str]], ...] = (
        _in_order,
        _in_frames,
        _in_path,
        _in_end,
        _in_cancel,
        _in_prompts,
        _in_prompt_rows,
        _in_plugins,
        _in_audit,
    )
    for session in store.sessions.values():
        for look in looks:
            yield from _named(session, look(session))
    yield from _in_all(store)


def _in_order(session: _Session) -> Iterator[str]:
    events = session.events
    for before, event in itertools.pairwise(events):
        if event.position <= before.position:
            yield f"event {event.seq} was committed before event {before.seq}: {event.position}, {before.position}"
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        yield f"its events are not 1 to {len(events)}: {_short([event.seq for event in events])}"
    if events and (events[0].kind, events[0].frame.get("phase")) != ("phase", PHASES["validating"]):
        yield f"its first event is not the phase validating_inputs but {_short(events[0].frame)}"


def _in_frames(session: _Session) -> Iterator[str]:
    for event in session.events:
        for name in ("seq", "kind", "at"):
            if event.frame.get(name) != getattr(event, name):
                yield f"event {event.seq} has {name} {getattr(event, name)}, its frame {event.frame.get(name)}"
        if len(event.data) > _FRAME_BYTES:
            yield f"the frame of event {event.seq} has {len(event.data)} bytes, more than 256 KiB"
        if not _AT.fullmatch(event.at):
            yield f"event {event.seq} has no time in UTC with milliseconds: {event.at}"
        lacking = [word for word in _WORDS.get(event.kind, ("kind",)) if word not in event.frame]
        if lacking:
            yield f"event {event.seq} ({event.kind}) lacks {lacking}"
        if event.kind == "input_received" and event.frame.keys() - _OF_AN_ANSWER:
            yield f"event {event.seq} tells more of an answer than it may: {sorted(event.frame)}"


def _in_path(session: _Session) -> Iterator[str]:
    yield from session.history.faults
    ends = [event.seq for event in session.events if event.kind in ("done", "failed")]
    if len(ends) != session.terminal or (ends and ends[-1] != session.events[-1].seq):
        yield f"it is {session.state}, and of its {len(session.events)} events these are terminal: {ends}"
    end = session.history.end
    frame = end.frame if end else {}
    told = {
        "state": session.history.state,
        "head_seq": max((event.seq for event in session.events), default=0),
        "error": frame.get("error"),
        "result": frame.get("result"),
        "ended_at": end.at if end else None,
    }
    for name, true in told.items():
        if getattr(session, name) != true:
            yield f"its row says {name} {_short(getattr(session, name))}, its events say {_short(true)}"


def _in_end(session: _Session) -> Iterator[str]:
    if session.terminal and session.blocked_on is not None:
        yield f"it is {session.state} and still blocked on {session.blocked_on}"
    if session.state != "done":
        if session.jobs or session.sync_status is not None:
            yield f"it is {session.state}, and a copy to the NAS is queued all the same"
        return
    result = _dict(session.result)
    if _OF_A_RESULT - result.keys():
        yield f"its result lacks {sorted(_OF_A_RESULT - result.keys())}"
    status = result.get("sync_status")
    if result.get("blocked") != (status == "blocked_by_validation") or session.sync_status != status:
        yield f"its copy is {session.sync_status}, its result says {status}, blocked {result.get('blocked')}"
    if [(job.source, job.status) for job in session.jobs] != [(result.get("path"), status)]:
        yield f"its copies to the NAS are not one of {result.get('path')} that is {status}: {session.jobs}"


def _in_cancel(session: _Session) -> Iterator[str]:
    if session.state == "aborted" and session.cancel_requested_at is None:
        yield "it is aborted, but no cancel was recorded"
    if session.state in ("done", "failed") and session.cancel_requested_at is not None:
        yield f"its cancel was recorded, but it is {session.state}"
    said = [command for command in session.audit if command.command == "cancel"]
    if bool(said) != (session.cancel_requested_at is not None):
        yield f"its cancel is {session.cancel_requested_at}, but the audit has {len(said)}"
    elif said:
        first, cancel = said[0], _dict(session.cancel)
        told = (first.at, first.operator, first.details.get("discard_files"))
        if told != (session.cancel_requested_at, cancel.get("operator"), cancel.get("discard_files")):
            yield f"its cancel is {cancel} at {session.cancel_requested_at}, the audit says {told}"
        if [command.details.get("joined") for command in said] != [False, *[True] * (len(said) - 1)]:
            yield "not all cancels but the first are said to have joined it"


def _in_prompts(session: _Session) -> Iterator[str]:
    """Each question once; one at a time; no settled one again."""
    waits: dict[str, Any] | None = None
    settled: list[tuple[object, ...]] = []
    for event in session.events:
        if event.kind == "input_required":
            asked = event.frame
            if waits is not None:
                yield f"event {event.seq} asks {asked.get('prompt_id')} while {waits.get('prompt_id')} is open"
            if _question(asked) in settled and not _secret(asked.get("fields")):
                yield f"event {event.seq} asks {asked.get('plugin')}'s question again, which was answered"
            waits = asked
        elif event.kind == "input_received":
            if waits is None or waits.get("prompt_id") != event.frame.get("prompt_id"):
                yield f"event {event.seq} answers {event.frame.get('prompt_id')}, which is not open"
            settled += [_question(waits)] if waits is not None else []
            waits = None
        elif event.kind == "failed":
            waits = None


def _question(frame: Mapping[str, Any]) -> tuple[object, ...]:
    return frame.get("plugin"), frame.get("file"), frame.get("fields")


def _secret(fields: object) -> bool:
    return any(_dict(field).get("secret") for field in _list(fields))


def _in_prompt_rows(session: _Session) -> Iterator[str]:
    told = _prompts_told(session)
    rows = {prompt.prompt_id: prompt for prompt in session.prompts}
    for prompt_id in sorted(told.keys() | rows.keys(), key=str):
        prompt = rows.get(prompt_id)
        status, asked, answer = told.get(prompt_id, ("not asked", {}, None))
        claimed = prompt.status if prompt else "missing"
        if prompt is None or prompt.status != status:
            yield f"the prompt {prompt_id} is {claimed}; by its events it is {status}"
            continue
        question = (prompt.plugin, prompt.file, prompt.fields)
        if question != _question(asked) or prompt.reason != asked.get("reason"):
            yield f"the prompt {prompt_id} is not the question that its event asks"
        if answer and (prompt.answered_at, prompt.operator) != (answer.at, answer.frame.get("operator")):
            yield f"the prompt {prompt_id} was not answered when, or by whom, its event says"
        if answer and not isinstance(prompt.answer, dict):
            yield f"the prompt {prompt_id} is answered, but its answer is not kept: {prompt.answer}"
    waiting = [prompt.prompt_id for prompt in session.prompts if prompt.status == "open"]
    if len(waiting) != (session.state == "input_required"):
        yield f"it is {session.state} with these prompts open: {waiting}"


def _prompts_told(session: _Session) -> dict[str, tuple[str, dict[str, Any], _Event | None]]:
    """By the events: what became of each prompt, how it was asked, and its answer."""
    told: dict[str, tuple[str, dict[str, Any], _Event | None]] = {}
    for event in session.events:
        prompt_id = str(event.frame.get("prompt_id"))
        if event.kind == "input_required":
            told[prompt_id] = ("open", event.frame, None)
        elif event.kind == "input_received" and prompt_id in told:
            told[prompt_id] = ("answered", told[prompt_id][1], event)
        elif event.kind == "failed":
            for asked, (status, frame, answer) in told.items():
                told[asked] = ("withdrawn" if status == "open" else status, frame, answer)
    return told


def _in_plugins(session: _Session) -> Iterator[str]:
    if [run.ordinal for run in session.runs] != list(range(1, len(session.runs) + 1)):
        yield f"its plugins are not counted from 1: {[run.ordinal for run in session.runs]}"
    often = Counter(run.plugin for run in session.runs)
    for index, run in enumerate(session.runs):
        if run.status == "success" and any(later.plugin == run.plugin for later in session.runs[index + 1 :]):
            yield f"the plugin {run.plugin} ran again after its success"
        ends = [event.seq for event in session.events if _ends(event, run)]
        if len(ends) != 1:
            yield f"the end of the plugin {run.plugin}, the {run.ordinal}., is told by these events: {ends}"
        elif often[run.plugin] == 1:
            yield from _after(session, run.plugin, ends[0])


def _ends(event: _Event, run: _Run) -> bool:
    """Its begin is told with the number of those before it."""
    frame = event.frame
    whole = event.kind == "progress" and "file" not in frame
    return whole and (frame.get("plugin"), frame.get("current")) == (run.plugin, run.ordinal)


def _after(session: _Session, plugin: str, end: int) -> Iterator[str]:
    for event in session.events:
        works = event.kind in ("progress", "input_required") and event.frame.get("plugin") == plugin
        if event.seq > end and works:
            yield f"event {event.seq} ({event.kind}) is of the plugin {plugin}, which was through with event {end}"


def _in_audit(session: _Session) -> Iterator[str]:
    opening = [command for command in session.audit if command.command in ("create", "retry")]
    wanted = [("retry" if session.retry_of else "create", session.operator, session.created_at)]
    if [(command.command, command.operator, command.at) for command in opening] != wanted:
        yield f"the audit of its opening is not one {wanted[0]}: {opening}"
    said = [command for command in session.audit if command.command == "resume"]
    audited = Counter((command.details.get("prompt_id"), command.operator, command.at) for command in said)
    answers = [event for event in session.events if event.kind == "input_received"]
    told = Counter((event.frame.get("prompt_id"), event.frame.get("operator"), event.at) for event in answers)
    for prompt_id, operator, at in (told - audited).elements():
        yield f"the answer to {prompt_id} by {operator} at {at} is not in the audit"
    for prompt_id, operator, at in (audited - told).elements():
        yield f"the audit has an answer to {prompt_id} by {operator} at {at}, of which no event tells"


def _in_all(store: _Store) -> Iterator[str]:
    """What must not be twice in a store."""
    every = store.sessions.values()
    asked = Counter(
        event.frame.get("prompt_id")
        for session in every
        for event in session.events
        if event.kind == "input_required"
    )
    for prompt_id, times in asked.items():
        if times > 1:
            yield f"the prompt {prompt_id} was asked {times} times"
    held = Counter(session.destination_key for session in every if not session.terminal)
    for key, times in held.items():
        if key is not None and times > 1:
            yield f"the destination {key} is held by {times} live sessions"
    keys = Counter(key for session in every for key in session.keys)
    for text, times in keys.items():
        if times > 1:
            yield f"the idempotency key {text} belongs to {times} sessions"


def _not_at_rest(store: _Store) -> Iterator[str]:
    for session in store.sessions.values():
        waits = session.state == "input_required" and session.cancel_requested_at is None
        if not session.terminal and not waits:
            facts = f"it has not come to rest: {session.state}, blocked on {session.blocked_on}, "
            yield from _named(session, [facts + f"cancel {session.cancel_requested_at}"])


# The store against what clients were answered


def _in_clients(store: _Store, seen: _Seen) -> Iterator[str]:
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


def _in_request(store: _Store, request: Request) -> Iterator[str]:
    if request.status is None or _aim(request)[0] != "sessions":
        return
    if request.status >= 400:
        yield from _in_refusal(store, request)
        return
    answer = _dict(request.answer)
    verb = _aim(request)[2]
    if verb == "events":
        yield from _in_page(store, request, answer)
    elif verb != "log":
        for handle in _list(answer["sessions"]) if "sessions" in answer else [answer]:
            yield from _in_handle(store, _dict(handle))
    match verb:
        case "resume":
            yield from _in_resumed(store, request)
        case "cancel":
            yield from _in_cancelled(store, request, answer)


def _in_handle(store: _Store, handle: dict[str, Any]) -> Iterator[str]:
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
            claimed = _short(getattr(session, each))
            yield f"was answered that {each} of {name} is {_short(handle.get(each))}; in the store it is {claimed}"


def _in_asking_handle(session: _Session, handle: dict[str, Any]) -> Iterator[str]:
    head = handle.get("head_seq")
    asked = [
        event.frame.get("prompt_id")
        for event in session.events
        if event.kind == "input_required" and isinstance(head, int) and event.seq <= head
    ]
    shown = _dict(handle.get("pending_input")).get("prompt_id")
    wanted = (asked or ["none"])[-1] if handle.get("state") == "input_required" else None
    if shown != wanted or (handle.get("next_action") == "awaiting_input") != (wanted is not None):
        state = handle.get("state")
        yield f"was answered with the prompt {shown} of {session.session_id}, which was {state} with {wanted}"


def _in_page(store: _Store, request: Request, page: dict[str, Any]) -> Iterator[str]:
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        yield "was answered with the events of a session that the store does not have"
        return
    after = int(parse_qs(urlsplit(request.path).query).get("after", ["0"])[0])
    stored = {event.seq: event.frame for event in session.events}
    for seq, frame in enumerate(_list(page.get("events")), after + 1):
        if stored.get(seq) != frame:
            yield f"was answered with {_short(frame)} as event {seq}, which in the store is {_short(stored.get(seq))}"


def _in_resumed(store: _Store, request: Request) -> Iterator[str]:
    """A 200 means that this very answer was taken, now or before."""
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        return
    told = _prompts_told(session)
    named = _dict(request.body).get("prompt_id")
    taken = [
        prompt
        for prompt in session.prompts
        if named in (None, prompt.prompt_id) and told.get(prompt.prompt_id, ("",))[0] == "answered"
    ]
    if not taken:
        yield f"was answered 200, but no event says that the prompt {named} was answered"
    elif not any(_gave(request, prompt) for prompt in taken):
        kept = [prompt.answer for prompt in taken]
        yield f"was answered 200, but the answer in the store is another one: {_short(kept)}"


def _gave(request: Request, prompt: _Prompt) -> bool:
    """Whether what is kept of an answer is what this request said."""
    said = _dict(_dict(request.body).get("extra_inputs"))
    kept = _dict(prompt.answer)
    for field in prompt.fields:
        name = _dict(field).get("id")
        value = said.get(str(name), _dict(field).get("default"))
        if not _dict(field).get("secret") and kept.get(str(name)) != (None if value == "" else value):
            return False
    return True


def _in_cancelled(store: _Store, request: Request, answer: dict[str, Any]) -> Iterator[str]:
    session = store.sessions.get(str(_aim(request)[1]))
    if session is None:
        return
    if session.state != "aborted" or answer.get("state") != "aborted":
        yield f"was answered 200 and {answer.get('state')}, and the session is {session.state}, not aborted"
    operator = _dict(request.body).get("operator")
    said = [command.operator for command in session.audit if command.command == "cancel"]
    if operator not in said:
        yield f"was answered 200, but the audit has no cancel by {operator}: {said}"


def _in_refusal(store: _Store, request: Request) -> Iterator[str]:
    error = _dict(_dict(request.answer).get("error"))
    code, details = error.get("code"), _dict(error.get("details"))
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


def _in_refused(session: _Session, code: str, details: dict[str, Any]) -> Iterator[str]:
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
        case "prompt_not_open" if details.get("prompt_id") not in _prompts_told(session):
            yield f"was told that {details.get('prompt_id')} is open, which the session never asked"


def _in_reused(store: _Store, request: Request) -> Iterator[str]:
    owner = next((each for each in store.sessions.values() if request.key in each.keys), None)
    if owner is None:
        yield f"was told that the key {request.key} was used, and the store does not have it"
    elif (owner.retry_of, owner.asked_for) == _opening(store, request):
        yield f"was told that the key {request.key} came with another body, and it came with the same"


def _opens(request: Request) -> bool:
    collection, session_id, verb = _aim(request)
    opening = session_id is None or verb == "retry"
    return request.method == "POST" and collection == "sessions" and opening


def _opening(store: _Store, request: Request) -> tuple[str | None, bytes]:
    """Which session a request wants to try again, and what the session that it opens is asked for."""
    retry_of = _aim(request)[1]
    if retry_of is None:
        return None, _whole_body(request.body)
    tried = store.sessions.get(retry_of)
    changes = _dict(request.body).get("changes", {})
    return retry_of, _whole_body(_patched(tried.request if tried else None, changes))


def _whole_body(body: object) -> bytes:
    """Equal for bodies that ask for the same."""
    told = _dict(body)
    dated = {"run_date": None} if told.get("kind") == "run" else {}
    return msgspec.json.encode(_LEFT_OUT | dated | told, order="sorted")


def _patched(target: object, patch: object) -> object:
    """The merge patch of RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(_dict(target))
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _patched(merged.get(name), value)
    return merged


def _in_openings(store: _Store, seen: _Seen) -> Iterator[str]:
    """A key opens one session, and what has no key opens one each."""
    opened = defaultdict(list)
    for request in seen.requests:
        if _opens(request) and request.status in (200, 201):
            session_id = str(_dict(request.answer).get("session_id"))
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


def _unasked(store: _Store, seen: _Seen) -> Iterator[str]:
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
        yield from _named(session, _unasked_commands(session, may, seen.requests))


def _unasked_commands(session: _Session, may: Sequence[Request], every: Sequence[Request]) -> Iterator[str]:
    answers = [each for each in may if _aim(each)[1:] == (session.session_id, "resume")]
    told = _prompts_told(session)
    for prompt in session.prompts:
        if told.get(prompt.prompt_id, ("",))[0] == "answered" and not any(
            _may_answer(each, prompt) for each in answers
        ):
            yield f"the prompt {prompt.prompt_id} was answered by {prompt.operator}, and nobody's request said so"
    cancels = [each for each in every if _aim(each)[1:] == (session.session_id, "cancel")]
    takeable = [each for each in cancels if each.status is None or each.status < 300 or each.status >= 500]
    if session.cancel_requested_at is not None and not takeable:
        yield "its cancel was recorded, and no request that was taken asked for it"


def _may_answer(request: Request, prompt: _Prompt) -> bool:
    body = _dict(request.body)
    named = body.get("prompt_id") in (None, prompt.prompt_id)
    return named and body.get("operator") == prompt.operator and _gave(request, prompt)


# The store against what clients were sent


def _in_watched(store: _Store, watched: Watched) -> Iterator[str]:
    session = store.sessions.get(watched.session_id)
    events = {event.seq: event for event in session.events} if session else {}
    cursor, markers = watched.after or 0, []
    for data in watched.frames:
        frame = _dict(_json(data))
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
            yield f"was sent as event {seq} {_short(data)}, and stored is {_short(events[seq].data)}"
        cursor = seq if isinstance(seq, int) else cursor
    if markers not in ([], ["hello"], ["hello", "caught_up"]):
        yield f"was sent these markers: {markers}"


def _next(events: Mapping[int, _Event], cursor: int, sent: object, of_old: _Session | None) -> int:
    """The seq that must come; a client of the replaced service is spared prompts that are settled."""
    settled = {prompt.prompt_id for prompt in of_old.prompts if prompt.status != "open"} if of_old else set()
    due = cursor + 1
    while due != sent and due in events and events[due].kind == "input_required":
        if events[due].frame.get("prompt_id") not in settled:
            break
        due += 1
    return due


def _in_marker(store: _Store, frame: dict[str, Any], watched: Watched, cursor: int) -> Iterator[str]:
    if frame["kind"] == "hello" and frame.get("epoch") != store.epoch:
        yield f"was told the epoch {frame.get('epoch')}, and the store's is {store.epoch}"
    if frame["kind"] == "hello" and frame.get("after") != (watched.after or 0):
        yield f"was told that it is served after {frame.get('after')}"
    if frame["kind"] == "caught_up":
        told = frame.get("seq")
        spared = watched.after is None and isinstance(told, int) and told > cursor
        if told != cursor and not spared:
            yield f"was told that it is caught up at {told}, having been sent all up to {cursor}"


def _in_close(store: _Store, watched: Watched, earlier: Sequence[Watched]) -> Iterator[str]:
    session = store.sessions.get(watched.session_id)
    sent = [frame for data in watched.frames if (frame := _dict(_json(data))).get("kind") not in _MARKERS]
    match watched.close_code:
        case 1000 if sent and sent[-1].get("kind") not in ("done", "failed"):
            yield f"was closed with 1000 after {_short(sent[-1])}, which is not the end"
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
    frames = (_dict(_json(data)) for data in watched.frames)
    numbers = (frame.get("seq") for frame in frames if frame.get("kind") not in _MARKERS)
    return max((seq for seq in numbers if isinstance(seq, int)), default=0)


# The store against the disk


class _Ground(msgspec.Struct, frozen=True):
    """A data root, and what the store says of it."""

    store: _Store
    expected: Expected
    live: bool

    @property
    def root(self) -> Path:
        return self.expected.local_root

    def foreign(self, path: Path) -> bool:
        """Whether somebody else made it, or the folder around it."""
        theirs = {*self.expected.foreign, *map(str, self.expected.untouched)}
        return any(str(each) in theirs for each in (path, *path.parents))

    def owner(self, folder: Path) -> _Session | None:
        """The session that a folder belongs to, by the store and by its own word."""
        session = self.store.sessions.get(str(_creation(folder).get("session_id")))
        states = ("done", "sync_queued") if self.live else ("done",)
        rightful = session is not None and session.state in states and session.destination == str(folder)
        return session if rightful else None


def _on_disk_for_good(path: Path, read: _Store, expected: Expected, *, live: bool) -> list[str]:
    """While a service runs, what is wrong at one look may be right at the next; what stays is wrong."""
    found = list(_on_disk(_Ground(read, expected, live)))
    if not live or not found:
        return found
    again = set(_on_disk(_Ground(_read(path), expected, live)))
    return [each for each in found if each in again]


def _on_disk(ground: _Ground) -> Iterator[str]:
    looks: tuple[Callable[[_Ground, _Session], Iterator[str]], ...] = (
        _in_place,
        _in_destination,
        _in_published,
        _in_provenance,
        _in_partial,
        _in_copies,
    )
    for session in ground.store.sessions.values():
        for look in looks:
            yield from _named(session, _looked(look(ground, session)))
    for general in (_shared, _completeness, _in_folders, _in_staging, _leftovers, _changed):
        yield from _looked(general(ground))


def _looked(facts: Iterator[str]) -> Iterator[str]:
    try:
        yield from facts
    except OSError as error:
        yield f"{error.filename} cannot be looked at: {error.strerror}"


def _creation(folder: Path) -> dict[str, Any]:
    """What a folder's creation.json says; nothing when it has none that can be read."""
    path = folder / _OURS / "creation.json"
    return _dict(_json(path.read_bytes())) if path.is_file() else {}


def _is_made(folder: Path) -> bool:
    return os.path.lexists(folder / _OURS / "creation.json")


def _in_place(ground: _Ground, session: _Session) -> Iterator[str]:
    """A destination lies where the contract says."""
    if session.destination is None or session.local_root is None:
        return
    way = "/".join(re.escape(str(each)) for each in (session.equipment_id, session.project_short_id))
    below = {None: "", "experimental": f"/Run_{_SECOND}", "test": f"/TestRuns/TestRun_{_SECOND}"}
    told = Path(session.destination)
    relative = told.relative_to(session.local_root) if told.is_relative_to(session.local_root) else told
    if not re.fullmatch(way + below.get(session.run_kind, "/"), relative.as_posix()):
        yield f"its destination {told} is no place for {session.run_kind or 'a project'}"


def _in_destination(ground: _Ground, session: _Session) -> Iterator[str]:
    """A destination that is not this session's own work is another's, or nobody's."""
    if session.destination is None:
        return
    folder = Path(session.destination)
    there = os.path.lexists(folder)
    if session.state == "done":
        if not there:
            yield f"it is done, and its destination {folder} is not there"
        elif folder.is_symlink() or not folder.is_dir() or ground.owner(folder) is not session:
            yield f"it is done, and the creation.json at {folder} does not name it: {_short(_creation(folder))}"
    elif session.state in TERMINAL and there:
        if _creation(folder).get("session_id") == session.session_id:
            yield f"it is {session.state}, and its folder stands at its destination {folder}"
        elif not ground.foreign(folder) and ground.owner(folder) is None and not _is_way(ground, folder):
            yield f"it is {session.state}, and at its destination {folder} stands what nobody made"


def _in_published(ground: _Ground, session: _Session) -> Iterator[str]:
    if session.state != "done":
        return
    folder, result = Path(str(session.destination)), _dict(session.result)
    if result.get("path") != session.destination:
        yield f"its result says {result.get('path')}, and its destination is {folder}"
    told = _creation(folder)
    if not told:
        return
    wanted = {
        "schema_version": _SCHEMA,
        "level": session.kind,
        "sync_status": result.get("sync_status"),
        "paths": session.destination,
    }
    found = {name: told.get(name) for name in wanted} | {"paths": _dict(told.get("paths")).get("local")}
    found["sync_status"] = told.get("sync_status", "pending")
    for name, value in wanted.items():
        if found[name] != value:
            yield f"its creation.json says {name} {found[name]}, and it should be {value}"
    for name in ("README.md", f"{_OURS}/readme_fields.json"):
        if not (folder / name).is_file():
            yield f"its folder {folder} has no {name}"
    yield from _in_equipment(session, Path(str(session.local_root)) / session.equipment_id)


def _in_equipment(session: _Session, folder: Path) -> Iterator[str]:
    warned = any(event.frame.get("code") == "equipment_not_noted" for event in session.events)
    path = folder / _OURS / "equipment.json"
    told = _dict(_json(path.read_bytes())) if path.is_file() else {}
    if told.get("id") != session.equipment_id and not warned:
        yield f"{path} does not tell of its equipment {session.equipment_id}"


def _in_provenance(ground: _Ground, session: _Session) -> Iterator[str]:
    """What plugins did and were told stands in the folder as in the store."""
    if session.state != "done" or session.destination is None:
        return
    planned = _list(_dict(session.pinned).get("plugins"))
    names = [each if isinstance(each, str) else _dict(each).get("name") for each in planned]
    if names != [run.plugin for run in session.runs]:
        yield f"it is done, its plugins are {names}, and through are {[run.plugin for run in session.runs]}"
    told = _creation(Path(session.destination))
    if not told:
        return
    shown = ("plugin", "version", "status", "files_affected")
    applied = [tuple(_dict(each).get(name) for name in shown) for each in _list(told.get("plugins_applied"))]
    ran = [
        (run.plugin, run.version, run.status, run.files) for run in session.runs if run.version is not None
    ]
    if applied != ran:
        yield f"its creation.json tells of the plugins {_short(applied)}, the store of {_short(ran)}"
    given = [_input(each) for each in _list(told.get("plugin_inputs"))]
    kept = [each for prompt in session.prompts if prompt.status == "answered" for each in _inputs(prompt)]
    if sorted(given, key=str) != sorted(kept, key=str):
        yield f"its creation.json tells of the answers {_short(given)}, the store of {_short(kept)}"


def _input(entry: object) -> tuple[object, ...]:
    return tuple(_dict(entry).get(name) for name in ("plugin", "file", "field", "value", "operator"))


def _inputs(prompt: _Prompt) -> Iterator[tuple[object, ...]]:
    kept = _dict(prompt.answer)
    for field in prompt.fields:
        name, secret = str(_dict(field).get("id")), _dict(field).get("secret")
        if secret or name in kept:
            value = None if secret else kept.get(name)
            yield prompt.plugin, prompt.file, name, value, prompt.operator


def _in_partial(ground: _Ground, session: _Session) -> Iterator[str]:
    """What is kept of a session that came to nothing is where it says, alone; what is not kept is gone."""
    if session.state not in ("failed", "aborted"):
        return
    error = _dict(session.error)
    details = _dict(error.get("details"))
    told, kept = details.get("partial_path"), session.partial_path
    if kept is not None and kept != told:
        yield f"its row keeps a partial tree at {kept}, its error says {told}"
    if kept is not None and not Path(kept).is_dir():
        yield f"its partial tree {kept} is not there"
    discarded = bool(_dict(session.cancel).get("discard_files")) and session.state == "aborted"
    if discarded and (told is not None or kept is not None):
        yield f"it was cancelled to be discarded, and keeps {told or kept}"
    lost = error.get("code") == "staging_lost"
    if session.passed("plugin_pass") and not discarded and not lost and told is None:
        yield f"it was rendered and is {session.state}, and nothing says where its partial tree is"


def _in_copies(ground: _Ground, session: _Session) -> Iterator[str]:
    if not session.terminal or _is_cleared_later(ground, session):
        return
    for tree in session.sealed:
        if os.path.lexists(tree) and tree != session.partial_path:
            yield f"it is {session.state}, and its snapshot {tree} is still there"


def _is_cleared_later(ground: _Ground, session: _Session) -> bool:
    """What a failed session leaves is cleared after its commit; what could not be, by the sweep."""
    told = any(event.frame.get("code") == "staging_left" for event in session.events)
    away = "left" in _dict(_dict(session.error).get("details"))
    return ground.live and (session.state == "failed" or told or away)


def _shared(ground: _Ground) -> Iterator[str]:
    done = [session for session in ground.store.sessions.values() if session.state == "done"]
    for destination, times in Counter(session.destination for session in done).items():
        if times > 1:
            yield f"the destination {destination} is owned by {times} sessions that are done"


def _completeness(ground: _Ground) -> Iterator[str]:
    """A destination is absent or complete, whatever became of its session."""
    projects = {
        session.destination for session in ground.store.sessions.values() if session.kind == "project"
    }
    for destination, wanted in ground.expected.complete.items():
        folder = Path(destination)
        if not folder.is_dir() or destination in ground.expected.foreign:
            continue
        if destination in projects and not _is_made(folder):
            continue  # a way to runs, which is looked at as such
        found = _files(folder, but=_is_run_level if destination in projects else lambda _: False)
        if found != wanted:
            lacking, more = sorted(wanted - found), sorted(found - wanted)
            yield f"the folder {destination} is not complete: it lacks {lacking} and has besides {more}"


def _files(folder: Path, *, but: Callable[[str], bool]) -> frozenset[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return frozenset(str(path) for path in paths if not but(path.parts[0]))


def _is_run_level(name: str) -> bool:
    return name == "TestRuns" or name.startswith("Run_")


def _in_folders(ground: _Ground) -> Iterator[str]:
    """Every project and every run is one of ours, or somebody's who said so."""
    for equipment in _subfolders(ground.root):
        if equipment.name == _STAGING or ground.foreign(equipment):
            continue
        yield from _strange_files(ground, equipment)
        for project in _subfolders(equipment):
            if project.name == _OURS:
                continue
            if _is_made(project) or not _is_way(ground, project):
                yield from _in_folder(ground, project)
            yield from _in_runs(ground, project)
    for text in ground.expected.foreign:
        session_id = str(_creation(Path(text)).get("session_id"))
        if session_id in ground.store.sessions:
            yield f"session {session_id}: {text}, which somebody else made, names it in its creation.json"


def _in_runs(ground: _Ground, project: Path) -> Iterator[str]:
    theirs = _is_made(project) or ground.foreign(project)
    for child in _subfolders(project):
        if child.name == "TestRuns":
            for run in _subfolders(child):
                yield from _in_folder(ground, run)
            yield from _strange_files(ground, child)
        elif not theirs or child.name.startswith("Run_"):
            yield from _in_folder(ground, child)
    if not theirs:
        yield from _strange_files(ground, project)


def _in_folder(ground: _Ground, folder: Path) -> Iterator[str]:
    if not _is_made(folder):
        if not ground.foreign(folder):
            yield f"the folder {folder} has no creation.json, and nobody else made it"
        return
    session_id = str(_creation(folder).get("session_id"))
    if ground.owner(folder) is None and not (
        ground.foreign(folder) and session_id not in ground.store.sessions
    ):
        session = ground.store.sessions.get(session_id)
        state = session.state if session else "unknown"
        yield f"session {session_id}: {folder} names it as its maker, and it is {state}, or is to make another"


def _is_way(ground: _Ground, project: Path) -> bool:
    """Whether a folder is only there for the runs in it, or for one that got as far as being published."""
    if _is_made(project) or not project.is_dir():
        return False
    runs = [run for child in _subfolders(project) for run in _runs_in(child)]
    published = (s.destination for s in ground.store.sessions.values() if s.passed("sync_queued"))
    wanted = any(each is not None and project in Path(each).parents for each in published)
    return wanted or any(_is_made(run) or ground.foreign(run) for run in runs)


def _runs_in(child: Path) -> list[Path]:
    return list(_subfolders(child)) if child.name == "TestRuns" else [child]


def _subfolders(folder: Path) -> Iterator[Path]:
    """Not those of a dead attempt, which are a matter of their own."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink() and not _temporary(path.name):
            yield path


def _strange_files(ground: _Ground, folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        real_folder = path.is_dir() and not path.is_symlink()
        if not real_folder and not ground.foreign(path) and not _temporary(path.name):
            yield f"{path} lies where only folders are, and nobody else made it"


def _in_staging(ground: _Ground) -> Iterator[str]:
    """Only live sessions have a folder there, and those that keep a partial tree, with nothing else in it."""
    staging = ground.root / _STAGING
    for name in sorted(os.listdir(staging)) if staging.is_dir() else ():
        session, folder = ground.store.sessions.get(name), staging / name
        if session is None:
            if not ground.foreign(folder) and not (ground.live and _temporary(name)):
                yield f"{folder} belongs to no session"
        elif not session.terminal:
            yield from _named(session, _in_waiting(ground, session, folder))
        elif _is_cleared_later(ground, session):
            continue
        elif session.partial_path is None:
            yield from _named(session, [f"it is {session.state}, and {folder} is still there"])
        else:
            yield from _named(session, _besides(folder, Path(session.partial_path)))


def _in_waiting(ground: _Ground, session: _Session, folder: Path) -> Iterator[str]:
    """Nothing runs for a session that waits, so nothing is there for it but its template and its tree."""
    if ground.live or session.state != "input_required" or session.tree is None:
        return
    more = sorted(set(os.listdir(folder)) - {"template", Path(session.tree).parent.name})
    if more:
        yield f"it waits for its operator, and in {folder} are besides its tree {more}"
    if not Path(session.tree).is_dir():
        yield f"it waits for its operator, and its tree {session.tree} is gone"


def _besides(folder: Path, kept: Path) -> Iterator[str]:
    way = [each for each in (kept, *kept.parents) if each.is_relative_to(folder)]
    for inner, outer in itertools.pairwise(way):
        more = sorted(set(os.listdir(outer)) - {inner.name}) if outer.is_dir() else []
        if more:
            yield f"it keeps {kept}, and in {outer} are besides it {more}"


def _temporary(name: str) -> bool:
    """A name that the service gives to what will be renamed, or is about to be removed."""
    drafted = name.startswith(".") and name.endswith(".tmp")
    made_there = name.startswith(".exlab-") and bool(_ID.fullmatch(name.removeprefix(".exlab-")))
    return drafted or made_there or name.endswith(".gone") or name == "template.partial"


def _leftovers(ground: _Ground) -> Iterator[str]:
    """Partial trees may hold anything; and what a running service works with comes and goes."""
    kept = {session.partial_path for session in ground.store.sessions.values()}
    for place, folders, files in os.walk(ground.root):
        here = Path(place)
        if place in kept or ground.foreign(here) or (ground.live and _is_worked_in(ground.root, here)):
            folders.clear()
            continue
        for name in sorted(filter(_temporary, (*folders, *files))):
            if not (ground.live and name.startswith(".exlab-")):
                yield f"{here / name} was left over"


def _is_worked_in(root: Path, folder: Path) -> bool:
    """Staging, and what is told of an equipment."""
    return folder == root / _STAGING or (folder.name == _OURS and folder.parent.parent == root)


def _changed(ground: _Ground) -> Iterator[str]:
    for path, before in ground.expected.untouched.items():
        if fingerprint(path) != before:
            yield f"{path} was to be left alone, and is not what it was"


def _short(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 300 else text[:299] + "…"
