"""When sessions are driven: at once, after an answer, after a restart; and how they are stopped.

It promises that every live session that does not wait for its operator is being driven, each by one task,
and that a recorded cancel is brought to its end. What a step does is the pipeline's affair.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import structlog

from app.errors import Failure, StoreUnavailable
from app.sessions import requests
from app.sessions.events import timestamp
from app.sessions.lifecycle import Recovered, State
from app.sessions.moves import Moved
from app.sessions.pipeline import RETRY_SECONDS, Pipeline
from app.sessions.session import Caller, Session
from app.sessions.store import Store
from app.steps import publish

log = structlog.get_logger()

SUSPECT_DEATHS = 2
"""Unclean deaths of the service in one step of a session after which the session is driven alone."""

SWEEP_SECONDS = 3600
ASK_AGAIN_SECONDS = 1.0
VERDICT_SECONDS = 30.0

_SESSION_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

T = TypeVar("T")
P = ParamSpec("P")


class Runner:
    """The tasks of the sessions that are being driven, one each."""

    def __init__(
        self, store: Store, pipeline: Pipeline, *, keep_partial_days: float, held: bool = False
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._keep_partial = timedelta(days=keep_partial_days)
        self._driving: dict[str, asyncio.Task[None]] = {}
        self._cancelling: dict[str, asyncio.Task[Session]] = {}
        self._judging: dict[str, asyncio.Future[Session]] = {}
        self._housekeeping: set[asyncio.Task[None]] = set()
        self._alone: str | None = None
        self._alone_over = asyncio.Event()
        self._open_road = asyncio.Event()
        self._drain = asyncio.Event()
        self.held = held

    @property
    def draining(self) -> bool:
        """Whether the service is stopping and takes no new work."""
        return self._drain.is_set()

    async def start(self, root: Callable[[], Path | None]) -> None:
        """Take up every unfinished session, those first, and alone, in which the service has died twice.

        `root` tells the data root that is configured, to be swept from time to time.
        """
        if self.held:
            return
        try:
            unfinished = await self._store.take_stock()
        except StoreUnavailable as unavailable:
            log.warning("The deaths of the last service could not be counted.", why=str(unavailable))
            unfinished = await self._store.unfinished()
        self._housekeep(self._take_up(unfinished))
        self._housekeep(self._sweep_for_ever(root))

    async def admit(self, session: Session) -> Session:
        """Drive a new session; it comes back as it was committed when the gate was through with it.

        That is `rendering` or `failed`; or still `validating` when something stands in the gate's way, or when
        the store takes no verdict for long.
        """
        if self.held:
            await self._until_taken(self._store.mark_idle, session.session_id)
        if self.held or self.draining:
            return session
        judged = self._judging.setdefault(session.session_id, asyncio.get_running_loop().create_future())
        self._drive(session)
        try:
            async with asyncio.timeout(VERDICT_SECONDS):
                return await asyncio.shield(judged)
        except TimeoutError:
            return await self._as_it_stands(session)

    async def answer(self, session_id: str, body: requests.ResumeBody, caller: Caller) -> Session:
        """Take an operator's answer, and drive the session on; it comes back as it was committed.

        Who asked may go away meanwhile: what was committed is driven on all the same.
        """
        return await asyncio.shield(asyncio.ensure_future(self._take(session_id, body, caller)))

    async def _take(self, session_id: str, body: requests.ResumeBody, caller: Caller) -> Session:
        session = await self._store.answer(session_id, body, caller)
        if session.state is State.PLUGIN_PASS:
            await self._until_taken(self._pipeline.learn, session_id, body)
            if self.held:
                await self._until_taken(self._store.mark_idle, session_id)
            self.wake(session_id)
        return session

    def wake(self, session_id: str) -> None:
        """Drive a session on that its operator has answered."""
        self._housekeep(self._drive_on(session_id))

    async def cancel(self, session_id: str, body: requests.CancelBody, caller: Caller) -> Session:
        """Record the cancel, stop the session's work, and give it back aborted. A second cancel joins the first."""
        await self._store.request_cancel(session_id, body, caller)
        return await asyncio.shield(self._finish_cancel(session_id))

    async def drain(self, seconds: float) -> None:
        """Let running steps end, for `seconds` at most; what is unfinished goes on at the next start."""
        self._drain.set()
        self._open_road.set()
        running = {*self._driving.values(), *self._cancelling.values()}
        if running:
            await asyncio.wait(running, timeout=seconds)
        await _stop([*self._driving.values(), *self._cancelling.values(), *self._housekeeping])
        if self.held:
            return
        try:
            await self._store.mark_all_idle()
        except StoreUnavailable as unavailable:
            log.warning("The good order of this stop could not be noted.", why=str(unavailable))

    def _drive(self, session: Session) -> None:
        taken = session.session_id in self._driving or session.session_id in self._cancelling
        if taken or self.held or self.draining:
            return
        task = asyncio.create_task(self._run(session), name=f"drive {session.session_id}")
        self._driving[session.session_id] = task
        task.add_done_callback(lambda _: self._driving.pop(session.session_id, None))

    async def _drive_on(self, session_id: str) -> None:
        while task := self._driving.get(session_id):  # it stopped to ask, but has not ended yet
            await asyncio.wait({task})
        session = await self._until_taken(self._store.get, session_id)
        if session.cancel is None:
            self._drive(session)

    async def _run(self, session: Session) -> None:
        try:
            await self._clear_road(session)
            if self.draining:
                return
            async with aclosing(self._pipeline.drive(session)) as road:
                async for step in road:
                    self._judge(step)
                    if step.blocked_on is not None:
                        await self._wait_out(step, step.blocked_on)
                    await self._clear_road(step)
                    if self.draining:
                        return
        except Moved:
            # Somebody was quicker: a cancel, which is finished by its own task.
            log.info("The session was moved by another.", session_id=session.session_id)
        except Exception:  # the edge of the task: nobody awaits it
            log.exception("The session cannot be driven on until a restart.", session_id=session.session_id)
        finally:
            if session.session_id == self._alone:
                self._alone_over.set()
            await self._judge_at_last(session)

    async def _clear_road(self, session: Session) -> None:
        """Beyond the gate, wait for those that are driven alone."""
        if session.state not in (State.PENDING, State.VALIDATING) and session.session_id != self._alone:
            await self._open_road.wait()

    async def _wait_out(self, session: Session, blocked_on: dict[str, object]) -> None:
        """Wait until what blocks the session is looked at again. While it waits, it can end no service."""
        if session.session_id == self._alone:
            self._alone = None
            self._alone_over.set()
        until = datetime.fromisoformat(str(blocked_on["retry_at"])) - datetime.now(UTC)
        # The clock may have been put back meanwhile.
        if not await _set_within(self._drain, min(until.total_seconds(), RETRY_SECONDS[-1])):
            await self._until_taken(self._store.mark_driven, session.session_id)

    def _judge(self, session: Session) -> None:
        if session.state in (State.PENDING, State.VALIDATING) and session.blocked_on is None:
            return
        judged = self._judging.pop(session.session_id, None)
        if judged is not None and not judged.done():
            judged.set_result(session)

    async def _judge_at_last(self, session: Session) -> None:
        """Who waits for a verdict gets the session as it stands, when there is none to come."""
        judged = self._judging.pop(session.session_id, None)
        if judged is not None and not judged.done():
            judged.set_result(await self._as_it_stands(session))

    async def _as_it_stands(self, session: Session) -> Session:
        """What was committed is answered, also when the store cannot be asked how it went on."""
        try:
            return await self._store.get(session.session_id)
        except StoreUnavailable:
            return session

    async def _take_up(self, unfinished: list[Session]) -> None:
        """Suspects one by one, each marked as the only one on the road; then all the others at once."""
        working = [one for one in unfinished if one.state is not State.INPUT_REQUIRED or one.cancel]
        suspects = [session for session in working if session.step_deaths >= SUSPECT_DEATHS]
        try:
            for session in suspects:
                self._alone = session.session_id
                await self._take_up_one(session, alone=True)
                if session.session_id in self._driving:
                    await self._alone_over.wait()
                self._alone_over.clear()
        finally:
            self._alone = None
            self._open_road.set()
        others = (self._take_up_one(one, alone=False) for one in working if one not in suspects)
        await asyncio.gather(*others)

    async def _take_up_one(self, session: Session, *, alone: bool) -> None:
        if session.cancel is not None:
            self._finish_cancel(session.session_id)
            return
        # What a dead plugin has left may be what fills the disk, and keep the store from taking a word.
        await self._pipeline.clear_attempts(session)
        try:
            recovered = await self._pipeline.record(session, Recovered(alone=alone))
        except Moved:
            return  # its operator was quicker, and cancelled it
        if session.step_deaths > SUSPECT_DEATHS:
            message = f"The service died {session.step_deaths} times in this step; it is not tried again."
            await self._pipeline.fail(recovered, Failure(code="recovery_limit_exceeded", message=message))
        else:
            self._drive(recovered)

    def _finish_cancel(self, session_id: str) -> asyncio.Task[Session]:
        if session_id not in self._cancelling:
            task = asyncio.create_task(self._abort(session_id), name=f"cancel {session_id}")
            self._cancelling[session_id] = task
            task.add_done_callback(_log_failure)
            task.add_done_callback(lambda _: self._cancelling.pop(session_id, None))
        return self._cancelling[session_id]

    async def _abort(self, session_id: str) -> Session:
        driving = self._driving.get(session_id)
        before = await self._until_taken(self._store.get, session_id)
        if driving is not None:
            await _stop([driving])
        session = await self._until_taken(self._store.get, session_id)
        if session.terminal:
            return session
        return await self._pipeline.abort(session, (str(before.state),) if driving is not None else ())

    async def _until_taken(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the store until it can be asked: what is at stake here has nobody who would ask again."""
        while True:
            try:
                return await call(*args, **kwargs)
            except StoreUnavailable as unavailable:
                log.warning("The store is away; asking again.", why=str(unavailable))
                await asyncio.sleep(ASK_AGAIN_SECONDS)

    def _housekeep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._housekeeping.add(task)
        task.add_done_callback(_log_failure)
        task.add_done_callback(self._housekeeping.discard)

    async def _sweep_for_ever(self, root: Callable[[], Path | None]) -> None:
        while True:
            try:
                await self.sweep(root())
            except StoreUnavailable as unavailable:
                log.warning("The staging folder is swept later.", why=str(unavailable))
            if await _set_within(self._drain, SWEEP_SECONDS):
                return

    async def sweep(self, root: Path | None) -> None:
        """Remove partial trees that were kept long enough, and what ended sessions have left below `root`.

        A folder of a session that this store does not know may be another store's, and stays.
        """
        limit = timestamp(datetime.now(UTC) - self._keep_partial)
        for session in await self._store.partials(ended_before=limit):
            if session.local_root is not None and await _removed(session.local_root, session.session_id):
                await self._store.forget_partial(session.session_id)
        if root is None:
            return
        found = [name for name in await asyncio.to_thread(_residents, root) if _SESSION_ID.fullmatch(name)]
        for session in (await self._store.known(found)).values():
            if session.terminal:
                await _removed(root, session.session_id, but=session.partial_path)


def _residents(root: Path) -> tuple[str, ...]:
    try:
        return publish.residents(root)
    except OSError as error:
        log.warning("The staging folder cannot be read.", root=str(root), why=str(error))
        return ()


async def _removed(root: Path, session_id: str, *, but: Path | None = None) -> bool:
    """Whether nothing of the session is left in the staging folder, but for one tree; not if its root is away."""
    folder = publish.session_folder(root, session_id)
    try:
        if but is not None and but != folder:
            await asyncio.to_thread(publish.keep, folder, but)
        elif but is None:
            await asyncio.to_thread(publish.discard, folder)
    except OSError as error:
        log.warning("A folder could not be swept.", session_id=session_id, why=str(error))
        return False
    return True


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether `event` was set before the time was over."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await event.wait()
    except TimeoutError:
        return False


async def _stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until each is over, with whatever it had to put in order."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("Housekeeping failed.", exc_info=error)
