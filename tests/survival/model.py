"""A model of the store: a few dictionaries that say what the contract says of sessions, and nothing of how.

It promises, for each verb of the store, the session as it must stand then, or what it must be refused with; and the
row that a history amounts to. It shares with the product the words in which things are asked for, and refused, and
no more. What is done to both, and how they are compared, is left to `test_model.py`.
"""

import copy
import json
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy.exc import IntegrityError

from app import database
from app.errors import (
    IdempotencyKeyReused,
    InputInvalid,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    TooLateToCancel,
)
from app.sessions import lifecycle
from app.sessions.lifecycle import IllegalMove, Outcome
from app.sessions.moves import DestinationHeld, Moved
from app.sessions.requests import CancelBody, CreateBody, ResumeBody
from app.sessions.session import Caller, Query, Session

ROAD = {
    "validating": "Accepted",
    "rendering": "Rendered",
    "plugin_pass": "Transformed",
    "cache_write": "Documented",
    "post_validate": "Checked",
    "sync_queued": "Published",
}
EDGES = {
    ("validating", "Accepted"): "rendering",
    ("rendering", "Rendered"): "plugin_pass",
    ("plugin_pass", "PluginRan"): "plugin_pass",
    ("plugin_pass", "Asked"): "input_required",
    ("input_required", "Answered"): "plugin_pass",
    ("plugin_pass", "Transformed"): "cache_write",
    ("cache_write", "Documented"): "post_validate",
    ("post_validate", "Checked"): "sync_queued",
    ("sync_queued", "Published"): "done",
}
LIVE = (*ROAD, "input_required")
REMARKS = ("Recovered", "Progressed", "Warned", "Blocked")
EDGES |= {(state, remark): state for state in LIVE for remark in REMARKS}
EDGES |= {(state, "Failed"): "failed" for state in LIVE}
EDGES |= {(state, "Cancelled"): "aborted" for state in LIVE if state != "sync_queued"}
PHASES = {
    "validating": "validating_inputs",
    "rendering": "rendering_template",
    "plugin_pass": "running_plugins",
    "input_required": "input_required",
    "cache_write": "writing_cache",
    "post_validate": "validating_post_creation",
    "sync_queued": "queueing_nas_sync",
}
STATES = (*LIVE, "done", "failed", "aborted")

WRONG: dict[str, object] = {"dose": 11, "stain": "H&E", "note": 7, "password": 5}
"""What fits no field of that id."""


class Told:
    """One session, as what happened to it tells: its row, its history, its questions."""

    def __init__(
        self, session_id: str, body: CreateBody, caller: Caller, retry_of: str | None, now: str
    ) -> None:
        asked = msgspec.to_builtins(body)
        self.session_id = session_id
        self.body = body
        self.frames: list[dict[str, Any]] = []
        self.questions: dict[str, dict[str, Any]] = {}
        self.runs: list[dict[str, Any]] = []
        self.lines: list[tuple[str, str, str]] = []
        self.manifest: str | None = None
        self.copied: tuple[str, str, str] | None = None
        self.row: dict[str, Any] = dict.fromkeys(database.sessions.columns.keys())
        for name in ("kind", "run_kind", "label", "operator", "equipment_id", "project_short_id"):
            self.row[name] = asked.get(name)
        self.row |= {"session_id": session_id, "state": "pending", "template_path": body.template_path}
        self.row |= {"created_at": now, "updated_at": now, "retry_of": retry_of, "request": asked}
        self.row |= {"principal": caller.principal, "trace_id": caller.trace_id}
        self.row |= {"head_seq": 0, "recoveries": 0, "step_deaths": 0, "driven": 1, "alone": 0}

    @property
    def state(self) -> str:
        return str(self.row["state"])

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def open_question(self) -> dict[str, Any] | None:
        return next((one for one in self.questions.values() if one["status"] == "open"), None)

    def draft(self) -> "Told":
        """To be changed beside the original. Frames are never changed, so they are shared."""
        draft = copy.copy(self)
        draft.row, draft.frames, draft.runs = dict(self.row), list(self.frames), list(self.runs)
        draft.lines = list(self.lines)
        draft.questions = {name: dict(question) for name, question in self.questions.items()}
        return draft

    def tell(self, now: str, kind: str, **frame: object) -> None:
        self.row |= {"head_seq": len(self.frames) + 1, "updated_at": now}
        self.frames.append({"kind": kind, "seq": len(self.frames) + 1, "at": now, **frame})

    def move(self, state: str) -> None:
        self.row |= {"state": state, "blocked_on": None, "step_deaths": 0}

    def enter(self, now: str, state: str) -> None:
        self.move(state)
        self.tell(now, "phase", phase=PHASES[state])

    def close_question(self, **values: object) -> None:
        question = self.open_question
        if question is not None:
            question |= values


