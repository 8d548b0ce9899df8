"""kill -9 at every commit and at every step on the disk, and again during the restart.

The service runs under strace, which kills it at the n-th call of a kind. The n rises until a creation
comes through alive, so that the sweep covers its whole life. After each death the service is started
anew, in the harder half of the cases to be killed once more on its way, and must finish by itself: one
complete folder, one contiguous history, nothing left in the staging folder. Meanwhile a watcher sees to
it that the destination is never there in part.
"""

import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import database
from app.demo import laboratory
from tests.service import Service, body, eventually, running

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace does the killing")

KINDS = {
    "project": ("project", "CONFOCAL_01/PROJ-1", {}),
    "experimental": (
        "confocal_run",
        "CONFOCAL_01/PROJ-1/Run_2026-04-17T14-32-05",
        {"run_date": "2026-04-17T14:32:05"},
    ),
    "test": (
        "plate_reader_test_run",
        "READER_01/PROJ-1/TestRuns/TestRun_2026-04-17T14-32-05",
        {"run_date": "2026-04-17T14:32:05"},
    ),
    "asking": (
        "stained_run",
        "CONFOCAL_01/PROJ-1/Run_2026-04-18T14-32-05",
        {"run_date": "2026-04-18T14:32:05"},
    ),
}
ANSWER = {"slide_box": "SB-0042", "laser_power": 2.5}
"""To the question of the plugin, for the kind that asks."""
CALLS = {
    "commit": ("fdatasync", 1),
    "rename": ("rename,renameat2", 1),
    "sync": ("fsync", 6),
    "folder": ("mkdir", 3),
    "removal": ("unlinkat,rmdir", 3),
}
"""What the knife falls at, and by how much the number of the call rises from trial to trial."""

MOST = 90
AT_ONCE = 2


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, frozenset[str]]:
    """What each kind of folder holds when nothing goes wrong."""
    lab = tmp_path_factory.mktemp("reference")
    config = laboratory.build(lab)
    with running(config) as service, service.http() as http:
        for example, _, changes in KINDS.values():
            created = http.post("/sessions", json=body(lab, example, **changes)).json()
            assert _come_to_an_end(http, created["session_id"])["state"] == "done"
    return {kind: _contents(lab / "data" / place) for kind, (_, place, _) in KINDS.items()}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So that the knife falls at what a session does, not at the making of the schema."""
    path = tmp_path_factory.mktemp("store") / "sessions.sqlite3"
    database.prepare(path)
    return path


def _answer(http: httpx.Client, handle: dict[str, Any]) -> None:
    """Answer what is asked; it may just have been answered by an answer whose own answer was lost."""
    if handle["pending_input"] is not None:
        told = {"extra_inputs": ANSWER, "prompt_id": handle["pending_input"]["prompt_id"]}
        assert http.post(f"/sessions/{handle['session_id']}/resume", json=told).status_code in (200, 409)


def _come_to_an_end(http: httpx.Client, session_id: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        handle: dict[str, Any] = http.get(f"/sessions/{session_id}").json()
        _answer(http, handle)
        return handle if handle["state"] in ("done", "failed", "aborted") else None

    return eventually(over)


def _contents(folder: Path) -> frozenset[str]:
    """The files of a published folder; the runs of a project are not part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return frozenset(str(path) for path in paths if not path.parts[0].startswith(("Run_", "TestRuns")))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "call"),
    [("experimental", call) for call in CALLS]
    + [("asking", call) for call in CALLS]
    + [(kind, call) for kind in ("project", "test") for call in ("commit", "rename")],
)
def test_a_killed_service_finishes_what_it_began(
    kind: str, call: str, complete: dict[str, frozenset[str]], empty_store: Path, tmp_path: Path
) -> None:
    calls, stride = CALLS[call]
    stride *= 1 if kind in ("experimental", "asking") else 3

    def trial(number: int) -> str:
        lab = tmp_path / str(number)
        found = _Trial(lab, kind, complete[kind], empty_store).run(calls, number, twice=number % 2 == 0)
        shutil.rmtree(lab)
        return found

    found: Counter[str] = Counter()
    with ThreadPoolExecutor(AT_ONCE) as hands:
        numbers = iter(range(1, MOST, stride))
        while not found[ALIVE] and (pair := list(islice(numbers, AT_ONCE))):
            found.update(hands.map(trial, pair))
    print(
        f"\n{kind}, {calls}: {found.total() - found[ALIVE]} deaths, the session then stood in {dict(found)}"
    )
    assert found[ALIVE], "the sweep did not come to the end of the session's life"


