"""A service that is killed at any call by which it changes something finishes what it began."""

import pytest

from tests.survival import deaths
from tests.survival.knife import AVAILABLE
from tests.survival.shares import SEED, SHARE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernel of another system decides on no calls")

OF_ALL = 0.1
"""Of all points, what a share of one tries in a run of the tests; the command tries every one."""


@pytest.mark.slow
def test_whatever_it_is_killed_at_it_finishes_what_it_began() -> None:
    tally = deaths.sweep(SHARE * OF_ALL, SEED, tell=print)
    assert tally.failed == []
    assert len(tally.deaths) > tally.trials, "hardly anything died twice"
