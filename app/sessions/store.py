"""The store of sessions: the only SQL on them, in the verbs of their life.

It promises that `record` moves a session and tells of it in one transaction, only if the session still
stands where the caller saw it; that nothing is answered or shown before it is on disk; and that after
the commit a bell rings for those who follow. What happens to a session is the table's to say
(`lifecycle.py`), what its frames look like is `events.py`'s.
"""

import asyncio
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import uuid_utils
from sqlalchemy import Connection, Row, Select, and_, func, insert, literal, or_, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from app import database
from app.database import (
    audit,
    copy_jobs,
    idempotency_keys,
    log_lines,
    prompts,
    sessions,
    snapshots,
    store_facts,
)
from app.errors import (
    CursorAhead,
    Failure,
    IdempotencyKeyReused,
    PromptNotOpen,
    SessionAlreadyCompleted,
    SessionNotAwaitingInput,
    SessionNotFound,
    SessionNotRetryable,
    StoreBroken,
    TooLateToCancel,
)
from app.sessions import events, lifecycle, requests
from app.sessions.lifecycle import LIVE, TERMINAL, Outcome, State
from app.sessions.prompts import PromptField, accepted

T = TypeVar("T")

CACHED_BYTES = 8 * 1024 * 1024
"""Newest frames kept in memory for those who follow closely; who is further behind reads the file."""

FAILED_SHOWN = timedelta(days=1)


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """The open question of a plugin that stopped."""

    prompt_id: str
    plugin: str
    file: str | None
    reason: str
    fields: tuple[PromptField, ...]


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


class Moved(Exception):
    """The session is no longer where the caller saw it; nothing was written."""


