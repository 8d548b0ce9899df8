"""Bugs that are planted in the product are found by the harness, which finds nothing where there are none."""

import random

import pytest

from tests.survival import mutants
from tests.survival.shares import SEED, SHARE
from tests.survival.stage import ROOT


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_a_bug_can_be_planted(name: str) -> None:
    """What it replaces stands in its file once, and what comes of it is still Python."""
    mutant = mutants.MUTANTS[name]
    text = (ROOT / mutant.path).read_text()
    assert text.count(mutant.line) == 1
    compile(text.replace(mutant.line, mutant.planted), mutant.path, "exec")


@pytest.mark.slow
def test_planted_bugs_are_found_and_nothing_where_there_are_none() -> None:
    """A share of the bugs, and one of the controls; others with another seed."""
    chance = random.Random(SEED)
    chosen = chance.sample([*mutants.MUTANTS], max(1, round(SHARE * len(mutants.MUTANTS))))
    trials = mutants.sweep([chance.choice([*mutants.CONTROLS]), *chosen], tell=print)
    assert [str(trial) for trial in trials if not trial.fine] == []
    if not trials:
        pytest.skip("nothing of it can be hunted here")
