"""The store against a model of it: a few dictionaries that say what the contract says, and nothing of how.

Random walks through all verbs of a real store on a real file, with good restarts, kills in the middle of a write,
and older copies put in its place. After each step every row, every event, every question and every follower must
be as the model has them; what is refused must be refused with the right word, and leave no trace.
"""

import asyncio
import copy
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.exc import IntegrityError

from app import database
from app.errors import (
    CursorAhead,
    Failure,
    IdempotencyKeyReused,
    InputInvalid,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    SessionNotFound,
    SessionNotRetryable,
    StoreBroken,
    TooLateToCancel,
)
from app.sessions import consistency, lifecycle
from app.sessions import store as store_module
from app.sessions.feed import Feed, Stopping
from app.sessions.lifecycle import IllegalMove, Outcome, State
from app.sessions.moves import DestinationHeld, Moved
from app.sessions.requests import CancelBody, CreateBody, ResumeBody
from app.sessions.session import Caller, Query, Session
from app.sessions.store import Store
from tests.conftest import SECONDS, project_body, run_body
from tests.survival.shares import SEED, SHARE

WALKS = round(200 * min(SHARE * 2, 1))
STEPS = 50
AGAIN = f"SURVIVAL_SHARE={SHARE} SURVIVAL_SEED={SEED} pytest -s tests/survival/test_model.py"

T = TypeVar("T")

# What the contract says


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
BEFORE_QUESTIONS = ("validating", "rendering")
REMARKS = ("Recovered", "Progressed", "Warned", "Blocked")
EDGES |= {(state, remark): state for state in LIVE for remark in REMARKS}
EDGES |= {(state, "Failed"): "failed" for state in LIVE}
EDGES |= {(state, "Cancelled"): "aborted" for state in LIVE if state != "sync_queued"}
OUTCOMES = sorted({"Begun", *(outcome for _, outcome in EDGES)})
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

SECRET = "hunter2-is-nowhere"
DOSE: dict[str, Any] = {"id": "dose", "label": "Dose", "type": "number", "min": 0, "max": 10}
STAIN: dict[str, Any] = {
    "id": "stain",
    "label": "Stain",
    "type": "choice",
    "options": ["DAPI", "GFP"],
    "default": "GFP",
}
NOTE: dict[str, Any] = {"id": "note", "label": "Note", "type": "string", "required": False}
PASSWORD: dict[str, Any] = {"id": "password", "label": "Password", "type": "string", "secret": True}
QUESTIONS = ((DOSE,), (STAIN, NOTE), (PASSWORD, DOSE))
RIGHT = {
    "dose": (2.5, 3),
    "stain": ("DAPI", "GFP"),
    "note": ("calm", "loud"),
    "password": (SECRET, SECRET + "-either"),
}
WRONG: dict[str, object] = {"dose": 11, "stain": "H&E", "note": 7, "password": 5}

# An underscore is a wildcard of LIKE, and "a" a letter that it stands for.
PROJECTS = ("/nowhere/data/eq/p_1", "/nowhere/data/eq/pa1")
LABELS = ("Embryos", "Embryos, 100% alive", "embryos_2", "E\\x")
KEYS = (None, None, "key-1", "key-2")
CALLERS = (Caller(principal="local", trace_id="t1"), Caller(principal="other", trace_id="t2"))


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


# What can happen


def outcome_of(kind: str, told: Told, pick: int) -> Outcome:
    """An outcome of that kind for `told`; `pick` says which of many."""
    match kind:
        case "Accepted":
            return _accepted(told, pick)
        case "Rendered":
            tree = Path(f"/nowhere/data/.exlab-sessions/{told.session_id}/{pick}/tree")
            lines = tuple(f"line {number}" for number in range(pick % 3))
            return lifecycle.Rendered(
                tree=tree, manifest=f"{pick:064}", rendered=("a.csv",), answers={"n": pick}, log=lines
            )
        case "PluginRan":
            return _ran(told, pick)
        case "Asked":
            fields = tuple(msgspec.Raw(msgspec.json.encode(one)) for one in QUESTIONS[pick % 3])
            return lifecycle.Asked(
                prompt_id=f"{told.session_id}-{len(told.questions)}",
                plugin=f"plugin {pick % 2}",
                file="plan.csv" if pick % 2 else None,
                reason="It is not said.",
                fields=fields,
                log=(lifecycle.Said("info", "about to ask"),),
            )
        case "Answered":
            names = [*told.questions, "nobody's"]
            name = names[-1 - pick % len(names)] if pick % 4 == 0 else (names[-2:] or names)[0]
            plugin = told.questions[name]["plugin"] if name in told.questions else "nobody"
            return lifecycle.Answered(
                prompt_id=name, plugin=plugin, operator=None, values={"dose": pick}, digest="0" * 64
            )
        case "Published":
            status = ("pending", "blocked_by_validation")[pick % 2]
            result: dict[str, object] = {"path": str(told.row["destination"]), "sync_status": status}
            return lifecycle.Published(result=result, nas_path=f"nas:{pick}")
        case "Checked":
            finding: dict[str, object] = {"rule": "leftover_token"}
            return lifecycle.Checked(findings=(finding,) * (pick % 2))
        case "Failed" | "Cancelled":
            rest: dict[str, object] | None = {"partial_path": f"/nowhere/rest/{pick}"} if pick % 2 else None
            if kind == "Failed":
                return lifecycle.Failed(error=Failure(code="render_failed", message="No.", details=rest))
            return lifecycle.Cancelled(error=Failure(code="cancelled", message="Cancelled.", details=rest))
        case _:
            return _remark_of(kind, pick)


def along(told: Told, picks: Sequence[int]) -> list[Outcome]:
    """What leads `told` along the road, as many steps as there are picks."""
    happened, state = [], told.state
    for pick in picks:
        if state in ROAD:
            happened.append(outcome_of(ROAD[state], told, pick))
            state = EDGES[state, ROAD[state]]
    return happened


