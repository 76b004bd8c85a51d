import os

import pytest

from faults.torment import lane

pytestmark = pytest.mark.network


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.slow)])
def test_random_kills_lose_no_receipt_and_count_nothing_twice(seconds, buffered):
    tally = lane(seconds, seed=2 * int.from_bytes(os.urandom(4), "big") + buffered)
    assert tally.failures == 0, "\n".join(tally.sentences)
    assert tally.federations > 0
    assert tally.kills > seconds / 2
