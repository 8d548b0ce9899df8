"""What can happen to a session in the model and in the store alike: outcomes of all kinds, and hands on the shell.

Whatever is legal or not is here by a number, so that a random walk may choose it, and choose the same again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.errors import Failure
from app.sessions import lifecycle
from app.sessions.lifecycle import Outcome
from tests.survival.model import EDGES, ROAD, STATES, Told

OUTCOMES = sorted({"Begun", *(outcome for _, outcome in EDGES)})

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
# An underscore is a wildcard of LIKE, and "a" a letter that it stands for.
PROJECTS = ("/nowhere/data/eq/p_1", "/nowhere/data/eq/pa1")


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


def by_hand(told: Told) -> Iterator[str]:
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