class Model:
    """All sessions by their ids, oldest first, and what else the store remembers."""

    def __init__(self) -> None:
        self.sessions: dict[str, Told] = {}
        self.history: list[tuple[str, dict[str, Any]]] = []
        self.keys: dict[tuple[str, str], tuple[object, str]] = {}
        self.audit: list[tuple[str, str, str | None, str]] = []
        self.roots: set[str] = set()

    def copied(self) -> "Model":
        twin = copy.copy(self)
        twin.sessions = {name: told.draft() for name, told in self.sessions.items()}
        twin.history, twin.keys, twin.roots = list(self.history), dict(self.keys), set(self.roots)
        twin.audit = list(self.audit)
        return twin

    def among(self, *states: str) -> list[Told]:
        return [told for told in self.sessions.values() if told.state in states]

    def put(self, told: Told) -> Told:
        earlier = self.sessions.get(told.session_id)
        known = len(earlier.frames) if earlier else 0
        self.history += [(told.session_id, frame) for frame in told.frames[known:]]
        self.sessions[told.session_id] = told
        return told

    # The verbs; each returns the session as it stands then, or raises what it is refused with

    def create(
        self, now: str, made: str, body: CreateBody, caller: Caller, key: str | None, retry_of: str | None
    ) -> Told:
        place, asked = (caller.principal, str(key)), (msgspec.to_builtins(body), retry_of)
        if key is not None and place in self.keys:
            if self.keys[place][0] != asked:
                raise IdempotencyKeyReused(details={"session_id": self.keys[place][1]})
            return self.sessions[self.keys[place][1]]
        if key is not None:
            self.keys[place] = asked, made
        self.audit.append(("retry" if retry_of else "create", made, body.operator, caller.principal))
        told = Told(made, body, caller, retry_of, now)
        told.enter(now, "validating")
        return self.put(told)

    def record(self, now: str, seen: Session, outcomes: Sequence[Outcome]) -> Told:
        told = self.sessions[seen.session_id].draft()
        if told.state != seen.state or (told.row["cancel"] is not None and seen.cancel is None):
            raise Moved
        told.row["updated_at"] = now
        for outcome in outcomes:
            self._happen(told, now, outcome)
        return self.put(told)

    def _happen(self, told: Told, now: str, outcome: Outcome) -> None:
        lead = EDGES.get((told.state, type(outcome).__name__))
        if lead is None:
            raise IllegalMove
        if isinstance(outcome, lifecycle.Accepted) and self.holders(told.session_id, outcome):
            raise DestinationHeld(" ".join(self.holders(told.session_id, outcome)))
        if told.row["cancel"] is not None and lead not in (told.state, "aborted"):
            raise refused("a session whose cancel is recorded can only be aborted")
        happen(told, now, outcome, lead)

    def holders(self, session_id: str, wanted: lifecycle.Accepted) -> list[str]:
        """Live sessions in the way: at the same folder, making its project, or making something below it."""
        found = []
        for other in self.sessions.values():
            place = other.row["destination_key"]
            if place is None or not other.live or other.session_id == session_id:
                continue
            same = place in (wanted.destination_key, wanted.project_key)
            if same or place.startswith(wanted.destination_key + "/"):
                found.append(other.session_id)
        return found

    def answer(self, now: str, session_id: str, body: ResumeBody, caller: Caller) -> Told:
        told = self.sessions[session_id].draft()
        named = told.questions.get(body.prompt_id or "")
        if named is not None and named["status"] == "answered" and named["told"] == _told(named, body):
            return told
        if not told.live:
            raise SessionAlreadyCompleted
        question = told.open_question
        if question is None or told.row["cancel"] is not None:
            raise SessionNotAwaitingInput
        if body.prompt_id is not None and named is not question:
            raise PromptNotOpen(details={"prompt_id": question["prompt_id"]})
        values = judged(question["fields"], body.extra_inputs)
        self.audit.append(("resume", session_id, body.operator, caller.principal))
        _answered(told, now, body.operator, values, _told(question, body))
        return self.put(told)

    def cancel(self, now: str, session_id: str, body: CancelBody, caller: Caller) -> Told:
        told = self.sessions[session_id].draft()
        if not told.live:
            raise SessionAlreadyCompleted
        if told.state == "sync_queued":
            raise TooLateToCancel
        self.audit.append(("cancel", session_id, body.operator, caller.principal))
        if told.row["cancel"] is None:
            asked = {"discard_files": body.discard_files, "operator": body.operator}
            told.row |= {"cancel": asked, "cancel_requested_at": now, "updated_at": now}
        return self.put(told)

    def take_stock(self) -> list[Told]:
        """A death counts for the one that was driven alone, else for all that were driven."""
        driven = [told for told in self.sessions.values() if told.row["driven"]]
        for told in [told for told in self.sessions.values() if told.row["alone"]] or driven:
            told.row["step_deaths"] += 1
        self.be_idle()
        return self.among(*LIVE)

    def be_idle(self) -> None:
        for told in self.sessions.values():
            told.row |= {"driven": 0, "alone": 0}

    def set(self, session_id: str, **values: object) -> None:
        told = self.sessions[session_id].draft()
        told.row |= values
        self.put(told)

    def search(self, query: Query) -> list[str]:
        """The ids of all that match, newest first."""
        return [told.session_id for told in reversed(self.sessions.values()) if _matches(told, query)]


