"""The frames of a session's history, and their JSON.

A frame is encoded once, when it is recorded, and what was stored is what every client is sent, byte
for byte. `told` says which frames an outcome leaves behind; nothing here does I/O.
"""

from datetime import UTC, datetime

import msgspec

from app.errors import Failure
from app.sessions import lifecycle
from app.sessions.lifecycle import PHASES, Outcome, State

MESSAGE_LIMIT = 4096
"""Characters of a message that a frame carries; a frame stays below 256 KiB with the findings capped."""


DETAILS_LIMIT = 128 * 1024
"""Bytes of the details of an error that a frame carries."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """`seq` counts 1, 2, 3 ... within the session; `at` is RFC 3339, UTC, with milliseconds."""

    seq: int
    at: str


class Phase(Event, frozen=True, kw_only=True, tag="phase"):
    phase: str


class Progress(Event, frozen=True, kw_only=True, tag="progress"):
    phase: str
    current: int
    total: int
    plugin: str | None = None
    file: str | None = None


class InputRequired(Event, frozen=True, kw_only=True, tag="input_required"):
    fields: tuple[msgspec.Raw, ...]
    reason: str
    plugin: str
    prompt_id: str
    file: str | None = None


class InputReceived(Event, frozen=True, kw_only=True, tag="input_received"):
    prompt_id: str
    plugin: str
    operator: str | msgspec.UnsetType | None = msgspec.UNSET


class Warning(Event, frozen=True, kw_only=True, tag="warning"):
    phase: str
    message: str
    code: str
    plugin: str | None = None


class Recovered(Event, frozen=True, kw_only=True, tag="recovered"):
    state: str


class Done(Event, frozen=True, kw_only=True, tag="done"):
    result: dict[str, object]


class Failed(Event, frozen=True, kw_only=True, tag="failed"):
    phase: str
    error: Failure


TERMINAL_KINDS = ("done", "failed")

_encode = msgspec.json.Encoder(order="deterministic").encode


def timestamp(moment: datetime) -> str:
    """RFC 3339 text of an aware `moment`, in UTC, with milliseconds and a Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def told(state: State, outcome: Outcome, *, seq: int, at: str) -> tuple[Event, ...]:
    """The events that `outcome` leaves in the history of a session in `state`, the first as `seq`."""
    match outcome:
        case lifecycle.Asked(prompt_id=prompt_id, plugin=plugin, file=file, reason=reason, fields=fields):
            return (
                InputRequired(
                    seq=seq,
                    at=at,
                    fields=fields,
                    reason=reason,
                    plugin=plugin,
                    prompt_id=prompt_id,
                    file=file,
                ),
            )
        case lifecycle.PluginRan():
            return _through(state, outcome, seq, at)
        case lifecycle.Answered(prompt_id=prompt_id, plugin=plugin, operator=operator):
            received = InputReceived(seq=seq, at=at, prompt_id=prompt_id, plugin=plugin, operator=operator)
            return (received, Phase(seq=seq + 1, at=at, phase=PHASES[State.PLUGIN_PASS]))
        case lifecycle.Published(result=result):
            return (Done(seq=seq, at=at, result=result),)
        case lifecycle.Failed(error=error) | lifecycle.Cancelled(error=error):
            return (Failed(seq=seq, at=at, phase=lifecycle.phase_left(state), error=_capped(error)),)
        case _:
            return _remark(state, outcome, seq, at)


def _through(state: State, ran: lifecycle.PluginRan, seq: int, at: str) -> tuple[Event, ...]:
    """That a plugin is through, after a warning where it came to no good."""
    phase, told = lifecycle.phase_left(state), []
    if ran.message is not None:
        message = _short(f"{ran.plugin}: {ran.message}")
        code = "plugin_missing" if ran.version is None else f"plugin_{ran.status}"
        told.append(Warning(seq=seq, at=at, phase=phase, message=message, code=code, plugin=ran.plugin))
    end = Progress(
        seq=seq + len(told), at=at, phase=phase, current=ran.ordinal, total=ran.total, plugin=ran.plugin
    )
    return (*told, end)


def _remark(state: State, outcome: Outcome, seq: int, at: str) -> tuple[Event, ...]:
    phase = lifecycle.phase_left(state)
    match outcome:
        case lifecycle.Recovered():
            return (Recovered(seq=seq, at=at, state=state),)
        case lifecycle.Progressed(current=current, total=total, file=file, plugin=plugin):
            return (
                Progress(seq=seq, at=at, phase=phase, current=current, total=total, plugin=plugin, file=file),
            )
        case lifecycle.Warned(message=message, code=code, plugin=plugin):
            return (Warning(seq=seq, at=at, phase=phase, message=_short(message), code=code, plugin=plugin),)
        case lifecycle.Blocked(again=True):
            return ()
        case lifecycle.Blocked(message=message, code=code):
            return (Warning(seq=seq, at=at, phase=phase, message=_short(message), code=code),)
        case _:
            return (Phase(seq=seq, at=at, phase=PHASES[lifecycle.after(state, outcome)]),)


def encode(event: Event) -> bytes:
    """The frame of `event`: one JSON object, UTF-8, its kind first."""
    return _encode(event)


def _short(message: str) -> str:
    return message if len(message) <= MESSAGE_LIMIT else message[: MESSAGE_LIMIT - 1] + "…"


def _capped(error: Failure) -> Failure:
    """Without the details that a frame has no room for; the largest go first."""
    details = dict(error.details or {})
    sizes = {key: len(msgspec.json.encode(value)) for key, value in details.items()}
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sum(sizes.values()) <= DETAILS_LIMIT:
            break
        del details[key], sizes[key]
    return msgspec.structs.replace(error, message=_short(error.message), details=details or None)
