"""A long time with everything at once: operators, viewers, and a fault now and then, on one real service.

It promises that each session ends as its scenario ends, or as a fault explains; that each viewer, however often it
comes back, however slowly it reads, is sent exactly what is stored; that all live sessions go on soon after a fault
has ended; and that each laboratory is whole in the end. The order of the faults follows from the seed, their moments
do not. What a session goes through is told by `scenarios.py`, what must hold of a laboratory by `invariants.py`.
"""

import errno
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec

from app.sessions import consistency
from tests.offspring import offspring
from tests.service import PATIENCE
from tests.survival.crowd import Crowd, reading
from tests.survival.deaths import RESTART_CALLS, die_at
from tests.survival.errors import SPARED, Disk, unexplained
from tests.survival.invariants import fingerprint, violations_of_clients
from tests.survival.invariants_disk import contents
from tests.survival.lanes import Fate, Fuse
from tests.survival.scenarios import HEALS_WITHIN, SCENARIOS, Course, Gone, Lab, Operator, empty_store
from tests.survival.stage import ROOT, Life, Stage, staged

DRAIN_SECONDS = 2
OPERATORS = 6
SESSIONS_IN_ONE_LAB = 250
"""So that the whole check of a laboratory takes seconds."""
_PAUSE = 6.0
_LOOK_SECONDS = 0.05
_AFTERMATH = 5.0
"""Seconds after a fault in which it may still explain what a client is told."""
_AT_REST = 30.0
_AT_LAST = 25.0
"""Seconds after a fault by which every session must have moved."""
_MEBIBYTE = 1024 * 1024

End = tuple[str, str]
"""The state of a session, and the code of its error."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long, and with how much at once."""

    seconds: float
    seed: int
    viewers: int = 50
    operators: int = OPERATORS

    def __str__(self) -> str:
        return f"soak --minutes {self.seconds / 60:g} --seed {self.seed} --viewers {self.viewers}"


