"""The calls by which a process, or anything that it starts, changes files below a folder: seen, counted, decided on.

It promises that each call of `CALLS` waits at the door of the kernel until `decide` has said whether it happens,
fails with an error, or finds that its service has just been killed; so the n-th call is the n-th of the whole
service, threads and children included, and a death falls between two calls. It uses seccomp's user notifications
(Linux 5.9 and newer, x86-64); who may install a filter without privileges has given up new ones first. Memory that is
mapped is changed without a call, and calls that nothing here makes are not in the table. What is killed when, and what
must hold afterwards, is left to others.
"""

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

# By name: the number on x86-64, and where the arguments say which file is changed:
# "fd0" a descriptor in argument 0, "at1" a path in 1 below the folder in 0, "path0" a path in 0.
CALLS = {
    "write": (1, "fd0"),
    "pwrite64": (18, "fd0"),
    "writev": (20, "fd0"),
    "pwritev": (296, "fd0"),
    "pwritev2": (328, "fd0"),
    "sendfile": (40, "fd0"),
    "copy_file_range": (326, "fd2"),
    "ioctl": (16, "fd0"),
    "fallocate": (285, "fd0"),
    "ftruncate": (77, "fd0"),
    "truncate": (76, "path0"),
    "fsync": (74, "fd0"),
    "fdatasync": (75, "fd0"),
    "openat": (257, "at0"),
    "mkdir": (83, "path0"),
    "mkdirat": (258, "at0"),
    "mknod": (133, "path0"),
    "mknodat": (259, "at0"),
    "rmdir": (84, "path0"),
    "unlink": (87, "path0"),
    "unlinkat": (263, "at0"),
    "rename": (82, "path1"),
    "renameat": (264, "at2"),
    "renameat2": (316, "at2"),
    "link": (86, "path1"),
    "linkat": (265, "at2"),
    "symlink": (88, "path1"),
    "symlinkat": (266, "at1"),
    "chmod": (90, "path0"),
    "fchmod": (91, "fd0"),
    "fchmodat": (268, "at0"),
    "chown": (92, "path0"),
    "fchown": (93, "fd0"),
    "lchown": (94, "path0"),
    "fchownat": (260, "at0"),
    "utimensat": (280, "at0"),
    "setxattr": (188, "path0"),
    "lsetxattr": (189, "path0"),
    "fsetxattr": (190, "fd0"),
    "removexattr": (197, "path0"),
    "lremovexattr": (198, "path0"),
    "fremovexattr": (199, "fd0"),
}
_NAMES = {number: name for name, (number, _) in CALLS.items()}

_FICLONE = 0x40049409
_MAKING = os.O_CREAT | os.O_TRUNC
_AT_FDCWD = -100

_SECCOMP = 317
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE = 1, 1 << 3, 1 << 5
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_GO_ON = 1
_JOIN_SECONDS = 30.0
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000

Verdict = Literal["go on", "die"] | int
"""What becomes of a call: it happens, its service is killed before it does, or it fails with an errno."""


class Call(NamedTuple):
    """A call that is about to change `path`, which is relative to the folder."""

    name: str
    path: str
    own: bool  # by the service itself, not by a child of it


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("yes", ctypes.c_ubyte),
        ("no", ctypes.c_ubyte),
        ("k", ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def install() -> int:
    """From now on the calls of this process, and of all that it starts, are asked about on the descriptor returned."""
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_no_new_privs = 38
    if os.geteuid() != 0 and libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    instructions = (_Instruction * len(_FILTER))(*(_Instruction(*each) for each in _FILTER))
    program = _Program(len(_FILTER), instructions)
    flags = _NEW_LISTENER | _WAIT_KILLABLE
    listener: int = libc.syscall(_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "the filter was refused")
    return listener


def _filter() -> Iterator[tuple[int, int, int, int]]:
    """Ask about the calls that change files; about opening only where it makes or empties one."""
    plain = [number for name, (number, _) in CALLS.items() if name not in ("openat", "ioctl")]
    yield _LOAD, 0, 0, 0
    for done, number in enumerate(plain):
        yield _EQUAL, len(plain) - done + 7, 0, number
    yield _EQUAL, 2, 0, CALLS["openat"][0]
    yield _EQUAL, 3, 0, CALLS["ioctl"][0]
    yield _RETURN, 0, 0, _ALLOW
    yield _LOAD, 0, 0, 16 + 8 * 2
    yield _ANY_BIT, 3, 2, _MAKING
    yield _LOAD, 0, 0, 16 + 8 * 1
    yield _EQUAL, 1, 0, _FICLONE
    yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _ASK


_FILTER = tuple(_filter())


class Knife:
    """Decides on the calls of one service, in a thread of its own, until the last of its processes is gone."""

    def __init__(self, listener: int, service: int, folder: Path, decide: Callable[[Call], Verdict]) -> None:
        self._listener = listener
        self._service = service
        self._folder = os.path.realpath(folder) + "/"
        self._decide = decide
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """When nobody is left to ask. Raises what went wrong in deciding, and TimeoutError if somebody stays."""
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"something that service {self._service} has started outlives it")
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        try:
            while poll.poll()[0][1] & select.POLLIN:
                self._hear()
        except BaseException as error:  # noqa: BLE001 - the edge of the thread; `join` raises it
            self.error = error
            os.kill(self._service, signal.SIGKILL)
        finally:
            os.close(self._listener)

    def _hear(self) -> None:
        heard = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, heard)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # who asked has died
            raise
        cookie, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(heard)
        path = self._changed(thread, number, arguments)
        verdict: Verdict = "go on"
        if path is not None:
            verdict = self._decide(Call(_NAMES[number], path, self._is_own(thread)))
        if verdict == "die":
            os.kill(self._service, signal.SIGKILL)
            if self._is_own(thread):
                return
            verdict = "go on"
        failing = -verdict if isinstance(verdict, int) else 0
        try:
            answer = _ANSWER.pack(cookie, 0, failing, 0 if failing else _GO_ON)
            fcntl.ioctl(self._listener, _SEND, bytearray(answer))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def _is_own(self, thread: int) -> bool:
        return os.path.exists(f"/proc/{self._service}/task/{thread}")

    def _changed(self, thread: int, number: int, arguments: list[int]) -> str | None:
        """The path below the folder that a call changes; None where it changes nothing there."""
        where = CALLS[_NAMES[number]][1]
        kind, place = where[:-1], int(where[-1])
        try:
            if kind == "fd":
                path = os.readlink(f"/proc/{thread}/fd/{arguments[place]}")
            else:
                path = _path(thread, arguments, place, at=kind == "at")
        except OSError:
            return None  # it is gone, or the call is going to fail
        path = os.path.normpath(path)
        return path.removeprefix(self._folder) if path.startswith(self._folder) else None


def _path(thread: int, arguments: list[int], place: int, *, at: bool) -> str:
    folder = f"/proc/{thread}/cwd"
    if at:
        given = ctypes.c_int(arguments[place] & 0xFFFFFFFF).value
        folder = folder if given == _AT_FDCWD else f"/proc/{thread}/fd/{given}"
        place += 1
    with open(f"/proc/{thread}/mem", "rb", 0) as memory:
        memory.seek(arguments[place])
        name = os.fsdecode(memory.read(4096).partition(b"\0")[0])
    return name if name.startswith("/") else os.path.join(os.readlink(folder), name)
