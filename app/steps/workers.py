"""Worker processes that are kept warm, because starting Python and importing takes seconds.

This module promises as many workers as there are slots, each given to one task at a time, and a new one
in the place of any that was lost, stopped halfway or killed by somebody. When a task is told to have
ended, its process is gone. A worker module calls `serve` with what it does, or keeps to the same words
in its own way; tasks and what is told of them are bytes, and mean something only to the two ends.
"""

import asyncio
import gc
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import structlog

from app.errors import ShuttingDown
from app.steps.child import ENDED, READY, TOLD, Channel, apart, die_with
from app.steps.process import Process

_START_SECONDS = 60.0
_HEARING_SECONDS = 0.5

_log = structlog.get_logger(__name__)

T = TypeVar("T")
Tell = Callable[[bytes], None]
Command = Callable[[], tuple[str, ...]]


class NotStarted(Exception):
    """The worker ended, or hung, before it was ready; the message is what it printed.

    `killed`: not by itself, so that the next one may well start.
    """

    def __init__(self, message: str, *, killed: bool) -> None:
        self.killed = killed
        super().__init__(message)


class Worker:
    """One process. It is not idle from the moment it gets a task until that is over.

    One that hangs up with its task, and never tells that it has ended, is for that one task only.
    `greeting` is what it had to say of itself when it was ready.
    """

    def __init__(self, command: tuple[str, ...], process: Process, greeting: bytes) -> None:
        self.command = command
        self.process = process
        self.greeting = greeting
        self.idle = True

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> "Worker":
        """Raises OSError and NotStarted."""
        process = await Process.start(command)
        try:
            async with asyncio.timeout(_START_SECONDS):
                ready = await process.receive()
        except TimeoutError:
            await process.kill()
            message = f"{command[-1]} was not ready within {_START_SECONDS:g} seconds"
            raise NotStarted(message, killed=True) from None
        except BaseException:
            await process.kill()
            raise
        if ready is None:
            await process.kill()
            raise NotStarted(process.output, killed=(process.exit_code or 0) < 0)
        return cls(command, process, ready.removeprefix(READY))

    async def work(self, task: bytes, tell: Tell, seconds: float) -> int | None:
        """Do `task` and pass on what is told of it, for `seconds` at most: TimeoutError.

        Answers the exit code of the process that did it, as of `subprocess`; None when the worker is
        lost as well. To stop the work, kill the process.
        """
        return await _within(seconds, self._worked(task, tell))

    async def _worked(self, task: bytes, tell: Tell) -> int | None:
        self.idle = False
        await self.process.send(task)
        while (frame := await self.process.receive()) is not None:
            if frame[:1] == ENDED:
                self.idle = True
                return int(frame[1:])
            tell(frame[1:])
        return None


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; TimeoutError when it takes longer.

    Whoever stood still meanwhile hears first what was told in that time, and judges then.
    """
    working = asyncio.ensure_future(work)
    try:
        for pause in (seconds, _HEARING_SECONDS):
            done, _ = await asyncio.wait({working}, timeout=pause)
            if done:
                return working.result()
        raise TimeoutError
    finally:
        if working.cancel():
            await asyncio.wait({working})


def _running(module: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-X", "utf8", "-m", module)


class Workers:
    """A fixed number of slots; None in a slot is a worker that is to be started by whoever takes it.

    Of `count` slots no more than `warm` have a worker that waits; those are taken first. `program` is a
    module, or what answers the command line, which is then asked anew for each worker. One that has things
    of its own to end gets `grace` seconds for that.
    """

    def __init__(
        self, program: str | Command, count: int, *, warm: int | None = None, grace: float = 0.0
    ) -> None:
        self._command = partial(_running, program) if isinstance(program, str) else program
        self._count = count
        self._warm = count if warm is None else warm
        self._grace = grace
        # Those with a worker come before the empty ones.
        self._slots: asyncio.PriorityQueue[tuple[bool, int, Worker | None]] = asyncio.PriorityQueue()
        self._tickets = itertools.count()
        self._waiting = 0
        self._warming: set[asyncio.Task[Worker]] = set()
        self._closed = False
        self.greeting = b""  # of the worker that was the last to get ready
        for _ in range(count):
            self._put(None)

    def warm(self) -> None:
        """Start the workers in the background."""
        for _ in range(self._warm):
            self._slots.get_nowait()
            self._replace()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Worker]:
        """Have a worker to oneself; wait for it if none is free. Left at work, it is killed.

        Raises ShuttingDown, and OSError and NotStarted where one had to be started.
        """
        if self._closed:
            raise ShuttingDown
        worker = await self._taken()
        try:
            yield worker
        finally:
            if worker.idle and self._waiting < self._warm:
                self._put(worker)
            else:
                try:
                    await worker.process.kill(self._grace)
                finally:
                    self._replace()

    async def close(self) -> None:
        """End the workers, each as soon as the task that it still has is over or cancelled."""
        self._closed = True
        for warming in self._warming:
            warming.cancel()
        for _ in range(self._count):
            if (worker := await self._get()) is not None:
                await worker.process.kill()

    async def _get(self) -> Worker | None:
        _, _, worker = await self._slots.get()
        self._waiting -= worker is not None
        return worker

    def _put(self, worker: Worker | None) -> None:
        self._waiting += worker is not None
        self._slots.put_nowait((worker is None, next(self._tickets), worker))

    async def _taken(self) -> Worker:
        worker = await self._get()
        try:
            if worker and worker.process.alive and worker.command == self._command():
                return worker
            if worker:
                await worker.process.kill()
            return await self._started()
        except BaseException:
            self._put(None)
            raise

    async def _started(self) -> Worker:
        worker = await Worker.start(self._command())
        self.greeting = worker.greeting
        return worker

    def _replace(self) -> None:
        if self._closed or self._waiting + len(self._warming) >= self._warm:
            self._put(None)
            return
        warming = asyncio.create_task(self._started())
        self._warming.add(warming)
        warming.add_done_callback(self._fill)

    def _fill(self, warming: asyncio.Task[Worker]) -> None:
        """A worker that does not start now is tried again by the task that needs it, which tells why."""
        self._warming.discard(warming)
        failed = warming.cancelled() or warming.exception()
        if isinstance(failed, BaseException):
            _log.warning("a worker could not be started", command=self._command(), reason=str(failed))
        self._put(None if failed else warming.result())


def serve(perform: Callable[[bytes, Tell], None]) -> None:
    """The life of a worker that has imported what it needs: do each task apart until the service hangs up."""
    channel = Channel()
    die_with(int(sys.argv[1]))
    gc.freeze()
    channel.send(READY)
    while (task := channel.receive()) is not None:
        exit_code = apart(channel, partial(perform, task, lambda told: channel.send(TOLD + told)))
        channel.send(ENDED + str(exit_code).encode())