class Report:
    """What a soak amounts to, and when to stop it: `over` is set by the first thing that is wrong."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._guard = threading.Lock()
        self._begun = time.monotonic()
        self.over = threading.Event()
        self.wrong: list[str] = []
        self.ends: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.laboratories = 0
        self.connections = 0
        self.frames = 0
        self.healing: list[float] = []
        self.longest_life = 0.0
        self.memory = (0, 0)
        self.log_bytes = 0
        self.check_seconds = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def say(self, text: str) -> None:
        self._tell(f"{self.seconds:8.1f} s  {text}")

    def blame(self, *facts: str) -> None:
        with self._guard:
            self.wrong += facts
            for fact in facts:
                self.say(f"WRONG: {fact}")
        if facts:
            self.over.set()

    def lived(self, seconds: float, first: int, last: int) -> None:
        """A life of the service has ended, and so much memory it took at its begin and its end."""
        if seconds > self.longest_life:
            self.longest_life, self.memory = seconds, (first, last)

    def lines(self) -> Iterator[str]:
        healed = sorted(self.healing) or [0.0]
        first, last = (size / _MEBIBYTE for size in self.memory)
        yield f"{self.seconds / 60:.1f} minutes, {self.laboratories} laboratories"
        yield f"{self.ends.total()} sessions: {_counted(self.ends)}"
        yield f"{self.faults.total()} faults: {_counted(self.faults)}"
        yield f"the service ended {self.statuses.total()} times, with: {_counted(self.statuses)}"
        yield f"viewers: {self.connections} connections, {self.frames} frames, closed with: {_counted(self.codes)}"
        yield f"healed after {healed[-1]:.1f} s at the most, {healed[len(healed) // 2]:.1f} s in the middle"
        yield f"the longest life took {self.longest_life:.0f} s, and {first:.0f} MiB at first, {last:.0f} MiB at last"
        yield f"the write-ahead log had {self.log_bytes / _MEBIBYTE:.1f} MiB at the most"
        yield f"the longest check took {self.check_seconds:.1f} s"
        yield f"{len(self.wrong)} violations"


def _counted(counter: Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "none"


# The service, and who starts it again


class Supervisor:
    """Starts the service again whatever it ends of, until it is dismissed; what ends it must be `explained`."""

    def __init__(self, stage: Stage, lab: Lab, report: Report, died: Callable[[], None]) -> None:
        self._stage = stage
        self._lab = lab
        self._report = report
        self._died = died
        self._dismissed = threading.Event()
        self._changed = threading.Condition()
        self._serving: Life | None = None
        self._newest: Life | None = None
        self.fuse = Fuse()
        self.at_next_start: Fate | None = None
        self.explained: frozenset[int] = frozenset()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def life(self) -> Life | None:
        """The service that is ready, if one is."""
        life = self._serving
        return life if life is not None and life.alive else None

    def url(self) -> str | None:
        """Where it is, if one is ready."""
        life = self.life
        return life.url if life is not None else None

    def await_life(self, *, but: Life | None = None) -> Life:
        """A service that is ready. Raises Gone when none comes, which is wrong, or is not wanted any more."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while (life := self.life) is None or life is but:
                if time.monotonic() > deadline:
                    self._report.blame(f"no service is ready after {PATIENCE:g} s")
                if self._report.over.is_set():
                    raise Gone
                self._changed.wait(0.1)
        return life

    def dismiss(self) -> None:
        """Have the service stopped in good order."""
        self._dismissed.set()
        self._thread.join(2 * PATIENCE)

    def abandon(self) -> None:
        """Have the service killed, when nothing else matters any more."""
        self._dismissed.set()
        if self._newest is not None:
            self._newest.signal(signal.SIGKILL)
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            while not self._dismissed.is_set():
                self._see_through()
        except Exception:  # noqa: BLE001 - the edge of the thread
            self._report.blame(f"the supervisor broke down: {traceback.format_exc()}")

    def _see_through(self) -> None:
        """One life, from its start to its end."""
        fate, self.at_next_start = self.at_next_start, None
        if fate is not None:
            self.fuse.light(fate)
        self._newest = life = self._stage.start(self._lab.config, decide=self.fuse)
        if life.await_ready():
            with self._changed:
                self._serving = life
                self._changed.notify_all()
            self._accompany(life)
        dismissed = self._dismissed.is_set() and not self._report.over.is_set()
        status = life.stop() if dismissed else life.end()
        self._report.statuses[status] += 1
        if status:
            self._died()
        why = None if status in (0, -signal.SIGKILL) else unexplained(life, status)
        if status not in self.explained | ({0} if dismissed else set()):
            why = f"the service ended of itself, with {status}"
        if why is not None and not self._report.over.is_set():
            self._report.blame(f"{why}; its log: {self._lab.folder}.log")
        self._report.over.wait(0.05)

    def _accompany(self, life: Life) -> None:
        """Until it ends or is to be ended, noting what it takes."""
        begun, first, last = time.monotonic(), 0, 0
        while life.alive and not self._dismissed.wait(0.05):
            last = _memory(life.pid) or last
            if not first and time.monotonic() > begun + 2.0:  # what is loaded late has been loaded
                first = last
            self._report.log_bytes = max(self._report.log_bytes, _size(Path(f"{self._lab.store}-wal")))
        self._report.lived(time.monotonic() - begun, first or last, last)


