"""The state machine of a creation session, as one table.

Its laws: nobody assigns a state; a step returns what happened, and `EDGES` says where that leads. A
session is in exactly one state, leaves it only along an edge of the table, and never leaves a terminal
one. The store carries the same table, as rows that its triggers ask, so that a hand on the SQLite shell
is held to it too. Nothing here does I/O.
"""

from enum import StrEnum
from pathlib import Path
from typing import Literal

import msgspec

from app.errors import Failure


class State(StrEnum):
    PENDING = "pending"
    VALIDATING = "validating"
    RENDERING = "rendering"
    PLUGIN_PASS = "plugin_pass"
    INPUT_REQUIRED = "input_required"
    CACHE_WRITE = "cache_write"
    POST_VALIDATE = "post_validate"
    SYNC_QUEUED = "sync_queued"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


TERMINAL = frozenset({State.DONE, State.FAILED, State.ABORTED})
LIVE = tuple(state for state in State if state not in TERMINAL)

PHASES: dict[State, str] = {
    State.VALIDATING: "validating_inputs",
    State.RENDERING: "rendering_template",
    State.PLUGIN_PASS: "running_plugins",
    State.INPUT_REQUIRED: "input_required",
    State.CACHE_WRITE: "writing_cache",
    State.POST_VALIDATE: "validating_post_creation",
    State.SYNC_QUEUED: "queueing_nas_sync",
    State.DONE: "done",
}


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a session. What it leads to stands in `EDGES`, not here."""


class Begun(Outcome, frozen=True, kw_only=True):
    """The session was taken up for the first time."""


class Accepted(Outcome, frozen=True, kw_only=True):
    """The gate let the inputs pass. `pinned` is what the session works with from now on."""

    destination: Path
    destination_key: str
    project_key: str
    project_short_id: str
    local_root: Path
    pinned: msgspec.Raw


class Rendered(Outcome, frozen=True, kw_only=True):
    """The template stands rendered in `tree`, synced; `manifest` is the digest of what it holds.

    `rendered` are the files that Jinja wrote, `answers` the values that it had for them, `log` is what the
    render printed, by lines.
    """

    tree: Path
    manifest: str
    rendered: tuple[str, ...]
    answers: dict[str, object]
    log: tuple[str, ...]


class Said(msgspec.Struct, frozen=True):
    """One line that a plugin logged or printed."""

    level: Literal["debug", "info", "warning", "error"]
    text: str


PluginStatus = Literal["success", "skipped", "failed", "timeout", "policy_violation"]


class PluginRan(Outcome, frozen=True, kw_only=True):
    """A plugin is through, the `ordinal`-th of `total`, counted from 1.

    `tree`, synced, and the digest `manifest` of what it holds are what the plugin made; None when the tree is
    as before it. `version` is None for one that is not there. Durations in milliseconds, memory in megabytes.
    """

    ordinal: int
    total: int
    plugin: str
    version: str | None
    status: PluginStatus
    message: str | None = None
    files_affected: tuple[str, ...] = ()
    duration_ms: int | None = None
    exit_code: int | None = None
    peak_memory_mb: int | None = None
    tree: Path | None = None
    manifest: str | None = None
    log: tuple[Said, ...] = ()


class Transformed(Outcome, frozen=True, kw_only=True):
    """Every plugin of the session is through."""


class Asked(Outcome, frozen=True, kw_only=True):
    """A plugin stopped to ask the operator."""

    prompt_id: str
    plugin: str
    file: str | None
    reason: str
    fields: tuple[msgspec.Raw, ...]
    log: tuple[Said, ...] = ()


class Answered(Outcome, frozen=True, kw_only=True):
    """The operator answered the open prompt; `values` has no value of a secret field."""

    prompt_id: str
    plugin: str
    operator: str | None
    values: dict[str, object]
    digest: str


class Documented(Outcome, frozen=True, kw_only=True):
    """Provenance stands in the tree, synced."""


class Checked(Outcome, frozen=True, kw_only=True):
    """The built tree was read through. `findings` are what must be mended before it may be copied."""

    findings: tuple[dict[str, object], ...]


class Published(Outcome, frozen=True, kw_only=True):
    """The tree stands at its destination, synced."""

    result: dict[str, object]
    nas_path: str


class Failed(Outcome, frozen=True, kw_only=True):
    error: Failure


class Cancelled(Outcome, frozen=True, kw_only=True):
    error: Failure


class Recovered(Outcome, frozen=True, kw_only=True):
    """The session was taken up again by a service that found it unfinished; `alone`: and drives no other."""

    alone: bool = False


class Progressed(Outcome, frozen=True, kw_only=True):
    current: int
    total: int
    file: str | None = None
    plugin: str | None = None


class Warned(Outcome, frozen=True, kw_only=True):
    message: str
    code: str
    plugin: str | None = None


class Blocked(Outcome, frozen=True, kw_only=True):
    """Something that may pass by itself stands in the way, `again` if that was told before.

    Times as RFC 3339 text.
    """

    code: str
    message: str
    since: str
    retry_at: str
    again: bool = False


EDGES: dict[tuple[State, type[Outcome]], State] = {
    (State.PENDING, Begun): State.VALIDATING,
    (State.VALIDATING, Accepted): State.RENDERING,
    (State.RENDERING, Rendered): State.PLUGIN_PASS,
    (State.PLUGIN_PASS, PluginRan): State.PLUGIN_PASS,
    (State.PLUGIN_PASS, Asked): State.INPUT_REQUIRED,
    (State.INPUT_REQUIRED, Answered): State.PLUGIN_PASS,
    (State.PLUGIN_PASS, Transformed): State.CACHE_WRITE,
    (State.CACHE_WRITE, Documented): State.POST_VALIDATE,
    (State.POST_VALIDATE, Checked): State.SYNC_QUEUED,
    (State.SYNC_QUEUED, Published): State.DONE,
    **{(state, Failed): State.FAILED for state in LIVE},
    **{(state, Cancelled): State.ABORTED for state in LIVE if state is not State.SYNC_QUEUED},
    **{(state, remark): state for state in LIVE for remark in (Recovered, Progressed, Warned, Blocked)},
}


class IllegalMove(Exception):
    """What happened cannot happen to a session in this state."""


def after(state: State, outcome: Outcome) -> State:
    """The state that `outcome` leads to from `state`; IllegalMove where the table has no edge."""
    try:
        return EDGES[state, type(outcome)]
    except KeyError:
        raise IllegalMove(f"{type(outcome).__name__} cannot happen in {state}") from None


def cancellable(state: State) -> bool:
    return (state, Cancelled) in EDGES


def phase_left(state: State) -> str:
    """The phase that a `failed` event names for a session that ended in `state`."""
    return PHASES.get(state, PHASES[State.VALIDATING])