def _accepted(told: Told, pick: int) -> lifecycle.Accepted:
    project = PROJECTS[pick % 2]
    place = project if told.row["kind"] == "project" else f"{project}/run_{pick % 3}"
    return lifecycle.Accepted(
        destination=Path(place),
        destination_key=place,
        project_key=project,
        project_short_id=f"PROJ-{pick % 2}",
        local_root=Path("/nowhere/data"),
        pinned=msgspec.Raw(b'{"pick":%d}' % pick),
    )


def _ran(told: Told, pick: int) -> lifecycle.PluginRan:
    """Mostly the next plugin; now and then one that is through already, or not yet in turn."""
    shift = {9: 0, 8: 2}.get(pick % 10, 1)
    good = pick % 3 == 0
    return lifecycle.PluginRan(
        ordinal=max(len(told.runs) + shift, 1),
        total=3,
        plugin=f"plugin {pick % 2}",
        version="1" if pick % 5 else None,
        status="success" if good else "failed",
        message=None if good else "It broke.",
        tree=Path(f"/nowhere/data/.exlab-sessions/{told.session_id}/{pick}/kept") if good else None,
        manifest=f"{pick:064}" if good else None,
        log=(lifecycle.Said("warning", f"ran {pick}"),),
    )


def _remark_of(kind: str, pick: int) -> Outcome:
    match kind:
        case "Begun":
            return lifecycle.Begun()
        case "Transformed":
            return lifecycle.Transformed()
        case "Documented":
            return lifecycle.Documented()
        case "Recovered":
            return lifecycle.Recovered(alone=pick % 3 == 0)
        case "Progressed":
            return lifecycle.Progressed(current=pick, total=99, file="ä.csv" if pick % 2 else None)
        case "Warned":
            return lifecycle.Warned(message="x" * (pick * 20), code="loud")
        case _:
            later = f"later {pick}"
            return lifecycle.Blocked(
                code="disk_full", message="Full.", since="then", retry_at=later, again=pick % 2 == 1
            )


_PROMPT = "INSERT INTO prompts (prompt_id, session_id, plugin, reason, fields, status, asked_at)"
_EVENT = "INSERT INTO events (session_id, seq, kind, at, frame)"


def _event(ahead: int, kind: str, more: str = "") -> str:
    """The insertion of an event of that kind, `ahead` of the history."""
    frame = f"json_object('kind', '{kind}', 'seq', {{seq}} + {ahead}, 'at', 'x'{more})"
    return f"{_EVENT} VALUES ('{{id}}', {{seq}} + {ahead}, '{kind}', 'x', {frame})"


BY_HAND = {
    "anything": (
        "UPDATE sessions SET head_seq = head_seq + 1 WHERE session_id = '{id}'",
        "UPDATE sessions SET label = 'another' WHERE session_id = '{id}'",
        "INSERT OR REPLACE INTO sessions SELECT * FROM sessions WHERE session_id = '{id}'",
        "UPDATE events SET frame = json_set(frame, '$.more', 1) WHERE session_id = '{id}'",
        "DELETE FROM events WHERE session_id = '{id}' AND seq = {seq}",
        f"{_EVENT} SELECT session_id, seq, kind, at, frame FROM events WHERE session_id = '{{id}}'",
        "INSERT OR REPLACE INTO events SELECT position, session_id, seq, kind, at, frame FROM events",
        _event(2, "warning"),
        _event(1, "input_received", ", 'prompt_id', 'nobody''s'"),
        f"{_PROMPT} VALUES ('new', '{{id}}', 'p', 'r', '[]', 'open', 'x')",
        "DELETE FROM audit",
        "UPDATE audit SET operator = 'another'",
        "INSERT INTO edges VALUES ('done', 'rendering')",
        "DELETE FROM edges WHERE from_state = 'done' OR to_state = 'done'",
        "UPDATE states SET terminal = 0",
    ),
    "life": ("DELETE FROM sessions WHERE session_id = '{id}'",),
    "an end": (
        "UPDATE sessions SET ended_at = 'another' WHERE session_id = '{id}'",
        _event(1, "warning"),
    ),
    "no way back": (
        "UPDATE sessions SET cancel = '{{}}', cancel_requested_at = 'x' WHERE session_id = '{id}'",
    ),
    "a cancel": ("UPDATE sessions SET cancel = NULL, cancel_requested_at = NULL WHERE session_id = '{id}'",),
    "a place": (
        "UPDATE sessions SET destination_key = 'another' WHERE session_id = '{id}'",
        "UPDATE sessions SET pinned = '{{}}' WHERE session_id = '{id}'",
    ),
    "a question": (
        "UPDATE prompts SET status = 'answered', answered_at = 'x' WHERE session_id = '{id}'",
        "UPDATE prompts SET status = 'withdrawn' WHERE session_id = '{id}'",
        "UPDATE prompts SET fields = '[]' WHERE session_id = '{id}'",
        "DELETE FROM prompts WHERE session_id = '{id}'",
    ),
    "plugins": (
        "UPDATE plugin_runs SET status = 'timeout' WHERE session_id = '{id}'",
        "DELETE FROM plugin_runs WHERE session_id = '{id}'",
    ),
}
"""Statements that the database refuses, and what a session must have for them to mean anything."""


def _by_hand(told: Told) -> Iterator[str]:
    """All of them that mean anything for `told`, among them the assignment of every other state."""
    held = {
        "anything": True,
        "life": told.live,
        "an end": not told.live,
        "no way back": told.state == "sync_queued" or not told.live,
        "a cancel": told.row["cancel"] is not None,
        "a place": told.row["pinned"] is not None,
        "a question": told.open_question is not None,
        "plugins": bool(told.runs),
    }
    for need in held:
        for statement in BY_HAND[need] if held[need] else ():
            yield statement.format(id=told.session_id, seq=len(told.frames))
    for state in ("pending", *STATES):
        if state != told.state:
            yield f"UPDATE sessions SET state = '{state}' WHERE session_id = '{told.session_id}'"


# The walk


class Deed(NamedTuple):
    """A verb of the store, and what the model makes of it, given what the store came to."""

    done: Callable[[Store], Awaitable[Any]]
    told: Callable[[Any], Told]


class Copy(NamedTuple):
    """A store that was closed in good order, as somebody put it aside."""

    data: bytes
    model: Model
    epoch: str
    head: int