class DestinationHeld(Exception):
    """A live session holds the destination, its project, or a folder below it."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        super().__init__(session_id)


class Store:
    """Open from `open` to `close`. All methods belong to the event loop that opened it."""

    def __init__(
        self,
        url: str,
        *,
        on_broken: Callable[[StoreBroken], None],
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.path = database.path_of(url)
        self._clock = clock or (lambda: datetime.now(UTC))
        self._lock = database.Lock(self.path)
        self._on_broken = on_broken
        self._recent: OrderedDict[str, deque[Frame]] = OrderedDict()
        self._recent_bytes = 0
        self._bells: defaultdict[str | None, set[asyncio.Event]] = defaultdict(set)
        self.head_position = 0

    async def open(self) -> database.Opened:
        """Take the lock, bring the schema up to date, and start the writer."""
        opened = await asyncio.to_thread(self._prepare)
        self._loop = asyncio.get_running_loop()
        self._readers = database.Readers(self.path)
        self._writer = database.Writer(self.path, on_broken=self._on_broken)
        self._writer.start()
        self.epoch, self.revision = opened.epoch, opened.revision
        [[row]] = await self._readers.all(select(func.coalesce(func.max(database.events.c.position), 0)))
        self.head_position = row[0]
        return opened

    def _prepare(self) -> database.Opened:
        self._lock.acquire()
        try:
            return database.prepare(self.path)
        except BaseException:
            self._lock.release()
            raise

    async def close(self) -> None:
        try:
            await self._readers.close()
            await asyncio.to_thread(self._writer.close)
            await asyncio.to_thread(database.write_note, self.path, self._writer.inode, self.head_position)
        finally:
            self._lock.release()

    # The verbs that write

    async def create(
        self,
        body: requests.CreateBody,
        caller: Caller,
        *,
        idempotency_key: str | None = None,
        retry_of: str | None = None,
    ) -> tuple[Session, bool]:
        """A new session in `validating`, or the one that this idempotency key made before.

        Returns the session and whether it is new; IdempotencyKeyReused if the key came with another body.
        """
        return await self._write(lambda db: self._create(db, body, caller, idempotency_key, retry_of))

    def _create(
        self,
        db: Connection,
        body: requests.CreateBody,
        caller: Caller,
        key: str | None,
        retry_of: str | None,
    ) -> tuple[tuple[Session, bool], list[Frame]]:
        request = requests.encode(body)
        digest = requests.digest(request + (retry_of or ""))
        if key is not None and (earlier := _by_key(db, caller.principal, key, digest)) is not None:
            return (earlier, False), []
        now = self._now()
        session_id = str(uuid_utils.uuid7())
        db.execute(insert(sessions), _new_row(session_id, body, request, now, caller, retry_of))
        if key is not None:
            entry = {"principal": caller.principal, "key": key, "body_digest": digest}
            db.execute(insert(idempotency_keys), entry | {"session_id": session_id, "created_at": now})
        command = "retry" if retry_of else "create"
        _audit(
            db, now, caller, command, session_id, body.operator, {"retry_of": retry_of} if retry_of else {}
        )
        session, frames = self._advance(db, _load(db, session_id), (lifecycle.Begun(),))
        return (session, True), frames

    async def record(self, session: Session, *outcomes: Outcome) -> Session:
        """Move `session` by what happened to it, and tell of it, in one transaction.

        Moved if it no longer stands where `session` says, or if its cancel was recorded meanwhile;
        DestinationHeld if it was accepted for a folder that a live session holds.
        """
        return await self._write(lambda db: self._advance(db, session, outcomes))

    async def answer(self, session_id: str, body: requests.ResumeBody, caller: Caller) -> Session:
        """Take an operator's answer to the open prompt; the refusals in the order in which they are checked."""
        return await self._write(lambda db: self._answer(db, session_id, body, caller))

    def _answer(
        self, db: Connection, session_id: str, body: requests.ResumeBody, caller: Caller
    ) -> tuple[Session, list[Frame]]:
        session = _load(db, session_id)
        if body.prompt_id is not None and _is_repeat(db, session_id, body):
            return session, []
        if session.terminal:
            raise SessionAlreadyCompleted
        if session.prompt is None or session.cancel is not None:
            raise SessionNotAwaitingInput
        if body.prompt_id is not None and body.prompt_id != session.prompt.prompt_id:
            raise PromptNotOpen(details={"prompt_id": session.prompt.prompt_id})
        values = accepted(session.prompt.fields, body.extra_inputs)
        answered = lifecycle.Answered(
            prompt_id=session.prompt.prompt_id,
            plugin=session.prompt.plugin,
            operator=body.operator,
            values=values,
            digest=_answer_digest(body),
        )
        _audit(
            db, self._now(), caller, "resume", session_id, body.operator, {"prompt_id": answered.prompt_id}
        )
        return self._advance(db, session, (answered,))

    async def request_cancel(self, session_id: str, body: requests.CancelBody, caller: Caller) -> Session:
        """Write a cancel down before it acts; a second one joins the first."""
        return await self._write(lambda db: self._request_cancel(db, session_id, body, caller))

    def _request_cancel(
        self, db: Connection, session_id: str, body: requests.CancelBody, caller: Caller
    ) -> tuple[Session, list[Frame]]:
        session = _load(db, session_id)
        if session.terminal:
            raise SessionAlreadyCompleted
        if not lifecycle.cancellable(session.state):
            raise TooLateToCancel
        now = self._now()
        details = {"discard_files": body.discard_files, "joined": session.cancel is not None}
        _audit(db, now, caller, "cancel", session_id, body.operator, details)
        if session.cancel is None:
            cancel = _json(Cancel(discard_files=body.discard_files, operator=body.operator))
            values = {"cancel_requested_at": now, "cancel": cancel, "updated_at": now}
            db.execute(_one(session_id).values(values))
        return _load(db, session_id), []

    async def retryable(self, session_id: str) -> Session:
        """The failed or aborted session that is to be tried again."""
        session = await self.get(session_id)
        if session.state not in (State.FAILED, State.ABORTED):
            raise SessionNotRetryable(details={"state": session.state})
        return session

    async def take_stock(self) -> list[Session]:
        """At the start: count the deaths of the last service, and give back what is unfinished, oldest first.

        A service that stopped in good order has left no session marked as driven. Of those that an
        uncleanly ended one was driving, the one that was driven alone is the only suspect.
        """
        return await self._write(self._take_stock)

    def _take_stock(self, db: Connection) -> tuple[list[Session], list[Frame]]:
        alone = db.execute(select(sessions.c.session_id).where(sessions.c.alone == 1)).first()
        suspects = sessions.c.driven == 1 if alone is None else sessions.c.alone == 1
        db.execute(update(sessions).where(suspects).values(step_deaths=sessions.c.step_deaths + 1))
        marked = or_(sessions.c.driven == 1, sessions.c.alone == 1)
        db.execute(update(sessions).where(marked).values(driven=0, alone=0))
        return _sessions(db.execute(_whole(sessions.c.state.in_(LIVE)).order_by(sessions.c.session_id))), []

    async def mark_all_idle(self) -> None:
        """The last word of a service that stops in good order."""
        idle = update(sessions).where(sessions.c.driven == 1).values(driven=0, alone=0)
        await self._write(lambda db: (db.execute(idle), []))

    async def note_root(self, root: Path) -> None:
        """This data root is ours from now on: if its mark is gone, it is not mounted."""
        fact = {"name": f"root:{root}", "value": self._now()}
        await self._write(
            lambda db: (db.execute(upsert(store_facts).values(fact).on_conflict_do_nothing()), [])
        )

    async def knows_root(self, root: Path) -> bool:
        [rows] = await self._readers.all(select(store_facts).where(store_facts.c.name == f"root:{root}"))
        return bool(rows)

    async def forget_partial(self, session_id: str) -> None:
        """The partial tree of a terminal session has gone from the disk."""
        await self._write(lambda db: (db.execute(_one(session_id).values(partial_path=None)), []))

    # The verbs that read

    async def get(self, session_id: str) -> Session:
        [rows] = await self._readers.all(_whole(sessions.c.session_id == session_id))
        if not rows:
            raise SessionNotFound
        return _session(rows[0])

    async def search(self, query: Query) -> tuple[list[Session], str | None]:
        """One page, newest first, and the id from which the next one goes on, or None."""
        page = _whole(*_conditions(query)).order_by(sessions.c.session_id.desc()).limit(query.limit + 1)
        [rows] = await self._readers.all(page)
        found = _sessions(rows[: query.limit])
        return found, found[-1].session_id if len(rows) > query.limit else None

    async def operations(self) -> list[Session]:
        """Every live session, and those that failed within a day, oldest first."""
        recent = events.timestamp(self._clock() - FAILED_SHOWN)
        failed = and_(sessions.c.state == State.FAILED, sessions.c.ended_at >= recent)
        [rows] = await self._readers.all(
            _whole(or_(sessions.c.state.in_(LIVE), failed)).order_by(sessions.c.session_id)
        )
        return _sessions(rows)

    async def counts(self) -> dict[str, int]:
        """How many sessions stand in each state, and how many left a partial tree."""
        by_state: Select[Any] = select(sessions.c.state, func.count()).group_by(sessions.c.state)
        partial = select(literal("partial"), func.count()).where(sessions.c.partial_path.is_not(None))
        blocked = select(literal("blocked"), func.count()).where(
            sessions.c.state.in_(LIVE), sessions.c.blocked_on.is_not(None)
        )
        [rows] = await self._readers.all(by_state.union_all(partial, blocked))
        return {str(name): int(count) for name, count in rows}

    async def partials(self, *, ended_before: str) -> list[Session]:
        """Terminal sessions whose partial tree has been kept since before `ended_before`."""
        old = and_(sessions.c.partial_path.is_not(None), sessions.c.ended_at < ended_before)
        [rows] = await self._readers.all(_whole(old))
        return _sessions(rows)

    async def known(self, session_ids: Sequence[str]) -> dict[str, Session]:
        [rows] = await self._readers.all(_whole(sessions.c.session_id.in_(session_ids)))
        return {session.session_id: session for session in _sessions(rows)}

    async def held(self) -> frozenset[str]:
        """The destination keys of all live sessions."""
        row = sessions.c
        keys = select(row.destination_key).where(row.state.in_(LIVE), row.destination_key.is_not(None))
        [rows] = await self._readers.all(keys)
        return frozenset(key for (key,) in rows)

    async def holder(self, session_id: str, destination_key: str, project_key: str) -> str | None:
        """The other live session that holds this destination, its project, or a folder below it."""
        [rows] = await self._readers.all(_holders(session_id, destination_key, project_key))
        return str(rows[0][0]) if rows else None

    async def manifest(self, session_id: str) -> str:
        """The digest of what the session's tree held when it was last sealed."""
        own = select(snapshots.c.manifest).where(snapshots.c.session_id == session_id)
        [rows] = await self._readers.all(own.order_by(snapshots.c.ordinal.desc()).limit(1))
        return str(rows[0].manifest)

    async def warnings(self, session_id: str, limit: int) -> list[dict[str, object]]:
        """What the history warns of, as the result of the session tells it."""
        table = database.events.c
        told = select(table.frame).where(table.session_id == session_id, table.kind == "warning")
        [rows] = await self._readers.all(told.order_by(table.seq).limit(limit))
        frames = (msgspec.json.decode(row.frame, type=dict[str, object]) for row in rows)
        return [
            {key: frame[key] for key in ("code", "message", "plugin") if key in frame} for frame in frames
        ]

    async def frames_after(self, session_id: str, cursor: int, limit: int) -> list[Frame]:
        """At most `limit` frames of the session with `seq` above `cursor`, in order."""
        recent = self._recent.get(session_id)
        if recent and recent[0].seq <= cursor + 1:
            first = cursor + 1 - recent[0].seq
            return list(islice(recent, first, first + limit))
        table = database.events.c
        later = _FRAMES.where(table.session_id == session_id, table.seq > cursor)
        [rows] = await self._readers.all(later.order_by(table.seq).limit(limit))
        return [_frame(row) for row in rows]

    async def feed_after(self, position: int, limit: int) -> list[Frame]:
        """At most `limit` frames of all sessions after `position`, in commit order."""
        table = database.events.c
        [rows] = await self._readers.all(
            _FRAMES.where(table.position > position).order_by(table.position).limit(limit)
        )
        return [_frame(row) for row in rows]

    async def settled_prompts(self, session_id: str) -> frozenset[str]:
        """The prompts of the session that wait for no answer any more."""
        settled = and_(prompts.c.session_id == session_id, prompts.c.status != "open")
        [rows] = await self._readers.all(select(prompts.c.prompt_id).where(settled))
        return frozenset(row[0] for row in rows)

    async def log_after(self, session_id: str, after: int, limit: int) -> list[LogLine]:
        own = and_(log_lines.c.session_id == session_id, log_lines.c.line > after)
        [rows] = await self._readers.all(select(log_lines).where(own).order_by(log_lines.c.line).limit(limit))
        return [LogLine(**_columns(row, "line at source level text")) for row in rows]

    def head_seq(self, session: Session, cursor: int) -> int:
        """The newest `seq`; CursorAhead if `cursor` is beyond it."""
        if cursor > session.head_seq:
            raise CursorAhead(details={"head_seq": session.head_seq, "epoch": self.epoch})
        return session.head_seq

    @contextmanager
    def bell(self, session_id: str | None) -> Iterator[asyncio.Event]:
        """An event that is set after each commit that tells of the session; None for every session."""
        ring = asyncio.Event()
        self._bells[session_id].add(ring)
        try:
            yield ring
        finally:
            self._bells[session_id].discard(ring)
            if not self._bells[session_id]:
                del self._bells[session_id]

    def ring_all(self) -> None:
        """Wake everyone who follows, to look whether the service is stopping."""
        for bells in self._bells.values():
            for bell in bells:
                bell.set()

    # Inside a transaction

    async def _write(self, unit: Callable[[Connection], tuple[T, list[Frame]]]) -> T:
        """Run `unit` in the writer; when its group is on disk, make its frames known, in commit order."""

        def committed(result: tuple[T, list[Frame]]) -> None:
            if result[1]:
                self._loop.call_soon_threadsafe(self._publish, result[1])

        return (await self._writer.write(unit, committed))[0]

    def _publish(self, frames: list[Frame]) -> None:
        for frame in frames:
            self._remember(frame)
            self.head_position = max(self.head_position, frame.position)
        for session_id in {frame.session_id for frame in frames} | {None}:
            for bell in self._bells.get(session_id, ()):
                bell.set()

    def _remember(self, frame: Frame) -> None:
        recent = self._recent.setdefault(frame.session_id, deque())
        recent.append(frame)
        self._recent.move_to_end(frame.session_id)
        self._recent_bytes += len(frame.data)
        while self._recent_bytes > CACHED_BYTES:
            oldest = next(iter(self._recent))
            self._recent_bytes -= len(self._recent[oldest].popleft().data)
            if not self._recent[oldest]:
                del self._recent[oldest]

    def _advance(
        self, db: Connection, seen: Session, outcomes: Sequence[Outcome]
    ) -> tuple[Session, list[Frame]]:
        now = self._now()
        frames: list[Frame] = []
        state = seen.state
        _claim(db, seen, now)
        head = db.execute(
            select(sessions.c.head_seq).where(sessions.c.session_id == seen.session_id)
        ).scalar_one()
        for outcome in outcomes:
            lead = lifecycle.after(state, outcome)
            _write_columns(db, seen.session_id, outcome, now, moves=lead is not state)
            for event in events.told(state, outcome, seq=head + 1, at=now):
                frames.append(_append(db, seen.session_id, event))
                head = event.seq
            state = lead
        return _load(db, seen.session_id), frames

    def _now(self) -> str:
        return events.timestamp(self._clock())