def _memory(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# The faults


class Fault(NamedTuple):
    """What is done to a laboratory, from its begin to its end, if anything was; and what may come of it.

    `blinds`: the service may be unable to read its store, which is what a stream ends with 1011 for.
    """

    does: Callable[["Scene", random.Random], bool]
    ends: frozenset[End] = frozenset()
    statuses: frozenset[int] = frozenset()
    blinds: bool = False


_RENDER, _PLUGIN = ("failed", "render_failed"), ("failed", "plugin_failed")
_RECOVERY = ("failed", "recovery_limit_exceeded")
_DEATHS = 3
"""As many unclean deaths in one step as end a session."""


def _kill(scene: "Scene", chance: random.Random) -> bool:
    """At any moment, or at a call."""
    call = chance.choice((0, chance.randint(1, 200)))
    life = scene.supervisor.await_life()
    scene.say(f"kill -9{f' at call {call}' if call else ''}")
    if call:
        scene.light(die_at(call), 5.0)
    life.signal(signal.SIGKILL)
    scene.supervisor.await_life(but=life)
    return True


def _kill_twice(scene: "Scene", chance: random.Random) -> bool:
    call = chance.randint(1, RESTART_CALLS)
    life = scene.supervisor.await_life()
    scene.say(f"kill -9, and again at call {call} of the restart")
    scene.supervisor.at_next_start = die_at(call)
    life.signal(signal.SIGKILL)
    scene.until(lambda: scene.supervisor.at_next_start is None, PATIENCE)
    twice = scene.until(lambda: scene.supervisor.fuse.fell is not None, 5.0)
    scene.supervisor.fuse.put_out()
    scene.supervisor.await_life(but=life)
    return twice


def _stop(scene: "Scene", _chance: random.Random) -> bool:
    life = scene.supervisor.await_life()
    scene.say("SIGTERM")
    life.signal(signal.SIGTERM)
    scene.supervisor.await_life(but=life)
    return True


def _fail_once(scene: "Scene", chance: random.Random) -> bool:
    number, call = chance.choice(list(SPARED)), chance.randint(1, 100)
    scene.say(f"{errno.errorcode[number]} at call {call}")
    return scene.light(Disk(number, call, 0.0), 5.0)


def _fail_for_a_while(scene: "Scene", chance: random.Random) -> bool:
    number, call, seconds = chance.choice(list(SPARED)), chance.randint(1, 100), chance.uniform(0.5, 3.0)
    scene.say(f"{errno.errorcode[number]} at call {call}, and on its disk for {seconds:.1f} s")
    return scene.light(Disk(number, call, seconds), 5.0, seconds)


def _lock(scene: "Scene", chance: random.Random) -> bool:
    seconds = chance.uniform(1.0, 8.0)
    scene.say(f"another program locks the store for {seconds:.1f} s")
    with closing(sqlite3.connect(scene.lab.store, isolation_level=None, timeout=PATIENCE)) as other:
        other.execute("BEGIN IMMEDIATE")
        scene.pass_by(seconds)
        other.execute("ROLLBACK")
    return True


def _read(scene: "Scene", _chance: random.Random) -> bool:
    seconds = min(60.0, scene.plan.seconds / 10)
    scene.say(f"another program reads for {seconds:.1f} s")
    with reading(scene.lab.store) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM sessions").fetchone()
        scene.pass_by(seconds)
    return True


def _stall(scene: "Scene", chance: random.Random) -> bool:
    seconds = chance.uniform(1.0, 3.0)
    life = scene.supervisor.await_life()
    scene.say(f"SIGSTOP for {seconds:.1f} s")
    life.signal(signal.SIGSTOP)
    scene.pass_by(seconds)
    life.signal(signal.SIGCONT)
    return True


def _kill_workers(scene: "Scene", chance: random.Random) -> bool:
    found = sorted(offspring(scene.supervisor.await_life().pid))
    chosen = chance.sample(found, chance.randint(min(1, len(found)), len(found)))
    scene.say(f"kill -9 of {len(chosen)} of its {len(found)} children")
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return bool(chosen)


def _unmount(scene: "Scene", chance: random.Random) -> bool:
    seconds = chance.uniform(1.0, 5.0)
    staging = scene.lab.data / ".exlab-sessions"
    with scene.disk:
        scene.say(f"the data root is away for {seconds:.1f} s")
        staging.rename(scene.lab.away())
        scene.pass_by(seconds)
        if staging.exists():
            scene.report.blame(f"something was made in the empty mount point: {sorted(staging.rglob('*'))}")
            return True
        scene.lab.away().rename(staging)
    return True


def _cut(scene: "Scene", _chance: random.Random) -> bool:
    cut = scene.crowd.cut()
    scene.say(f"{cut} viewers are cut off")
    return cut > 0


FAULTS = {
    "killed": Fault(_kill, statuses=frozenset({-9})),
    "killed twice": Fault(_kill_twice, statuses=frozenset({-9})),
    "stopped": Fault(_stop, statuses=frozenset({0})),
    "a call that fails": Fault(_fail_once, frozenset({_PLUGIN}), frozenset({70, 1}), blinds=True),
    "a disk that fails": Fault(_fail_for_a_while, frozenset({_PLUGIN}), frozenset({70, 1}), blinds=True),
    "locked": Fault(_lock),
    "read": Fault(_read),
    "stalled": Fault(_stall),
    "workers killed": Fault(_kill_workers, frozenset({_RENDER, _PLUGIN})),
    "unmounted": Fault(_unmount, frozenset({_RENDER, _PLUGIN})),
    "cut": Fault(_cut),
}
_DISK_SCENARIOS = ("blocked", "unmounted")
"""They take the data root away from everybody."""


# A laboratory under load


class _Calm(Operator):
    """An operator who does not look as often as the machine allows.

    A disk that is away for a moment only does not exist: whoever met that must have time to notice.
    """

    away_seconds = 1.5

    def look(self, session_id: str) -> dict[str, Any]:
        time.sleep(_LOOK_SECONDS)
        return super().look(session_id)


class _Standing(NamedTuple):
    """Where a live session stands."""

    head_seq: int
    waits: bool
    retry_at: str | None


class Scene:
    """One laboratory, its service, those who work with it, and what is done to it, one thing at a time."""

    def __init__(self, plan: Plan, stage: Stage, lab: Lab, report: Report, root: Path) -> None:
        self.plan = plan
        self.lab = lab
        self.report = report
        self.disk = threading.Lock()
        """Held by whoever takes the data root away."""
        self._stage = stage
        self._root = root
        self._guard = threading.Lock()
        self._closing = threading.Event()
        self._courses: dict[Course, int] = {}
        self._begun = 0
        self._fault: Fault | None = None
        self._calm_at = 0.0
        self._order: list[str] = []
        self._chance = random.Random(f"{plan.seed} {lab.folder.name} operators")
        self._complete: dict[str, frozenset[str]] = {}
        with lab.config.open("a") as config:
            config.write(f"  drain_seconds: {DRAIN_SECONDS}\n")
        lab.untouched[lab.config] = fingerprint(lab.config)
        self.supervisor = Supervisor(stage, lab, report, self._count_death)
        self._accompany("plain")  # so that the data root is known, and missed when it is away
        self.crowd = Crowd(
            plan.viewers,
            random.Random(f"{plan.seed} {lab.folder.name} viewers"),
            lab.store,
            url=self.supervisor.url,
            trouble=self._is_blind,
            blame=report.blame,
        )
        self._operators = [threading.Thread(target=self._work, daemon=True) for _ in range(plan.operators)]
        for operator in self._operators:
            operator.start()

    @property
    def used_up(self) -> bool:
        return self._begun >= SESSIONS_IN_ONE_LAB

    def say(self, text: str) -> None:
        self.report.say(text)

    def pass_by(self, seconds: float) -> None:
        """The fault itself takes time."""
        self.report.over.wait(seconds)

    def until(self, holds: Callable[[], bool], within: float) -> bool:
        deadline = time.monotonic() + within
        while not holds():
            if time.monotonic() > deadline or self.report.over.wait(0.01):
                return False
        return True

    def light(self, fate: Fate, within: float, seconds: float = 0.0) -> bool:
        """Have a fate decide on the calls until it has struck, and for some seconds after that; whether it has."""
        fuse = self.supervisor.fuse
        fuse.light(fate)
        if self.until(lambda: fuse.fell is not None, within):
            self.say(f"    at {fuse.fell}")
            self.pass_by(seconds)
        return fuse.put_out() is not None

    # Faults

    def suffer(self, name: str, chance: random.Random) -> None:
        """One fault, from its begin until everybody has got over it."""
        fault = FAULTS[name]
        with self._guard:
            self._fault = fault
            for course in self._courses:
                course.excused |= fault.ends
        self.supervisor.explained = fault.statuses
        struck = fault.does(self, chance)
        if not self.report.over.is_set():
            self.report.faults[name] += struck
            self._heal(name)
        self.supervisor.explained = frozenset()
        with self._guard:
            self._fault = None
            self._calm_at = time.monotonic() + _AFTERMATH if fault.blinds else self._calm_at

    def _is_blind(self) -> bool:
        """Whether the service may be unable to read its store, or a viewer not have heard yet that it was."""
        fault = self._fault
        return (fault is not None and fault.blinds) or time.monotonic() < self._calm_at

    def _heal(self, name: str) -> None:
        """Wait until the service is ready, and every session that lives has moved or waits for its operator.

        Nobody takes the disk away meanwhile; who has it away just now is waited for.
        """
        begun, before = time.monotonic(), self._standing()
        if not self.until(self._is_ready, HEALS_WITHIN) and not self.report.over.is_set():
            self.report.blame(f"{name}: the service is not ready {HEALS_WITHIN:g} s later")
        with self.disk:
            self._see_moved(name, before)
        took = time.monotonic() - begun
        self.report.healing.append(took)
        self.say(f"    {name}: healed after {took:.1f} s")

    def _see_moved(self, name: str, before: dict[str, _Standing]) -> None:
        begun = time.monotonic()
        held_up = {each: (standing, begun + HEALS_WITHIN) for each, standing in before.items()}
        while held_up and not self.report.over.wait(0.05):
            now = self._standing()
            held_up = {
                each: (then, _patience(now[each], until, begun + _AT_LAST))
                for each, (then, until) in held_up.items()
                if each in now and not _moved(then, now[each])
            }
            late = [each for each, (_, until) in held_up.items() if time.monotonic() > until]
            if late:
                facts = {each: now[each] for each in late}
                self.report.blame(f"{name}: {time.monotonic() - begun:.1f} s later these are stuck: {facts}")

    def _is_ready(self) -> bool:
        life = self.supervisor.life
        try:
            return life is not None and httpx.get(f"{life.url}/api/v1/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _standing(self) -> dict[str, _Standing]:
        with reading(self.lab.store) as db:
            rows = db.execute(
                "SELECT session_id, head_seq, state = 'input_required' AND cancel_requested_at IS NULL, blocked_on"
                " FROM sessions WHERE state NOT IN ('done', 'failed', 'aborted')"
            ).fetchall()
        return {
            each: _Standing(head, bool(waits), json.loads(blocked)["retry_at"] if blocked else None)
            for each, head, waits, blocked in rows
        }

    def look_over(self) -> None:
        """What may be said of a laboratory while everything moves."""
        if not self.disk.acquire(blocking=False):
            return
        try:
            found = [
                each for each in consistency.examine(self.lab.store, self.lab.data) if each.level == "error"
            ]
        finally:
            self.disk.release()
        self.report.blame(*(f"check: {each.where}: {each.what}" for each in found))
        self.report.blame(*violations_of_clients(self.lab.store, self.lab.log))

    # Operators

    def _count_death(self) -> None:
        """Who was there when the service died often enough may be taken for the one who did it."""
        with self._guard:
            for course in self._courses:
                self._courses[course] += 1
                if self._courses[course] >= _DEATHS:
                    course.excused.add(_RECOVERY)

    def _work(self) -> None:
        try:
            while not self._closing.is_set() and not self.report.over.is_set():
                name = self._next()
                with self.disk if name in _DISK_SCENARIOS else nullcontext():
                    self._accompany(name)
                self._closing.wait(self._chance.uniform(0.1, 1.5))
        except Exception:  # noqa: BLE001 - the edge of the thread
            if not self.report.over.is_set():
                self.report.blame(f"an operator broke down: {traceback.format_exc()}")

    def _next(self) -> str:
        """All scenarios, in another order each time."""
        with self._guard:
            if not self._order:
                self._order = self._chance.sample(list(SCENARIOS), len(SCENARIOS))
            return self._order.pop()

    def _accompany(self, name: str) -> None:
        """A session from its begin to its end, as often as the service dies meanwhile."""
        course = SCENARIOS[name].begin(self.lab)
        with self._guard:
            self._begun += 1
            self._courses[course] = 0
            course.excused |= self._fault.ends if self._fault else frozenset()
        try:
            while course.ended is None and not self.report.over.is_set():
                self._go(course)
        finally:
            with self._guard:
                del self._courses[course]
            if name in _DISK_SCENARIOS and self.lab.away().exists():
                self.lab.away().rename(self.lab.data / ".exlab-sessions")
        if course.ended is not None:
            self.report.ends[f"{name} {course.ended}"] += 1
        if course.ended == "done" and course.destination is not None:
            self._is_whole(course, course.destination)

    def _go(self, course: Course) -> None:
        try:
            operator = _Calm(self.lab, self.supervisor.await_life())
        except Gone:
            return
        try:
            course.go(operator)
        except Gone:
            return
        except AssertionError as error:
            self.report.blame(str(error))
        finally:
            if not self.report.over.is_set():
                operator.close()

    def _is_whole(self, course: Course, destination: Path) -> None:
        """All folders of one scenario hold the same files; of a project whose plugins may fail, too."""
        with self._guard:
            self.lab.complete[str(destination)] = self._complete.setdefault(
                course.name, contents(destination)
            )

    # The end

    def close(self) -> None:
        """Let all come to its end, and look at what is left."""
        self._closing.set()
        for operator in self._operators:
            operator.join(2 * PATIENCE)
            if operator.is_alive() and not self.report.over.is_set():
                self.report.blame("an operator does not come to an end")
        self.crowd.leave()
        self.report.connections += self.crowd.connections
        self.report.frames += self.crowd.frames
        self.report.codes += self.crowd.codes
        if self.report.over.is_set():
            self.supervisor.abandon()
            return
        self.supervisor.dismiss()
        if not self.report.over.is_set():
            self._check()

    def _check(self) -> None:
        """After another start, as what could not be cleared while the disk failed is cleared by that."""
        begun = time.monotonic()
        life = self._stage.start(self.lab.config)
        if not life.await_ready():
            self.report.blame(f"the service does not start again: {life.end()}")
            return
        while (wrong := self.lab.wrong()) and time.monotonic() < begun + _AT_REST:
            time.sleep(0.1)
        if (status := life.stop()) != 0:
            self.report.blame(f"a stop in good order ended with {status}")
        self.report.blame(*(wrong or self.lab.wrong()))
        command = [sys.executable, "-m", "app.cli", "check", "--config", str(self.lab.config)]
        environment = {**os.environ, "PYTHONPATH": str(self._root)}
        checked = subprocess.run(
            command, check=False, cwd=self._root, env=environment, capture_output=True, text=True, timeout=300
        )
        if checked.returncode:
            self.report.blame(
                f"exlab-sessions check says {checked.returncode}: {checked.stdout}{checked.stderr}"
            )
        self.report.check_seconds = max(self.report.check_seconds, time.monotonic() - begun)


def _moved(then: _Standing, now: _Standing) -> bool:
    return now.waits or now.head_seq > then.head_seq


def _patience(now: _Standing, until: float, at_last: float) -> float:
    """Until when a session may stand still: one that waits for something to pass, until it has looked again."""
    if now.retry_at is None:
        return until
    wait = (datetime.fromisoformat(now.retry_at) - datetime.now(UTC)).total_seconds()
    return max(until, min(time.monotonic() + wait + HEALS_WITHIN, at_last))


# The whole


def soak(plan: Plan, *, tell: Callable[[str], None], root: Path = ROOT) -> Report:
    """One laboratory after the other, until the time is over or something is wrong, with the product in `root`."""
    report = Report(tell)
    tell(f"the same again: python -m tests.survival {plan}")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    store = empty_store(folder)
    order = _order(random.Random(plan.seed))
    with staged(root) as stage:
        while report.seconds < plan.seconds and not report.over.is_set():
            report.laboratories += 1
            lab = Lab(folder / f"lab{report.laboratories}", store)
            _live_in(Scene(plan, stage, lab, report, root), order)
            if not report.over.is_set():
                shutil.rmtree(lab.folder)
    if report.wrong:
        tell(
            f"the laboratory and its log are kept in {folder}; the same faults: python -m tests.survival {plan}"
        )
    else:
        shutil.rmtree(folder)
    for line in report.lines():
        tell(line)
    return report


def _order(chance: random.Random) -> Iterator[tuple[str, random.Random]]:
    """The faults, all of them in another order each time, and the dice that each throws."""
    while True:
        for name in chance.sample(list(FAULTS), len(FAULTS)):
            yield name, random.Random(chance.random())


def _live_in(scene: Scene, order: Iterator[tuple[str, random.Random]]) -> None:
    report, seconds = scene.report, scene.plan.seconds
    try:
        while report.seconds < seconds and not scene.used_up and not report.over.is_set():
            name, chance = next(order)
            scene.pass_by(chance.uniform(0.05, 1.0) * min(_PAUSE, seconds / 20))
            scene.suffer(name, chance)
            scene.look_over()
    except Exception:  # noqa: BLE001 - the edge of the soak: what is kept of it is worth more than a traceback alone
        if not report.over.is_set():
            report.blame(f"the soak broke down: {traceback.format_exc()}")
    scene.close()