def happen(told: Told, now: str, outcome: Outcome, lead: str) -> None:
    """What one outcome makes of a session that it leads to `lead`."""
    phase = PHASES[told.state]
    match outcome:
        case lifecycle.Accepted():
            told.row |= {"destination": str(outcome.destination), "destination_key": outcome.destination_key}
            told.row |= {"project_key": outcome.project_key, "project_short_id": outcome.project_short_id}
            told.row |= {"local_root": str(outcome.local_root), "pinned": json.loads(bytes(outcome.pinned))}
            told.enter(now, lead)
        case lifecycle.Rendered():
            told.row |= {"tree": str(outcome.tree), "rendered": [*outcome.rendered]}
            told.row |= {"answers": outcome.answers}
            told.manifest = outcome.manifest
            told.lines += [("render", "info", line) for line in outcome.log]
            told.enter(now, lead)
        case lifecycle.PluginRan():
            _plugin_ran(told, now, outcome)
        case lifecycle.Asked():
            _asked(told, now, outcome)
        case lifecycle.Answered():
            question = told.open_question
            if question is None or question["prompt_id"] != outcome.prompt_id:
                raise refused("an answer is to the open prompt of its session")
            # By an answer that is recorded without a body, no body is known again.
            _answered(told, now, outcome.operator, outcome.values, None)
        case lifecycle.Checked():
            told.row["findings"] = [*outcome.findings]
            told.enter(now, lead)
        case lifecycle.Published():
            status = outcome.result["sync_status"]
            told.move(lead)
            told.row |= {"result": outcome.result, "sync_status": status, "ended_at": now}
            told.row |= {"driven": 0, "alone": 0}
            told.copied = str(outcome.result["path"]), outcome.nas_path, str(status)
            told.tell(now, "done", result=outcome.result)
        case lifecycle.Failed() | lifecycle.Cancelled():
            error = msgspec.to_builtins(outcome.error)
            told.move(lead)
            told.row |= {"error": error, "ended_at": now, "driven": 0, "alone": 0}
            told.row["partial_path"] = (outcome.error.details or {}).get("partial_path")
            told.close_question(status="withdrawn")
            told.tell(now, "failed", phase=phase, error=error)
        case lifecycle.Transformed() | lifecycle.Documented():
            told.enter(now, lead)
        case _:
            _remark(told, now, outcome, phase)


def _plugin_ran(told: Told, now: str, ran: lifecycle.PluginRan) -> None:
    if ran.ordinal != len(told.runs) + 1:
        raise refused("plugins run one after the other")
    if ran.message is not None:
        code = "plugin_missing" if ran.version is None else f"plugin_{ran.status}"
        message = f"{ran.plugin}: {ran.message}"
        told.tell(now, "warning", phase="running_plugins", message=message, code=code, plugin=ran.plugin)
    told.tell(
        now, "progress", phase="running_plugins", current=ran.ordinal, total=ran.total, plugin=ran.plugin
    )
    told.row |= {"step_deaths": 0, "blocked_on": None}
    if ran.tree is not None:
        told.row["tree"], told.manifest = str(ran.tree), ran.manifest
    told.runs.append({"ordinal": ran.ordinal, "plugin": ran.plugin, "status": ran.status})
    told.lines += [(ran.plugin, said.level, said.text) for said in ran.log]