_FRAMES = select(
    database.events.c.position,
    database.events.c.session_id,
    database.events.c.seq,
    database.events.c.kind,
    database.events.c.frame,
)
_INSERT_EVENT = insert(database.events)


def _claim(db: Connection, seen: Session, now: str) -> None:
    """Touch the row if it still stands where the caller saw it.

    A cancel that was recorded meanwhile is a race that the caller has lost, unless it is the one who
    finishes that cancel and so has seen it.
    """
    still = and_(sessions.c.session_id == seen.session_id, sessions.c.state == seen.state)
    if seen.cancel is None:
        still = and_(still, sessions.c.cancel_requested_at.is_(None))
    if db.execute(update(sessions).where(still).values(updated_at=now)).rowcount != 1:
        raise Moved(seen.session_id)


def _append(db: Connection, session_id: str, event: events.Event) -> Frame:
    data = events.encode(event)
    kind = str(type(event).__struct_config__.tag)
    row = {"session_id": session_id, "seq": event.seq, "kind": kind, "at": event.at, "frame": data.decode()}
    position = db.execute(_INSERT_EVENT, row).lastrowid
    return Frame(position, session_id, event.seq, kind, data)


def _write_columns(db: Connection, session_id: str, outcome: Outcome, now: str, *, moves: bool) -> None:
    """What an outcome leaves in the tables besides its events, before they move the row."""
    values: dict[str, object] = {"blocked_on": None, "step_deaths": 0} if moves else {}
    match outcome:
        case lifecycle.Accepted():
            holder = db.execute(_holders(session_id, outcome.destination_key, outcome.project_key)).first()
            if holder is not None:
                raise DestinationHeld(holder.session_id)
            values |= {
                "destination": str(outcome.destination),
                "destination_key": outcome.destination_key,
                "project_key": outcome.project_key,
                "project_short_id": outcome.project_short_id,
                "local_root": str(outcome.local_root),
                "pinned": bytes(outcome.pinned).decode(),
            }
        case lifecycle.Rendered():
            values |= {"tree": str(outcome.tree), "rendered": _json(outcome.rendered)}
            _snapshot(db, session_id, outcome, now)
            _log(db, session_id, "render", outcome.log, now)
        case lifecycle.Asked():
            db.execute(insert(prompts), _prompt_row(session_id, outcome, now))
            values |= {"driven": 0, "alone": 0}
        case lifecycle.Answered():
            _close_prompt(db, outcome, now)
            values |= {"driven": 1}
        case lifecycle.Checked(findings=findings):
            values |= {"findings": _json(findings)}
        case lifecycle.Published():
            values |= {"sync_status": outcome.result["sync_status"], "driven": 0, "alone": 0}
            db.execute(insert(copy_jobs), _copy_row(session_id, outcome, now))
        case lifecycle.Failed(error=error) | lifecycle.Cancelled(error=error):
            partial = (error.details or {}).get("partial_path")
            values |= {"partial_path": partial, "driven": 0, "alone": 0}
            withdrawn = and_(prompts.c.session_id == session_id, prompts.c.status == "open")
            db.execute(update(prompts).where(withdrawn).values(status="withdrawn"))
        case lifecycle.Recovered():
            values |= {"recoveries": sessions.c.recoveries + 1, "driven": 1, "alone": int(outcome.alone)}
        case lifecycle.Blocked(code=code, message=message, since=since, retry_at=retry_at):
            blocked = {"code": code, "message": message, "since": since, "retry_at": retry_at}
            values |= {"blocked_on": _json(blocked), "alone": 0}
    if values:
        db.execute(_one(session_id).values(values))


