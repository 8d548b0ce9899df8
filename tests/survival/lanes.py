"""A laboratory whose service lives under the knife, and many of them beside each other.

A lane promises a service that runs and has nothing left to do before each trial, a word on every change that was
in reach of it, and a whole check of the laboratory afterwards. At each change it looks at the destination of the
session on trial, which must be absent or complete. What is done to the service in a trial is left to others.
"""

import itertools
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Protocol, TypeVar

from tests.survival.invariants_disk import contents
from tests.survival.knife import Call, Verdict
from tests.survival.scenarios import SCENARIOS, Course, Gone, Lab, Operator, empty_store
from tests.survival.shares import LANES
from tests.survival.stage import ROOT, Life, Stage, staged

TRIALS_IN_ONE_LAB = 20
_CHECK_SECONDS = 10.0

P = TypeVar("P")
T = TypeVar("T")
R = TypeVar("R", bound="Outcome")

Fate = Callable[[int, Call], Verdict]
"""What becomes of a call, given how many there were since the fuse was lit, this one counted."""


def nothing_happens(_number: int, _call: Call) -> Verdict:
    return "go on"


class Fuse:
    """Counts calls from when it is lit, and has a fate decide on each."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._fate: Fate = nothing_happens
        self.count = 0
        self.fell: str | None = None
        self.course: Course | None = None
        self.complete: frozenset[str] | None = None
        self.partial: set[str] = set()

    def light(self, fate: Fate) -> None:
        with self._guard:
            self.count, self._fate, self.fell = 0, fate, None

    def put_out(self) -> str | None:
        """Let all further calls happen; the call that something was done to, if one was."""
        with self._guard:
            self._fate = nothing_happens
            return self.fell

    def seen_in_part(self) -> list[str]:
        """The destinations that were neither absent nor complete at some call since this was asked."""
        with self._guard:
            partial, self.partial = sorted(self.partial), set()
            return partial

    def __call__(self, call: Call) -> Verdict:
        with self._guard:
            self.count += 1
            self._look()
            verdict = self._fate(self.count, call)
            if verdict != "go on" and self.fell is None:
                self.fell = f"{'' if call.own else 'child '}{call.name} {_general(call.path)}"
            return verdict

    def _look(self) -> None:
        if self.course is None or self.course.destination is None or self.complete is None:
            return
        place = self.course.destination
        if not place.is_dir() or str(place) in self.course.lab.foreign:
            return
        if (found := contents(place)) != self.complete:
            self.partial.add(f"{place} is there in part: {sorted(found ^ self.complete)}")


def _general(path: str) -> str:
    """A path without what is another one in each session."""
    path = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", path)
    return re.sub(r"PROJ-\d+", "PROJ", re.sub(r"\b[0-9a-f]{8,16}\b", "HEX", path))


class Lane:
    """One laboratory after the other; its service goes on from trial to trial."""

    def __init__(self, stage: Stage, folder: Path, empty_store: Path) -> None:
        self._stage = stage
        self._folder = folder
        self._empty_store = empty_store
        self._labs = itertools.count(1)
        self._trials = 0
        self._complete: dict[str, frozenset[str]] = {}
        self._lab: Lab | None = None
        self._life: Life | None = None
        self.fuse = Fuse()

    @property
    def life(self) -> Life:
        """The service that is on now, or has just died."""
        assert self._life is not None
        return self._life

    def begin(self, scenario: str) -> Course:
        """A session that is still to be asked for, in a laboratory that has come to rest; a new one now and then."""
        if self._lab is None or self._trials >= TRIALS_IN_ONE_LAB:
            self.abandon()
            self._lab = Lab(self._folder / f"lab{next(self._labs)}", self._empty_store)
            self.restart(nothing_happens)
            self._found()
        self._trials += 1
        return self._begun(self._lab, scenario)

    def _begun(self, lab: Lab, scenario: str) -> Course:
        course = SCENARIOS[scenario].begin(lab)
        self.fuse.course, self.fuse.complete = course, self._complete.get(scenario)
        return course

    def _found(self) -> None:
        """The first session makes the laboratory known; and each kind of folder is seen whole once."""
        assert self._lab is not None
        for name, scenario in SCENARIOS.items():
            if scenario.ends == "done" and (name not in self._complete or name == "plain"):
                course = self._begun(self._lab, name)
                self.accompany(course)
                assert course.destination is not None
                self._complete[name] = contents(course.destination)

    def restart(self, fate: Fate) -> None:
        """Start the service, which has died, with this fate from its first call on."""
        assert self._lab is not None
        self.fuse.light(fate)
        self._life = self._stage.start(self._lab.config, decide=self.fuse)

    def accompany(self, course: Course) -> None:
        """See the session to its end, and its viewer, too.

        Raises Gone when the service dies, and AssertionError for a wrong end.
        """
        if not self.life.await_ready():
            raise Gone
        operator = Operator(course.lab, self.life)
        try:
            course.go(operator)
            operator.see_end(spared=self.fuse.fell is not None)
        finally:
            operator.close()

    def counted(self, scenario: str) -> int:
        """How many calls the scenario makes when nothing happens to it."""
        course = self.begin(scenario)
        self.fuse.light(nothing_happens)
        self.accompany(course)
        return self.fuse.count

    def judge(self, course: Course, *, within: float = _CHECK_SECONDS) -> list[str]:
        """What is wrong with the laboratory and stays so, as some files are cleared after the commit."""
        lab = course.lab
        if course.ended == "done":
            lab.complete[str(course.destination)] = self._complete[course.name]
        self.fuse.course = None
        deadline = time.monotonic() + within
        while (wrong := lab.wrong()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return wrong

    def abandon(self) -> None:
        """End the service and leave the laboratory."""
        if self._life is not None:
            self._life.kill()
            self._life = None
        if self._lab is not None:
            shutil.rmtree(self._lab.folder)
        self._lab, self._trials = None, 0


class Lanes:
    """As many lanes as there is room for, on one stage."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        store = empty_store(folder)
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for number in range(LANES):
            self._free.put(Lane(stage, folder / f"lane{number}", store))

    def spread(self, trial: Callable[[Lane, P], T], chosen: Sequence[P]) -> Iterator[T]:
        """The outcome of each trial, in the order of what was chosen."""

        def one(each: P) -> T:
            lane = self._free.get()
            try:
                return trial(lane, each)
            finally:
                self._free.put(lane)

        with ThreadPoolExecutor(LANES) as hands:
            yield from hands.map(one, chosen)

    def counted(self) -> dict[str, int]:
        """How many calls each scenario makes."""
        return dict(zip(SCENARIOS, self.spread(Lane.counted, list(SCENARIOS)), strict=True))

    def close(self) -> None:
        while not self._free.empty():
            self._free.get().abandon()


