"""Disks that fill up, and readers of other programs that stay, around a service at work.

What other tests of faults share stands here, too: a plugin that waits for a sign, so that a session is under way
for as long as a test needs it; and viewers, who see a history exactly once whatever happens meanwhile.
"""

import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import connections
from app.client import Client, ClientError, Unreachable
from app.demo import laboratory
from tests.service import PATIENCE, bare_run, ended, eventually, plugin, template
from tests.survival.shares import SHARE
from tests.survival.stage import Life, Stage

pytestmark = pytest.mark.sweep

HEALING_SECONDS = 10.0
"""After the fault is over, all goes on within this time."""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root: file systems are mounted")

WAITS = """
def transform(self, file_path, ctx):
    file_path.write_text("begun")
    while not (ctx.dst_root.parents[3] / "go").exists():
        time.sleep(0.02)
    file_path.write_text("through")
"""
ASKS = """
def transform(self, file_path, ctx):
    if "dose" not in ctx.extra_inputs:
        raise PluginInputRequired([{"id": "dose", "label": "Dose", "type": "number"}], "No dose is known.")
    file_path.write_text(str(ctx.extra_inputs["dose"]))
"""


def made(folder: Path, *settings: str) -> Path:
    """The config of a demo laboratory with templates whose sessions wait for a sign, or for an answer."""
    config = laboratory.build(folder)
    with config.open("a") as file:
        file.writelines(f"  {line}\n" for line in ("render_workers: 1", "drain_seconds: 1", *settings))
    plugin(folder, "waits", WAITS, isolation={"timeout_seconds": 300})
    plugin(folder, "asks", ASKS)
    template(folder, "gated", {"one.txt": "1"}, _exlab_plugins=["waits"])
    template(folder, "asking", {"one.txt": "1"}, _exlab_plugins=["asks"])
    template(folder, "plain", {"one.txt": "1"})
    return config


def store_of(config: Path) -> Path:
    return config.parent / "state" / "sessions.sqlite3"


def log_of(config: Path) -> str:
    """What the services on this laboratory have logged."""
    return Path(f"{config.parent}.log").read_text()


def begun(http: httpx.Client, name: str) -> str:
    answer = http.post("/sessions", json=bare_run(name))
    assert answer.status_code == 201 and answer.json()["error"] is None, answer.text
    return str(answer.json()["session_id"])


def in_plugin(http: httpx.Client, config: Path) -> str:
    """A session whose plugin is at work until `give_sign`."""
    session_id = begun(http, "gated")
    folder = config.parent / "data" / ".exlab-sessions" / session_id
    eventually(lambda: any(file.read_text() == "begun" for file in folder.glob("*/tree/one.txt")))
    return session_id


def give_sign(config: Path) -> None:
    (config.parent / "data" / "go").touch()


def history(http: httpx.Client, session_id: str) -> list[dict[str, Any]]:
    """All events of a session; they are counted without a gap."""
    told: list[dict[str, Any]] = http.get(f"/sessions/{session_id}/events").json()["events"]
    assert [event["seq"] for event in told] == [*range(1, len(told) + 1)]
    return told


def listed(http: httpx.Client) -> set[str]:
    found, query = set[str](), ""
    while True:
        page = http.get(f"/sessions?limit=200{query}").json()
        assert not found & {handle["session_id"] for handle in page["sessions"]}
        found |= {handle["session_id"] for handle in page["sessions"]}
        if page["next"] is None:
            return found
        query = f"&next={page['next']}"


def refused(answer: httpx.Response) -> bool:
    """Whether it is the refusal of a store that takes no write now, with a time to come again."""
    if answer.status_code != 503:
        return False
    assert answer.json()["error"]["code"] == "store_unavailable" and int(answer.headers["Retry-After"]) > 0
    return True


class Viewer(threading.Thread):
    """Follows a session by the client, through whatever happens, and keeps what it was given."""

    def __init__(self, url: str, session_id: str) -> None:
        super().__init__(daemon=True)
        self.frames: list[dict[str, Any]] = []
        self.losses: list[str] = []
        self.error: Exception | None = None
        self._url, self._session_id = url, session_id
        self.start()

    def run(self) -> None:
        try:
            with Client(self._url) as client:
                self.frames.extend(client.follow(self._session_id, lost=self.losses.append))
        except (ClientError, Unreachable) as error:
            self.error = error

    def seen(self) -> list[dict[str, Any]]:
        """All of the history, once it has ended."""
        self.join(PATIENCE)
        assert not self.is_alive() and self.error is None, self.error
        return self.frames