def _holders(session_id: str, destination_key: str, project_key: str) -> Select[tuple[str]]:
    """One live session to a destination; a project that is being made is closed, and closes what is below."""
    row = sessions.c
    below = row.destination_key.startswith(destination_key + "/", autoescape=True)
    held = or_(row.destination_key.in_((destination_key, project_key)), below)
    return select(row.session_id).where(row.session_id != session_id, row.state.in_(LIVE), held)


def _snapshot(db: Connection, session_id: str, rendered: lifecycle.Rendered, now: str) -> None:
    row = {
        "session_id": session_id,
        "ordinal": 0,
        "step": "rendering",
        "tree": str(rendered.tree),
        "manifest": rendered.manifest,
        "taken_at": now,
    }
    db.execute(
        upsert(snapshots)
        .values(row)
        .on_conflict_do_update(index_elements=["session_id", "ordinal"], set_=row)
    )


def _log(db: Connection, session_id: str, source: str, lines: tuple[str, ...], now: str) -> None:
    rows = [
        {"session_id": session_id, "at": now, "source": source, "level": "info", "text": line}
        for line in lines
    ]
    if rows:
        db.execute(insert(log_lines), rows)


def _prompt_row(session_id: str, asked: lifecycle.Asked, now: str) -> dict[str, object]:
    return {
        "prompt_id": asked.prompt_id,
        "session_id": session_id,
        "plugin": asked.plugin,
        "file": asked.file,
        "reason": asked.reason,
        "fields": _json(asked.fields),
        "status": "open",
        "asked_at": now,
    }


