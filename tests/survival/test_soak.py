"""A short time with everything at once; the long one is `python -m tests.survival soak`."""

import pytest

from tests.survival.shares import SEED
from tests.survival.soak import Plan, soak


@pytest.mark.slow
def test_under_load_and_faults_all_sessions_end_and_all_viewers_see_what_is_stored() -> None:
    told: list[str] = []
    report = soak(Plan(seconds=18.0, seed=SEED, viewers=20), tell=told.append)
    print("\n" + "\n".join(told))
    assert not report.wrong
    assert report.faults.total() and report.ends and report.frames
