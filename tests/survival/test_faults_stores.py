"""Two services on one store, a store that is put back, and files of a store that are changed under the service."""

import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from app.client import ClientError
from tests.service import PATIENCE, bare_run, ended, eventually, waiting
from tests.survival.stage import Life, Stage
from tests.survival.test_faults import (
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
    sound,
    store_of,
)

pytestmark = pytest.mark.sweep


# Two services


def test_a_second_service_on_the_same_store_is_refused_and_the_first_goes_on(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as first, first.http() as http:
        working = in_plugin(http, config)
        second = stage.start(config)
        assert not second.await_ready() and second.end() == 1
        assert f"is held by another service (pid {first.pid})" in log_of(config)
        give_sign(config)
        assert ended(http, working)["state"] == "done"
        assert "recovered" not in [event["kind"] for event in history(http, working)]


def test_a_service_that_starts_while_another_is_being_killed_takes_over_or_is_refused(
    stage: Stage, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"\nthe moments of the deaths come from random.Random({seed})")
    chosen = random.Random(seed)
    config = made(tmp_path / "lab")
    before = time.monotonic()
    life, outcomes = stage.start(config), list[bool]()
    assert life.await_ready()
    start = time.monotonic() - before
    with life.http() as http:
        working = in_plugin(http, config)
    for _ in range(4):
        heir = stage.start(config)
        threading.Event().wait(chosen.random() * start)
        life.kill()
        outcomes.append(heir.await_ready())
        if not outcomes[-1]:
            assert heir.end() == 1
            heir = stage.start(config)
            assert heir.await_ready(), log_of(config)
        with heir.http() as http:
            state = eventually(lambda: http.get(f"/sessions/{working}").json())
            assert state["state"] in ("plugin_pass", "failed"), state
        life = heir
    print(f"took over: {outcomes.count(True)}, refused: {outcomes.count(False)}")
    give_sign(config)
    try:
        with life.http() as http:
            over = ended(http, working)
            history(http, working)
        # From the third death on that session is to blame, as far as anybody can tell.
        assert over["state"] == "done" or over["error"]["code"] == "recovery_limit_exceeded"
    finally:
        life.kill()
    sound(store_of(config))


# A store that is put back


def closed_with(url: str, path: str) -> int | None:
    """The code with which a stream ends that gives no frame."""
    with connect(url.replace("http", "ws") + "/api/v1" + path, proxy=None) as socket:
        try:
            socket.recv(PATIENCE)
        except ConnectionClosed:
            return socket.close_code
    raise AssertionError("it gave a frame")


def test_a_store_that_is_put_back_sends_clients_to_the_beginning_of_what_is_left(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    store, backup = store_of(config), tmp_path / "backup"
    with serving(stage, config) as life, life.http() as http:
        port = life.url.rpartition(":")[2]
        kept, lost = begun(http, "asking"), begun(http, "asking")
        for session_id in (kept, lost):
            waiting(http, session_id)
        with closing(sqlite3.connect(store)) as db:
            db.execute("VACUUM INTO ?", (str(backup),))
        old = history(http, kept)
        epoch = http.get(f"/sessions/{kept}").json()["epoch"]
        after = begun(http, "asking")
        waiting(http, after)
        viewers = [Viewer(life.url, session_id) for session_id in (kept, after)]
        assert http.post(f"/sessions/{lost}/resume", json={"extra_inputs": {"dose": 1}}).status_code == 200
        published = Path(ended(http, lost)["destination"])
        cursor = len(history(http, lost))
        eventually(lambda: all(viewer.frames for viewer in viewers))
        assert life.stop() == 0
    shutil.copy(backup, store)
    with serving(stage, config, "--port", port) as life, life.http() as http:
        for viewer in viewers:
            viewer.join(PATIENCE)
            assert isinstance(viewer.error, ClientError)
        assert [getattr(viewer.error, "code", None) for viewer in viewers] == ["cursor_ahead"] * 2
        assert http.get(f"/sessions/{kept}").json()["epoch"] != epoch
        assert closed_with(life.url, f"/sessions/{lost}/events?after={cursor}") == 4409
        assert closed_with(life.url, f"/sessions/{kept}/events?after=1&epoch={epoch}") == 4409
        assert closed_with(life.url, f"/sessions/{after}/events?after=0") == 4404
        assert history(http, kept) == old
        again = Viewer(life.url, kept)
        for session_id in (kept, lost):
            answer = {"extra_inputs": {"dose": 2}}
            assert http.post(f"/sessions/{session_id}/resume", json=answer).status_code == 200
        assert ended(http, kept)["state"] == "done"
        check_viewers(http, kept, [again])
        # It was published in the future that is gone: what it made is left alone, and that is said.
        failed = ended(http, lost)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "staging_lost")
        assert (published / "one.txt").read_text() == "1"


# Files of the store, under the service


def move(store: Path) -> None:
    store.rename(store.with_name("moved"))


def delete(store: Path) -> None:
    store.unlink()


def replace(store: Path) -> None:
    """With a copy of itself, as it stands."""
    with closing(sqlite3.connect(store)) as db:
        db.execute("VACUUM INTO ?", (f"{store}.copy",))
    Path(f"{store}.copy").replace(store)


def replace_by_the_bare_file(store: Path) -> None:
    """With a copy of the file alone, as `cp` makes it."""
    shutil.copy(store, f"{store}.copy")
    Path(f"{store}.copy").replace(store)


def truncate(store: Path) -> None:
    os.truncate(store, store.stat().st_size // 2 // 4096 * 4096)


def overwrite_a_page(store: Path) -> None:
    """The root of the table of events."""
    with closing(sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True)) as db:
        [root] = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
    with store.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(b"\xa5" * 4096)


def delete_the_index(store: Path) -> None:
    Path(f"{store}-shm").unlink()


def delete_the_log(store: Path) -> None:
    Path(f"{store}-wal").unlink()


def delete_the_log_and_its_index(store: Path) -> None:
    delete_the_log(store)
    delete_the_index(store)


LOSE_NOTHING = (delete_the_index, delete_the_log, delete_the_log_and_its_index)

ADVICE = ("restore", "backup", "put ", "remove")
"""One of these words is in a message that says what to do."""


@pytest.mark.parametrize(
    "mishap",
    [
        move,
        delete,
        replace,
        replace_by_the_bare_file,
        truncate,
        overwrite_a_page,
        *LOSE_NOTHING,
    ],
)
def test_what_is_done_to_its_files_under_the_service_loses_nothing_in_silence(
    stage: Stage, tmp_path: Path, mishap: Callable[[Path], None]
) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as life, life.http() as http:
        acknowledged = {begun(http, "plain") for _ in range(2)}
        for session_id in acknowledged:
            ended(http, session_id)
        assert life.stop() == 0  # so that part of it is in the file, and part of it in the log
    with serving(stage, config) as life, life.http() as http:
        if mishap not in (truncate, overwrite_a_page):  # what is in the log hides what the file has
            acknowledged |= {begun(http, name) for name in ("plain", "asking")}
        mishap(store_of(config))
        acknowledged |= written_until_it_ends(life, mishap is delete_the_index)
        if mishap is not delete_the_index:
            assert life.end() == 70
            assert "the store may be lying, stopping at once" in log_of(config).splitlines()[-1]
    check_next_start(stage, config, acknowledged, losing=mishap not in LOSE_NOTHING)


def written_until_it_ends(life: Life, lives_on: bool) -> set[str]:
    """What the service acknowledges after the mishap."""
    taken = set[str]()
    with life.http() as http:
        try:
            for _ in range(3 if lives_on else 10):
                answer = http.post("/sessions", json=bare_run("plain"))
                taken |= {answer.json()["session_id"]} if answer.status_code == 201 else set()
        except httpx.TransportError:
            assert not lives_on
    return taken


def check_next_start(stage: Stage, config: Path, acknowledged: set[str], *, losing: bool) -> None:
    """It has all, or tells that it has not, or is refused with a word of advice; the last two if it may be `losing`."""
    logged = len(log_of(config))
    heir = stage.start(config)
    try:
        if not heir.await_ready():
            assert heir.end() == 1 and losing
            said = log_of(config)[logged:]
            print(f"\nrefused: {said}")
            assert str(store_of(config)) in said and any(word in said for word in ADVICE), said
            return
        with heir.http() as http:
            lost = acknowledged - listed(http)
        said = log_of(config)[logged:]
        told = [
            line
            for line in said.splitlines()
            if '"level": "info"' not in line and store_of(config).name in line
        ]
        print(f"\nready, {len(lost)} of {len(acknowledged)} lost, told: {told}")
        assert not lost or (told and losing), (
            f"{len(lost)} of {len(acknowledged)} acknowledged sessions are gone, in silence"
        )
    finally:
        heir.kill()