def _close_prompt(db: Connection, answered: lifecycle.Answered, now: str) -> None:
    values = {
        "status": "answered",
        "answered_at": now,
        "operator": answered.operator,
        "answer": _json(answered.values),
        "answer_digest": answered.digest,
    }
    db.execute(update(prompts).where(prompts.c.prompt_id == answered.prompt_id).values(values))


def _copy_row(session_id: str, published: lifecycle.Published, now: str) -> dict[str, object]:
    return {
        "session_id": session_id,
        "source": published.result["path"],
        "target": published.nas_path,
        "status": published.result["sync_status"],
        "attempts": 0,
        "created_at": now,
        "updated_at": now,
    }


def _new_row(
    session_id: str, body: requests.CreateBody, request: str, now: str, caller: Caller, retry_of: str | None
) -> dict[str, object]:
    run = isinstance(body, requests.RunBody)
    return {
        "session_id": session_id,
        "kind": "run" if run else "project",
        "run_kind": body.run_kind if isinstance(body, requests.RunBody) else None,
        "state": State.PENDING,
        "label": body.label,
        "operator": body.operator,
        "equipment_id": body.equipment_id,
        "project_short_id": body.project_short_id if isinstance(body, requests.RunBody) else None,
        "template_path": body.template_path,
        "created_at": now,
        "updated_at": now,
        "head_seq": 0,
        "recoveries": 0,
        "step_deaths": 0,
        "driven": 1,
        "alone": 0,
        "retry_of": retry_of,
        "principal": caller.principal,
        "trace_id": caller.trace_id,
        "request": request,
    }


