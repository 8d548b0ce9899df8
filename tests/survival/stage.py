"""Real services that start in a tenth of the time: forked from a process that has imported everything, under the knife.

It promises that what is forked is the service as the command line starts it, with its own workers, log and exit
status; only the import is shared. A `Stage` stands on a checkout, which need not be this one, so that a changed
copy of the product can be put on it. It ends, and all services on it, with the process that made it.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import httpx

from tests.survival.knife import Call, Knife, Verdict, install

ROOT = Path(__file__).parents[2]
START_SECONDS = 60.0
_LOADED_LATE = (
    "app.main",
    "litestar.plugins.pydantic",
    "uvicorn.protocols.http.auto",
    "uvicorn.lifespan.off",
)
"""What a service loads when it is told to serve, which takes longer than all else it does until it is ready."""


class Life:
    """One service from its start to its end."""

    def __init__(self, line: socket.socket, output: int, pid: int, log: Path, begun: int) -> None:
        self.pid = pid
        self._log, self._begun = log, begun
        self._line = line
        self._output = os.fdopen(output)
        self._status: int | None = None
        self.knife: Knife | None = None
        self.url = ""

    def await_ready(self) -> bool:
        """Whether it came as far as its ready line. Raises TimeoutError when it neither came so far nor ended."""
        if not self.url:
            if not select.select([self._output], [], [], START_SECONDS)[0]:
                raise TimeoutError(f"the service is neither ready nor ended after {START_SECONDS:g} s")
            self.url = (self._output.readline().split() or [""])[-1]
        return bool(self.url)

    def said(self) -> str:
        """What it has logged."""
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(self._begun)
            return log.read()

    def http(self, timeout: float = START_SECONDS) -> httpx.Client:
        return httpx.Client(base_url=f"{self.url}/api/v1", timeout=timeout)

    @property
    def alive(self) -> bool:
        if self._status is not None:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> int:
        """SIGKILL, and what its exit status says."""
        self.signal(signal.SIGKILL)
        return self.end()

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.end()

    def signal(self, number: int) -> None:
        if self._status is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def end(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        if self._status is None:
            self._line.settimeout(START_SECONDS)
            self._status = int(self._line.makefile().readline())
            self._line.close()
            self._output.close()
        if self.knife is not None:
            self.knife.join()
        return self._status


class Stage:
    """Where services are started from one checkout."""

    def __init__(self, root: Path = ROOT) -> None:
        ours, theirs = socket.socketpair()
        self._control = ours
        self._asking = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.survival.stage", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        theirs.close()

    def start(
        self,
        config: Path,
        *options: str,
        decide: Callable[[Call], Verdict] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Life:
        """A service on `config`, whose changes below the config's folder are decided on; its log beside that folder."""
        folder = config.parent
        line, far = socket.socketpair()
        output, printing = os.pipe()
        logged = Path(f"{folder}.log")
        with logged.open("ab") as log:
            begun = log.tell()
            asked = {"config": str(config), "options": options, "environment": dict(environment)}
            with self._asking:
                socket.send_fds(
                    self._control,
                    [json.dumps(asked | {"cut": decide is not None}).encode()],
                    [far.fileno(), printing, log.fileno()],
                )
                self._control.recv(1)
        far.close()
        os.close(printing)
        told, handed, _, _ = socket.recv_fds(line, 64, 1)
        life = Life(line, output, int(told), logged, begun)
        if decide is not None:
            life.knife = Knife(handed[0], life.pid, folder, decide)
        line.send(b"!")
        return life

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@contextmanager
def staged(root: Path = ROOT) -> Iterator[Stage]:
    stage = Stage(root)
    try:
        yield stage
    finally:
        stage.close()


# The process that forks


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def main(control: socket.socket) -> None:
    _die_with_parent()
    for module in _LOADED_LATE:
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 65536, 3)
        if not asked:
            return
        if os.fork() == 0:
            control.close()
            _mind(json.loads(asked), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        control.send(b"!")


def _mind(asked: dict[str, Any], line: int, output: int, log: int) -> NoReturn:
    """Fork the service, and tell its exit status when it has one."""
    _die_with_parent()
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    telling = socket.socket(fileno=line)
    service = os.fork()
    if service == 0:
        _die_with_parent()
        _serve(asked, telling, output, log)
    os.close(output)
    _, status = os.waitpid(service, 0)
    telling.send(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _serve(asked: dict[str, Any], line: socket.socket, output: int, log: int) -> NoReturn:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(log, 2)
        os.close(output)
        os.close(log)
        os.environ.update(asked["environment"])
        handed = [install()] if asked["cut"] else []
        socket.send_fds(line, [str(os.getpid()).encode()], handed)
        for descriptor in handed:
            os.close(descriptor)
        line.recv(1)
        line.close()
        status = _told(asked)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _told(asked: dict[str, Any]) -> int:
    from app.cli import main as command

    try:
        command(["serve", "--config", asked["config"], "--port", "0", *asked["options"]], "exlab-sessions")
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    return 0


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
