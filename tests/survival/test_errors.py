"""A disk that reports errors costs no session, and no viewer a frame."""

import pytest

from tests.survival import errors
from tests.survival.knife import AVAILABLE
from tests.survival.shares import SEED, SHARE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernel of another system decides on no calls")

OF_ALL = 500
"""Faults of the whole."""


@pytest.mark.slow
def test_a_disk_that_fails_at_any_call_is_outlasted_or_ends_the_service_with_a_last_word() -> None:
    tally = errors.sweep(round(SHARE * OF_ALL), SEED, tell=print)
    assert tally.failed == []
    assert tally.injected, "no disk has failed"
