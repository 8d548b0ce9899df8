"""Sessions over HTTP: opened, looked at, answered, cancelled, tried again, and listed.

A handler decodes, makes one call, and shows what was committed. Which command a state allows is the
store's to say; nobody asks here first.
"""

import re
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, QueryParameter

from app.errors import CursorInvalid, Failure, SetupIncomplete, ShuttingDown, ValidationFailed
from app.sessions import requests
from app.sessions.events import timestamp
from app.sessions.lifecycle import PHASES, State
from app.sessions.requests import CancelBody, CreateBody, ResumeBody, RetryBody
from app.sessions.runner import Runner
from app.sessions.session import Caller, LogLine, Prompt, Query, Session
from app.sessions.store import Store
from app.settings import ConfigFile
from app.web import errors

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KEY = re.compile(r"[\x20-\x7e]{1,255}")

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        description="1 to 255 printable ASCII characters. The same key with the same body gives the same session.",
    ),
]
Next = Annotated[
    str | None, QueryParameter(name="next", description="The `next` of the page before this one.")
]
States = Annotated[list[State] | None, QueryParameter(name="state", description="One or more of these.")]
Limit = Annotated[int, QueryParameter(ge=1, le=200, description="Sessions on the page.")]
LineLimit = Annotated[int, QueryParameter(ge=1, le=1000, description="Lines in the answer.")]
LineCursor = Annotated[
    int, QueryParameter(ge=0, le=2**63 - 1, description="The last `line` that the client has.")
]


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """A session as it was committed last. Times are RFC 3339, UTC. `request` stands in the answer to GET of one."""

    session_id: str
    state: State
    current_phase: str | None
    next_action: Literal["none", "awaiting_input"]
    pending_input: Prompt | None
    error: Failure | None
    result: dict[str, object] | None
    kind: str
    run_kind: str | None
    label: str
    equipment_id: str
    project_short_id: str | None
    operator: str
    template: str
    destination: str | None
    created_at: str
    updated_at: str
    head_seq: int
    epoch: str
    recoveries: int
    blocked_on: dict[str, object] | None
    retry_of: str | None
    request: CreateBody | msgspec.UnsetType = msgspec.UNSET


class Listing(msgspec.Struct, frozen=True):
    """One page, newest first. `next` asks for the page after it; null on the last."""

    sessions: list[Handle]
    next: str | None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """A session that is under way, or failed within a day."""

    id: str
    state: State
    started_at: str
    equipment_id: str
    project_short_id: str | None
    run_label: str
    plugin_name: str | None
    suspended_reason: str | None


class Operations(msgspec.Struct, frozen=True):
    operations: list[Operation]


class Log(msgspec.Struct, frozen=True):
    """What the session's plugins and steps printed, oldest first."""

    lines: list[LogLine]


def shown(session: Session, epoch: str) -> Handle:
    return Handle(
        session_id=session.session_id,
        state=session.state,
        current_phase=PHASES.get(session.state),
        next_action="awaiting_input" if session.prompt else "none",
        pending_input=session.prompt,
        error=session.error,
        result=session.result,
        kind=session.kind,
        run_kind=session.run_kind,
        label=session.label,
        equipment_id=session.equipment_id,
        project_short_id=session.project_short_id,
        operator=session.operator,
        template=session.template_path,
        destination=str(session.destination) if session.destination else None,
        created_at=session.created_at,
        updated_at=session.updated_at,
        head_seq=session.head_seq,
        epoch=epoch,
        recoveries=session.recoveries,
        blocked_on=session.blocked_on,
        retry_of=session.retry_of,
    )


async def require_setup(config: ConfigFile) -> None:
    """SetupIncomplete as long as the workstation is not configured far enough to make folders."""
    await config.refresh()
    status = config.status
    if not status.ready:
        missing = msgspec.to_builtins(status.missing)
        raise SetupIncomplete(details={"state": status.state, "missing": missing})


def _require_running(runner: Runner) -> None:
    if runner.draining:
        raise ShuttingDown


