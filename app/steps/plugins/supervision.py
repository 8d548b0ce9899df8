"""Watching over a plugin, from the start of its process until nothing of it is left; not on Windows.

Promises that the plugin's process is confined before it runs anything foreign, that what it sends and
prints is passed on within bounds and in order, that limits end it, and that when its end is told
nothing that it started runs: by namespace, or by descent where there is none.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from app.steps import child, confinement
from app.steps.plugins import hooks

assert sys.platform != "win32"

MOST_PROCESSES = 64
FILE_MB = 512
HANDLES = 256
_MOST_THREADS = 512
_MOST_TASKS = 640  # what the kernel refuses at once; the two above are noticed
_NICE = 5
_WATCH_SECONDS = 0.05
_DYING_SECONDS = 1.0
_MOST_FRAMES = 5000
_MOST_BYTES = 4 * hooks.LARGEST_FRAME
_KEPT_OUTPUT = 32 * 1024
_CHUNK = 1 << 16
_LEFT_IN_A_PIPE = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MB = 1024 * 1024

_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt")
_HARMLESS = (
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/fonts"),
    *("/etc/hosts", "/etc/timezone", "/etc/gitconfig", "/etc/alternatives"),
    *("/etc/mime.types", "/etc/services", "/etc/protocols", "/proc/cpuinfo", "/proc/meminfo"),
    *("/sys/devices/system/cpu",),
)
_FOR_NETWORK = ("/etc/resolv.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/ssl", "/etc/pki")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

Task = dict[str, Any]


class Frames:
    """What the plugin sends, as far as it is whole and within limits; `broken` says what is not."""

    def __init__(self) -> None:
        self.broken = ""
        self._rest = bytearray()
        self._frames = 0
        self._bytes = 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        self._rest += data
        self._bytes += len(data)
        while not self.broken and (frame := self._next()) is not None:
            self._frames += 1
            yield frame
        if self._frames > _MOST_FRAMES or self._bytes > _MOST_BYTES:
            self.broken = self.broken or "it sent more than a plugin has to say"

    def end(self) -> None:
        if self._rest and not self.broken:
            self.broken = "its last message is not whole"

    def _next(self) -> bytes | None:
        if len(self._rest) < 4:
            return None
        size = int.from_bytes(self._rest[:4], "big")
        if size > hooks.LARGEST_FRAME:
            self.broken = "it sent what is no message, or too large a one"
            return None
        if len(self._rest) < 4 + size:
            return None
        frame = bytes(self._rest[4 : 4 + size])
        del self._rest[: 4 + size]
        return frame


class Printed:
    """The beginning and the end of what is printed."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._tail = bytearray()
        self._all = 0

    def feed(self, data: bytes) -> None:
        self._all += len(data)
        room = _KEPT_OUTPUT - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        del self._tail[:-_KEPT_OUTPUT]

    def report(self) -> dict[str, object]:
        omitted = self._all - len(self._head) - len(self._tail)
        head, tail = (self._head, self._tail) if omitted else (self._head + self._tail, b"")
        return {
            "kind": "printed",
            "head": head.decode(errors="replace"),
            "tail": tail.decode(errors="replace"),
            "omitted": omitted,
        }


@dataclass(frozen=True)
class Seen:
    """A process, as /proc shows it."""

    pid: int
    parent: int
    threads: int
    resident: int