class Follower(NamedTuple):
    """Who follows one session live, from a cursor, and what it was given so far."""

    session_id: str
    cursor: int
    given: list[dict[str, Any]]
    task: asyncio.Task[None]
    heard: asyncio.Event


class Attempt(NamedTuple):
    """An answer: to which question, with what; `asks`: after another question, if nothing is asked now."""

    asks: bool
    named: str | None
    value: str
    operator: str | None


seen_kinds: Counter[str] = Counter()
"""How often each rule was tried, in all walks."""

REFUSALS = (
    DestinationHeld,
    IdempotencyKeyReused,
    IllegalMove,
    InputInvalid,
    IntegrityError,
    Moved,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    TooLateToCancel,
)

numbers = st.integers(0, 11)
outcomes = st.tuples(st.sampled_from(OUTCOMES), numbers)

attempts = st.builds(
    Attempt,
    asks=st.booleans(),
    named=st.sampled_from(("newest", "newest", "oldest", "nobody's", None)),
    value=st.sampled_from(("right", "right", "other", "another secret", "wrong", "nothing")),
    operator=st.sampled_from((None, "bjones")),
)
queries = st.builds(
    Query,
    state=st.lists(st.sampled_from(State), max_size=4).map(tuple),
    kind=st.sampled_from((None, None, "run", "project")),
    equipment=st.sampled_from((None, None, None, "CONFOCAL_01", "ELSEWHERE")),
    project=st.sampled_from((None, None, "PROJ-0", "PROJ-1")),
    operator=st.sampled_from((None, None, "asmith")),
    label_prefix=st.sampled_from((None, "Embryos", "Embryos, 100%", "embryos_", "%", "E\\", "")),
    limit=st.integers(1, 5),
)
LOOKS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "search": {"query": queries, "since": st.none() | numbers, "until": st.none() | numbers},
    "look": {"number": numbers},
    "look_around": {},
    "resist": {"number": numbers},
    "read_history": {"number": numbers, "cursor": st.integers(-2, 40), "limit": st.integers(1, 7)},
}
"""What can be looked at, and what is to be chosen for it."""


