"""`kill -9` at every call by which a session changes anything, and again during the restart.

A point is a scenario, the number of the call at which its service dies, and the number of the call of the next
start at which that one dies, too. The calls are those of the service and of all that it has started, below the
laboratory's folder: files, and the store. After both deaths the service is started once more, must have every
session driven within ten seconds, and end it as the scenario ends; then the whole laboratory is checked.
"""

import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.survival.knife import Call, Verdict
from tests.survival.lanes import Fate, Lane, nothing_happens, swept
from tests.survival.scenarios import Course, Gone
from tests.survival.stage import ROOT

RESTART_CALLS = 120
"""About as many calls as a restart makes; beyond them the second death falls into the session's own steps."""


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
    befell: tuple[str, ...]
    wrong: tuple[str, ...]


def die_at(last: int) -> Fate:
    """Die at a call; a call that is counted later was made by a child that did not know yet."""

    def fate(number: int, _call: Call) -> Verdict:
        return "die" if number == last else "go on"

    return fate


def _trial(lane: Lane, at: Point) -> Trial:
    """Die once or twice, finish, check."""
    fell: list[str] = []
    try:
        wrong = _tried(lane, at, fell)
    except (AssertionError, Gone) as failed:
        wrong = [f"{at}: {str(failed) or 'the service died of itself'}"]
    except Exception:  # noqa: BLE001 - the edge of a trial: the others go on, and this one is told as what it is
        wrong = [f"{at}: {traceback.format_exc()}"]
    wrong += lane.fuse.seen_in_part()
    if wrong:
        lane.abandon()
    return Trial(at, tuple(fell), tuple(wrong))


def _tried(lane: Lane, at: Point, fell: list[str]) -> list[str]:
    """What is wrong in the end; `fell` gets the calls at which the service died."""
    course = lane.begin(at.scenario)
    lane.fuse.light(die_at(at.call))
    if _dies(lane, course, fell) and at.again:
        lane.restart(die_at(at.again))
        _dies(lane, course, fell)
    if not lane.life.alive:
        lane.restart(nothing_happens)
        lane.accompany(course)
    return lane.judge(course)


def _dies(lane: Lane, course: Course, fell: list[str]) -> bool:
    """Whether the service died before the session came to its end."""
    try:
        lane.accompany(course)
    except Gone:
        if lane.fuse.fell is None:
            raise
    if (call := lane.fuse.put_out()) is None:
        return False
    lane.life.end()
    course.died()
    fell.append(call)
    return True


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
        self.deaths: set[tuple[str, int, str]] = set()
        self.failed: list[Trial] = []

    def add(self, trial: Trial) -> None:
        self.trials += 1
        at = trial.point
        for (phase, number), fell in zip(
            (("run", at.call), ("restart", at.again)), trial.befell, strict=False
        ):
            self.deaths.add((f"{at.scenario} {phase}", number, fell))
        if trial.wrong:
            self.failed.append(trial)

    def lines(self) -> Iterator[str]:
        yield f"{self.trials} trials, {len(self.deaths)} distinct deaths, {len(self.failed)} with violations"
        calls = Counter(fell.removeprefix("child ").split()[0] for _, _, fell in self.deaths)
        yield "at: " + ", ".join(f"{name} {count}" for name, count in calls.most_common())


def sweep(
    share: float, seed: int, chosen: Sequence[Point] = (), *, tell: Callable[[str], None], root: Path = ROOT
) -> Tally:
    """Try the `chosen` points, or a share of all, several beside each other; `root` is where the product stands."""
    tally = Tally()
    tell(f"seed {seed}")
    for trial in swept(
        "deaths", _trial, chosen, lambda counts: points(counts, share, seed), tell=tell, root=root
    ):
        tally.add(trial)
    for line in tally.lines():
        tell(line)
    return tally