class Sessions(Controller):
    path = "/sessions"
    tags = ("sessions",)

    @post(
        operation_id="create_session",
        responses=errors.responses(
            "validation_failed",
            "idempotency_key_reused",
            "setup_incomplete",
            "shutting_down",
            "store_unavailable",
            changes=True,
        ),
    )
    async def create(
        self,
        data: JSONBody[CreateBody],
        store: NamedDependency[Store],
        runner: NamedDependency[Runner],
        config: NamedDependency[ConfigFile],
        caller: NamedDependency[Caller],
        idempotency_key: IdempotencyKey = None,
    ) -> Handle:
        """Open a session. What the gate refuses answers 201, too, with state `failed` and the reason in `error`."""
        _require_running(runner)
        await require_setup(config)
        session, is_new = await store.create(data, caller, idempotency_key=_sane(idempotency_key))
        return shown(await runner.admit(session) if is_new else session, store.epoch)

    @get(
        operation_id="list_sessions",
        responses=errors.responses("validation_failed", "cursor_invalid", "store_unavailable"),
    )
    async def search(
        self,
        store: NamedDependency[Store],
        states: States = None,
        kind: FromQuery[Literal["project", "run"] | None] = None,
        equipment: FromQuery[str | None] = None,
        project: FromQuery[str | None] = None,
        operator: FromQuery[str | None] = None,
        label: Annotated[str | None, QueryParameter(description="What the label begins with.")] = None,
        since: Annotated[
            datetime | None, QueryParameter(description="Created at that time or later.")
        ] = None,
        until: Annotated[datetime | None, QueryParameter(description="Created before that time.")] = None,
        page: Next = None,
        limit: Limit = 50,
    ) -> Listing:
        """Sessions, newest first, one page of them."""
        query = Query(
            state=tuple(states or ()),
            kind=kind,
            equipment=equipment,
            project=project,
            operator=operator,
            label_prefix=label,
            since=_moment("since", since),
            until=_moment("until", until),
            before=_page(page),
            limit=limit,
        )
        found, following = await store.search(query)
        return Listing([shown(session, store.epoch) for session in found], following)

    @get(
        "/{session_id:str}",
        operation_id="get_session",
        responses=errors.responses("session_not_found", "store_unavailable"),
    )
    async def look(self, session_id: FromPath[str], store: NamedDependency[Store]) -> Handle:
        """One session, with the request that opened it."""
        session = await store.get(session_id)
        return msgspec.structs.replace(shown(session, store.epoch), request=session.request)

    @post(
        "/{session_id:str}/resume",
        operation_id="resume_session",
        status_code=200,
        responses=errors.responses(
            "validation_failed",
            "session_not_found",
            "session_already_completed",
            "session_not_awaiting_input",
            "prompt_not_open",
            "input_invalid",
            "setup_incomplete",
            "shutting_down",
            "store_unavailable",
            changes=True,
        ),
    )
    async def resume(
        self,
        session_id: FromPath[str],
        data: JSONBody[ResumeBody],
        store: NamedDependency[Store],
        runner: NamedDependency[Runner],
        config: NamedDependency[ConfigFile],
        caller: NamedDependency[Caller],
    ) -> Handle:
        """Answer the open prompt. An answer that was accepted may be sent again, with its `prompt_id`."""
        _require_running(runner)
        await require_setup(config)
        if data.prompt_id is None and config.current.service.require_prompt_id:
            raise ValidationFailed("This service takes answers with their prompt_id only.", field="prompt_id")
        return shown(await runner.answer(session_id, data, caller), store.epoch)

    @post(
        "/{session_id:str}/cancel",
        operation_id="cancel_session",
        status_code=200,
        responses=errors.responses(
            "validation_failed",
            "session_not_found",
            "session_already_completed",
            "too_late_to_cancel",
            "setup_incomplete",
            "store_unavailable",
            changes=True,
        ),
    )
    async def cancel(
        self,
        session_id: FromPath[str],
        data: JSONBody[CancelBody],
        store: NamedDependency[Store],
        runner: NamedDependency[Runner],
        config: NamedDependency[ConfigFile],
        caller: NamedDependency[Caller],
    ) -> Handle:
        """End the session. Answers when its work has stopped; the receipt is in `error.details`."""
        await require_setup(config)
        return shown(await runner.cancel(session_id, data, caller), store.epoch)

    @post(
        "/{session_id:str}/retry",
        operation_id="retry_session",
        responses=errors.responses(
            "validation_failed",
            "session_not_found",
            "session_not_retryable",
            "idempotency_key_reused",
            "setup_incomplete",
            "shutting_down",
            "store_unavailable",
            changes=True,
        ),
    )
    async def retry(
        self,
        session_id: FromPath[str],
        data: JSONBody[RetryBody],
        store: NamedDependency[Store],
        runner: NamedDependency[Runner],
        config: NamedDependency[ConfigFile],
        caller: NamedDependency[Caller],
        idempotency_key: IdempotencyKey = None,
    ) -> Handle:
        """Open a new session with the body of a failed or aborted one, under a merge patch of changes."""
        _require_running(runner)
        await require_setup(config)
        body = requests.changed((await store.retryable(session_id)).request, data.changes)
        key = _sane(idempotency_key)
        session, is_new = await store.create(body, caller, idempotency_key=key, retry_of=session_id)
        return shown(await runner.admit(session) if is_new else session, store.epoch)

    @get(
        "/{session_id:str}/log",
        operation_id="read_log",
        responses=errors.responses("validation_failed", "session_not_found", "store_unavailable"),
    )
    async def log(
        self,
        session_id: FromPath[str],
        store: NamedDependency[Store],
        after: LineCursor = 0,
        limit: LineLimit = 1000,
    ) -> Log:
        """What the session's plugins and steps printed."""
        await store.get(session_id)
        return Log(await store.log_after(session_id, after, limit))


@get(
    "/operations",
    operation_id="list_operations",
    tags=["sessions"],
    responses=errors.responses("store_unavailable"),
)
async def operations(store: NamedDependency[Store]) -> Operations:
    """Every live session, and those that failed within a day, oldest first."""
    return Operations([_operation(session) for session in await store.operations()])


def _operation(session: Session) -> Operation:
    return Operation(
        id=session.session_id,
        state=session.state,
        started_at=session.created_at,
        equipment_id=session.equipment_id,
        project_short_id=session.project_short_id,
        run_label=session.label,
        plugin_name=session.prompt.plugin if session.prompt else None,
        suspended_reason=session.prompt.reason if session.prompt else None,
    )


def _sane(key: str | None) -> str | None:
    if key is not None and not _KEY.fullmatch(key):
        raise ValidationFailed("expected 1 to 255 printable ASCII characters", field="Idempotency-Key")
    return key


def _page(cursor: str | None) -> str | None:
    if cursor is not None and not _UUID.fullmatch(cursor):
        raise CursorInvalid("This is not the `next` of a page.", field="next")
    return cursor


def _moment(name: str, given: datetime | None) -> str | None:
    """As the store writes times; one without an offset is taken as UTC."""
    if given is None:
        return None
    try:
        return timestamp(given if given.tzinfo else given.replace(tzinfo=UTC))
    except OverflowError as error:
        raise ValidationFailed(f"{given} is too far away", field=name) from error