def _asked(told: Told, now: str, asked: lifecycle.Asked) -> None:
    fields = [json.loads(bytes(field)) for field in asked.fields]
    told.move("input_required")
    told.row |= {"driven": 0, "alone": 0}
    question: dict[str, Any] = {"prompt_id": asked.prompt_id, "plugin": asked.plugin, "reason": asked.reason}
    question |= {"fields": fields} | ({"file": asked.file} if asked.file is not None else {})
    told.tell(now, "input_required", **question)
    rest = {"status": "open", "asked_at": now, "answered_at": None, "operator": None, "answer": None}
    told.questions[asked.prompt_id] = {"file": None} | question | rest | {"told": None}
    told.lines += [(asked.plugin, said.level, said.text) for said in asked.log]


def _answered(
    told: Told, now: str, operator: str | None, values: dict[str, object], body: str | None
) -> None:
    question = told.open_question
    assert question is not None
    question |= {"status": "answered", "answered_at": now, "operator": operator, "answer": values}
    question |= {"told": body}
    name, plugin = question["prompt_id"], question["plugin"]
    told.tell(now, "input_received", prompt_id=name, plugin=plugin, operator=operator)
    told.row["driven"] = 1
    told.enter(now, "plugin_pass")


def _remark(told: Told, now: str, outcome: Outcome, phase: str) -> None:
    match outcome:
        case lifecycle.Recovered():
            told.tell(now, "recovered", state=told.state)
            told.row |= {"recoveries": told.row["recoveries"] + 1, "driven": 1, "alone": int(outcome.alone)}
        case lifecycle.Progressed():
            whose = {"plugin": outcome.plugin, "file": outcome.file}
            whose = {name: value for name, value in whose.items() if value is not None}
            told.tell(now, "progress", phase=phase, current=outcome.current, total=outcome.total, **whose)
        case lifecycle.Warned():
            told.tell(now, "warning", phase=phase, message=outcome.message, code=outcome.code)
        case lifecycle.Blocked():
            blocked = {name: getattr(outcome, name) for name in ("code", "message", "since", "retry_at")}
            told.row |= {"blocked_on": blocked, "driven": 0, "alone": 0}
            if not outcome.again:
                told.tell(now, "warning", phase=phase, message=outcome.message, code=outcome.code)


def judged(fields: Sequence[dict[str, Any]], given: dict[str, object]) -> dict[str, object]:
    """What of `given` is kept of an answer that fits; the first field that does not is named."""
    kept = {}
    for field in fields:
        value = given.get(field["id"], field.get("default"))
        if value == WRONG[field["id"]] or (value is None and field.get("required", True)):
            raise InputInvalid(field=field["id"])
        if value is not None and not field.get("secret"):
            kept[field["id"]] = value
    return kept


def _told(question: dict[str, Any], body: ResumeBody) -> str:
    """By which a repeat is known: all that was entered but for secrets. As JSON, where 1 is not true."""
    return json.dumps(
        [body.extra_inputs.get(one["id"]) for one in question["fields"] if not one.get("secret")]
    )


def refused(why: str) -> IntegrityError:
    """What the database's own guards raise."""
    return IntegrityError(None, None, sqlite3.IntegrityError(why))


def _matches(told: Told, query: Query) -> bool:
    row = told.row
    exact = (
        (query.kind, row["kind"]),
        (query.equipment, row["equipment_id"]),
        (query.project, row["project_short_id"]),
        (query.operator, row["operator"]),
    )
    return (
        all(wanted is None or wanted == found for wanted, found in exact)
        and (not query.state or told.state in query.state)
        and row["label"].lower().startswith((query.label_prefix or "").lower())
        and (query.since is None or row["created_at"] >= query.since)
        and (query.until is None or row["created_at"] < query.until)
        and (query.before is None or told.session_id < query.before)
    )


def fold(frames: Sequence[dict[str, Any]]) -> dict[str, object]:
    """The row that a history amounts to, as far as it tells."""
    row: dict[str, object] = {"state": "pending", "ended_at": None, "error": None, "result": None}
    phases = {phase: state for state, phase in PHASES.items()}
    for frame in frames:
        match frame["kind"]:
            case "phase":
                row["state"] = phases[frame["phase"]]
            case "input_required":
                row["state"] = "input_required"
            case "done":
                row |= {"state": "done", "ended_at": frame["at"], "result": frame["result"]}
            case "failed":
                aborted = frame["error"]["code"] == "cancelled"
                row |= {"state": "aborted" if aborted else "failed", "ended_at": frame["at"]}
                row["error"] = frame["error"]
    return row | {"head_seq": len(frames)}
