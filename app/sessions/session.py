"""A session as a record: one row of the store with its open prompt, and what goes with it.

Decoded from rows, never written back: what changes a session is an outcome that the store records.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog

from app.errors import Failure
from app.sessions import requests
from app.sessions.lifecycle import TERMINAL, PluginStatus, State
from app.sessions.prompts import PromptField

log = structlog.get_logger()


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """The open question of a plugin that stopped."""

    prompt_id: str
    plugin: str
    file: str | None
    reason: str
    fields: tuple[PromptField, ...]


class AnsweredPrompt(Prompt, frozen=True, kw_only=True):
    """A question that is settled; `answer` has no value of a secret field."""

    answer: dict[str, object]
    operator: str | None
    answered_at: str


class PluginRun(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the `ordinal`-th plugin of a session; `version` None for one that was not there."""

    ordinal: int
    plugin: str
    version: str | None
    status: PluginStatus
    message: str | None
    files_affected: tuple[str, ...]
    duration_ms: int | None
    exit_code: int | None
    peak_memory_mb: int | None


class Cancel(msgspec.Struct, frozen=True, kw_only=True):
    """A recorded cancel: what was asked for, and by whom."""

    discard_files: bool
    operator: str | None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `sessions` with its open prompt; times are RFC 3339 text."""

    session_id: str
    kind: Literal["project", "run"]
    run_kind: Literal["experimental", "test"] | None
    state: State
    label: str
    operator: str
    equipment_id: str
    project_short_id: str | None
    template_path: str
    destination: Path | None
    local_root: Path | None
    created_at: str
    updated_at: str
    ended_at: str | None
    head_seq: int
    recoveries: int
    step_deaths: int
    driven: bool
    tree: Path | None
    rendered: tuple[str, ...]
    answers: dict[str, object] | None
    blocked_on: dict[str, object] | None
    cancel: Cancel | None
    partial_path: Path | None
    sync_status: str | None
    findings: tuple[dict[str, object], ...]
    error: Failure | None
    result: dict[str, object] | None
    retry_of: str | None
    trace_id: str
    request: requests.CreateBody
    pinned: msgspec.Raw | None
    prompt: Prompt | None

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who gives a command, for the audit."""

    principal: str
    trace_id: str


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """What to list. `before` is the id after which, newest first, the page begins."""

    state: tuple[State, ...] = ()
    kind: str | None = None
    equipment: str | None = None
    project: str | None = None
    operator: str | None = None
    label_prefix: str | None = None
    since: str | None = None
    until: str | None = None
    before: str | None = None
    limit: int = 50


class Frame(msgspec.Struct, frozen=True):
    """One stored event: its place among all sessions' events, its session, and its bytes as sent."""

    position: int
    session_id: str
    seq: int
    kind: str
    data: bytes


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    line: int
    at: str
    source: str
    level: str
    text: str


def sessions_of(rows: Iterable[Any]) -> list[Session]:
    """Each row that can be read. One that cannot, changed by hand perhaps, must not hide all the others."""
    found = []
    for row in rows:
        try:
            found.append(session_of(row))
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("A row of sessions cannot be read.", session_id=row.session_id, why=str(error))
    return found


_PLAIN = (
    "session_id kind run_kind label operator equipment_id project_short_id template_path created_at updated_at"
    " ended_at head_seq recoveries step_deaths sync_status retry_of trace_id"
)


def session_of(row: Any) -> Session:
    return Session(
        **columns(row, _PLAIN),
        state=State(row.state),
        destination=_path(row.destination),
        local_root=_path(row.local_root),
        driven=bool(row.driven),
        tree=_path(row.tree),
        rendered=_read(row.rendered, tuple[str, ...]) or (),
        answers=_read(row.answers, dict[str, object]),
        blocked_on=_read(row.blocked_on, dict[str, object]),
        cancel=_read(row.cancel, Cancel),
        partial_path=_path(row.partial_path),
        findings=_read(row.findings, tuple[dict[str, object], ...]) or (),
        error=_read(row.error, Failure),
        result=_read(row.result, dict[str, object]),
        request=requests.decode(row.request),
        pinned=msgspec.Raw(row.pinned.encode()) if row.pinned is not None else None,
        prompt=_prompt(row),
    )


def _prompt(row: Any) -> Prompt | None:
    if row.prompt_id is None:
        return None
    fields = msgspec.json.decode(row.fields, type=tuple[PromptField, ...])
    return Prompt(**columns(row, "prompt_id plugin file reason"), fields=fields)


def answered_prompt_of(row: Any) -> AnsweredPrompt:
    return AnsweredPrompt(
        **columns(row, "prompt_id plugin file reason operator answered_at"),
        fields=msgspec.json.decode(row.fields, type=tuple[PromptField, ...]),
        answer=_read(row.answer, dict[str, object]) or {},
    )


def plugin_run_of(row: Any) -> PluginRun:
    return PluginRun(
        **columns(row, "ordinal plugin version status message duration_ms exit_code peak_memory_mb"),
        files_affected=_read(row.files_affected, tuple[str, ...]),
    )


def columns(row: Any, names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names.split()}


def frame_of(row: Any) -> Frame:
    return Frame(row.position, row.session_id, row.seq, row.kind, row.frame.encode())


def _path(value: str | None) -> Path | None:
    return Path(value) if value is not None else None


def _read(value: str | None, shape: Any) -> Any:
    return None if value is None else msgspec.json.decode(value, type=shape)
