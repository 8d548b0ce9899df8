"""What the tests of faults share: a stage on which services start fast."""

from collections.abc import Iterator

import pytest

from tests.survival.stage import Stage, staged


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as one:
        yield one
