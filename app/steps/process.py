"""Child processes for work that must be stoppable at any moment, whatever it does.

This module promises that a child runs in a process group of its own and is killed with all of that
group, that it does not outlive the service, that it sees nothing of the service's environment, and
that what it prints cannot fill the memory of the service. The two sides talk in frames, over pipes
that printing does not reach; the child's end of them is `child.py`. What the frames say is left to
those who use it, the limits that a child takes upon itself to `confinement.py`.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Self

from app.steps.child import frame

_LARGEST_FRAME = 64 * 1024 * 1024
_KEPT_OUTPUT = 16 * 1024
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]

# How long a killed group may take to be gone. It is over at once but for a process that hangs in the
# kernel (a dead network share), or one that left the group and holds a pipe.
_DYING_SECONDS = 5.0


async def to_its_end(work: Coroutine[object, object, None]) -> None:
    """Await `work` even while the task around it is being cancelled; the cancellation then goes on."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()


class Process:
    """One child, its process group, and the frames that go to and fro."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.pid = process.pid
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._output = b""
        self._collecting = asyncio.create_task(self._collect(process.stderr))

    @classmethod
    async def start(cls, command: tuple[str, ...]) -> Self:
        """Run `command`, with the id of this process as its last argument, in a new process group.

        Raises OSError where there is no such program, or no room for it. Linux ends the child when the
        thread that started it ends, so this must be called on a thread that lives as long as the service.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            str(os.getpid()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            cwd=os.path.abspath(os.sep),
            start_new_session=True,
        )
        return cls(process)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """As of `subprocess`: minus the number of the signal that ended it."""
        return self._process.returncode

    @property
    def output(self) -> str:
        """The end of what the group printed."""
        return self._output.decode(errors="replace").strip()

    async def send(self, payload: bytes) -> None:
        """Hand a frame to the child. That the child is gone shows in `receive`."""
        try:
            self._stdin.write(frame(payload))
            await self._stdin.drain()
        except ConnectionError:
            return

    async def receive(self) -> bytes | None:
        """The next frame, or None when no more can come."""
        try:
            size = int.from_bytes(await self._stdout.readexactly(4), "big")
            return await self._stdout.readexactly(size) if size <= _LARGEST_FRAME else None
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def kill(self, grace: float = 0.0) -> None:
        """End the whole group, and return when nothing of it runs; not even a cancellation hurries it.

        One that has things of its own to end is told by the end of its pipe, `grace` seconds before.
        """
        await to_its_end(self._kill(grace))

    async def _kill(self, grace: float) -> None:
        if grace:
            self._stdin.close()
            await _within(grace, self._drain())
        await _end_group(self.pid)
        self._stdin.close()
        leftovers = asyncio.ensure_future(self._drain())
        await asyncio.wait((leftovers, self._collecting), timeout=_DYING_SECONDS)
        for task in (leftovers, self._collecting):
            task.cancel()
        if not self.alive:
            await _group_gone(self.pid)

    async def _drain(self) -> None:
        """The pipes end when the last process of the group has let go of them."""
        while await self._stdout.read(1 << 16):
            pass
        await self._process.wait()

    async def _collect(self, stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(1 << 14):
            self._output = (self._output + chunk)[-_KEPT_OUTPUT:]


def _environment() -> dict[str, str]:
    """What a child needs to run Python, and no more: no programs to call, no home, no secrets."""
    kept = {name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ}
    return {
        "LC_ALL": "C.UTF-8",
        "HOME": os.devnull,
        "PATH": os.devnull,
        "PYTHONPATH": str(_PACKAGE_ROOT),
        **kept,
    }


async def _within(seconds: float, work: Coroutine[object, object, None]) -> None:
    """Give `work` so much time and no more."""
    task = asyncio.ensure_future(work)
    await asyncio.wait((task,), timeout=seconds)
    task.cancel()
    await asyncio.wait((task,))


async def _end_group(leader: int) -> None:
    if sys.platform == "win32":
        command = ("taskkill", "/T", "/F", "/PID", str(leader))
        await asyncio.to_thread(subprocess.run, command, capture_output=True, check=False)
        return
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


async def _group_gone(leader: int) -> None:
    """Wait for those that are still inside their last system call."""
    loop = asyncio.get_running_loop()
    deadline, pause = loop.time() + _DYING_SECONDS, 0.001
    while await asyncio.to_thread(_runs, leader) and loop.time() < deadline:
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.1)
    _reap_orphans(leader)


def _runs(leader: int) -> bool:
    """Whether something of the group runs. Zombies belong to it until somebody reaps them, maybe never."""
    if sys.platform == "win32":
        return False
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
        return False
    return sys.platform != "linux" or any(_is_alive_in(leader, entry) for entry in os.scandir("/proc"))


def _is_alive_in(group: int, process: os.DirEntry[str]) -> bool:
    if not process.name.isdigit():
        return False
    try:
        stat = Path(process.path, "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    state, _, its_group, *_ = stat.rpartition(")")[2].split()  # the name before may contain anything
    return int(its_group) == group and state not in "ZX"


def _reap_orphans(leader: int) -> None:
    """In a container this service may be process 1, whose children all orphans become."""
    if sys.platform == "win32":
        return
    try:
        while os.waitpid(-leader, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return
