"""`kill -9` at every call by which a session changes anything, and again during the restart.

A point is a scenario, the number of the call at which its service dies, and the number of the call of the next
start at which that one dies, too. The calls are those of the service and of all that it has started, below the
laboratory's folder: files, and the store. After both deaths the service is started once more, must have every
session driven within ten seconds, and end it as the scenario ends; then the whole laboratory is checked.
"""

import itertools
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

from tests.survival.knife import Call, Verdict
from tests.survival.scenarios import HEALS_WITHIN, SCENARIOS, Course, Gone, Lab, Operator, empty_store
from tests.survival.shares import LANES
from tests.survival.stage import ROOT, Life, Stage, staged

TRIALS_IN_ONE_LAB = 20
RESTART_CALLS = 120
"""About as many calls as a restart makes; beyond them the second death falls into the session's own steps."""
_CHECK_SECONDS = 10.0


class Point(NamedTuple):
    """Where the service dies: at the `call`-th change of the scenario, and at the `again`-th of the restart; 0 not."""

    scenario: str
    call: int
    again: int = 0

    def __str__(self) -> str:
        return f"{self.scenario}:{self.call}:{self.again}"


def point(text: str) -> Point:
    """The point that `str` has given for this text."""
    scenario, call, again = text.split(":")
    return Point(scenario, int(call), int(again))


class Trial(NamedTuple):
    """What became of one point: the calls at which the service died, and what was wrong in the end."""

    point: Point
    fell: tuple[str, ...]
    wrong: tuple[str, ...]


class Fuse:
    """Counts calls once it is lit, and has the service die at one of them."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._count = 0
        self._last = 0
        self.fell: str | None = None
        self.course: Course | None = None
        self.complete: frozenset[str] | None = None
        self.partial: set[str] = set()

    @property
    def count(self) -> int:
        """The calls since it was lit."""
        return self._count

    def light(self, last: int) -> None:
        """From now on count, and let the `last` call be the death; 0 for no death."""
        with self._guard:
            self._count, self._last, self.fell = 0, last, None

    def __call__(self, call: Call) -> Verdict:
        with self._guard:
            self._count += 1
            self._look()
            if self._count != self._last or self.fell is not None:
                return "go on"
            self.fell = f"{'' if call.own else 'child '}{call.name} {_general(call.path)}"
            return "die"

    def _look(self) -> None:
        """At each change: a destination must be absent or complete."""
        if self.course is None or self.course.destination is None or self.complete is None:
            return
        place = self.course.destination
        if place.is_dir() and str(place) not in self.course.lab.foreign and contents(place) != self.complete:
            self.partial.add(f"{place} is there in part: {sorted(contents(place))}")


def _general(path: str) -> str:
    """A path without what is another one in each session."""
    path = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", path)
    return re.sub(r"PROJ-\d+", "PROJ", re.sub(r"\b[0-9a-f]{8,16}\b", "HEX", path))


def contents(folder: Path) -> frozenset[str]:
    """The files of a published folder; the runs of a project are not part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return frozenset(str(path) for path in paths if not path.parts[0].startswith(("Run_", "TestRuns")))


class Lane:
    """One laboratory after the other, in which points are tried; its service goes on from point to point."""

    def __init__(self, stage: Stage, folder: Path, empty_store: Path) -> None:
        self._stage = stage
        self._folder = folder
        self._empty_store = empty_store
        self._fuse = Fuse()
        self._labs = itertools.count(1)
        self._trials = 0
        self._complete: dict[str, frozenset[str]] = {}
        self._lab: Lab | None = None
        self._life: Life | None = None

    def close(self) -> None:
        if self._life is not None:
            self._life.kill()
            self._life = None

    def calls(self, scenario: str) -> int:
        """How many calls the scenario makes when nobody dies."""
        lab = self._settled()
        self._fuse.light(0)
        self._accompany(self._begin(lab, scenario))
        return self._fuse.count

    def trial(self, at: Point) -> Trial:
        """Die once or twice, finish, check."""
        lab = self._settled()
        course = self._begin(lab, at.scenario)
        self._fuse.light(at.call)
        fell = [self._dies(course)]
        if fell[0] is not None and at.again:
            self._restart(at.again)
            fell.append(self._dies(course))
        wrong = self._heals(lab, course, died=fell[-1] is not None)
        self._fuse.course = None
        wrong += sorted(self._fuse.partial)
        self._fuse.partial.clear()
        if wrong:
            self._abandon()
        return Trial(at, tuple(each for each in fell if each), tuple(wrong))

    def _begin(self, lab: Lab, scenario: str) -> Course:
        course = SCENARIOS[scenario].begin(lab)
        self._fuse.course, self._fuse.complete = course, self._complete.get(scenario)
        return course

    def _settled(self) -> Lab:
        """A laboratory whose service runs and has nothing left to do; a new one now and then."""
        if self._lab is None or self._trials >= TRIALS_IN_ONE_LAB:
            self._abandon()
            self._lab = Lab(self._folder / f"lab{next(self._labs)}", self._empty_store)
            self._restart(0)
            self._found(self._lab)
        self._trials += 1
        return self._lab

    def _found(self, lab: Lab) -> None:
        """The first session of a laboratory makes it known; and each kind of folder is seen whole once."""
        for name, scenario in SCENARIOS.items():
            if scenario.ends == "done" and (name not in self._complete or name == "plain"):
                course = self._begin(lab, name)
                self._accompany(course)
                assert course.destination is not None
                self._complete[name] = contents(course.destination)

    def _abandon(self) -> None:
        self.close()
        if self._lab is not None:
            shutil.rmtree(self._lab.folder)
        self._lab, self._trials = None, 0

    def _restart(self, again: int) -> None:
        assert self._lab is not None
        self._fuse.light(again)
        self._life = self._stage.start(self._lab.config, decide=self._fuse)

    def _dies(self, course: Course) -> str | None:
        """The call at which the service died; None when the session came to its end alive."""
        assert self._life is not None
        try:
            if self._life.await_ready():
                self._accompany(course)
        except Gone:
            pass
        if self._fuse.fell is None:
            return None
        self._life.end()
        return self._fuse.fell

    def _accompany(self, course: Course) -> None:
        assert self._life is not None
        assert self._life.await_ready(), "the service did not start"
        operator = Operator(course.lab, self._life)
        try:
            course.go(operator)
        finally:
            operator.close()

    def _heals(self, lab: Lab, course: Course, *, died: bool) -> list[str]:
        """Start again, let the session end, and see what is wrong."""
        try:
            if died:
                self._restart(0)
                self._accompany(course)
                if course.driven_after > HEALS_WITHIN:
                    return [f"{course.key}: it was taken up {course.driven_after:.1f} s after the restart"]
        except (AssertionError, Gone) as failed:
            return [f"{course.key}: {failed or type(failed).__name__}"]
        if course.destination is not None and SCENARIOS[course.name].ends == "done":
            lab.complete[str(course.destination)] = self._complete[course.name]
        return _persisting(lab)


