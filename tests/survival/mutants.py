"""Bugs that are planted in a copy of the product, one at a time: that each is found shows that the harness can fail.

It promises that the part of the harness which is named with a bug hunts in a copy of this checkout that has this one
bug and no other, stops at the first violation, and says what it was; and that the same hunts find nothing in a copy
without a bug. What is a violation is left to the parts of the harness.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol
from unittest.mock import patch

import hypothesis
import pytest

from tests.survival import deaths, errors, lanes, power, scenarios
from tests.survival.knife import AVAILABLE, Call, Verdict
from tests.survival.lanes import Fate, Fuse, Lane
from tests.survival.scenarios import Course, Gone, empty_store
from tests.survival.shares import LANES
from tests.survival.stage import ROOT, Stage, staged

SEED = 1
"""A hunt throws the same dice each time: a bug is found by it always, or it is no hunt for that bug."""
PATIENCE = 15.0
"""Seconds that a session may take in a hunt: some bugs make one that never ends."""
_SETTLE_SECONDS = 3.0
_TEST_SECONDS = 120.0
_SHOWN = 300
"""Of a violation, so many characters: it may tell all of a session."""
_COPIED = ("app", "exlab_sessions", "migrations", "tests", "pyproject.toml", "alembic.ini")


class Hunt(Protocol):
    """What is done to find a bug in the product below `root`."""

    def __call__(self, root: Path) -> str | None:
        """The first violation; None when there was none."""


class Missed(Exception):
    """The hunt did not come as far as what it was to do."""


class Found(Exception):
    """The violation that ends a hunt."""


def _stop_at_first(line: str) -> None:
    """For what tells each violation on a line of its own, further in than all else."""
    if line.startswith("    "):
        raise Found(line.strip())


class At(NamedTuple):
    """A call that a scenario makes: the first in which the last of `calls` is found, once those before it were.

    A call is told as `child fsync data/notes.txt`, the word `child` where the service does not make it itself.
    """

    scenario: str
    calls: tuple[str, ...]


class _Aim:
    """A fate that decides on calls from one on, which is the first for it."""

    def __init__(self, calls: tuple[str, ...], fate: Fate) -> None:
        self._fate = fate
        self._calls = list(calls)
        self._number = 0

    def __call__(self, _number: int, call: Call) -> Verdict:
        told = f"{'' if call.own else 'child '}{call.name} {call.path}"
        if self._calls and re.search(self._calls[0], told):
            del self._calls[0]
        self._number += not self._calls
        return self._fate(self._number, call)


class _Fuse(Fuse):
    def __init__(self, calls: tuple[str, ...]) -> None:
        super().__init__()
        self._calls = calls

    def light(self, fate: Fate) -> None:
        super().light(_Aim(self._calls, fate))


class _Lane(Lane):
    """Numbers of calls count from the one that is aimed at, and nobody waits for long."""

    def __init__(self, stage: Stage, folder: Path, calls: tuple[str, ...]) -> None:
        super().__init__(stage, folder, empty_store(folder))
        self.fuse = _Fuse(calls)

    def judge(self, course: Course, *, within: float = _SETTLE_SECONDS) -> list[str]:
        return super().judge(course, within=within)


@contextmanager
def _lane(root: Path, at: At) -> Iterator[Lane]:
    """A lane on a checkout, for one scenario."""
    known = {name: scenarios.SCENARIOS[name] for name in ("plain", at.scenario)}
    with (
        patch.object(scenarios, "PATIENCE", PATIENCE),
        patch.object(lanes, "SCENARIOS", known),
        tempfile.TemporaryDirectory() as folder,
        staged(root) as stage,
    ):
        lane = _Lane(stage, Path(folder), at.calls)
        try:
            yield lane
        finally:
            lane.abandon()


class Deaths(NamedTuple):
    """The service dies at a call, and at each of some `more` after it."""

    at: At
    more: int = 0

    def __call__(self, root: Path) -> str | None:
        with _lane(root, self.at) as lane:
            for number in range(1, self.more + 2):
                try:
                    trial = deaths._trial(lane, deaths.Point(self.at.scenario, number))  # noqa: SLF001
                except (AssertionError, Gone) as failed:
                    return f"no death: {str(failed) or 'the service died of itself'}"
                if trial.wrong:
                    return f"{', '.join(trial.befell) or 'no death'}: {trial.wrong[0]}"
                if not trial.befell:
                    raise Missed(f"{self.at} is not reached")
        return None


class Undisturbed(NamedTuple):
    """Nothing happens to a scenario."""

    scenario: str

    def __call__(self, root: Path) -> str | None:
        with _lane(root, At(self.scenario, ())) as lane:
            course = lane.begin(self.scenario)
            try:
                lane.accompany(course)
            except (AssertionError, Gone) as failed:
                return str(failed) or "the service died of itself"
            return next(iter(lane.judge(course)), None)


class Errors(NamedTuple):
    """A call fails with an error, once."""

    at: At
    error: str

    def __call__(self, root: Path) -> str | None:
        with _lane(root, self.at) as lane:
            try:
                trial = errors._trial(lane, errors.Point(self.at.scenario, 1, self.error, "once"))  # noqa: SLF001
            except (AssertionError, Gone) as failed:
                return f"no error: {str(failed) or 'the service died of itself'}"
        if not trial.befell:
            raise Missed(f"{self.at} is not reached")
        return f"{', '.join(trial.befell)}: {trial.wrong[0]}" if trial.wrong else None


class Cuts(NamedTuple):
    """The power fails, and as many images are given to a service."""

    images: int = 3

    def __call__(self, root: Path) -> str | None:
        try:
            with patch.object(scenarios, "PATIENCE", PATIENCE):
                power.cuts(self.images / power.RECOVERED, SEED, tell=_stop_at_first, root=root)
        except (AssertionError, Found) as found:
            return str(found)
        return None


class Tests(NamedTuple):
    """Tests of the copy are run, a `share` of those that come in shares."""

    node: str
    share: float = 0.02

    def __call__(self, root: Path) -> str | None:
        hunting = subprocess.Popen(
            [sys.executable, "-m", "tests.survival.mutants", self.node],
            cwd=root,
            env=os.environ
            | {"PYTHONPATH": str(root), "SURVIVAL_SEED": str(SEED), "SURVIVAL_SHARE": str(self.share)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = hunting.communicate(timeout=_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(hunting.pid, signal.SIGKILL)
            said = hunting.communicate()[0]
            raise Missed(f"{self.node} came to no end: {said[-_SHOWN:]}") from None
        if hunting.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise Missed(f"{self.node} could not be run: {said[-2000:]}")
        return _complaint(said) if hunting.returncode else None


def _complaint(said: str) -> str:
    lines = [line.lstrip("E| ").rstrip() for line in said.splitlines()]
    return next(
        (line for line in lines if re.match(r"(?!.*Cancelled)[\w.]*(Error|Exception|Moved)\b", line)),
        "it failed",
    )


def main(node: str) -> int:
    """In a copy: run tests, wait for nothing for long, and be content with the first example that fails."""
    from tests import service

    service.PATIENCE = PATIENCE
    phases = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
    hypothesis.settings.register_profile("hasty", phases=phases, database=None)
    hypothesis.settings.load_profile("hasty")
    return int(pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", node]))


# The bugs


class Mutant(NamedTuple):
    """A bug: `line` stands exactly once in the file at `path`, and `planted` in its place is the bug."""

    name: str
    path: str
    line: str
    planted: str
    hunt: Hunt


MODEL = Tests("tests/survival/test_model.py::test_the_store_is_as_the_contract_says_wherever_it_is_led")
_RENAMED = "renameat2 data/CONFOCAL"
PUBLISHED = At("plain", (_RENAMED, "fsync"))
ENDED = At("plain", (_RENAMED, "fdatasync"))

_TABLE = (
    Mutant(
        "a commit is answered before it is synced",
        "app/connections.py",
        '    "synchronous=FULL",',
        '    "synchronous=NORMAL",',
        Cuts(),
    ),
    Mutant(
        "a command is answered before its commit",
        "app/connections.py",
        "            outcome = unit.run(self._connection), None\n",
        "            outcome = unit.run(self._connection), None\n"
        "            unit.future.set_result(outcome[0])\n"
        "            unit.future.set_result = lambda _: None\n",
        Cuts(),
    ),
    Mutant(
        "events are shown before their commit",
        "app/sessions/store.py",
        "            return unit(tx), tx.frames",
        "            return unit(tx), self._loop.call_soon_threadsafe(self._publish, tx.frames) and []",
        Cuts(),
    ),
    Mutant(
        "the files of a tree are not synced",
        "app/steps/publish.py",
        "        _run(threads.map(disk.sync_file, files))",
        "        _run(threads.map(disk.sync_file, ()))",
        Cuts(),
    ),
    Mutant(
        "the files of a plugin are not synced",
        "app/sessions/plugin_pass.py",
        "    publish.sync_tree(tree)",
        "    publish.scratch(tree)",
        Cuts(),
    ),
    Mutant(
        "provenance is not synced",
        "app/disk.py",
        "        _flush(file.fileno())",
        "        file.fileno()",
        Cuts(),
    ),
    Mutant(
        "folders are not synced",
        "app/disk.py",
        "        _sync(path, os.O_RDONLY)",
        "        path.lstat()",
        Cuts(),
    ),
    Mutant(
        "a row and its events are two commits",
        "app/sessions/moves.py",
        "        _write_columns(tx, seen.session_id, outcome, moves=lead is not state)",
        "        _write_columns(tx, seen.session_id, outcome, moves=lead is not state)\n"
        '        for said in ("COMMIT", "BEGIN IMMEDIATE", "SAVEPOINT unit"):\n'
        "            tx.db.exec_driver_sql(said)",
        Deaths(ENDED),
    ),
    Mutant(
        "the tree is published before the commit to it",
        "app/sessions/pipeline.py",
        "            return (checked,)",
        "            return (checked, *await self._publish(session))",
        Deaths(PUBLISHED),
    ),
    Mutant(
        "what was published before a death is not known again",
        "app/steps/publish.py",
        "    if provenance.session_of(destination) != session_id:",
        "    if provenance.session_of(destination) == session_id:",
        Deaths(PUBLISHED),
    ),
    Mutant(
        "whose folder stands at the destination is not looked at",
        "app/steps/publish.py",
        "    if provenance.session_of(destination) != session_id:",
        "    if not destination:",
        Tests("tests/test_publish.py::test_somebody_elses_folder_is_not_taken_for_ours"),
    ),
    Mutant(
        "a tree is published file by file",
        "app/disk.py",
        " not _rename_exclusively(source, target):",
        " not shutil.copytree(source, target) or shutil.rmtree(source):",
        Deaths(PUBLISHED),
    ),
    Mutant(
        "a rename replaces what is there",
        "app/steps/publish.py",
        "        disk.rename_new(tree, destination)",
        "        tree.rename(destination)",
        Undisturbed("colliding"),
    ),
    Mutant(
        "what is in staging stays after the end",
        "app/sessions/pipeline.py",
        "        _clear(publish.session_folder(known(session.local_root), session.session_id), None)",
        "        known(session.local_root)",
        Undisturbed("plain"),
    ),
    Mutant(
        "files are cleared before the failure is recorded",
        "app/sessions/pipeline.py",
        "        failed = await self.record(session, Failed(error=failure))",
        "        await thread(_clear, folder, kept)\n"
        "        failed = await self.record(session, Failed(error=failure))",
        Deaths(At("unrendered", ("unlinkat .*/template/",)), 2),
    ),
    Mutant(
        "a plugin works on the files themselves",
        "app/steps/publish.py",
        "    disk.copy_file(file, copy)",
        "    os.link(file, copy)",
        Deaths(At("asking", (r"child write .*notes.txt", "fdatasync", r"child write .*notes.txt"))),
    ),
    Mutant(
        "a start forgets who was being published",
        "app/sessions/moves.py",
        "(whole(sessions.c.state.in_(LIVE)).order_by(",
        "(whole(sessions.c.state.in_(LIVE[:-1])).order_by(",
        Deaths(PUBLISHED),
    ),
    Mutant(
        "a start does not drive who wrote provenance",
        "app/sessions/runner.py",
        "if one.state is not State.INPUT_REQUIRED or one.cancel]",
        "if one.state not in (State.INPUT_REQUIRED, State.CACHE_WRITE) or one.cancel]",
        Deaths(At("plain", ("creation.json$",))),
    ),
    Mutant(
        "a start does not record whom it takes up",
        "app/sessions/runner.py",
        "            recovered = await self._pipeline.record(session, Recovered(alone=alone))",
        "            recovered = session",
        Deaths(PUBLISHED),
    ),
    Mutant(
        "a start does not finish a cancel",
        "app/sessions/runner.py",
        "        if session.cancel is not None:\n",
        "        if session.cancel == ():\n",
        Deaths(At("stopped", (r"child", "fdatasync", r"rename .*\.gone$")), 1),
    ),
    Mutant(
        "a cancel is not recorded",
        "app/sessions/moves.py",
        "    if session.cancel is None:\n",
        "    if session.cancel == ():\n",
        Deaths(At("cancelled", ("mkdir data/.exlab-sessions/",))),
    ),
    Mutant(
        "a tree is taken up unseen",
        "app/sessions/pipeline.py",
        "        if await thread(publish.verify, tree, digest, owned=provenance.OWNED):",
        "        if digest:",
        Tests("tests/test_restart.py::test_a_tree_that_somebody_meddled_with_is_not_published"),
    ),
    Mutant(
        "a key is not kept",
        "app/sessions/moves.py",
        "    if key is not None:\n",
        '    if key == "":\n',
        Deaths(At("plain", ("mkdir data/.exlab-sessions/",))),
    ),
    Mutant(
        "a key opens whatever comes with it",
        "app/sessions/moves.py",
        "    if row.body_digest != digest:",
        '    if row.body_digest == "":',
        MODEL,
    ),
    Mutant(
        "a move does not look where the session stands",
        "app/sessions/moves.py",
        "    still = and_(sessions.c.session_id == seen.session_id, sessions.c.state == seen.state)",
        "    still = and_(sessions.c.session_id == seen.session_id)",
        MODEL,
    ),
    Mutant(
        "an answer to an earlier question is taken for this one",
        "app/sessions/moves.py",
        "    if body.prompt_id is not None and body.prompt_id != session.prompt.prompt_id:",
        '    if body.prompt_id == "":',
        MODEL,
    ),
    Mutant(
        "the repeat of an answer is refused",
        "app/sessions/moves.py",
        "    return bool(row.answer_digest == _answer_digest(fields, body))",
        "    return bool(row.answer_digest is fields)",
        MODEL,
    ),
    Mutant(
        "an ended session holds its destination",
        "app/sessions/moves.py",
        ".where(row.session_id != session_id, row.state.in_(LIVE), held)",
        ".where(row.session_id != session_id, held)",
        MODEL,
    ),
    Mutant(
        "a project does not hold what is below it",
        "app/sessions/moves.py",
        "    held = or_(row.destination_key.in_((destination_key, project_key)), below)",
        "    held = row.destination_key.in_((destination_key, project_key))",
        MODEL,
    ),
    Mutant(
        "what is refused in a group is written all the same",
        "app/connections.py",
        '            self._connection.exec_driver_sql("ROLLBACK TO unit")',
        "            pass",
        MODEL,
    ),
    Mutant(
        "deaths are not counted",
        "app/sessions/moves.py",
        "values(step_deaths=sessions.c.step_deaths + 1)",
        "values(step_deaths=sessions.c.step_deaths)",
        MODEL,
    ),
    Mutant(
        "a cursor is off by one",
        "app/sessions/store.py",
        "later = _FRAMES.where(table.session_id == session_id, table.seq > cursor)",
        "later = _FRAMES.where(table.session_id == session_id, table.seq > cursor + 1)",
        MODEL,
    ),
    Mutant(
        "a ring of the bell is lost",
        "app/sessions/feed.py",
        "                    bell.clear()\n"
        "                    page = _bounded(await self._store.frames_after(session_id, cursor, PAGE))\n",
        "                    page = _bounded(await self._store.frames_after(session_id, cursor, PAGE))\n"
        "                    bell.clear()\n",
        Tests("tests/test_feed.py::test_what_is_committed_while_a_follower_reads_is_not_slept_through"),
    ),
    Mutant(
        "a store that went back keeps its epoch",
        "app/database.py",
        ' and same and int(str(note["position"])) <= head:',
        " and same:",
        Tests("tests/survival/test_model.py::test_a_history_that_was_left_and_comes_back_has_another_epoch"),
    ),
    Mutant(
        "a failed sync of the store passes",
        "app/connections.py",
        "        sqlite3.SQLITE_FULL,\n",
        "        sqlite3.SQLITE_FULL,\n        sqlite3.SQLITE_IOERR,\n",
        Errors(At("plain", ("openat .*copier.yml", "fdatasync")), "EIO"),
    ),
    Mutant(
        "a damaged store passes",
        "app/connections.py",
        "        sqlite3.SQLITE_FULL,\n",
        "        sqlite3.SQLITE_FULL,\n        sqlite3.SQLITE_CORRUPT,\n",
        Tests(
            "tests/survival/test_faults_stores.py::test_what_is_done_to_its_files_under_the_service_loses_nothing_in_silence[overwrite_a_page]"
        ),
    ),
    Mutant(
        "a store that was exchanged passes",
        "app/connections.py",
        "        if _identity(self._path) != self._identity:",
        "        if not self._identity:",
        Tests(
            "tests/survival/test_faults_stores.py::test_what_is_done_to_its_files_under_the_service_loses_nothing_in_silence[replace]"
        ),
    ),
)

MUTANTS = {mutant.name: mutant for mutant in _TABLE}

_OF_EACH = {mutant.hunt: mutant.name for mutant in reversed(_TABLE)}
CONTROLS = {f"nothing, hunted as: {name}": hunt for hunt, name in _OF_EACH.items()}
"""Each hunt, which must find nothing in a copy without a bug."""


# Trying them


class Trial(NamedTuple):
    """What became of one hunt, in how many seconds: it found something or nothing, or `missed` its aim."""

    name: str
    planted: bool
    found: str | None
    missed: str | None
    seconds: float

    @property
    def fine(self) -> bool:
        """A bug was caught, or nothing where there is none."""
        return self.missed is None and self.planted == (self.found is not None)

    def __str__(self) -> str:
        outcome = f"found: {self.found[:_SHOWN]}" if self.found else f"missed: {self.missed}"
        if self.found is None and self.missed is None:
            outcome = "nothing was found"
        bug = self.name if self.planted else f"without a bug, {self.name}"
        return f"{'' if self.fine else 'WRONG: '}{bug}: {outcome} ({self.seconds:.0f} s)"


def plant(mutant: Mutant, root: Path) -> None:
    """Raises ValueError where the line is not, or more than once."""
    path = root / mutant.path
    before, after = path.read_text().split(mutant.line)
    path.write_text(before + mutant.planted + after)


def _hunted(name: str) -> Trial:
    """What the hunt for a bug finds in a copy where it is planted, or a control in one where nothing is."""
    mutant = MUTANTS.get(name)
    hunt = CONTROLS[name] if mutant is None else mutant.hunt
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in _COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, root / part)
        if mutant is not None:
            plant(mutant, root)
        began = time.monotonic()
        found, missed = None, None
        try:
            found = hunt(root)
        except Missed as why:
            missed = str(why)
        return Trial(name, mutant is not None, found, missed, time.monotonic() - began)


def _possible(name: str) -> bool:
    """Whether there is on this machine what its hunt takes."""
    hunt = CONTROLS[name] if name in CONTROLS else MUTANTS[name].hunt
    return isinstance(hunt, Tests) or (AVAILABLE and not (isinstance(hunt, Cuts) and power.unavailable()))


def sweep(chosen: Sequence[str] = (), *, tell: Callable[[str], None]) -> list[Trial]:
    """Hunt for these bugs, several beside each other, or for all, and once for each kind of hunt for nothing."""
    wanted = chosen or (*CONTROLS, *MUTANTS)
    possible = [name for name in wanted if _possible(name)]
    tell(f"seed {SEED}; {len(wanted) - len(possible)} of {len(wanted)} hunts cannot be done on this machine")
    trials = []
    with ProcessPoolExecutor(LANES, mp_context=get_context("spawn")) as hands:  # a hunt patches what it uses
        for trial in hands.map(_hunted, possible):
            trials.append(trial)
            tell(str(trial))
            if not trial.fine:
                tell(f"    the same again: python -m tests.survival mutants {trial.name!r}")
    tell(f"{len(trials)} hunts, {sum(not trial.fine for trial in trials)} wrong")
    return trials


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
