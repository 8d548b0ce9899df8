"""What a child process gives up before it does work that comes from outside.

Resource limits on POSIX, and on Linux Landlock: no file outside the given folders, no TCP, no signal
to a process outside; and, for foreign code, namespaces from which no process escapes, and no
privileges. Everything asked for holds or `Refused` is raised: work is never done with less
confinement than was told. What the platform does not have is told, not pretended. It imports nothing
but the standard library, as it serves on foreign interpreters too.
"""

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import resource

_MB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one piece of work may use: address space, the size of a single file, processor time.

    And, where they are given: open files; processes and threads, which the system counts by user.
    """

    memory_mb: int
    file_mb: int
    cpu_seconds: int
    handles: int | None = None
    tasks: int | None = None


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
        if limits.handles is not None:
            wanted[resource.RLIMIT_NOFILE] = limits.handles
        if limits.tasks is not None:
            wanted[resource.RLIMIT_NPROC] = limits.tasks
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
    abi = landlock_abi()
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
_NO_DEVICES = _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV
_ONLY_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NEVER = _EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _IOCTL_DEV
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_PR_SET_NO_NEW_PRIVS = 38


def enclose(
    *,
    readable: Iterable[Path],
    writable: Iterable[Path] = (),
    runnable: Iterable[Path] = (),
    workable: Iterable[Path] = (),
    devices: Iterable[Path] = (),
    network: bool = False,
) -> None:
    """Leave this process only these places (and Python itself); no way back. Raises Refused.

    From what is `runnable` programs may be started too; in what is `workable` all may be done but
    making devices; `devices` may be read and written.
    """
    abi = landlock_abi()
    if not abi:
        return
    handled = _file_rights(abi)
    ruleset = _call(_CREATE_RULESET, *_ruleset(abi, handled, network=network), 0)
    look = handled & (_READ_FILE | _READ_DIR)
    for places, rights in (
        ((*readable, *python_places()), look),
        (writable, handled & ~_NEVER),
        (runnable, look | _EXECUTE),
        (workable, handled & ~_NO_DEVICES),
        (devices, handled & (_READ_FILE | _WRITE_FILE | _TRUNCATE)),
    ):
        for place in places:
            _allow(ruleset, place, rights)
    _forswear_privileges()
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _forswear_privileges() -> None:
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise Refused("no_new_privs could not be set")


def python_places() -> tuple[Path, ...]:
    """Where modules and shared libraries are loaded from, also late, and what they look up."""
    system = ("/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/etc/localtime", "/dev/null")
    own = (*sys.path, sys.prefix, sys.base_prefix, sys.exec_prefix)
    return tuple(Path(place) for place in (*system, *own) if place)


def _file_rights(abi: int) -> int:
    known = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)
    return (1 << known) - 1


def _ruleset(abi: int, handled: int, *, network: bool) -> tuple[ctypes.Array[ctypes.c_char], int]:
    fields = [handled]
    if abi >= 4:
        fields.append(0 if network else _BIND_AND_CONNECT_TCP)
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


def landlock_abi() -> int:
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
        raise Refused(f"Landlock is there but did not take the rules ({number}: {_error()})")
    return answer


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# linux/sched.h, sys/mount.h, linux/prctl.h, linux/capability.h
_NEW_MOUNTS, _NEW_IPC, _NEW_USERS = 0x00020000, 0x08000000, 0x10000000
_NEW_PROCESSES, _NEW_NETWORK = 0x20000000, 0x40000000
_NO_SETUID, _NO_DEVICE_FILES, _NO_PROGRAMS = 2, 4, 8
_INERT = _NO_SETUID | _NO_DEVICE_FILES | _NO_PROGRAMS
_BIND, _RECURSIVE, _PRIVATE = 1 << 12, 1 << 14, 1 << 18
_CHANGE_MOUNT = 442  # mount_setattr, the same on every architecture but Alpha
_HERE, _AND_BELOW, _READ_ONLY = -100, 0x8000, 1
_PR_SET_CHILD_SUBREAPER = 36
_CAPABILITY_VERSION_3 = 0x20080522

_SHARED_MEMORY = Path("/dev/shm")

# Where services of the machine and of its users keep their sockets, which Landlock does not guard.
_MEETING_PLACES = (Path("/run"), Path("/tmp"), Path("/var/tmp"))


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What namespaces a process may have on this machine: of its own for processes, users, mounts."""

    processes: bool = False
    users: bool = False
    mounts: bool = False


def surveyed() -> Ground:
    """Find out by trying, in processes that end at once."""
    if sys.platform != "linux":
        return Ground()
    for users in (True, False):
        ground = Ground(processes=True, users=users, mounts=True)
        if _succeeds(lambda: separate(ground, network=False), lambda: own_mounts(Path("/tmp"), ())):  # noqa: B023
            return ground
        if _succeeds(lambda: separate(ground, network=False), lambda: None):  # noqa: B023
            return Ground(processes=True, users=users)
    return Ground()


