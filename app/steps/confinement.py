"""What a child process gives up before it does work that comes from outside.

Resource limits on POSIX, and on Linux Landlock: no file outside the given folders, no TCP, no signal
to a process outside. Everything asked for holds or `Refused` is raised: work is never done with less
confinement than `described` has told. What the platform does not have is told, not pretended.
"""

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

if sys.platform != "win32":
    import resource

_MB = 1024 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one piece of work may use: address space, the size of a single file, processor time."""

    memory_mb: int
    file_mb: int
    cpu_seconds: int


class Refused(Exception):
    """The system refused a limit that it is able to set."""


def limit(limits: Limits) -> None:
    """Bind this process, and all that it starts. Raises Refused."""
    if sys.platform != "win32":
        wanted = {
            resource.RLIMIT_FSIZE: limits.file_mb * _MB,
            resource.RLIMIT_CPU: limits.cpu_seconds,
            resource.RLIMIT_CORE: 0,
        }
        if sys.platform == "linux":  # macOS takes RLIMIT_AS and does not keep it
            wanted[resource.RLIMIT_AS] = limits.memory_mb * _MB
        for which, amount in wanted.items():
            _lower(which, amount)


def _lower(which: int, amount: int) -> None:
    if sys.platform != "win32":
        _, hard = resource.getrlimit(which)
        bound = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        try:
            resource.setrlimit(which, (bound, bound))
        except (OSError, ValueError) as error:
            raise Refused(f"resource limit {which} could not be set to {bound}: {error}") from error


def described(limits: Limits) -> dict[str, str]:
    """Which confinement holds on this machine, for people."""
    posix = sys.platform != "win32"
    abi = _landlock_abi()
    return {
        "stopped_as_a_group": "process group" if posix else "process tree",
        "ends_with_the_service": "parent-death signal" if sys.platform == "linux" else "end of its pipe",
        "memory": f"{limits.memory_mb} MB" if sys.platform == "linux" else "not limited on this platform",
        "file_size": f"{limits.file_mb} MB" if posix else "not limited on this platform",
        "cpu": f"{limits.cpu_seconds} s" if posix else "not limited on this platform",
        "files": f"Landlock {abi}" if abi else "not confined on this machine",
        "network": "no TCP" if abi >= 4 else "not confined on this machine",
        "signals": "none to other processes" if abi >= 6 else "not confined on this machine",
    }


# linux/landlock.h. The numbers of the three calls are the same on every architecture but Alpha.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_EXECUTE, _MAKE_CHAR, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _IOCTL_DEV = (
    1 << n for n in (0, 6, 9, 10, 11, 15)
)
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_ONLY_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NEVER = _EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _IOCTL_DEV
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_PR_SET_NO_NEW_PRIVS = 38


def enclose(*, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """Leave this process only these places (and Python itself); no way back. Raises Refused."""
    abi = _landlock_abi()
    if not abi:
        return
    handled = _file_rights(abi)
    ruleset = _call(_CREATE_RULESET, *_ruleset(abi, handled), 0)
    for place in (*readable, *_python()):
        _allow(ruleset, place, handled & (_READ_FILE | _READ_DIR))
    for place in writable:
        _allow(ruleset, place, handled & ~_NEVER)
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise Refused("no_new_privs could not be set")
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _python() -> tuple[Path, ...]:
    """Where modules and shared libraries are loaded from, also late, and what they look up."""
    system = ("/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/etc/localtime", "/dev/null")
    own = (*sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix)
    return tuple(Path(place) for place in (*system, *own) if place)


def _file_rights(abi: int) -> int:
    known = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    return (1 << known) - 1


def _ruleset(abi: int, handled: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
    fields = [handled]
    if abi >= 4:
        fields.append(_BIND_AND_CONNECT_TCP)
    if abi >= 6:
        fields.append(_ABSTRACT_SOCKETS_AND_SIGNALS)
    packed = struct.pack(f"={len(fields)}Q", *fields)
    return ctypes.create_string_buffer(packed, len(packed)), len(packed)


def _allow(ruleset: int, place: Path, rights: int) -> None:
    if sys.platform != "linux":
        return
    try:
        folder = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        rights = rights if place.is_dir() else rights & _ONLY_FOR_FILES
        rule = struct.pack("=Qi", rights, folder)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.create_string_buffer(rule, len(rule)), 0)
    finally:
        os.close(folder)


def _landlock_abi() -> int:
    """0 where there is no Landlock: another platform, an old kernel, switched off, or a container's filter."""
    if sys.platform != "linux":
        return 0
    question = (ctypes.c_long(_CREATE_RULESET), None, ctypes.c_long(0), ctypes.c_long(_ASK_VERSION))
    answer: int = _libc().syscall(*question)
    return max(0, answer)


def _call(number: int, *arguments: object) -> int:
    libc = _libc()
    words = (ctypes.c_long(each) if isinstance(each, int) else each for each in (number, *arguments))
    answer: int = libc.syscall(*words)
    if answer < 0:
        name = errno.errorcode.get(ctypes.get_errno(), "?")
        raise Refused(f"Landlock is there but did not take the rules ({number}: {name})")
    return answer


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