def _by_key(db: Connection, principal: str, key: str, digest: str) -> Session | None:
    own = and_(idempotency_keys.c.principal == principal, idempotency_keys.c.key == key)
    row = db.execute(select(idempotency_keys.c.body_digest, idempotency_keys.c.session_id).where(own)).first()
    if row is None:
        return None
    if row.body_digest != digest:
        raise IdempotencyKeyReused(details={"session_id": row.session_id})
    return _load(db, row.session_id)


def _is_repeat(db: Connection, session_id: str, body: requests.ResumeBody) -> bool:
    row = db.execute(
        select(prompts.c.answer_digest).where(
            prompts.c.session_id == session_id, prompts.c.prompt_id == body.prompt_id
        )
    ).first()
    return row is not None and row.answer_digest == _answer_digest(body)


def _answer_digest(body: requests.ResumeBody) -> str:
    return requests.digest(msgspec.json.encode(body.extra_inputs, order="sorted").decode())


def _audit(
    db: Connection,
    now: str,
    caller: Caller,
    command: str,
    session_id: str,
    operator: str | None,
    details: Mapping[str, object],
) -> None:
    row = {
        "at": now,
        "principal": caller.principal,
        "operator": operator,
        "command": command,
        "session_id": session_id,
        "trace_id": caller.trace_id,
        "details": _json(details),
    }
    db.execute(insert(audit), row)


