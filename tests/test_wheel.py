"""What a user installs: the wheel alone, in an empty environment, serves the demo."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service import eventually

ROOT = Path(__file__).parent.parent
READY = re.compile(r"exlab-sessions ready on (http://127\.0\.0\.1:\d+)")
PATIENCE_SECONDS = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command as it stands after `pip install` of the wheel into an environment with nothing in it."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    scripts = venv / ("Scripts" if sys.platform == "win32" else "bin")
    constraints = ("--constraint", ROOT / "constraints.txt")
    subprocess.run([scripts / "python", "-m", "pip", "install", "-qq", *constraints, wheel], check=True)
    return scripts / "exlab-sessions"


def _settled(client: httpx.Client, session_id: str) -> str:
    """Where a session stands when nothing is done for it."""

    def look() -> str | None:
        state: str = client.get(f"/api/v1/sessions/{session_id}").json()["state"]
        return state if state in ("input_required", "done", "failed") else None

    return eventually(look, within=PATIENCE_SECONDS)


@pytest.fixture
def demo(program: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`serve --demo` of a user whose home is empty, started in a folder with nothing in it."""
    process = subprocess.Popen(
        [program, "serve", "--demo", "--port", "0"],
        cwd=tmp_path,
        env={"PATH": os.defpath, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("wb"),
        text=True,
    )
    overdue = threading.Timer(PATIENCE_SECONDS, process.kill)
    overdue.start()
    yield process
    overdue.cancel()
    process.kill()
    process.communicate()


def test_the_wheel_carries_all_that_is_not_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "app/migrations/env.py" in names
    assert any(re.fullmatch(r"app/migrations/versions/\w+\.py", name) for name in names)
    assert "app/demo/templates/confocal_run/copier.yml" in names
    assert "app/demo/templates/project/{{ _copier_conf.answers_file }}.jinja" in names
    assert "app/web/vendor/swagger-ui/swagger-ui-bundle.js" in names


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    known = r"app/|exlab_sessions-[^/]*\.dist-info/|exlab_sessions/(__init__|plugins)\.py$"
    assert [name for name in names if not re.match(known, name)] == []
    assert [name for name in names if "__pycache__" in name] == []


def test_authors_can_import_what_plugins_import(program: Path) -> None:
    names = "Plugin, PluginContext, PluginError, PluginInputRequired, FileChange"
    importing = [str(program.with_name("python")), "-I", "-c", f"from exlab_sessions.plugins import {names}"]
    subprocess.run(importing, check=True)


def test_the_installed_wheel_serves_the_demo_until_it_is_told_to_stop(
    demo: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert demo.stdout is not None
    line = demo.stdout.readline()
    ready = READY.fullmatch(line.rstrip("\n"))
    assert ready, f"no ready line but {line!r}\n{(tmp_path / 'log').read_text()}"
    with httpx.Client(base_url=ready[1], timeout=PATIENCE_SECONDS) as client:
        assert client.get("/api/v1/setup/status").json()["ready"]
        offered = client.get("/api/v1/templates").json()["templates"]
        asked = json.loads((tmp_path / "exlab-demo/examples/stained_run.json").read_text())
        session_id = client.post("/api/v1/sessions", json=asked).json()["session_id"]
        assert _settled(client, session_id) == "input_required"
    assert {template["name"] for template in offered} == {
        "project",
        "confocal_run",
        "plate_reader_run",
        "stained_run",
    }
    demo.send_signal(signal.SIGTERM)
    assert demo.wait(PATIENCE_SECONDS) == 0