@contextmanager
def lanes(root: Path = ROOT) -> Iterator[Lanes]:
    """Lanes on a checkout."""
    with tempfile.TemporaryDirectory() as folder, staged(root) as stage:
        opened = Lanes(stage, Path(folder))
        try:
            yield opened
        finally:
            opened.close()


class Outcome(Protocol):
    """What became of a point: `str(point)` names it to the command that tries it again."""

    @property
    def point(self) -> object: ...
    @property
    def befell(self) -> tuple[str, ...]:
        """The calls that something was done to."""
        ...

    @property
    def wrong(self) -> tuple[str, ...]: ...


def swept(
    command: str,
    trial: Callable[[Lane, P], R],
    chosen: Sequence[P],
    choose: Callable[[dict[str, int]], Sequence[P]],
    *,
    tell: Callable[[str], None],
    root: Path,
) -> Iterator[R]:
    """Try the `chosen` points, or those that `choose` takes of all calls, and tell what is wrong."""
    with lanes(root) as opened:
        if not chosen:
            counts = opened.counted()
            tell(f"{sum(counts.values())} calls: {counts}")
            chosen = choose(counts)
        for outcome in opened.spread(trial, chosen):
            if outcome.wrong:
                tell(f"{outcome.befell}; the same again: python -m tests.survival {command} {outcome.point}")
                for each in outcome.wrong:
                    tell(f"    {each}")
            yield outcome
