"""The child's end of a process that the service has started: its frames, and its own end.

Promises that what is printed reaches neither tasks nor frames, that the process does not outlive the
service, and that a piece of work can be done apart and leave nothing behind. It imports nothing but
the standard library, and little of that: a child must be ready soon, also on a foreign interpreter.
The service's end is `process.py`.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

# What a worker says of itself: that it is ready, something about its task, how that ended.
READY, TOLD, ENDED = b"r", b"t", b"e"


def frame(payload: bytes) -> bytes:
    """A payload as it goes through a pipe: its length in four bytes before it."""
    return len(payload).to_bytes(4, "big") + payload


class Channel:
    """The child's end: it takes over standard input and output, so that printing reaches neither."""

    def __init__(self) -> None:
        self.jobs = os.dup(0)
        self._frames = os.dup(1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

    def send(self, payload: bytes) -> None:
        rest = memoryview(frame(payload))
        while rest:
            rest = rest[os.write(self._frames, rest) :]

    def lend(self) -> int:
        """The pipe itself, to whom writes whole frames to it."""
        return self._frames

    def hang_up(self) -> None:
        """No further frame will come; tasks are still heard, and their end."""
        os.close(self._frames)

    def receive(self) -> bytes | None:
        """The next frame, or None when the service has hung up."""
        head = self._read(4)
        return None if head is None else self._read(int.from_bytes(head, "big"))

    def _read(self, size: int) -> bytes | None:
        """Unbuffered: nothing may be read ahead of what `select` is asked about."""
        data = b""
        while len(data) < size:
            chunk = os.read(self.jobs, size - len(data))
            if not chunk:
                return None
            data += chunk
        return data


def die_with(parent: int) -> None:
    """Have the system end this process when `parent`, which started it, ends in whatever way.

    In a process-id namespace of its own a process sees a parent outside as 0.

    macOS has nothing of the kind; there the end of the pipe tells (see `apart`, `Channel.receive`).
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the parent-death signal was refused")
        if os.getppid() not in (parent, 0):  # it died before the signal was asked for
            os._exit(1)
    if sys.platform == "win32":
        threading.Thread(target=_outlive_not, args=(parent,), daemon=True).start()


def _outlive_not(parent: int) -> None:
    if sys.platform == "win32":
        synchronize, infinite = 0x00100000, 0xFFFFFFFF
        handle = ctypes.windll.kernel32.OpenProcess(synchronize, False, parent)
        ctypes.windll.kernel32.WaitForSingleObject(handle, infinite)
        os._exit(1)


def apart(channel: Channel, work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process and answer its exit code, as `subprocess` would give it.

    A fork has everything that was imported and leaves nothing behind. No frame comes in meanwhile, so
    if there is something to read from the service, it is the end: then this group ends too. Windows
    cannot fork: there the work is done in place.
    """
    if sys.platform == "win32":
        work()
        return 0
    ended, running = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(ended)
        _run_and_exit(work, parent)
    os.close(running)
    ready, _, _ = select.select([ended, channel.jobs], [], [])
    if ended not in ready:
        os.killpg(0, signal.SIGKILL)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_and_exit(work: Callable[[], None], parent: int) -> NoReturn:
    """The edge of the forked process: nothing may return, or the fork would go on as its parent."""
    try:
        die_with(parent)
        work()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
