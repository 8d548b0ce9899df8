"""What was acknowledged outlasts a power cut, and what lies at a destination is whole."""

import pytest

from tests.survival import power
from tests.survival.shares import SEED, SHARE

_LACKING = power.unavailable()
pytestmark = pytest.mark.skipif(_LACKING is not None, reason=_LACKING or "nothing lacks")


@pytest.mark.slow
def test_nothing_that_was_acknowledged_un_happens_when_the_power_is_cut() -> None:
    tally = power.cuts(SHARE, SEED, tell=print)
    assert tally.failed == []
    assert tally.recovered > 0
    assert sum(image.live for image in tally.images) > len(tally.images), "hardly anything was under way"
    assert any(image.lost.lost for image in tally.images), "no disk has lost anything of its cache"