def check_viewers(http: httpx.Client, session_id: str, viewers: list[Viewer]) -> None:
    whole = history(http, session_id)
    assert whole[-1]["kind"] == "done"
    for viewer in viewers:
        assert viewer.seen() == whole


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of its own at `place`; gives what is to be filled, and removed again, for it to be full."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    try:
        yield place / "ballast"
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


@contextmanager
def locked(store: Path) -> Iterator[None]:
    """Another program that holds the database."""
    with closing(sqlite3.connect(store, isolation_level=None, timeout=PATIENCE)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def sound(store: Path) -> None:
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@contextmanager
def serving(stage: Stage, config: Path, *options: str) -> Iterator[Life]:
    life = stage.start(config, *options)
    try:
        assert life.await_ready(), log_of(config)
        yield life
    finally:
        life.kill()


# Disks


@needs_root
def test_a_full_database_disk_costs_no_viewer_a_frame_and_heals_in_time(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab")
    state = config.parent / "state"
    with (
        small_disk(state, "6m") as ballast,
        serving(stage, config) as life,
        life.http() as http,
    ):
        working = in_plugin(http, config)
        viewers = [Viewer(life.url, working) for _ in range(3)]
        large = bare_run("no such template", variables={"notes": "x" * 100_000})
        fill(ballast)
        acknowledged = {working}
        while not refused(answer := http.post("/sessions", json=large)):
            acknowledged.add(answer.json()["session_id"])
        viewers.append(Viewer(life.url, working))
        eventually(lambda: viewers[-1].frames == viewers[0].frames == history(http, working))
        assert acknowledged <= listed(http)
        give_sign(config)
        eventually(lambda: "takes no write" in log_of(config))
        assert refused(http.post("/sessions", json=large))
        assert http.get(f"/sessions/{working}").json()["state"] == "plugin_pass"
        ballast.unlink()
        room = time.monotonic()
        assert ended(http, begun(http, "plain"))["state"] == "done"
        assert ended(http, working)["state"] == "done"
        assert time.monotonic() - room < HEALING_SECONDS
        check_viewers(http, working, viewers)
        assert all(not viewer.losses for viewer in viewers)
        assert acknowledged <= listed(http)
        assert life.stop() == 0
        sound(store_of(config))


@needs_root
def test_a_full_data_disk_is_waited_for_and_the_store_goes_on_meanwhile(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab")
    with (
        small_disk(config.parent / "data", "80m") as ballast,
        serving(stage, config) as life,
        life.http() as http,
    ):
        working = in_plugin(http, config)
        viewers = [Viewer(life.url, working) for _ in range(2)]
        fill(ballast)
        give_sign(config)
        eventually(lambda: http.get(f"/sessions/{working}").json()["blocked_on"])
        assert http.get(f"/sessions/{working}").json()["blocked_on"]["code"] == "disk_full"
        failed = http.post("/sessions", json=bare_run("plain")).json()
        assert (failed["error"] or failed["blocked_on"])["code"] in ("disk_space_insufficient", "disk_full")
        ballast.unlink()
        room = time.monotonic()
        assert ended(http, working)["state"] == "done"
        assert time.monotonic() - room < HEALING_SECONDS + 2  # it looks again every ten seconds, at most
        check_viewers(http, working, viewers)


# A reader


def test_a_reader_who_stays_for_long_stops_no_commit_and_its_log_shrinks_after_it(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    store = store_of(config)
    wal = store.with_name(store.name + "-wal")
    asked = bare_run("no such template", variables={"notes": "x" * 20_000})

    def command(http: httpx.Client) -> float:
        before = time.monotonic()
        assert http.post("/sessions", json=asked).status_code == 201
        return time.monotonic() - before

    with serving(stage, config) as life, life.http() as http:
        with closing(sqlite3.connect(store, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            [[before]] = reader.execute("SELECT count(*) FROM sessions").fetchall()
            took, sizes = list[float](), list[int]()
            for _ in range(int(1000 * SHARE)):
                took.append(command(http))
                sizes.append(wal.stat().st_size)
            assert reader.execute("SELECT count(*) FROM sessions").fetchall() == [(before,)]
        assert sizes == sorted(sizes) and sizes[-1] > 2 * connections.CHECKPOINT_BYTES
        quarter = len(took) // 4
        first, last = (sorted(part)[quarter // 2] for part in (took[:quarter], took[-quarter:]))
        for _ in range(3):
            command(http)
        print(
            f"\n{len(took)} commands, {first * 1000:.0f} ms each at first, {last * 1000:.0f} ms at last; the log grew"
            f" to {sizes[-1] / 2**20:.0f} MiB and fell to {wal.stat().st_size / 2**20:.1f} MiB"
        )
        assert last < 4 * first + 0.02
        assert wal.stat().st_size <= connections.CHECKPOINT_BYTES
        assert len(listed(http)) == len(took) + 3