def _succeeds(outside: Callable[[], None], inside: Callable[[], object]) -> bool:
    """Whether both can be done, the second by a child of the process that did the first."""
    if sys.platform == "win32":
        return False
    child = os.fork()
    if child == 0:
        try:
            outside()
            grandchild = os.fork()
            if grandchild == 0:
                inside()
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) and 1)
        except (Refused, OSError):
            os._exit(1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def separate(ground: Ground, *, network: bool) -> None:
    """Have what this process starts next be the first in a namespace that ends with it. Raises Refused.

    Without `network` it sees no interface but one of its own that leads nowhere.
    """
    if sys.platform != "linux" or not ground.processes:
        return
    user, group = os.getuid(), os.getgid()
    kinds = _NEW_PROCESSES | _NEW_IPC
    kinds |= _NEW_USERS if ground.users else 0
    kinds |= 0 if network else _NEW_NETWORK
    _unshare(kinds)
    if ground.users:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")


def own_mounts(writable: Path, needed: Iterable[Path], copied: Iterable[Path] = ()) -> tuple[Path, ...]:
    """Make everything but `writable` read-only for this process, hide other processes, and the sockets of others.

    Unlike Landlock that also keeps it from changing modes, owners and times. A place that something
    `needed` lies in is not hidden; files of a hidden one may be `copied` into what is there instead.
    Answers where shared memory of its own is. Raises Refused.
    """
    copies = {file.resolve(): file.read_bytes() for file in copied if file.is_file()}
    kept = [place.resolve() for place in (writable, *needed)]
    _unshare(_NEW_MOUNTS)
    _mount(None, Path("/"), _RECURSIVE | _PRIVATE)
    _change_mount(Path("/"), deny=_READ_ONLY)
    _mount(str(writable), writable, _BIND | _RECURSIVE)
    _change_mount(writable, allow=_READ_ONLY)
    _mount("proc", Path("/proc"), _INERT)
    for place in [place for place in _MEETING_PLACES if _can_be_hidden(place, kept)]:
        _mount("tmpfs", place, _INERT, "size=1m,mode=0755")
        for file, content in copies.items():
            if file.is_relative_to(place.resolve()):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    if not _can_be_hidden(_SHARED_MEMORY, kept):
        return ()
    _mount("tmpfs", _SHARED_MEMORY, _INERT, "size=16m,mode=1777")
    return (_SHARED_MEMORY,)


def number_up_to(most: int) -> None:
    """Bound the processes and threads of a namespace by their numbers, where the kernel (6.14) has that.

    It binds root too, which no resource limit does.
    """
    try:
        Path("/proc/sys/kernel/pid_max").write_text(str(most))
    except (PermissionError, FileNotFoundError):  # the numbers of all namespaces are one thing in older ones
        return


def _can_be_hidden(place: Path, kept: Iterable[Path]) -> bool:
    return place.is_dir() and not any(each.is_relative_to(place.resolve()) for each in kept)


def adopt() -> None:
    """Become the parent of all orphans below this process. Raises Refused."""
    if sys.platform == "linux" and _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise Refused("this process could not become the parent of its orphans")


def renounce() -> None:
    """Give up all privileges, and the way to any. Raises Refused."""
    if sys.platform != "linux":
        return
    _forswear_privileges()
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    if _libc().capset(header, ctypes.create_string_buffer(24)):
        raise Refused(f"capabilities could not be given up ({_error()})")


def occupied_mb() -> int:
    """The address space that this process takes up already, rounded up; 0 where it is not limited."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return -(-pages * os.sysconf("SC_PAGE_SIZE") // _MB)


def _unshare(kinds: int) -> None:
    if _libc().unshare(kinds):
        raise Refused(f"namespaces {kinds:#x} were refused ({_error()})")


def _mount(kind: str | None, place: Path, flags: int, options: str = "") -> None:
    name = kind.encode(errors="surrogateescape") if kind else None
    words = (name, os.fsencode(place), name, ctypes.c_ulong(flags), options.encode() or None)
    if _libc().mount(*words):
        raise Refused(f"{kind or 'private'} could not be mounted at {place} ({_error()})")


def _change_mount(place: Path, *, deny: int = 0, allow: int = 0) -> None:
    """Set and clear attributes of the mount at `place` and of those below it."""
    wanted = struct.pack("=4Q", deny, allow, 0, 0)
    words = (
        ctypes.c_long(_CHANGE_MOUNT),
        ctypes.c_long(_HERE),
        os.fsencode(place),
        ctypes.c_long(_AND_BELOW),
    )
    if _libc().syscall(*words, wanted, ctypes.c_long(len(wanted))):
        raise Refused(f"mounts at {place} could not be changed ({_error()})")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise Refused(f"{path} was not taken: {error.strerror}") from error


def _error() -> str:
    return errno.errorcode.get(ctypes.get_errno(), "?")
