"""A program that holds the database: for a second, for longer than anybody waits, and for ever."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app import connections
from tests.service import bare_run, ended
from tests.survival.stage import Stage
from tests.survival.test_faults import (
    HEALING_SECONDS,
    Viewer,
    begun,
    check_viewers,
    give_sign,
    history,
    in_plugin,
    listed,
    locked,
    log_of,
    made,
    refused,
    serving,
    store_of,
)

pytestmark = pytest.mark.sweep


def test_a_lock_of_a_second_is_noticed_by_nobody(stage: Stage, tmp_path: Path) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as life, life.http() as http, ThreadPoolExecutor(8) as hands:
        working = in_plugin(http, config)
        viewer = Viewer(life.url, working)
        with locked(store_of(config)):
            held = time.monotonic()
            posts = [hands.submit(begun, http, "plain") for _ in range(4)]
            give_sign(config)
            while time.monotonic() - held < 1:
                assert http.get(f"/sessions/{working}").status_code == 200
            assert not any(post.done() for post in posts)
        for post in posts:
            assert ended(http, post.result())["state"] == "done"
        assert ended(http, working)["state"] == "done"
        check_viewers(http, working, [viewer])
        assert "takes no write" not in log_of(config)


def test_a_lock_that_outlasts_all_patience_refuses_and_heals_when_it_ends(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as life, life.http() as http, ThreadPoolExecutor(1) as hands:
        working = in_plugin(http, config)
        viewer = Viewer(life.url, working)
        with locked(store_of(config)):
            give_sign(config)
            for _ in range(2):
                post = hands.submit(http.post, "/sessions", json=bare_run("plain"))
                while not post.done():
                    asked = time.monotonic()
                    assert history(http, working) and listed(http) == {working}
                    assert time.monotonic() - asked < 2
                assert refused(post.result())
        free = time.monotonic()
        assert ended(http, begun(http, "plain"))["state"] == "done"
        assert ended(http, working)["state"] == "done"
        assert time.monotonic() - free < HEALING_SECONDS
        check_viewers(http, working, [viewer])
        assert viewer.losses == []


def test_a_lock_for_ever_keeps_the_service_neither_from_stopping_nor_from_starting(
    stage: Stage, tmp_path: Path
) -> None:
    config = made(tmp_path / "lab")
    with serving(stage, config) as first, first.http() as http:
        working = in_plugin(http, config)
        with locked(store_of(config)):
            give_sign(config)
            told = time.monotonic()
            assert first.stop() == 0
            stopped = time.monotonic() - told
            second = stage.start(config)
            try:
                assert second.await_ready(), log_of(config)
                started = time.monotonic() - told - stopped
                with second.http() as again:
                    assert listed(again) == {working}
                    assert refused(again.post("/sessions", json=bare_run("plain")))
            except BaseException:
                second.kill()
                raise
        print(f"\nunder a lock: stopped in {stopped:.1f} s, ready in {started:.1f} s")
        # The session's own write, the good order of the stop and the folding of the log wait for the lock.
        assert stopped < 1 + 4 * connections.BUSY_MS / 1000 and started < 4 * connections.BUSY_MS / 1000
        try:
            with second.http() as again:
                free = time.monotonic()
                assert ended(again, working)["state"] == "done"
                assert time.monotonic() - free < HEALING_SECONDS
        finally:
            second.kill()