def _conditions(query: Query) -> list[Any]:
    row = sessions.c
    conditions: list[Any] = []
    if query.state:
        conditions.append(row.state.in_(query.state))
    exact = {
        row.kind: query.kind,
        row.equipment_id: query.equipment,
        row.project_short_id: query.project,
        row.operator: query.operator,
    }
    conditions += [column == value for column, value in exact.items() if value is not None]
    if query.label_prefix is not None:
        conditions.append(row.label.startswith(query.label_prefix, autoescape=True))
    if query.since is not None:
        conditions.append(row.created_at >= query.since)
    if query.until is not None:
        conditions.append(row.created_at < query.until)
    if query.before is not None:
        conditions.append(row.session_id < query.before)
    return conditions


def _whole(*conditions: Any) -> Select[Any]:
    """Rows of sessions, each with its open prompt."""
    open_prompt = and_(prompts.c.session_id == sessions.c.session_id, prompts.c.status == "open")
    prompt = [
        prompts.c.prompt_id,
        prompts.c.plugin,
        prompts.c.file,
        prompts.c.reason,
        prompts.c.fields,
    ]
    return select(sessions, *prompt).select_from(sessions.outerjoin(prompts, open_prompt)).where(*conditions)


def _load(db: Connection, session_id: str) -> Session:
    row = db.execute(_whole(sessions.c.session_id == session_id)).first()
    if row is None:
        raise SessionNotFound
    return _session(row)


def _one(session_id: str) -> Any:
    return update(sessions).where(sessions.c.session_id == session_id)


def _sessions(rows: Iterable[Row[Any]]) -> list[Session]:
    return [_session(row) for row in rows]


_PLAIN = (
    "session_id kind run_kind label operator equipment_id project_short_id template_path created_at updated_at"
    " ended_at head_seq recoveries step_deaths sync_status retry_of trace_id"
)


def _session(row: Row[Any]) -> Session:
    return Session(
        **_columns(row, _PLAIN),
        state=State(row.state),
        destination=_path(row.destination),
        local_root=_path(row.local_root),
        driven=bool(row.driven),
        tree=_path(row.tree),
        rendered=_read(row.rendered, tuple[str, ...]) or (),
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


def _prompt(row: Row[Any]) -> Prompt | None:
    if row.prompt_id is None:
        return None
    fields = msgspec.json.decode(row.fields, type=tuple[PromptField, ...])
    return Prompt(**_columns(row, "prompt_id plugin file reason"), fields=fields)


def _columns(row: Row[Any], names: str) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names.split()}


def _frame(row: Row[Any]) -> Frame:
    return Frame(row.position, row.session_id, row.seq, row.kind, row.frame.encode())


def _path(value: str | None) -> Path | None:
    return Path(value) if value is not None else None


def _read(value: str | None, shape: Any) -> Any:
    return None if value is None else msgspec.json.decode(value, type=shape)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