def _persisting(lab: Lab) -> list[str]:
    """What is wrong and stays so: some files are cleared after the commit."""
    deadline = time.monotonic() + _CHECK_SECONDS
    while (wrong := lab.wrong()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return wrong


def points(calls: dict[str, int], share: float, seed: int) -> list[Point]:
    """A share of all points, each with a second death somewhere in the restart; another share for another seed."""
    chance = random.Random(seed)
    every = [
        Point(name, call, chance.randint(1, RESTART_CALLS))
        for name, count in calls.items()
        for call in range(1, count + 1)
    ]
    return chance.sample(every, max(1, round(len(every) * share)))


class Tally:
    """What the trials amount to."""

    def __init__(self) -> None:
        self.trials = 0
        self.deaths: set[tuple[str, str, int]] = set()
        self.calls: Counter[str] = Counter()
        self.failed: list[Trial] = []

    def add(self, trial: Trial) -> None:
        self.trials += 1
        numbers = (("run", trial.point.call), ("restart", trial.point.again))
        for (phase, number), fell in zip(numbers, trial.fell, strict=False):
            self.deaths.add((f"{trial.point.scenario} {phase}", fell, number))
            self.calls[fell.split(" data")[0].split(" state")[0]] += 1
        if trial.wrong:
            self.failed.append(trial)

    def lines(self) -> Iterator[str]:
        yield f"{self.trials} trials, {len(self.deaths)} distinct deaths, {len(self.failed)} with violations"
        yield "died at: " + ", ".join(f"{name} {count}" for name, count in self.calls.most_common())


def sweep(
    share: float, seed: int, chosen: Sequence[Point] = (), *, tell: Callable[[str], None], root: Path = ROOT
) -> Tally:
    """Try the `chosen` points, or a share of all, several beside each other."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, staged(root) as stage:
        store = empty_store(Path(folder))
        lanes: SimpleQueue[Lane] = SimpleQueue()
        for number in range(LANES):
            lanes.put(Lane(stage, Path(folder) / f"lane{number}", store))
        if not chosen:
            counts = _counted(lanes)
            tell(f"seed {seed}, calls: {counts}")
            chosen = points(counts, share, seed)
        with ThreadPoolExecutor(LANES) as hands:
            for trial in hands.map(partial(_tried, lanes), chosen):
                tally.add(trial)
                for line in _story(trial):
                    tell(line)
        while not lanes.empty():
            lanes.get().close()
    for line in tally.lines():
        tell(line)
    return tally


def _counted(lanes: SimpleQueue[Lane]) -> dict[str, int]:
    lane = lanes.get()
    try:
        return {scenario: lane.calls(scenario) for scenario in SCENARIOS}
    finally:
        lanes.put(lane)


def _tried(lanes: SimpleQueue[Lane], at: Point) -> Trial:
    lane = lanes.get()
    try:
        return lane.trial(at)
    finally:
        lanes.put(lane)


def _story(trial: Trial) -> Iterator[str]:
    if trial.wrong:
        yield f"{trial.point} died at {trial.fell}; the same again: python -m tests.survival deaths {trial.point}"
        yield from (f"    {each}" for each in trial.wrong)