class Walk(RuleBasedStateMachine):
    empty: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(dir=self.empty.parent))
        self.path = self.folder / "store.sqlite3"
        shutil.copyfile(self.empty, self.path)
        self.now = datetime(2026, 1, 2, tzinfo=UTC)
        self.model = Model()
        self.broken: list[StoreBroken] = []
        self.latest: dict[str, Session] = {}
        self.seen: list[Session] = []
        self.copies: list[Copy] = []
        self.epochs: set[str] = set()
        self.followers: list[Follower] = []
        self.noted = 0
        self.steps_since_start = 0
        self.sound = False
        seen_kinds["walks"] += 1
        self.open()
        self.expect_another_epoch()

    # What a step is made of

    @property
    def at(self) -> str:
        return _at(self.now)

    def begin(self, kind: str) -> None:
        seen_kinds[kind] += 1
        self.sound = False
        self.steps_since_start += 1
        self.now += timedelta(seconds=1)

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, SECONDS))

    def do(self, *deeds: Deed) -> None:
        """All of them at once; what comes of them is what the model says comes of one after the other."""

        async def at_once() -> list[Any]:
            return await asyncio.gather(*(deed.done(self.store) for deed in deeds), return_exceptions=True)

        for deed, outcome in zip(deeds, self.run(at_once()), strict=True):
            try:
                told = deed.told(outcome)
            except REFUSALS as refusal:
                _compare(outcome, refusal)
            else:
                if isinstance(outcome, BaseException):
                    raise outcome
                self.meet(outcome, told)

    def meet(self, session: Session, told: Told) -> None:
        """A session that the store gave is as the model has it."""
        assert _shown(session) == _expected(told)
        self.latest[session.session_id] = session
        self.seen.append(session)

    def create_deed(
        self, body: CreateBody, caller: Caller, key: str | None, retry_of: str | None = None
    ) -> Deed:
        async def done(store: Store) -> Session:
            session, is_new = await store.create(body, caller, idempotency_key=key, retry_of=retry_of)
            assert is_new == (session.session_id not in self.model.sessions)
            return session

        def told(made: Any) -> Told:
            session_id = made.session_id if isinstance(made, Session) else ""
            return self.model.create(self.at, session_id, body, caller, key, retry_of)

        return Deed(done, told)

    def record_deed(self, session: Session, *happened: Outcome) -> Deed:
        return Deed(
            lambda store: store.record(session, *happened),
            lambda _: self.model.record(self.at, session, happened),
        )

    def answer_deed(self, session_id: str, body: ResumeBody, caller: Caller) -> Deed:
        return Deed(
            lambda store: store.answer(session_id, body, caller),
            lambda _: self.model.answer(self.at, session_id, body, caller),
        )

    def cancel_deed(self, session_id: str, body: CancelBody, caller: Caller) -> Deed:
        return Deed(
            lambda store: store.request_cancel(session_id, body, caller),
            lambda _: self.model.cancel(self.at, session_id, body, caller),
        )

    def pick(self, number: int, *states: str) -> Told:
        found = self.model.among(*states)
        return found[-1 - number % len(found)]

    def some(self, *states: str) -> bool:
        return bool(self.model.among(*states))

    @initialize(
        cached=st.sampled_from((700, 3000, 8 * 1024 * 1024)),
        ways=st.lists(st.lists(numbers, max_size=6), min_size=2, max_size=4),
    )
    def come_to_a_running_service(self, cached: int, ways: list[list[int]]) -> None:
        # A history that is longer than that is read from memory in part, and in part from the file.
        store_module.CACHED_BYTES = cached
        for number, way in enumerate(ways):
            self.create(number == 0, LABELS[number], "asmith", KEYS[-number], CALLERS[0])
            if way:
                self.live_on(0, way)

    # Creating

    @rule(
        project=st.booleans(),
        label=st.sampled_from(LABELS),
        person=st.sampled_from(("asmith", "bjones")),
        key=st.sampled_from(KEYS),
        caller=st.sampled_from(CALLERS),
    )
    def create(self, project: bool, label: str, person: str, key: str | None, caller: Caller) -> None:
        self.begin("create")
        make = project_body if project else run_body
        self.do(self.create_deed(make(label=label, operator=person), caller, key))

    @precondition(lambda self: self.some(*STATES))
    @rule(
        number=numbers, key=st.sampled_from(KEYS), how=st.sampled_from(("same", "another", "retry", "retry"))
    )
    def create_again(self, number: int, key: str | None, how: str) -> None:
        """With a key that was used, for the same body or another; or by trying again."""
        self.begin("create again")
        if how == "retry" or not self.model.keys:
            self.retry(number, key)
        else:
            self.use_key_again(number, how == "same")

    def use_key_again(self, number: int, same: bool) -> None:
        (principal, key), (_, session_id) = [*self.model.keys.items()][number % len(self.model.keys)]
        told = self.model.sessions[session_id]
        body = told.body if same else msgspec.structs.replace(told.body, objective="Another.")
        [caller] = [caller for caller in CALLERS if caller.principal == principal]
        self.do(self.create_deed(body, caller, key, told.row["retry_of"]))

    def retry(self, number: int, key: str | None) -> None:
        told = self.pick(number, *STATES)
        if told.state in ("failed", "aborted"):
            self.meet(self.run(self.store.retryable(told.session_id)), told)
            own = [one for (_, one), (_, made) in self.model.keys.items() if made == told.session_id]
            key = own[0] if own and number % 2 else key
            self.do(self.create_deed(told.body, CALLERS[0], key, told.session_id))
        else:
            with pytest.raises(SessionNotRetryable):
                self.run(self.store.retryable(told.session_id))

    # Moving

    @precondition(lambda self: self.some(*ROAD))
    @rule(number=numbers, picks=st.lists(numbers, min_size=1, max_size=6), together=st.booleans())
    def go_along(self, number: int, picks: list[int], together: bool) -> None:
        """Along the road, by one transaction or by many."""
        self.begin("go along")
        told = self.pick(number, *ROAD)
        happened = along(told, picks)
        for group in [happened] if together else [[outcome] for outcome in happened]:
            self.do(self.record_deed(self.latest[told.session_id], *group))

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, picks=st.lists(numbers, min_size=1, max_size=4))
    def live_on(self, number: int, picks: list[int]) -> None:
        """Whatever a session does in its state, plugins and answers and all."""
        self.begin("live on")
        session_id = self.pick(number, *LIVE).session_id
        for pick in picks:
            told = self.model.sessions[session_id]
            kind = {
                "plugin_pass": ("PluginRan", "Asked", "Transformed")[pick % 3],
                "input_required": "Answered",
            }
            if told.live:
                outcome = outcome_of(kind.get(told.state) or ROAD[told.state], told, pick)
                self.do(self.record_deed(self.latest[session_id], outcome))

    @precondition(lambda self: self.some(*STATES))
    @rule(number=numbers, happened=st.lists(outcomes, min_size=1, max_size=3))
    def record_anything(self, number: int, happened: list[tuple[str, int]]) -> None:
        """Legal or not, alone or with others before and after it."""
        self.begin("record anything")
        told = self.pick(number, *STATES)
        made = [outcome_of(kind, told, pick) for kind, pick in happened]
        self.do(self.record_deed(self.latest[told.session_id], *made))

    @precondition(lambda self: bool(self.stale()))
    @rule(number=numbers, pick=numbers)
    def record_what_was_seen_long_ago(self, number: int, pick: int) -> None:
        self.begin("record stale")
        session = self.stale()[-1 - number % len(self.stale())]
        kinds = [kind for state, kind in EDGES if state == session.state] or ["Warned"]
        outcome = outcome_of(kinds[pick % len(kinds)], self.model.sessions[session.session_id], pick)
        self.do(self.record_deed(session, outcome))

    def stale(self) -> list[Session]:
        """What was seen of sessions that have moved, or been cancelled, since."""
        now = ((session, self.model.sessions[session.session_id]) for session in self.seen)
        return [
            session
            for session, told in now
            if told.state != session.state or (told.row["cancel"] and session.cancel is None)
        ]

    @precondition(lambda self: self.some(*LIVE))
    @rule(
        number=numbers,
        happened=st.lists(outcomes, min_size=1, max_size=3),
        others=st.permutations(("record", "record", "cancel", "answer", "create")),
    )
    def race(self, number: int, happened: list[tuple[str, int]], others: Sequence[str]) -> None:
        """All at once, each of them having seen the same."""
        self.begin("race")
        told = self.pick(number, *LIVE)
        session, pick = self.latest[told.session_id], happened[0][1]
        made = [outcome_of(kind, told, pick) for kind, pick in happened]
        deeds = {
            "cancel": self.cancel_deed(told.session_id, CancelBody(), CALLERS[0]),
            "answer": self.answer_deed(told.session_id, ResumeBody(extra_inputs={"dose": 3}), CALLERS[1]),
            "create": self.create_deed(run_body(), CALLERS[0], KEYS[pick % 4]),
        }
        straight = outcome_of(ROAD.get(told.state, "Answered"), told, pick)
        crowd = [self.record_deed(session, straight), self.record_deed(session, *made)]
        crowd += [deeds[name] for name in others[: pick % 3] if name in deeds]
        self.do(*(reversed(crowd) if pick % 2 else crowd))

    # Asking and answering

    @precondition(lambda self: self.some(*BEFORE_QUESTIONS, "plugin_pass", "input_required"))
    @rule(number=numbers, pick=numbers, attempts=st.lists(attempts, min_size=2, max_size=5))
    def converse(self, number: int, pick: int, attempts: list[Attempt]) -> None:
        """A plugin asks, and its operator answers: right or wrong, once or twice, and is asked again."""
        self.begin("converse")
        told = self.pick(number, *BEFORE_QUESTIONS, "plugin_pass", "input_required")
        session_id = told.session_id
        for state in BEFORE_QUESTIONS:
            if self.model.sessions[session_id].state == state:
                self.do(self.record_deed(self.latest[session_id], outcome_of(ROAD[state], told, pick)))
        for attempt in attempts:
            told = self.model.sessions[session_id]
            if told.state == "plugin_pass" and (attempt.asks or not told.questions):
                self.do(self.record_deed(self.latest[session_id], outcome_of("Asked", told, pick)))
            self.try_to_answer(session_id, attempt)

    @precondition(lambda self: bool(self.asked()))
    @rule(number=numbers, attempt=attempts)
    def answer_late(self, number: int, attempt: Attempt) -> None:
        """Whatever became meanwhile of a session that had asked."""
        self.begin("answer late")
        self.try_to_answer(self.asked()[-1 - number % len(self.asked())].session_id, attempt)

    def asked(self) -> list[Told]:
        return [told for told in self.model.sessions.values() if told.questions]

    def try_to_answer(self, session_id: str, attempt: Attempt) -> None:
        questions = self.model.sessions[session_id].questions
        names = [*questions] or ["nobody's"]
        name = {"newest": names[-1], "oldest": names[0]}.get(attempt.named or "", attempt.named)
        question = questions.get(name or names[-1]) or questions.get(names[-1])
        given: dict[str, object] = {"nobody asked": SECRET}
        for field in question["fields"] if question and attempt.value != "nothing" else ():
            right, other = RIGHT[field["id"]]
            values = {"right": right, "other": other, "wrong": WRONG[field["id"]]}
            values["another secret"] = other if field.get("secret") else right
            given[field["id"]] = values[attempt.value]
        body = ResumeBody(extra_inputs=given, prompt_id=name, operator=attempt.operator)
        self.do(self.answer_deed(session_id, body, CALLERS[attempt.value == "other"]))

    # Ending

    @precondition(lambda self: self.some(*STATES))
    @rule(number=numbers, discard=st.booleans(), operator=st.sampled_from((None, "bjones")))
    def cancel(self, number: int, discard: bool, operator: str | None) -> None:
        self.begin("cancel")
        told = self.pick(number, *STATES)
        body = CancelBody(discard_files=discard, operator=operator)
        self.do(self.cancel_deed(told.session_id, body, CALLERS[number % 2]))

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, pick=numbers, kind=st.sampled_from(("Cancelled", "Failed")))
    def end(self, number: int, pick: int, kind: str) -> None:
        self.begin(kind)
        told = self.pick(number, *LIVE)
        self.do(self.record_deed(self.latest[told.session_id], outcome_of(kind, told, pick)))

    # Marks

    @precondition(lambda self: self.some(*LIVE))
    @rule(number=numbers, driven=st.sampled_from((None, False, True)))
    def mark(self, number: int, driven: bool | None) -> None:
        """What the service notes from time to time, and forgets."""
        self.begin("mark")
        if driven is None:
            self.note(number)
        else:
            told = self.pick(number, *LIVE)
            self.run((self.store.mark_driven if driven else self.store.mark_idle)(told.session_id))
            self.model.set(told.session_id, driven=int(driven))

    def note(self, number: int) -> None:
        self.forget_partial(number)
        root = f"/nowhere/{number % 2}"
        assert self.run(self.store.knows_root(Path(root))) == (root in self.model.roots)
        self.run(self.store.note_root(Path(root)))
        self.model.roots.add(root)
        self.run(self.store.note_progress())
        self.note_head()

    def note_head(self) -> None:
        self.noted = len(self.model.history)

    def forget_partial(self, number: int) -> None:
        kept = [told for told in self.model.sessions.values() if told.row["partial_path"]]
        until = _at(self.now - timedelta(seconds=number))
        old = [told.session_id for told in kept if told.row["ended_at"] < until]
        assert {one.session_id for one in self.run(self.store.partials(ended_before=until))} == {*old}
        for session_id in old[:1]:
            self.run(self.store.forget_partial(session_id))
            self.model.set(session_id, partial_path=None)

    # Looking

    @precondition(lambda self: self.some(*STATES))
    @rule(
        how=st.sampled_from(("search", "search", "look", "look_around", "read_history", "resist")),
        data=st.data(),
    )
    def look_at_it(self, how: str, data: st.DataObject) -> None:
        self.begin(how.replace("_", " "))
        arguments = {name: data.draw(drawn, name) for name, drawn in LOOKS[how].items()}
        getattr(self, how)(**arguments)

    def search(self, query: Query, since: int | None, until: int | None) -> None:
        """All pages of a listing; a session that comes meanwhile is on none of them."""
        times = {name: self.ago(number) for name, number in (("since", since), ("until", until))}
        query = msgspec.structs.replace(query, **times)
        expected, found = self.model.search(query), []
        while True:
            page, following = self.run(self.store.search(query))
            assert len(page) <= query.limit
            found += [session.session_id for session in page]
            if following is None:
                break
            assert following == found[-1] and len(page) == query.limit and len(found) < len(expected)
            query = msgspec.structs.replace(query, before=following)
            self.do(self.create_deed(run_body(label="Embryos"), CALLERS[0], None))
        assert found == expected

    def ago(self, number: int | None) -> str | None:
        """The time at which one of the sessions was created, or some time before now."""
        if number is None:
            return None
        made = [told.row["created_at"] for told in self.model.sessions.values()]
        return str(made[number % len(made)]) if number % 3 else _at(self.now - timedelta(seconds=number))

    def look(self, number: int) -> None:
        told, store = self.pick(number, *STATES), self.store
        self.meet(self.run(store.get(told.session_id)), told)
        own = told.session_id
        runs = [(run.ordinal, run.plugin, run.status) for run in self.run(store.plugin_runs(own))]
        assert runs == [(run["ordinal"], run["plugin"], run["status"]) for run in told.runs]
        lines = self.run(store.log_after(own, 0, 1000))
        assert [(line.source, line.level, line.text) for line in lines] == told.lines
        tail = self.run(store.log_after(own, lines[number % len(lines)].line, 2)) if lines else []
        assert tail == lines[number % len(lines) + 1 :][:2] if lines else True
        assert self.run(store.settled_prompts(own)) == {
            name for name, question in told.questions.items() if question["status"] != "open"
        }
        answered = {one.prompt_id: (one.answer, one.operator) for one in self.run(store.answered(own))}
        assert answered == {
            name: (question["answer"], question["operator"])
            for name, question in told.questions.items()
            if question["status"] == "answered"
        }
        if told.manifest is not None:
            assert self.run(store.manifest(own)) == told.manifest
        with pytest.raises(SessionNotFound):
            self.run(store.get("0" * 36))

    def look_around(self) -> None:
        store, live = self.store, self.model.among(*LIVE)
        everyone = self.model.sessions.values()
        shown = [told.session_id for told in everyone if told.live or told.state == "failed"]
        assert [session.session_id for session in self.run(store.operations())] == shown
        assert [session.session_id for session in self.run(store.unfinished())] == [
            told.session_id for told in live
        ]
        held = {told.row["destination_key"] for told in live} - {None}
        assert self.run(store.held()) == held
        counts = Counter(told.state for told in everyone)
        counts["partial"] = sum(told.row["partial_path"] is not None for told in everyone)
        counts["blocked"] = sum(told.row["blocked_on"] is not None for told in live)
        assert Counter(self.run(store.counts())) == counts

    def read_history(self, number: int, cursor: int, limit: int) -> None:
        """From any cursor, a negative one counted from the end, in pages of any size."""
        told = self.pick(number, *STATES)
        head = len(told.frames)
        cursor = cursor % (head + 2) if cursor >= 0 else max(head + cursor, 0)
        session = self.latest[told.session_id]
        if cursor > head:
            with pytest.raises(CursorAhead):
                self.store.head_seq(session, cursor)
        assert self._pages(told.session_id, cursor, limit) == told.frames[cursor:]
        place = cursor % (len(self.model.history) + 1)
        position = self.positions[place - 1] if place else 0
        frames = self.run(self.store.feed_after(position, limit))
        found = [(frame.session_id, json.loads(frame.data)) for frame in frames]
        assert found == self.model.history[place:][:limit]

    def _pages(self, session_id: str, cursor: int, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while page := self.run(self.store.frames_after(session_id, cursor, limit)):
            assert len(page) <= limit
            found += [json.loads(frame.data) for frame in page]
            cursor = page[-1].seq
        return found

    @precondition(lambda self: self.some(*STATES) and len(self.followers) < 4)
    @rule(number=numbers, cursor=numbers)
    def follow(self, number: int, cursor: int) -> None:
        """Somebody follows one session from now on, over restarts, too."""
        self.begin("follow")
        told = self.pick(number, *STATES)
        cursor = cursor % (len(told.frames) + 1)
        if told.live or cursor < len(told.frames):
            self.followers.append(self._following(told.session_id, cursor, []))

    def _following(self, session_id: str, cursor: int, given: list[dict[str, Any]]) -> Follower:
        heard, feed = asyncio.Event(), self.feed

        async def follow() -> None:
            try:
                async for page in feed.follow(session_id, cursor + len(given)):
                    given.extend(json.loads(frame.data) for frame in page)
                    heard.set()
            except Stopping:
                return

        return Follower(session_id, cursor, given, self.loop.create_task(follow()), heard)

    # Stopping and starting

    def open(self) -> None:
        clock: Callable[[], datetime] = lambda: self.now  # noqa: E731
        self.store = Store(f"sqlite:///{self.path}", on_broken=self.broken.append, clock=clock)
        self.epoch = self.run(self.store.open()).epoch
        self.feed = Feed(self.store)
        self.eye = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        self.eye.row_factory = sqlite3.Row
        self.steps_since_start, self.positions = 0, list[int]()
        self.note_head()
        self.followers = [self._following(*follower[:3]) for follower in self.followers]

    def close(self) -> None:
        self.feed.stop()
        if self.followers:
            self.run(asyncio.wait([follower.task for follower in self.followers]))
        for follower in self.followers:
            follower.task.result()
        self.eye.close()
        self.run(self.store.close())
        assert self.broken == []

    def expect_another_epoch(self) -> None:
        assert self.epoch not in self.epochs
        self.epochs.add(self.epoch)

    def take_stock(self) -> None:
        found = self.run(self.store.take_stock())
        expected = self.model.take_stock()
        assert [session.session_id for session in found] == [told.session_id for told in expected]
        for session, told in zip(found, expected, strict=True):
            self.meet(session, told)

    def take_up(self, alone: int) -> None:
        """As a service takes up what it found: some at once, or one of them alone before the others."""
        for number, told in enumerate(self.model.among(*ROAD)[:4]):
            recovered = lifecycle.Recovered(alone=number == alone)
            self.do(self.record_deed(self.latest[told.session_id], recovered))

    @precondition(lambda self: self.steps_since_start > 6)
    @rule(held=st.booleans(), alone=st.integers(0, 5), exchanged=st.booleans())
    def restart(self, held: bool, alone: int, exchanged: bool) -> None:
        """In good order, while somebody takes a copy, and perhaps puts it in the place of the original.

        `held`: the next service drives nothing.
        """
        self.begin("restart")
        epoch = self.epoch
        self.run(self.store.mark_all_idle())
        self.model.be_idle()
        self.close()
        self.note_head()
        assert not self.beside("-wal").exists()
        data, head = self.path.read_bytes(), len(self.model.history)
        self.copies.append(Copy(data, self.model.copied(), epoch, head))
        if exchanged:
            self.beside(".copy").write_bytes(data)
            self.beside(".copy").replace(self.path)
        self.open()
        if exchanged:
            self.expect_another_epoch()
        assert exchanged or self.epoch == epoch
        if not held:
            self.take_stock()
            self.take_up(alone)

    @precondition(lambda self: self.steps_since_start > 6)
    @rule(alone=st.integers(0, 5))
    def crash(self, alone: int) -> None:
        """Killed while nothing was being written."""
        self.begin("crash")
        epoch, noted = self.epoch, self.noted
        left = self.left()
        self.close()
        self.leave(left)
        assert self.noted == noted
        self.open()
        assert self.epoch == epoch
        self.take_stock()
        self.take_up(alone)

    @precondition(lambda self: self.steps_since_start > 6 and self.some(*LIVE))
    @rule(
        number=numbers,
        picks=st.lists(numbers, min_size=1, max_size=4),
        share=st.integers(0, 10),
    )
    def crash_in_a_write(self, number: int, picks: list[int], share: int) -> None:
        """Killed when only a part of what was written of one transaction was in the log, or just all of it."""
        self.begin("crash in a write")
        told, epoch = self.pick(number, *LIVE), self.epoch
        kinds = [kind for state, kind in EDGES if state == told.state]
        happened = along(told, picks) or [outcome_of(kinds[picks[0] % len(kinds)], told, picks[0])]
        before, length = self.model.copied(), self.wal_bytes()
        known = dict(self.latest), list(self.seen)
        followers = [one._replace(given=list(one.given)) for one in self.followers]
        self.do(self.record_deed(self.latest[told.session_id], *happened))
        self.every_follower_was_given_all()
        left = self.left()
        self.close()
        if share < 10:
            kept = length + (len(left["-wal"]) - length) * share // 10
            left["-wal"] = left["-wal"][:kept]
            # Nobody was told of it, and those who follow have not been given it.
            self.model, (self.latest, self.seen), self.followers = before, known, followers
        self.leave(left)
        self.open()
        assert self.epoch == epoch
        self.take_stock()

    @precondition(lambda self: self.steps_since_start > 0 and bool(self.copies))
    @rule(choices=st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=2))
    def put_older_copies_back(self, choices: list[tuple[int, bool]]) -> None:
        """By hand, between two runs of the service: over the file, or as another one in its place."""
        self.begin("put back")
        for number, in_place in choices:
            self.put_back(self.copies[-1 - number % len(self.copies)], in_place=in_place)
        self.latest = self.run(self.store.known([*self.model.sessions]))
        self.take_stock()

    def put_back(self, aside: Copy, *, in_place: bool) -> None:
        self.close()
        self.note_head()
        another = not in_place or aside.epoch != self.epoch or aside.head < self.noted
        if in_place:
            self.path.write_bytes(aside.data)
        else:
            self.beside(".copy").write_bytes(aside.data)
            self.beside(".copy").replace(self.path)
        self.model, self.followers, self.seen = aside.model.copied(), [], []
        self.open()
        if another:
            self.expect_another_epoch()

    def beside(self, suffix: str) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def wal_bytes(self) -> int:
        log = self.beside("-wal")
        return log.stat().st_size if log.exists() else 0

    def left(self) -> dict[str, bytes]:
        """The files of an open store, as a kill leaves them."""
        files = {suffix: self.beside(suffix) for suffix in ("", "-wal", "-shm", ".note")}
        return {suffix: path.read_bytes() for suffix, path in files.items() if path.exists()}

    def leave(self, left: dict[str, bytes]) -> None:
        """Undo what closing did; the file stays the same one, as it does in a crash."""
        for suffix, data in left.items():
            self.beside(suffix).write_bytes(data)

    # What must hold after each step

    @invariant()
    def all_is_as_it_was_told(self) -> None:
        self.every_row_is_as_it_was_told()
        self.every_event_is_there_once()
        self.every_question_is_as_it_was_told()
        self.commands_and_copies_are_noted()
        self.every_follower_was_given_all()
        self.sound = True

    def every_row_is_as_it_was_told(self) -> None:
        found = {
            row["session_id"]: row for row in self.eye.execute("SELECT * FROM sessions ORDER BY session_id")
        }
        assert [*found] == [*self.model.sessions]
        for session_id, told in self.model.sessions.items():
            row = dict(found[session_id])
            assert {name: _plain(name, value) for name, value in row.items()} == told.row
            amount = fold(told.frames)
            assert {name: told.row[name] for name in amount} == amount

    def every_event_is_there_once(self) -> None:
        told = self.eye.execute(
            "SELECT position, session_id, seq, kind, at, frame FROM events WHERE position > ? ORDER BY position",
            (self.positions[-1] if self.positions else 0,),
        ).fetchall()
        new = [(row["session_id"], json.loads(row["frame"])) for row in told]
        assert new == self.model.history[len(self.positions) :]
        self.positions += [row["position"] for row in told]
        for row, (_, frame) in zip(told, new, strict=True):
            assert (row["seq"], row["kind"], row["at"]) == (frame["seq"], frame["kind"], frame["at"])

    def every_question_is_as_it_was_told(self) -> None:
        columns = ("session_id", "plugin", "file", "reason", "status", "asked_at", "answered_at", "operator")
        found = {row["prompt_id"]: row for row in self.eye.execute("SELECT * FROM prompts")}
        told = {
            name: question | {"session_id": session_id}
            for session_id, one in self.model.sessions.items()
            for name, question in one.questions.items()
        }
        assert found.keys() == told.keys()
        for name, row in found.items():
            assert tuple(row[column] for column in columns) == tuple(told[name][column] for column in columns)
            assert json.loads(row["fields"]) == told[name]["fields"]
            assert (row["answer"] and json.loads(row["answer"])) == told[name]["answer"]

    def commands_and_copies_are_noted(self) -> None:
        audited = self.eye.execute(
            "SELECT command, session_id, operator, principal FROM audit ORDER BY entry"
        )
        assert [tuple(row) for row in audited] == self.model.audit
        jobs = self.eye.execute("SELECT session_id, source, target, status FROM copy_jobs")
        done = self.model.among("done")
        assert {row[0]: tuple(row)[1:] for row in jobs} == {told.session_id: told.copied for told in done}

    def every_follower_was_given_all(self) -> None:
        """Every follower has been given all there is, each event once, and has left after the last."""
        for follower in self.followers:
            told = self.model.sessions[follower.session_id]
            self.run(self._caught_up(follower, len(told.frames) - follower.cursor))
            assert follower.given == told.frames[follower.cursor :]
            if not told.live:
                self.run(follower.task)
        self.followers = [one for one in self.followers if self.model.sessions[one.session_id].live]

    async def _caught_up(self, follower: Follower, count: int) -> None:
        while len(follower.given) < count:
            follower.heard.clear()
            await follower.heard.wait()

    def resist(self, number: int) -> None:
        self.refuse(number)
        self.meddle(number)

    def refuse(self, number: int) -> None:
        """What cannot happen in a state is refused, and writes nothing."""
        for told in self.one_of_each(number):
            kinds = [kind for kind in OUTCOMES if (told.state, kind) not in EDGES]
            made = [outcome_of(kind, told, number) for kind in kinds]
            if told.state == "plugin_pass":
                made += [outcome_of("PluginRan", told, pick) for pick in (8, 9)]
            self.do(*(self.record_deed(self.latest[told.session_id], outcome) for outcome in made))
            self.do(*self.answers_again(told))
        for (principal, key), (_, made_by) in self.model.keys.items():
            told = self.model.sessions[made_by]
            if principal == CALLERS[0].principal and told.state in ("failed", "aborted"):
                # Another try is another body, though it looks the same.
                self.do(self.create_deed(told.body, CALLERS[0], key, made_by))

    def answers_again(self, told: Told) -> Iterator[Deed]:
        """What was accepted, with another secret and another operator, changes nothing; nor does it after a cancel."""
        for name, question in told.questions.items():
            if question["told"] is not None:
                asked = [one["id"] for one in question["fields"] if not one.get("secret")]
                given = dict(zip(asked, json.loads(question["told"]), strict=True)) | {"password": "another"}
                body = ResumeBody(extra_inputs=given, prompt_id=name, operator="cdoe")
                yield self.answer_deed(told.session_id, body, CALLERS[1])
        question = told.open_question or {"fields": []}
        if told.row["cancel"] is not None:
            right = {one["id"]: RIGHT[one["id"]][0] for one in question["fields"]}
            yield self.answer_deed(told.session_id, ResumeBody(extra_inputs=right), CALLERS[0])

    def meddle(self, number: int) -> None:
        """A hand on the SQLite shell, which the database refuses."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as shell:
            shell.execute("PRAGMA foreign_keys=ON")
            for told in self.one_of_each(number):
                for statement in _by_hand(told):
                    shell.execute("BEGIN IMMEDIATE")
                    with pytest.raises(sqlite3.IntegrityError):
                        shell.execute(statement)
                    shell.execute("ROLLBACK")

    def one_of_each(self, number: int) -> list[Told]:
        """One session in each state that there is."""
        return [self.pick(number, state) for state in STATES if self.some(state)]

    def take_a_last_look(self) -> None:
        for number in range(len(self.model.sessions)):
            self.look(number)
        self.look_around()
        self.resist(0)

    def teardown(self) -> None:
        try:
            seen_kinds["events"] += len(self.model.history)
            seen_kinds["sessions"] += len(self.model.sessions)
            seen_kinds["done"] += len(self.model.among("done"))
            if self.sound:
                self.take_a_last_look()
            left = b"".join(self.left().values())
            self.close()
            assert SECRET.encode() not in left + self.path.read_bytes()
            complaints = consistency.examine(self.path, None)
            assert [complaint for complaint in complaints if complaint.level == "error"] == []
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()
            shutil.rmtree(self.folder)


def _at(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _compare(outcome: object, refusal: Exception) -> None:
    """That the store refused as the model did."""
    same = type(outcome) is type(refusal) and _particulars(outcome) == _particulars(refusal)
    if isinstance(outcome, DestinationHeld) and isinstance(refusal, DestinationHeld):
        same = outcome.session_id in refusal.session_id.split()  # one of all that are in the way
    assert same, f"{outcome!r}, where the contract says {refusal!r}"


def _particulars(refusal: object) -> object:
    """What a refusal names besides itself."""
    return [getattr(refusal, name, None) for name in ("details", "field")]


_JSON = (
    "rendered",
    "findings",
    "blocked_on",
    "cancel",
    "error",
    "result",
    "request",
    "pinned",
    "answers",
)


def _plain(column: str, value: object) -> object:
    return json.loads(str(value)) if column in _JSON and value is not None else value


def _shown(session: Session) -> dict[str, object]:
    """A session as the store gives it, in plain values."""
    names = [name for name in session.__struct_fields__ if name not in ("pinned", "prompt")]
    told: dict[str, object] = json.loads(
        msgspec.json.encode({name: getattr(session, name) for name in names}, enc_hook=str)
    )
    return told | {"prompt": session.prompt and session.prompt.prompt_id}


def _expected(told: Told) -> dict[str, object]:
    names = (name for name in Session.__struct_fields__ if name not in ("pinned", "prompt"))
    row = {name: told.row[name] for name in names}
    row |= {
        "driven": bool(row["driven"]),
        "rendered": row["rendered"] or [],
        "findings": row["findings"] or [],
    }
    return row | {"prompt": told.open_question and told.open_question["prompt_id"]}


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """An empty store, and room beside it; in memory where there is such a place, since every commit is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        path = Path(folder) / "empty.sqlite3"
        database.prepare(path)
        yield path


