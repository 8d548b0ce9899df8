"""Processes that stall, are killed one by one, or run out of handles, under sessions and their viewers."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.offspring import offspring, running
from tests.service import bare_run, ended, eventually, plugin, template
from tests.survival.shares import SHARE
from tests.survival.stage import Life, Stage
from tests.survival.test_faults import (
    HEALING_SECONDS,
    Viewer,
    begun,
    check_viewers,
    give_sign,
    history,
    in_plugin,
    listed,
    log_of,
    made,
    serving,
)

pytestmark = pytest.mark.sweep

ACCEPTING_FAILED = "socket.accept() out of system resource"
STALL_SECONDS = 5 + 10 * max(0.0, SHARE - 0.2)

SHORT = """
def transform(self, file_path, ctx):
    (ctx.dst_root / "begun").touch()
    time.sleep(0.5)
    (ctx.dst_root / "begun").unlink()
    file_path.write_text("through")
"""


def workers(life: Life, module: str) -> set[int]:
    """The processes of the service that run `module`, those that they have started included."""
    return {pid for pid in offspring(life.pid) if module in _command(pid)}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


RENDERER = "app.steps.render"
PLUGINS = "plugins/worker.py"


@contextmanager
def stalled(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue


def pass_by(seconds: float) -> None:
    """The fault itself takes time: nothing is waited for."""
    threading.Event().wait(seconds)


# Stalled


def test_a_service_that_stalled_goes_on_and_no_viewer_misses_a_frame(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab")
    plugin(config.parent, "short", SHORT, isolation={"timeout_seconds": 1})
    template(config.parent, "brief", {"one.txt": "1"}, _exlab_plugins=["short"])
    with serving(stage, config) as life, life.http() as http:
        ended(http, begun(http, "brief"))  # so that all that it takes is warm
        working = in_plugin(http, config)
        brief = begun(http, "brief")
        viewers = [Viewer(life.url, session_id) for session_id in (working, working, brief)]
        trees = config.parent / "data" / ".exlab-sessions" / brief
        eventually(lambda: list(trees.glob("*/tree/begun")))
        with stalled(life.pid):
            late = Viewer(life.url, working)
            give_sign(config)
            pass_by(STALL_SECONDS)
        for session_id in (working, brief):
            assert ended(http, session_id)["state"] == "done"
        check_viewers(http, working, [*viewers[:2], late])
        check_viewers(http, brief, viewers[2:])
        assert all(not viewer.losses for viewer in viewers)


def test_a_plugin_that_stalls_costs_its_session_a_warning_and_nobody_else(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    plugin(config.parent, "waits", _waits(config), isolation={"timeout_seconds": 1})
    with serving(stage, config) as life, life.http() as http:
        working = in_plugin(http, config)
        with stalled(*workers(life, PLUGINS)):
            other = begun(http, "plain")
            assert ended(http, other)["state"] == "done"
            done = ended(http, working)
        assert done["state"] == "done"
        assert [warning["code"] for warning in done["result"]["warnings"]] == ["plugin_timeout"]
        give_sign(config)
        after = ended(http, begun(http, "gated"))
        assert (after["state"], after["result"]["warnings"]) == ("done", [])


def _waits(config: Path) -> str:
    return (config.parent / "plugins" / "waits" / "__init__.py").read_text().rpartition("return True\n")[2]


def test_a_render_worker_that_stalls_fails_its_session_alone(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab", "render_timeout_seconds: 2")
    with serving(stage, config) as life, life.http() as http:
        ended(http, begun(http, "plain"))
        with stalled(*workers(life, RENDERER)):
            stuck = ended(http, begun(http, "plain"))
        assert (stuck["state"], stuck["error"]["code"]) == ("failed", "render_failed")
        assert ended(http, begun(http, "plain"))["state"] == "done"


# Killed


def test_workers_that_are_killed_one_by_one_cost_no_session(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab")
    loop = "{% for i in range(4000) %}{% for j in range(500) %}{% endfor %}{% endfor %}"
    template(config.parent, "slow", {"work/long.txt.jinja": loop})
    with serving(stage, config) as life, life.http() as http:
        ended(http, begun(http, "plain"))
        killed(workers(life, RENDERER))
        assert ended(http, begun(http, "plain"))["state"] == "done"
        killed(eventually(lambda: workers(life, PLUGINS)))
        slow = begun(http, "slow")
        trees = config.parent / "data" / ".exlab-sessions" / slow
        eventually(lambda: list(trees.glob("*/tree/work")))
        killed(workers(life, RENDERER))
        done = ended(http, slow)
        assert (done["state"], done["recoveries"]) == ("done", 0)
        working = in_plugin(http, config)
        killed(workers(life, PLUGINS))
        lost = ended(http, working)
        assert lost["state"] == "done"
        assert [warning["code"] for warning in lost["result"]["warnings"]] == ["plugin_failed"]
        assert (Path(lost["destination"]) / "one.txt").read_text() == "1"
        give_sign(config)
        after = ended(http, begun(http, "gated"))
        assert (after["state"], after["result"]["warnings"]) == ("done", [])
        assert (Path(after["destination"]) / "one.txt").read_text() == "through"
        history(http, working)


def killed(pids: set[int]) -> None:
    assert pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    eventually(lambda: not any(running(pid) for pid in pids))


# Without handles


@pytest.mark.parametrize("spare", [1, 12])
def test_a_service_without_handles_refuses_what_it_cannot_do_and_heals(
    stage: Stage, tmp_path: Path, spare: int
) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as life, ExitStack() as clients:
        http = clients.enter_context(life.http())
        ended(http, begun(http, "plain"))
        working = in_plugin(http, config)
        viewer = Viewer(life.url, working)
        eventually(
            lambda: viewer.is_alive() and http.get("/health").json()["components"]["streams"]["followers"]
        )
        before = resource.prlimit(life.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(life.pid, resource.RLIMIT_NOFILE, (handles(life) + spare, before[1]))
        flood = [clients.enter_context(socket.socket()) for _ in range(60)]
        for one in flood:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", int(life.url.rpartition(":")[2])))
        eventually(lambda: ACCEPTING_FAILED in log_of(config))
        acknowledged = {working}
        give_sign(config)
        for _ in range(5):
            asked = time.monotonic()
            answer = http.post("/sessions", json=bare_run("plain"))
            assert answer.status_code in (201, 503), answer.text
            assert time.monotonic() - asked < HEALING_SECONDS, log_of(config).count(ACCEPTING_FAILED)
            if answer.status_code == 201:
                acknowledged.add(answer.json()["session_id"])
        assert life.alive
        for one in flood:
            one.close()
        resource.prlimit(life.pid, resource.RLIMIT_NOFILE, before)
        for session_id in acknowledged:
            eventually(partial(is_done, http, session_id), within=2 * HEALING_SECONDS)
        assert acknowledged <= listed(http)
        with life.http() as newcomer:
            assert ended(newcomer, begun(newcomer, "gated"))["state"] == "done"
        check_viewers(http, working, [viewer])
        assert life.stop() == 0
        # Each is a line with its traceback, written by the event loop, which does nothing else meanwhile.
        assert log_of(config).count(ACCEPTING_FAILED) < 1000


def handles(life: Life) -> int:
    """The highest number of a descriptor that it has open."""
    return max(int(entry.name) for entry in Path(f"/proc/{life.pid}/fd").iterdir())


def is_done(http: httpx.Client, session_id: str) -> bool:
    handle = http.get(f"/sessions/{session_id}").json()
    assert handle["state"] not in ("failed", "aborted"), handle
    return bool(handle["state"] == "done")