class Supervision:
    """One task, from the start of the plugin's process until nothing of it is left.

    Between the two stands the keeper. In a namespace it is the first process, whose end the kernel
    makes the end of all others; everywhere it reaps them and tells how the plugin's own process ended.
    """

    def __init__(self, channel: child.Channel, task: Task, ground: confinement.Ground) -> None:
        self._channel = channel
        self._task = task
        self._ground = ground
        self._frames = Frames()
        self._printed = Printed()
        self._status = b""
        self._verdict = ""
        self._peak = 0
        self._keeper = 0

    def run(self) -> None:
        try:
            self._pipes = (os.pipe(), os.pipe(), os.pipe())
            confinement.separate(self._ground, network=self._task["network"])
            self._keeper = os.fork()
        except (confinement.Refused, OSError) as error:
            self._tell({"kind": "refused", "reason": str(error)})
            return
        if self._keeper == 0:
            self._keep()
        for _, written in self._pipes:
            os.close(written)
        try:
            self._pump()
        finally:
            self._end_all()
        self._drain()
        self._tell_the_end()

    def _pump(self) -> None:
        """Pass on and look after it, until it has ended or must."""
        frames, output, status = (read for read, _ in self._pipes)
        poll = select.poll()
        for each in (self._channel.jobs, frames, output, status):
            poll.register(each, select.POLLIN)
        now = time.monotonic()
        deadline, look_at = now + self._task["seconds"], now
        while not self._verdict:
            pause = max(0.0, min(deadline, look_at) - now)
            for ready, _ in poll.poll(pause * 1000 + 1):
                if ready == self._channel.jobs:
                    self._verdict = "let go"
                elif not (data := os.read(ready, _CHUNK)):
                    poll.unregister(ready)
                    if ready == status:
                        return
                else:
                    self._take(ready, data)
            now = time.monotonic()
            if now >= look_at:
                self._look()
                # Looking at much takes long, which must not keep a processor from those that work.
                took = time.monotonic() - now
                look_at = now + took + max(_WATCH_SECONDS, 2 * took)
            if now >= deadline:
                self._verdict = self._verdict or "timeout"

    def _take(self, pipe: int, data: bytes) -> None:
        frames, output, _ = (read for read, _ in self._pipes)
        if pipe == frames:
            for frame in self._frames.feed(data):
                self._channel.send(child.TOLD + b"p" + frame)
            self._verdict = "protocol" if self._frames.broken else self._verdict
        elif pipe == output:
            self._printed.feed(data)
        else:
            self._status += data

    def _look(self) -> None:
        """Count what has come of the plugin, in processes, threads and memory."""
        if sys.platform != "linux" or b"started" not in self._status:
            return
        family = self._family()
        proc = self._proc()
        # What forks share counts for each of them. The exact figures wait for locks that a plugin can hold.
        memory = sum(each.resident for each in family) + _kept_in_files(proc, family)
        self._peak = max(self._peak, memory)
        if len(family) > MOST_PROCESSES:
            self._verdict = "processes"
        elif sum(each.threads for each in family) > _MOST_THREADS:
            self._verdict = "threads"
        elif memory > self._task["memory_mb"] * _MB:
            self._verdict = "memory"

    def _proc(self) -> str:
        """Where the plugin's processes are seen, by the numbers that they have there."""
        return f"/proc/{self._keeper}/root/proc" if self._ground.mounts else "/proc"

    def _family(self) -> list[Seen]:
        """The plugin's process and all that it started, the keeper left out."""
        if self._ground.mounts:
            return [each for each in _seen(self._proc()) if each.pid != 1]
        return [each for each in _descendants(os.getpid()) if each.pid != self._keeper]

    def _end_all(self) -> None:
        """Return when nothing of the plugin runs. A namespace has ended when its first process has."""
        if self._ground.processes:
            os.kill(self._keeper, signal.SIGKILL)
            self._count(os.wait4(self._keeper, 0)[2].ru_maxrss)
            return
        deadline = time.monotonic() + _DYING_SECONDS
        while self._kill_what_is_left() and time.monotonic() < deadline:
            time.sleep(0.002)

    def _kill_what_is_left(self) -> bool:
        """Orphans become children of this process, so it can reap them all; True while it cannot yet."""
        if sys.platform == "linux":
            for each in _descendants(os.getpid()):
                _signal(os.kill, each.pid)
        else:
            _signal(os.kill, self._keeper)
            if started := _said(self._status, b"started"):
                _signal(os.killpg, int(started))
        try:
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                self._count(ended[2].ru_maxrss)
        except ChildProcessError:
            return False
        return True

    def _count(self, most: int) -> None:
        self._peak = max(self._peak, most * (1024 if sys.platform == "linux" else 1))

    def _drain(self) -> None:
        """Take what still lies in the pipes; not for ever, where somebody may have got away with an end of one."""
        for read, _ in self._pipes:
            os.set_blocking(read, False)
            for _ in range(_LEFT_IN_A_PIPE // _CHUNK):
                try:
                    data = os.read(read, _CHUNK)
                except BlockingIOError:
                    break
                self._take(read, data)
        self._frames.end()

    def _tell_the_end(self) -> None:
        if refused := _said(self._status, b"refused"):
            self._tell({"kind": "refused", "reason": refused})
        if self._frames.broken:
            self._verdict = self._verdict or "protocol"
        self._tell(self._printed.report())
        self._tell(
            {
                "kind": "ended",
                "verdict": self._verdict,
                "reason": self._frames.broken,
                "exit_code": int(_said(self._status, b"ended") or -signal.SIGKILL),
                "peak_memory_mb": -(-self._peak // _MB),
            }
        )

    def _tell(self, report: dict[str, object]) -> None:
        self._channel.send(child.TOLD + b"s" + json.dumps(report).encode())

    def _keep(self) -> NoReturn:
        """The life of the keeper."""
        status = self._pipes[2][1]
        try:
            for read, _ in self._pipes:
                os.close(read)
            child.die_with(os.getppid())
            if _abandoned(status):
                os._exit(1)
            own = self._own_mounts()
            plugin = os.fork()
            if plugin == 0:
                self._become_the_plugin(own)
            os.write(status, b"started %d\n" % plugin)
            while (ended := os.wait())[0] != plugin:
                continue
            os.write(status, b"ended %d\n" % os.waitstatus_to_exitcode(ended[1]))
        except confinement.Refused as error:
            os.write(status, b"refused %s\n" % str(error).encode())
        except BaseException:  # noqa: BLE001 - a fork must not return into what its parent does
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(0)

    def _own_mounts(self) -> tuple[Path, ...]:
        if not self._ground.mounts:
            return ()
        copied = (Path("/etc/resolv.conf"),) if self._task["network"] else ()  # a link into /run
        # One mount for tree and scratch, so that files can be renamed from one to the other.
        attempt = Path(os.path.commonpath((self._task["tree"], self._task["scratch"])))
        needed = (Path(self._task["folder"]), *confinement.python_places())
        own = confinement.own_mounts(attempt, needed, copied)
        confinement.number_up_to(_MOST_TASKS)
        return own

    def _become_the_plugin(self, own: tuple[Path, ...]) -> NoReturn:
        """Give up all that the plugin must not have, and let it run."""
        (_, frames), (_, output), (_, status) = self._pipes
        try:
            os.setsid()
            os.nice(_NICE)
            child.die_with(os.getppid())
            os.dup2(output, 1)
            os.dup2(output, 2)
            hooks.put_in_place(self._task)
            self._confine(own)
            os.closerange(3, frames)
            os.closerange(frames + 1, 1 << 16)
            hooks.perform(self._task, hooks.Telling(frames))
        except confinement.Refused as error:
            os.write(status, b"refused %s\n" % str(error).encode())
        except BaseException:  # noqa: BLE001 - a fork must not return into what its parent does
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def _confine(self, own: tuple[Path, ...]) -> None:
        task = self._task
        confinement.limit(
            confinement.Limits(
                # What the interpreter has mapped already, most of it shared, is not the plugin's doing.
                memory_mb=task["memory_mb"] + confinement.occupied_mb(),
                file_mb=FILE_MB,
                # Counted by process: its threads on several processors use up the time that much faster.
                cpu_seconds=task["seconds"] * (os.cpu_count() or 1) + 1,
                handles=HANDLES,
                tasks=_MOST_TASKS if self._ground.users else None,
            )
        )
        confinement.renounce()
        harmless = (*_HARMLESS, *(_FOR_NETWORK if task["network"] else ()))
        confinement.enclose(
            readable=map(Path, harmless),
            runnable=(Path(task["folder"]).parent, *map(Path, _PROGRAMS), *confinement.python_places()),
            workable=(Path(task["tree"]), Path(task["scratch"]), *own),
            devices=map(Path, _DEVICES),
            network=task["network"],
        )


def _abandoned(pipe: int) -> bool:
    """Whether nobody is left to read from `pipe`."""
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def _said(status: bytes, word: bytes) -> str:
    for line in status.splitlines():
        if line.startswith(word + b" "):
            return line[len(word) + 1 :].decode()
    return ""


def _signal(send: Any, whom: int) -> None:
    try:
        send(whom, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS answers EPERM for zombies
        return


def _seen(proc: str) -> Iterator[Seen]:
    """The processes that run; zombies do not."""
    try:
        names = os.listdir(proc)
    except (FileNotFoundError, ProcessLookupError):
        return
    for name in names:
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/stat", "rb") as file:
                words = file.read().rpartition(b")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0] not in (b"Z", b"X"):
            yield Seen(int(name), int(words[1]), int(words[17]), int(words[21]) * _PAGE)


def _kept_in_files(proc: str, family: list[Seen]) -> int:
    """The bytes in the files that these processes have open in memory alone, each counted once."""
    sizes: dict[int, int] = {}
    for each in family:
        handles = f"{proc}/{each.pid}/fd"
        try:
            names = os.listdir(handles)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        for name in names:
            try:
                if os.readlink(f"{handles}/{name}").startswith("/memfd:"):
                    file = os.stat(f"{handles}/{name}")
                    sizes[file.st_ino] = file.st_blocks * 512
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
    return sum(sizes.values())


def _descendants(ancestor: int) -> list[Seen]:
    children: dict[int, list[Seen]] = {}
    for each in _seen("/proc"):
        children.setdefault(each.parent, []).append(each)
    found: list[Seen] = []
    waiting = [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += [each.pid for each in below]
    return found