async def test_a_history_that_was_left_and_comes_back_has_another_epoch(tmp_path: Path) -> None:
    """Of what it told after the copy that comes back was taken, clients may still hold cursors."""
    path = tmp_path / "store.sqlite3"
    older = await _gone_on(path)
    newer = await _gone_on(path)
    await _gone_on(path)
    told = [older.epoch]
    for aside in (older, newer):
        path.write_bytes(aside.data)
        told.append((await _gone_on(path, sessions=0)).epoch)
    assert len({*told}) == 3, told


async def _gone_on(path: Path, sessions: int = 1) -> Copy:
    """A copy of the store after another run of the service."""
    store = Store(f"sqlite:///{path}", on_broken=lambda broken: None)
    opened = await store.open()
    for _ in range(sessions):
        await store.create(run_body(), CALLERS[0])
    await store.close()
    return Copy(path.read_bytes(), Model(), opened.epoch, store.head_position)


@pytest.mark.slow
def test_the_store_is_as_the_contract_says_wherever_it_is_led(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "CACHED_BYTES", store_module.CACHED_BYTES)  # each walk has its own
    # It is asked for at each look, and does not change.
    monkeypatch.setattr("app.sessions.consistency._made", cache(consistency._made))  # noqa: SLF001
    Walk.empty = empty
    seen_kinds.clear()
    configured = settings(
        max_examples=WALKS,
        stateful_step_count=STEPS,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    print(f"\nthe same again: {AGAIN}")
    try:
        run_state_machine_as_test(seed(SEED)(Walk), settings=configured)
    finally:
        print(f"{seen_kinds.pop('walks')} walks: {dict(seen_kinds)}")
