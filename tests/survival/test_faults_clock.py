"""A clock that jumps by a day, forward and back: under sessions that run, ask and wait, and between two services.

The service runs with libfaketime, which moves its calendar and leaves its monotonic clock alone, as a machine does
whose time is set. Its workers see the true time.
"""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from tests.service import PATIENCE, Service, bare_run, ended, eventually, waiting
from tests.survival.test_faults import (
    HEALING_SECONDS,
    Viewer,
    begun,
    check_viewers,
    give_sign,
    history,
    in_plugin,
    listed,
    made,
    store_of,
)

DAY = 86400
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(LIBRARY is None, reason="needs the Debian package faketime"),
]


class Clock:
    """The calendar of the services of one laboratory."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """To so many seconds from the true time, for the services that are started from now on."""
        self._file.with_suffix(".new").write_text(f"{seconds:+d}")
        self._file.with_suffix(".new").replace(self._file)

    def jump_under(self, http: httpx.Client, seconds: int) -> None:
        """The same, under a service at work; comes back when it has noticed."""
        self.jump(seconds)

        def noticed() -> bool:
            told = parsedate_to_datetime(http.get("/ready").headers["Date"])
            return abs((told - datetime.now(UTC)).total_seconds() - seconds) < 60

        eventually(noticed)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@contextmanager
def serving(config: Path, clock: Clock) -> Iterator[Service]:
    service = Service(config, environment=clock.environment)
    try:
        assert service.ready, service.errors.read_text()
        yield service
    finally:
        service.kill()


def take_root_away(config: Path) -> None:
    (config.parent / "data" / ".exlab-sessions").rename(config.parent / "away")


def put_root_back(config: Path) -> None:
    (config.parent / "away").rename(config.parent / "data" / ".exlab-sessions")


def blocked(http: httpx.Client) -> str:
    """A session that waits at the gate, for its data root."""
    handle = http.post("/sessions", json=bare_run("plain")).json()
    assert handle["blocked_on"] and handle["blocked_on"]["code"] == "not_mounted", handle
    return str(handle["session_id"])


def check_done_in_time(http: httpx.Client, session_id: str) -> None:
    begun_at = time.monotonic()

    def done() -> bool:
        handle = http.get(f"/sessions/{session_id}").json()
        # It looks again every ten seconds, at most.
        assert time.monotonic() - begun_at < 2 * HEALING_SECONDS, (datetime.now(UTC), handle)
        return bool(handle["state"] == "done")

    eventually(done)


def partial_tree(http: httpx.Client, config: Path) -> Path:
    """What an aborted session has kept."""
    session_id = in_plugin(http, config)
    answer = http.post(f"/sessions/{session_id}/cancel", json={}).json()
    return Path(answer["error"]["details"]["partial_path"])


def test_a_clock_that_jumps_under_running_asking_and_blocked_sessions_holds_nobody_up(tmp_path: Path) -> None:
    config, clock = made(tmp_path / "lab"), Clock(tmp_path)
    with serving(config, clock) as service, service.http() as http:
        ended(http, begun(http, "plain"))
        asking, working = begun(http, "asking"), in_plugin(http, config)
        waiting(http, asking)
        viewers = [Viewer(service.url, session_id) for session_id in (asking, working)]
        made_ids = {asking, working}
        for offset in (DAY, -DAY):
            take_root_away(config)
            waits = blocked(http)
            clock.jump_under(http, offset)
            made_ids |= {blocked(http)}
            put_root_back(config)
            check_done_in_time(http, waits)
            made_ids |= {waits}
        days = {event["at"][:10] for session_id in made_ids for event in history(http, session_id)}
        assert len(days) >= 3, "the clock of the service did not jump"
        assert len(made_ids) == 6 and made_ids <= listed(http)
        assert made_ids & {one["id"] for one in http.get("/operations").json()["operations"]}
        clock.jump_under(http, -DAY)
        answer = http.post(f"/sessions/{asking}/resume", json={"extra_inputs": {"dose": 1}})
        assert answer.status_code == 200
        give_sign(config)
        for session_id, viewer in zip((asking, working), viewers, strict=True):
            assert ended(http, session_id)["state"] == "done"
            check_viewers(http, session_id, [viewer])
        for session_id in made_ids:
            assert ended(http, session_id)["state"] == "done"
        clock.jump_under(http, DAY)
        assert service.stop() == 0


def test_a_clock_put_back_while_a_block_is_recorded_does_not_make_it_wait_a_day(tmp_path: Path) -> None:
    config, clock = made(tmp_path / "lab"), Clock(tmp_path)
    with serving(config, clock) as service, service.http() as http, ThreadPoolExecutor(1) as hands:
        ended(http, begun(http, "plain"))
        take_root_away(config)
        with closing(sqlite3.connect(store_of(config), isolation_level=None, timeout=PATIENCE)) as other:
            post = hands.submit(http.post, "/sessions", json=bare_run("plain"))
            lock_at_the_gate(other)
            # Meanwhile what stands in the way has been found, and the time of the next look been chosen.
            clock.jump_under(http, -DAY)
            other.execute("ROLLBACK")
        handle = post.result().json()
        assert handle["blocked_on"]["code"] == "not_mounted", handle
        put_root_back(config)
        check_done_in_time(http, handle["session_id"])


def lock_at_the_gate(other: sqlite3.Connection) -> None:
    """Take the lock when a session has been recorded, and nothing that stands in its way."""
    fresh = "SELECT count(*) FROM sessions WHERE state = 'validating' AND blocked_on IS NULL"

    def taken() -> bool:
        other.execute("BEGIN IMMEDIATE")
        if other.execute(fresh).fetchone()[0]:
            return True
        other.execute("ROLLBACK")
        return False

    eventually(taken)


def test_a_clock_that_jumped_between_two_services_prunes_nothing_early_and_takes_all_up(
    tmp_path: Path,
) -> None:
    config, clock = made(tmp_path / "lab", "keep_partial_days: 2"), Clock(tmp_path)
    clock.jump(-3 * DAY)
    with serving(config, clock) as service, service.http() as http:
        old = partial_tree(http, config)
        clock.jump_under(http, 0)
        young, working, asking = partial_tree(http, config), in_plugin(http, config), begun(http, "asking")
        question = waiting(http, asking)["pending_input"]
        before = {session_id: history(http, session_id) for session_id in (working, asking)}
    for offset in (DAY, -DAY):
        clock.jump(offset)
        with serving(config, clock) as service, service.http() as http:
            eventually(lambda: "recovered" in kinds(http, working))
            eventually(lambda: not old.exists())
            assert young.is_dir()
            assert http.get(f"/sessions/{asking}").json()["pending_input"] == question
            if offset < 0:
                give_sign(config)
                again = begun(http, "plain")
                answer = http.post(f"/sessions/{asking}/resume", json={"extra_inputs": {"dose": 1}})
                assert answer.status_code == 200
                for session_id in (working, asking, again):
                    assert ended(http, session_id)["state"] == "done"
                assert {working, asking, again} <= listed(http)
            for session_id, told in before.items():
                assert history(http, session_id)[: len(told)] == told
                page = http.get(f"/sessions/{session_id}/events?after={len(told)}").json()["events"]
                assert [told, page] == [told, history(http, session_id)[len(told) :]]


def kinds(http: httpx.Client, session_id: str) -> list[str]:
    return [str(event["kind"]) for event in history(http, session_id)]
