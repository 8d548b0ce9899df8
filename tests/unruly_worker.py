"""A worker module that misbehaves on request, for the tests of the plumbing."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from app.steps import confinement
from app.steps.workers import Tell, serve


def perform(task: bytes, tell: Tell) -> None:
    verb, _, argument = task.decode().partition(" ")
    if verb == "environment":
        tell(json.dumps({"environment": dict(os.environ), "cwd": os.getcwd()}).encode())
    elif verb == "print":
        print("x" * int(argument), flush=True)
        print("input:", sys.stdin.read(), "the end", flush=True)
        tell(b"printed")
    elif verb == "multiply":
        multiply(tell)
    elif verb == "exit":
        os._exit(int(argument))
    elif verb == "trespass":
        trespass(Path(argument), tell)


def multiply(tell: Tell) -> None:
    """A grandchild that hears no polite signal, and one that has let go of every pipe."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    loud = subprocess.Popen([sys.executable, "-c", stubborn])
    silent = subprocess.Popen(
        [sys.executable, "-c", stubborn],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tell(json.dumps([os.getpid(), loud.pid, silent.pid]).encode())
    while True:
        time.sleep(1000)


def trespass(allowed: Path, tell: Tell) -> None:
    """Tells of each thing that a confined process should not be able to do, whether it was."""
    confinement.enclose(readable=[], writable=[allowed])
    attempts: dict[str, Callable[[], object]] = {
        "write inside": lambda: (allowed / "inside").write_text("x"),
        "write outside": lambda: (allowed.parent / "outside").write_text("x"),
        "read outside": lambda: Path("/etc/passwd").read_text(),
        "list outside": lambda: os.listdir("/"),
        "run a program": lambda: subprocess.run(["/bin/true"], check=True),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        "signal": lambda: os.kill(os.getppid(), signal.SIGCONT),
    }
    outcomes = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            outcomes[name] = "possible"
        except OSError as error:
            outcomes[name] = type(error).__name__
    tell(json.dumps(outcomes).encode())


if __name__ == "__main__":
    serve(perform)