ALIVE = "(alive)"


class _Trial:
    """One creation that is interrupted, in a laboratory of its own."""

    def __init__(self, lab: Path, kind: str, complete: frozenset[str], empty_store: Path) -> None:
        self._lab = lab
        self._config = laboratory.build(lab)
        shutil.copyfile(empty_store, lab / "state" / "sessions.sqlite3")
        self._example, place, self._changes = KINDS[kind]
        self._destination = lab / "data" / place
        self._complete = complete
        self._answered: str | None = None
        self._partial: list[frozenset[str]] = []

    def run(self, calls: str, number: int, *, twice: bool) -> str:
        """Die, perhaps twice, finish, check; where the session stood after the first death."""
        died = self.die_at(calls, number)
        found = (self._state() or "(not recorded)") if died else ALIVE
        if died and twice:
            self.die_in_restart(calls, number)
        self.finish()
        self.check()
        return found

    def die_at(self, calls: str, number: int) -> bool:
        """Create under the knife; whether it fell before the session was done."""
        with self._watched():
            service = self._traced(calls, number)
            try:
                if service.ready:
                    self._create(service)
                return self._state() != "done"
            finally:
                service.kill()

    def die_in_restart(self, calls: str, number: int) -> None:
        """A restart under the same knife, which falls early or not at all."""
        with self._watched():
            service = self._traced(calls, max(1, number // 2))
            try:
                if service.ready:
                    self._accompany(service)
            finally:
                service.kill()

    def finish(self) -> None:
        with self._watched(), running(self._config) as service, service.http() as http:
            if self._state() is None:
                self._answered = http.post("/sessions", json=self._body()).json()["session_id"]
            for handle in http.get("/sessions").json()["sessions"]:
                assert _come_to_an_end(http, handle["session_id"])["state"] == "done", handle
            assert service.stop() == 0

    def check(self) -> None:
        assert self._partial == []
        assert _contents(self._destination) == self._complete
        assert list((self._lab / "data" / ".exlab-sessions").iterdir()) == []
        with self._sql() as store:
            [(session_id, state, head)] = store.execute(
                "SELECT session_id, state, head_seq FROM sessions"
            ).fetchall()
            rows = store.execute("SELECT seq, kind FROM events ORDER BY position").fetchall()
        assert state == "done"
        assert self._answered in (None, session_id)
        assert [seq for seq, _ in rows] == list(range(1, head + 1))
        kinds = [kind for _, kind in rows]
        assert [kind for kind in kinds if kind in ("done", "failed")] == [rows[-1][1]]
        assert kinds.count("input_required") == kinds.count("input_received") <= 1

    def _create(self, service: Service) -> None:
        try:
            with service.http() as http:
                self._answered = http.post("/sessions", json=self._body()).json()["session_id"]
        except httpx.TransportError:
            return  # it died before it answered
        self._accompany(service)

    def _accompany(self, service: Service) -> None:
        """Until it dies or has nothing left to do; what is asked meanwhile is answered."""

        def over() -> bool:
            state = self._state()
            if state == "input_required":
                try:
                    with service.http() as http:
                        _answer(http, http.get("/sessions").json()["sessions"][0])
                except httpx.TransportError:
                    return not service.alive
            return not service.alive or state in ("done", None) or self._waits_for_a_worker()

        eventually(over)

    def _waits_for_a_worker(self) -> bool:
        """The knife falls at the service's children as well, and may leave it none that gets ready."""
        with self._sql() as store:
            row = store.execute("SELECT blocked_on FROM sessions").fetchone()
        return bool(row and row[0] and "not_started" in row[0])

    def _traced(self, calls: str, number: int) -> Service:
        knife = f"inject={calls}:signal=SIGKILL:when={number}"
        silent = ("-f", "-o", "/dev/null")
        return Service(self._config, tracer=("strace", *silent, "-e", f"trace={calls}", "-e", knife))

    def _body(self) -> dict[str, object]:
        return body(self._lab, self._example, **self._changes)

    def _state(self) -> str | None:
        try:
            with self._sql() as store:
                row = store.execute("SELECT state FROM sessions").fetchone()
        except sqlite3.OperationalError:
            return None  # not made yet
        return row[0] if row else None

    @contextmanager
    def _sql(self) -> Iterator[sqlite3.Connection]:
        store = sqlite3.connect(f"file:{self._lab}/state/sessions.sqlite3?mode=ro", uri=True)
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Look at the destination all the time; what is there in part is kept for `check`."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.002):
                if self._destination.exists() and (seen := _contents(self._destination)) != self._complete:
                    self._partial.append(seen)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
