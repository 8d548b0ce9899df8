"""The store against itself: its rows and events, its prompts, plugins and audit, as section 4 and 5 have them.

It promises to find what no sequence of legal moves leads to. It takes what `histories.py` has read, and looks at
nothing else.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.survival.histories import (
    PHASES,
    Event,
    Run,
    Session,
    Store,
    as_dict,
    as_list,
    of_session,
    prompts_told,
    short,
)

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
_AT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def in_store(store: Store) -> Iterator[str]:
    yield from store.strays
    looks: tuple[Callable[[Session], Iterator[str]], ...] = (
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
            yield from of_session(session, look(session))
    yield from _in_all(store)


def _in_order(session: Session) -> Iterator[str]:
    events = session.events
    for before, event in itertools.pairwise(events):
        if event.position <= before.position:
            yield f"event {event.seq} was committed before event {before.seq}: {event.position}, {before.position}"
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        yield f"its events are not 1 to {len(events)}: {short([event.seq for event in events])}"
    if events and (events[0].kind, events[0].frame.get("phase")) != ("phase", PHASES["validating"]):
        yield f"its first event is not the phase validating_inputs but {short(events[0].frame)}"


def _in_frames(session: Session) -> Iterator[str]:
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


def _in_path(session: Session) -> Iterator[str]:
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
            yield f"its row says {name} {short(getattr(session, name))}, its events say {short(true)}"


def _in_end(session: Session) -> Iterator[str]:
    if session.terminal and session.blocked_on is not None:
        yield f"it is {session.state} and still blocked on {session.blocked_on}"
    if session.state != "done":
        if session.jobs or session.sync_status is not None:
            yield f"it is {session.state}, and a copy to the NAS is queued all the same"
        return
    result = as_dict(session.result)
    if _OF_A_RESULT - result.keys():
        yield f"its result lacks {sorted(_OF_A_RESULT - result.keys())}"
    status = result.get("sync_status")
    if result.get("blocked") != (status == "blocked_by_validation") or session.sync_status != status:
        yield f"its copy is {session.sync_status}, its result says {status}, blocked {result.get('blocked')}"
    if [(job.source, job.status) for job in session.jobs] != [(result.get("path"), status)]:
        yield f"its copies to the NAS are not one of {result.get('path')} that is {status}: {session.jobs}"


def _in_cancel(session: Session) -> Iterator[str]:
    if session.state == "aborted" and session.cancel_requested_at is None:
        yield "it is aborted, but no cancel was recorded"
    if session.state in ("done", "failed") and session.cancel_requested_at is not None:
        yield f"its cancel was recorded, but it is {session.state}"
    said = [command for command in session.audit if command.command == "cancel"]
    if bool(said) != (session.cancel_requested_at is not None):
        yield f"its cancel is {session.cancel_requested_at}, but the audit has {len(said)}"
    elif said:
        first, cancel = said[0], as_dict(session.cancel)
        told = (first.at, first.operator, first.details.get("discard_files"))
        if told != (session.cancel_requested_at, cancel.get("operator"), cancel.get("discard_files")):
            yield f"its cancel is {cancel} at {session.cancel_requested_at}, the audit says {told}"
        if [command.details.get("joined") for command in said] != [False, *[True] * (len(said) - 1)]:
            yield "not all cancels but the first are said to have joined it"


def _in_prompts(session: Session) -> Iterator[str]:
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
    return any(as_dict(field).get("secret") for field in as_list(fields))


def _in_prompt_rows(session: Session) -> Iterator[str]:
    told = prompts_told(session)
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


def _in_plugins(session: Session) -> Iterator[str]:
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


def _ends(event: Event, run: Run) -> bool:
    """Its begin is told with the number of those before it."""
    frame = event.frame
    whole = event.kind == "progress" and "file" not in frame
    return whole and (frame.get("plugin"), frame.get("current")) == (run.plugin, run.ordinal)


def _after(session: Session, plugin: str, end: int) -> Iterator[str]:
    for event in session.events:
        works = event.kind in ("progress", "input_required") and event.frame.get("plugin") == plugin
        if event.seq > end and works:
            yield f"event {event.seq} ({event.kind}) is of the plugin {plugin}, which was through with event {end}"


def _in_audit(session: Session) -> Iterator[str]:
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


def _in_all(store: Store) -> Iterator[str]:
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


def not_at_rest(store: Store) -> Iterator[str]:
    for session in store.sessions.values():
        waits = session.state == "input_required" and session.cancel_requested_at is None
        if not session.terminal and not waits:
            facts = f"it has not come to rest: {session.state}, blocked on {session.blocked_on}, "
            yield from of_session(session, [facts + f"cancel {session.cancel_requested_at}"])
