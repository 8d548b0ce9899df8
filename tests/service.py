"""A real service in a process of its own, for tests: started, talked to, killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).parent.parent
PATIENCE = 60.0
"""Seconds that a condition may take on a slow machine before a test fails."""

T = TypeVar("T")


def eventually(look: Callable[[], T | None], *, within: float = PATIENCE) -> T:
    """The first true thing that `look` gives, asked for again until the time is over."""
    deadline = time.monotonic() + within
    while not (found := look()):
        assert time.monotonic() < deadline, f"it did not come to pass within {within} s"
        time.sleep(0.02)
    return found


class Service:
    """One process of the service, in a process group of its own with whatever traces it."""

    def __init__(
        self,
        config: Path,
        *options: str,
        tracer: tuple[str, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        command = [*tracer, sys.executable, "-m", "app.cli", "serve", "--config", str(config), "--port", "0"]
        self.errors = config.parent / "service.log"
        with self.errors.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                start_new_session=True,
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.url = words[-1] if words else ""

    @property
    def ready(self) -> bool:
        """Whether it came as far as its ready line."""
        return bool(self.url)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=f"{self.url}/api/v1", timeout=PATIENCE)

    def kill(self) -> None:
        """SIGKILL to the service, and to the tracer in front of it."""
        if self.alive:
            os.killpg(self.process.pid, signal.SIGKILL)
        self._reap()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        self._reap()
        return self.process.returncode

    def _reap(self) -> None:
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def running(config: Path, *options: str) -> Iterator[Service]:
    service = Service(config, *options)
    try:
        assert service.ready, service.errors.read_text()
        yield service
    finally:
        service.kill()


def body(lab: Path, example: str, **changes: Any) -> dict[str, Any]:
    """A body that the demo laboratory in `lab` accepts."""
    asked: dict[str, Any] = json.loads((lab / "examples" / f"{example}.json").read_text())
    return asked | changes


def template(lab: Path, name: str, files: dict[str, str], **manifest: object) -> str:
    """A template for runs of every kind in `lab`; JSON is YAML, too."""
    told = {"_exlab_type": "run", "_exlab_version": "1.0", "_exlab_run_scope": "both"} | manifest
    folder = lab / "templates" / name
    folder.mkdir()
    for path, text in {"copier.yml": json.dumps(told), **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return name


def bare_run(template_path: str, **changes: Any) -> dict[str, Any]:
    """A run with a template that asks for nothing."""
    told = {
        "kind": "run",
        "equipment_id": "CONFOCAL_01",
        "project_short_id": "PROJ-1",
        "template_path": template_path,
        "run_kind": "experimental",
        "label": "A run",
        "operator": "asmith",
        "objective": "See what becomes of it",
    }
    return told | changes


def ended(http: httpx.Client, session_id: str) -> dict[str, Any]:
    """The handle of a session once it is terminal."""

    def terminal() -> dict[str, Any] | None:
        handle: dict[str, Any] = http.get(f"/sessions/{session_id}").json()
        return handle if handle["state"] in ("done", "failed", "aborted") else None

    return eventually(terminal)


def plugin(lab: Path, name: str, code: str, **manifest: object) -> str:
    """A plugin in `lab` whose class body is `code`; it sees every text file unless the manifest says otherwise."""
    told = {"name": name, "version": "1.0", "supported_extensions": [".txt"], "api_version": "1"} | manifest
    folder = lab / "plugins" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.yml").write_text(json.dumps(told))
    head = "import os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
    api = "from exlab_sessions.plugins import FileChange, PluginContext, PluginError, PluginInputRequired\n"
    base = "from exlab_sessions.plugins import Plugin as Base\n\n\nclass Plugin(Base):\n"
    yes = "    def can_handle(self, file_path, variables):\n        return True\n\n"
    (folder / "__init__.py").write_text(
        head + api + base + yes + textwrap.indent(textwrap.dedent(code), "    ")
    )
    return name


def waiting(http: httpx.Client, session_id: str) -> dict[str, Any]:
    """The handle of a session once it asks its operator."""

    def asking() -> dict[str, Any] | None:
        handle: dict[str, Any] = http.get(f"/sessions/{session_id}").json()
        assert handle["state"] not in ("done", "failed", "aborted"), handle
        return handle if handle["state"] == "input_required" else None

    return eventually(asking)
