"""What a store holds, read with plain SQL, and the ways that a session may take, once more.

It promises each session with all that belongs to it, from one snapshot, and the states that its events alone have
led it through. What is wrong with them is left to the checker in `invariants.py`.
"""

import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

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
_LEFT_OUT: dict[str, object] = {"lims_project": {}, "variables": {}, "readme_extra": {}}
"""What a body says that does not say it; a run, besides, has no date."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    position: int
    seq: int
    kind: str
    at: str
    data: bytes
    frame: dict[str, Any]


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    prompt_id: str
    plugin: str
    file: str | None
    reason: str
    fields: list[Any]
    status: str
    answered_at: str | None
    operator: str | None
    answer: Any


class Run(msgspec.Struct, frozen=True, kw_only=True):
    ordinal: int
    plugin: str
    version: str | None
    status: str
    files: Any


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the audit."""

    at: str
    operator: str | None
    command: str
    details: dict[str, Any]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    source: str
    status: str


class History:
    """The states that a session has passed through, by its events alone, and what is wrong with the path."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.state = "pending"
        self.states = {0: self.state}
        self.faults: list[str] = []
        self.end: Event | None = None
        for before, event in itertools.pairwise([None, *events]):
            if event is not None:
                self._add(event, before)
        if events and events[-1].kind == "input_received":
            self.faults.append("its history ends with an answer, without the phase running_plugins after it")

    def _add(self, event: Event, before: Event | None) -> None:
        self._must_agree(event)
        answered = before is not None and before.kind == "input_received"
        goes_on = event.kind == "phase" and event.frame.get("phase") == PHASES["plugin_pass"]
        if answered and not goes_on:
            self.faults.append(f"event {event.seq} ({event.kind}) comes where the answer leads to a phase")
        elif not answered:
            self._move(event)
        self.states[event.seq] = self.state

    def _move(self, event: Event) -> None:
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

    def _must_agree(self, event: Event) -> None:
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


def _lead(event: Event) -> str | None:
    """Where an event takes its session, None for one that does not."""
    match event.kind:
        case "phase":
            return _STATE_OF.get(str(event.frame.get("phase")), "no state")
        case "input_required" | "done":
            return event.kind
        case "input_received":
            return "plugin_pass"
        case "failed":
            return "aborted" if as_dict(event.frame.get("error")).get("code") == "cancelled" else "failed"
        case _:
            return None


class Session(msgspec.Struct, frozen=True, kw_only=True):
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
    events: list[Event]
    history: History
    prompts: list[Prompt]
    runs: list[Run]
    sealed: list[str]
    jobs: list[Job]
    audit: list[Command]
    keys: list[str]

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def asked_for(self) -> bytes:
        return whole_body(self.request)

    def passed(self, state: str) -> bool:
        return state in self.history.states.values()


class Store(msgspec.Struct, frozen=True, kw_only=True):
    sessions: dict[str, Session]
    epoch: str | None
    strays: list[str]


_PLAIN = (
    "session_id kind run_kind state label operator equipment_id project_short_id destination destination_key"
    " local_root created_at ended_at head_seq tree blocked_on cancel_requested_at partial_path sync_status retry_of"
)
_JSON = ("error", "result", "cancel", "request", "pinned")

Rows = Mapping[str, list[sqlite3.Row]]


def read_store(path: Path) -> Store:
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
    return Store(sessions=sessions, epoch=epoch[0] if epoch else None, strays=list(_strays(rows, sessions)))


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


def _session(row: sqlite3.Row, rows: Mapping[str, Rows]) -> Session:
    own = {table: grouped.get(row["session_id"], []) for table, grouped in rows.items()}
    events = [_event(each) for each in own["events"]]
    return Session(
        **{name: row[name] for name in _PLAIN.split()},
        **{name: parsed(row[name]) for name in _JSON},
        events=events,
        history=History(events),
        prompts=[_prompt(each) for each in own["prompts"]],
        runs=[_run(each) for each in own["plugin_runs"]],
        sealed=[each["tree"] for each in own["snapshots"]],
        jobs=[Job(source=each["source"], status=each["status"]) for each in own["copy_jobs"]],
        audit=[_command(each) for each in own["audit"]],
        keys=[each["key"] for each in own["idempotency_keys"]],
    )


def _event(row: sqlite3.Row) -> Event:
    plain = {name: row[name] for name in ("position", "seq", "kind", "at")}
    return Event(**plain, data=row["frame"].encode(), frame=as_dict(parsed(row["frame"])))


def _prompt(row: sqlite3.Row) -> Prompt:
    names = ("prompt_id", "plugin", "file", "reason", "status", "answered_at", "operator")
    told = {name: parsed(row[name]) for name in ("fields", "answer")}
    return Prompt(
        **{name: row[name] for name in names}, fields=as_list(told["fields"]), answer=told["answer"]
    )


def _run(row: sqlite3.Row) -> Run:
    plain = {name: row[name] for name in ("ordinal", "plugin", "version", "status")}
    return Run(**plain, files=parsed(row["files_affected"]))


def _command(row: sqlite3.Row) -> Command:
    plain = {name: row[name] for name in ("at", "operator", "command")}
    return Command(**plain, details=as_dict(parsed(row["details"])))


def prompts_told(session: Session) -> dict[str, tuple[str, dict[str, Any], Event | None]]:
    """By the events: what became of each prompt, how it was asked, and its answer."""
    told: dict[str, tuple[str, dict[str, Any], Event | None]] = {}
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


def whole_body(body: object) -> bytes:
    """Equal for bodies that ask for the same."""
    told = as_dict(body)
    dated = {"run_date": None} if told.get("kind") == "run" else {}
    return msgspec.json.encode(_LEFT_OUT | dated | told, order="sorted")


def parsed(text: str | bytes | None) -> Any:
    """What a text says; one that is no JSON is like nothing that it should be."""
    try:
        return None if text is None else msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"no JSON: {text!r}"


def as_dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def of_session(session: Session, facts: Iterable[str]) -> Iterator[str]:
    return (f"session {session.session_id}: {fact}" for fact in facts)


def short(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text if len(text) <= 300 else text[:299] + "…"
