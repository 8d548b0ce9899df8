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
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from tests.survival.knife import Call, Verdict
from tests.survival.lanes import Fate, Lane, nothing_happens, swept
from tests.survival.scenarios import HEALS_WITHIN, Course, Gone
from tests.survival.stage import ROOT, Life

LASTS = 1.0
"""Seconds for which a disk fails that does so for a while."""
_SYNCS = frozenset({"fsync", "fdatasync"})
SPARED = {
    errno.ENOSPC: frozenset({"unlink", "unlinkat", "rmdir", "chmod", "fchmod", "fchmodat", "utimensat"}),
    errno.EIO: frozenset[str](),
    errno.EROFS: _SYNCS,
}
"""The errors, and the calls that never end with them."""
_STATE = "state"
_STARTS = 40
_REFUSED, _LYING = 1, 70
"""The exit codes of a service that refuses to start, and of one whose store may be lying."""
_SOON = 5.0
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


class Disk:
    """One disk that fails from a call on, that call alone or for `seconds`: a fate, also across restarts."""

    def __init__(self, number: int, begin: int, seconds: float) -> None:
        self._number = number
        self._begin = begin
        self._seconds = seconds
        self._until = 0.0
        self.name = ""
        self.calls: list[Call] = []
        """What has failed."""

    def __call__(self, number: int, call: Call) -> Verdict:
        if call.name in SPARED[self._number] or not (self._begins(number) or self._goes_on(call)):
            return "go on"
        if not self.calls:
            self.name, self._until = _disk(call), time.monotonic() + self._seconds
        self.calls.append(call)
        return self._number

    def _begins(self, number: int) -> bool:
        return not self.calls and number >= self._begin

    def _goes_on(self, call: Call) -> bool:
        return _disk(call) == self.name and time.monotonic() < self._until

    @property
    def over_since(self) -> float:
        """Seconds since it is well again."""
        return time.monotonic() - self._until

    @property
    def met_store(self) -> bool:
        """Whether the store may be lying because of it."""
        return any(call.own and call.path.startswith(_STATE) for call in self.calls)

    @property
    def met_sync(self) -> bool:
        """Whether a sync of the store has failed: then it must be taken for lying."""
        store = [
            call for call in self.calls if call.own and call.path.startswith(f"{_STATE}/sessions.sqlite3")
        ]
        return self._number == errno.EIO and any(
            call.name in _SYNCS and call.path.endswith("-wal") for call in store
        )


def _disk(call: Call) -> str:
    return Path(call.path).parts[0] if Path(call.path).parts else ""


def unexplained(life: Life, status: int) -> str | None:
    """Why an end of the service by itself is wrong: one that a disk explains has a last word, and no other."""
    if status == _REFUSED and life.url:
        return "the service ended with 1 after it was ready"
    if status not in (_REFUSED, _LYING):
        return f"the service ended with {status}"
    said = life.said()
    last = ([line for line in said.splitlines() if line.strip()] or ["nothing"])[-1]
    if not last.startswith("exlab-sessions: ") or "\nTraceback" in said:
        return f"the service ended with {status}, and its last word was {last[:200]!r}"
    return None


class Trial(NamedTuple):
    """What became of one point: the calls that failed, how often the service ended itself, and what was wrong."""

    point: Point
    befell: tuple[str, ...]
    ends: tuple[int, ...]
    wrong: tuple[str, ...]


def _trial(lane: Lane, at: Point) -> Trial:
    disk = Disk(getattr(errno, at.error), at.call, LASTS if at.how == "lasting" else 0.0)
    ends: list[int] = []
    try:
        wrong = _tried(lane, at, disk, ends)
    except (AssertionError, Gone) as failed:
        wrong = [f"{at}: {str(failed) or 'the service ended without a reason'}"]
    except Exception:  # noqa: BLE001 - the edge of a trial: the others go on, and this one is told as what it is
        wrong = [f"{at}: {traceback.format_exc()}"]
    wrong += lane.fuse.seen_in_part()
    if wrong:
        lane.abandon()
    return Trial(at, tuple(call.name for call in disk.calls), tuple(ends), tuple(wrong))


def _tried(lane: Lane, at: Point, disk: Disk, ends: list[int]) -> list[str]:
    """What is wrong in the end; `ends` gets the exit codes of a service that ended by itself meanwhile."""
    course = lane.begin(at.scenario)

    def fate(number: int, call: Call) -> Verdict:
        verdict = disk(number, call)
        if verdict != "go on" and not call.own:
            course.excused.add(("failed", "plugin_failed"))
        return verdict

    lane.fuse.light(fate)
    _see_through(lane, course, disk, fate, ends)
    late = bool(disk.calls) and disk.over_since > 2 * HEALS_WITHIN
    wrong = _at_rest(lane, course)
    if late:
        wrong.append(f"{course.key}: it ended long after the disk was well again")
    if disk.met_sync and _LYING not in ends:
        wrong.append(f"{course.key}: the service went on after a failed sync of its store")
    return wrong


def _see_through(lane: Lane, course: Course, disk: Disk, fate: Fate, ends: list[int]) -> None:
    """Start the service again as often as it ends itself, until the session has come to its end."""
    while len(ends) < _STARTS:
        try:
            _accompany(lane, course, disk)
        except Gone:
            status = lane.life.end()
            assert disk.met_store, (
                f"{course.key}: its store met no error, and the service ended with {status}"
            )
            why = unexplained(lane.life, status)
            assert why is None, f"{course.key}: {why}"
            ends.append(status)
            course.died()
            time.sleep(0.1)
            lane.restart(fate)
        else:
            return
    raise AssertionError(f"{course.key}: the service ended itself {len(ends)} times")


def _accompany(lane: Lane, course: Course, disk: Disk) -> None:
    """To the end of the session; Gone, too, when the service is about to end itself after that."""
    lane.accompany(course)
    lane.fuse.put_out()
    deadline = time.monotonic() + _SOON
    while disk.met_sync and lane.life.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    if not lane.life.alive:
        raise Gone


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
        Point(
            *chance.choice(every), error=errno.errorcode[chance.choice(list(SPARED))], how=chance.choice(hows)
        )
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
