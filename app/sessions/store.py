"""The store of sessions, in the verbs of their life.

It promises that `record` moves a session and tells of it in one transaction, only if the session still
stands where the caller saw it; that nothing is answered or shown before it is on disk; and that after
the commit a bell rings for those who follow. What a transaction does stands in `moves.py`.
"""

import asyncio
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
from sqlalchemy import Connection, and_, func, literal, or_, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from app import connections, database
from app.database import log_lines, plugin_runs, prompts, sessions, snapshots, store_facts
from app.errors import CursorAhead, SessionNotFound, SessionNotRetryable, StoreBroken
from app.sessions import events, moves, requests
from app.sessions.lifecycle import LIVE, Outcome, State
from app.sessions.moves import Transaction, holders, whole
from app.sessions.session import (
    AnsweredPrompt,
    Caller,
    Frame,
    LogLine,
    PluginRun,
    Query,
    Session,
    answered_prompt_of,
    columns,
    frame_of,
    plugin_run_of,
    session_of,
    sessions_of,
)

log = structlog.get_logger()

T = TypeVar("T")

CACHED_BYTES = 8 * 1024 * 1024
"""Newest frames kept in memory for those who follow closely; who is further behind reads the file."""

FAILED_SHOWN = timedelta(days=1)


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
        self._noted = 0

    async def open(self) -> database.Opened:
        """Take the lock, bring the schema up to date, and start the writer."""
        opened = await asyncio.to_thread(self._prepare)
        self._loop = asyncio.get_running_loop()
        self._readers = connections.Readers(self.path)
        self._writer = connections.Writer(self.path, on_broken=self._on_broken)
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

    async def note_progress(self) -> None:
        """Leave word of how far the file has come, by which an older copy in its place is known."""
        if self._noted == self.head_position:
            return
        self._noted = self.head_position
        try:
            await asyncio.to_thread(
                database.write_note, self.path, self._writer.inode, self.epoch, self._noted
            )
        except OSError as error:  # a full disk: an older note is a safe one
            log.warning("The note beside the database could not be written.", why=str(error))

    async def close(self) -> None:
        try:
            await self._readers.close()
            await asyncio.to_thread(self._writer.close)
            await self.note_progress()
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
        return await self._write(lambda tx: moves.create(tx, body, caller, idempotency_key, retry_of))

    async def record(self, session: Session, *outcomes: Outcome) -> Session:
        """Move `session` by what happened to it, and tell of it, in one transaction.

        Moved if it no longer stands where `session` says, or if its cancel was recorded meanwhile;
        DestinationHeld if it was accepted for a folder that a live session holds.
        """
        return await self._write(lambda tx: moves.advance(tx, session, outcomes))

    async def answer(self, session_id: str, body: requests.ResumeBody, caller: Caller) -> Session:
        """Take an operator's answer to the open prompt; the refusals in the order in which they are checked."""
        return await self._write(lambda tx: moves.answer(tx, session_id, body, caller))

    async def request_cancel(self, session_id: str, body: requests.CancelBody, caller: Caller) -> Session:
        """Write a cancel down before it acts; a second one joins the first."""
        return await self._write(lambda tx: moves.request_cancel(tx, session_id, body, caller))

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
        return await self._write(moves.take_stock)

    async def unfinished(self) -> list[Session]:
        """Every live session, oldest first."""
        [found] = await self._readers.all(whole(sessions.c.state.in_(LIVE)).order_by(sessions.c.session_id))
        return sessions_of(found)

    async def mark_driven(self, session_id: str) -> None:
        """The session is on the road again, after it had waited for something to pass."""
        await self._write(lambda tx: moves.write_row(tx.db, session_id, {"driven": 1}))

    async def mark_idle(self, session_id: str) -> None:
        """The session is not on the road: it belongs to a service that drives nothing."""
        await self._write(lambda tx: moves.write_row(tx.db, session_id, {"driven": 0}))

    async def mark_all_idle(self) -> None:
        """The last word of a service that stops in good order."""
        idle = update(sessions).where(sessions.c.driven == 1).values(driven=0, alone=0)
        await self._write(lambda tx: tx.db.execute(idle))

    async def note_root(self, root: Path) -> None:
        """This data root is ours from now on: if its mark is gone, it is not mounted."""
        fact = {"name": f"root:{root}", "value": events.timestamp(self._clock())}
        known = upsert(store_facts).values(fact).on_conflict_do_nothing()
        await self._write(lambda tx: tx.db.execute(known))

    async def knows_root(self, root: Path) -> bool:
        [rows] = await self._readers.all(select(store_facts).where(store_facts.c.name == f"root:{root}"))
        return bool(rows)

    async def forget_partial(self, session_id: str) -> None:
        """The partial tree of a terminal session has gone from the disk."""
        await self._write(lambda tx: moves.write_row(tx.db, session_id, {"partial_path": None}))

    # The verbs that read

    async def get(self, session_id: str) -> Session:
        [rows] = await self._readers.all(whole(sessions.c.session_id == session_id))
        if not rows:
            raise SessionNotFound
        return session_of(rows[0])

    async def search(self, query: Query) -> tuple[list[Session], str | None]:
        """One page, newest first, and the id from which the next one goes on, or None."""
        page = whole(*_conditions(query)).order_by(sessions.c.session_id.desc()).limit(query.limit + 1)
        [rows] = await self._readers.all(page)
        found = sessions_of(rows[: query.limit])
        return found, found[-1].session_id if len(rows) > query.limit else None

    async def operations(self) -> list[Session]:
        """Every live session, and those that failed within a day, oldest first."""
        recent = events.timestamp(self._clock() - FAILED_SHOWN)
        failed = and_(sessions.c.state == State.FAILED, sessions.c.ended_at >= recent)
        [rows] = await self._readers.all(
            whole(or_(sessions.c.state.in_(LIVE), failed)).order_by(sessions.c.session_id)
        )
        return sessions_of(rows)

    async def counts(self) -> dict[str, int]:
        """How many sessions stand in each state, and how many left a partial tree."""
        number = func.count().label("number")
        by_state = select(sessions.c.state, number).group_by(sessions.c.state)
        partial = select(literal("partial"), number).where(sessions.c.partial_path.is_not(None))
        blocked = select(literal("blocked"), number).where(
            sessions.c.state.in_(LIVE), sessions.c.blocked_on.is_not(None)
        )
        [rows] = await self._readers.all(by_state.union_all(partial, blocked))
        return {row.state: row.number for row in rows}

    async def partials(self, *, ended_before: str) -> list[Session]:
        """Terminal sessions whose partial tree has been kept since before `ended_before`."""
        old = and_(sessions.c.partial_path.is_not(None), sessions.c.ended_at < ended_before)
        [rows] = await self._readers.all(whole(old))
        return sessions_of(rows)

    async def known(self, session_ids: Sequence[str]) -> dict[str, Session]:
        [rows] = await self._readers.all(whole(sessions.c.session_id.in_(session_ids)))
        return {session.session_id: session for session in sessions_of(rows)}

    async def held(self) -> frozenset[str]:
        """The destination keys of all live sessions."""
        row = sessions.c
        keys = select(row.destination_key).where(row.state.in_(LIVE), row.destination_key.is_not(None))
        [rows] = await self._readers.all(keys)
        return frozenset(key for (key,) in rows)

    async def holder(self, session_id: str, destination_key: str, project_key: str) -> str | None:
        """The other live session that holds this destination, its project, or a folder below it."""
        [rows] = await self._readers.all(holders(session_id, destination_key, project_key))
        return str(rows[0][0]) if rows else None

    async def manifest(self, session_id: str) -> str:
        """The digest of what the session's tree held when it was last sealed."""
        own = select(snapshots.c.manifest).where(snapshots.c.session_id == session_id)
        [rows] = await self._readers.all(own.order_by(snapshots.c.ordinal.desc()).limit(1))
        return str(rows[0].manifest)

    async def plugin_runs(self, session_id: str) -> list[PluginRun]:
        """What became of the session's plugins that are through, in the order in which they ran."""
        own = select(plugin_runs).where(plugin_runs.c.session_id == session_id)
        [rows] = await self._readers.all(own.order_by(plugin_runs.c.ordinal))
        return [plugin_run_of(row) for row in rows]

    async def answered(self, session_id: str) -> list[AnsweredPrompt]:
        """The questions of the session that were answered, in the order in which they were asked."""
        own = and_(prompts.c.session_id == session_id, prompts.c.status == "answered")
        [rows] = await self._readers.all(
            select(prompts).where(own).order_by(prompts.c.asked_at, prompts.c.answered_at)
        )
        return [answered_prompt_of(row) for row in rows]

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
        return [frame_of(row) for row in rows]

    async def feed_after(self, position: int, limit: int) -> list[Frame]:
        """At most `limit` frames of all sessions after `position`, in commit order."""
        table = database.events.c
        [rows] = await self._readers.all(
            _FRAMES.where(table.position > position).order_by(table.position).limit(limit)
        )
        return [frame_of(row) for row in rows]

    async def settled_prompts(self, session_id: str) -> frozenset[str]:
        """The prompts of the session that wait for no answer any more."""
        settled = and_(prompts.c.session_id == session_id, prompts.c.status != "open")
        [rows] = await self._readers.all(select(prompts.c.prompt_id).where(settled))
        return frozenset(row[0] for row in rows)

    async def log_after(self, session_id: str, after: int, limit: int) -> list[LogLine]:
        own = and_(log_lines.c.session_id == session_id, log_lines.c.line > after)
        [rows] = await self._readers.all(select(log_lines).where(own).order_by(log_lines.c.line).limit(limit))
        return [LogLine(**columns(row, "line at source level text")) for row in rows]

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

    async def _write(self, unit: Callable[[Transaction], T]) -> T:
        """Run `unit` in the writer; when its group is on disk, make its frames known, in commit order."""

        def run(db: Connection) -> tuple[T, list[Frame]]:
            tx = Transaction(db, events.timestamp(self._clock()))
            return unit(tx), tx.frames

        def committed(result: tuple[T, list[Frame]]) -> None:
            if result[1]:
                self._loop.call_soon_threadsafe(self._publish, result[1])

        return (await self._writer.write(run, committed))[0]

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


_FRAMES = select(
    database.events.c.position,
    database.events.c.session_id,
    database.events.c.seq,
    database.events.c.kind,
    database.events.c.frame,
)


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
