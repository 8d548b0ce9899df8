"""A disk that fails: an errno at any call by which a session changes anything, once or for a while.

A point is a scenario, the number of a call, an errno, and whether that call alone fails or, for a second, every
one of its disk: the store's, or the data root's. It promises to be the supervisor meanwhile, who starts the service
again when it has ended itself with a last word, and the operator, who asks again when told to ask later; and then
that the session ends as the scenario ends, soon after the fault has ended, and the whole laboratory is as it must
be. Only what a plugin or a template does with its own errors may end the session otherwise.
"""

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tests.survival.knife import Call, Verdict
from tests.survival.lanes import Lane, nothing_happens, swept
from tests.survival.scenarios import HEALS_WITHIN, Course, Gone
from tests.survival.stage import ROOT

LASTS = 1.0
"""Seconds for which a disk fails that does so for a while."""
_SYNCS = frozenset({"fsync", "fdatasync"})
_SPARED = {
    "ENOSPC": frozenset({"unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "utimensat"}),
    "EIO": frozenset[str](),
    "EROFS": _SYNCS,
}
"""The errors, and the calls that never end with them."""
_STORE = "state/sessions.sqlite3"
_STARTS = 40
_LAST_WORD = {1: "it refuses to start", 70: "the store may be lying"}
_AT_REST_SECONDS = 1.0

How = Literal["once", "lasting"]


class Point(NamedTuple):
    """Where the disk fails: at the `call`-th change of the scenario, or the next one that can fail so."""

    scenario: str
    call: int
    error: str
    how: How

    def __str__(self) -> str:
        return f"{self.scenario}:{self.call}:{self.error}:{self.how}"


def point(text: str) -> Point:
    """The point that `str` has given for this text."""
    scenario, call, error, how = text.split(":")
    return Point(scenario, int(call), error, "lasting" if how == "lasting" else "once")


class _Fault:
    """One failing of a disk, also across restarts: a fate that knows when it has come and gone."""

    def __init__(self, at: Point, course: Course) -> None:
        self._at = at
        self._course = course
        self._number = getattr(errno, at.error)
        self._disk = ""
        self._until = 0.0
        self.calls: list[str] = []
        """What has failed."""
        self.is_distrusted = False
        """A sync of the store has failed: the service must end itself."""

    def __call__(self, number: int, call: Call) -> Verdict:
        if call.name in _SPARED[self._at.error] or not (self._begins(number) or self._goes_on(call)):
            return "go on"
        if not self.calls:
            self._disk, self._until = _disk(call), time.monotonic() + LASTS
        self.calls.append(call.name)
        store = call.path.startswith(_STORE) and call.own
        self.is_distrusted |= store and call.name in _SYNCS and self._at.error == "EIO"
        if not call.own:
            self._course.excused.add(("failed", "plugin_failed"))
        return int(self._number)

    def _begins(self, number: int) -> bool:
        return not self.calls and number >= self._at.call

    def _goes_on(self, call: Call) -> bool:
        return self._at.how == "lasting" and _disk(call) == self._disk and time.monotonic() < self._until

    @property
    def over_since(self) -> float:
        """Seconds since the disk is well again."""
        over = self._until if self._at.how == "lasting" else self._until - LASTS
        return time.monotonic() - over


def _disk(call: Call) -> str:
    return Path(call.path).parts[0] if Path(call.path).parts else ""


class Trial(NamedTuple):
    """What became of one point: the calls that failed, how often the service ended itself, and what was wrong."""

    point: Point
    befell: tuple[str, ...]
    ends: tuple[int, ...]
    wrong: tuple[str, ...]


def _trial(lane: Lane, at: Point) -> Trial:
    course = lane.begin(at.scenario)
    fault = _Fault(at, course)
    lane.fuse.light(fault)
    ends: list[int] = []
    wrong: list[str] = []
    try:
        _see_through(lane, course, fault, ends)
        if fault.calls and (took := fault.over_since) > 2 * HEALS_WITHIN:
            wrong.append(f"{course.key}: it ended {took:.1f} s after the disk was well again")
        if fault.is_distrusted and not ends:
            wrong.append(f"{course.key}: the service went on after a failed sync of its store")
        wrong += _at_rest(lane, course)
    except (AssertionError, Gone) as failed:
        wrong.append(f"{course.key}: {str(failed) or 'the service ended without a reason'}")
    if wrong:
        lane.abandon()
    return Trial(at, tuple(fault.calls), tuple(ends), tuple(wrong))


def _see_through(lane: Lane, course: Course, fault: _Fault, ends: list[int]) -> None:
    """Start the service again as often as it ends itself, until the session has come to its end."""
    while len(ends) < _STARTS:
        try:
            lane.accompany(course)
        except Gone:
            status = lane.life.end()
            if not fault.calls or status not in _LAST_WORD:
                raise AssertionError(f"{course.key}: the service ended with {status}") from None
            ends.append(status)
            course.died()
            time.sleep(0.1)
            lane.restart(fault)
        else:
            if ends and course.driven_after > HEALS_WITHIN:
                raise AssertionError(
                    f"{course.key}: it was taken up {course.driven_after:.1f} s after the restart"
                )
            return
    raise AssertionError(f"{course.key}: the service ended itself {len(ends)} times")


def _at_rest(lane: Lane, course: Course) -> list[str]:
    """What stays wrong; what could not be cleared while the disk failed is cleared by the next start."""
    if not (wrong := lane.judge(course, within=_AT_REST_SECONDS)):
        return []
    if (status := lane.life.stop()) != 0:
        return [*wrong, f"{course.key}: a stop in good order ended with {status}"]
    lane.restart(nothing_happens)
    if not lane.life.await_ready():
        return [*wrong, f"{course.key}: the service does not start again"]
    return lane.judge(course)


def points(calls: dict[str, int], number: int, seed: int) -> list[Point]:
    """As many of all points; others for another seed."""
    chance = random.Random(seed)
    every = [(name, call) for name, count in calls.items() for call in range(1, count + 1)]
    hows: tuple[How, How] = ("once", "lasting")
    return [
        Point(*chance.choice(every), error=chance.choice(list(_SPARED)), how=chance.choice(hows))
        for _ in range(number)
    ]


class Tally:
    """What the trials amount to."""

    def __init__(self) -> None:
        self.injected: set[Point] = set()
        self.calls: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()
        self.failed: list[Trial] = []

    def add(self, trial: Trial) -> None:
        if trial.befell:
            self.injected.add(trial.point)
        self.calls.update(trial.befell)
        self.ends.update(trial.ends)
        if trial.wrong:
            self.failed.append(trial)

    def lines(self) -> Iterator[str]:
        calls = ", ".join(f"{name} {count}" for name, count in self.calls.most_common())
        yield f"{len(self.injected)} faults, {len(self.failed)} with violations; {self.calls.total()} calls: {calls}"
        yield f"the service ended itself: {dict(self.ends)}"


def sweep(
    number: int, seed: int, chosen: Sequence[Point] = (), *, tell: Callable[[str], None], root: Path = ROOT
) -> Tally:
    """Try the `chosen` points, or a `number` of all, several beside each other; `root` is where the product stands."""
    tally = Tally()
    tell(f"seed {seed}")
    for trial in swept(
        "errors", _trial, chosen, lambda counts: points(counts, number, seed), tell=tell, root=root
    ):
        tally.add(trial)
    for line in tally.lines():
        tell(line)
    return tally
