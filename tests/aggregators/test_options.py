"""What the laws do not ask: options of each aggregator."""

import numpy as np
import pytest

import support
from hansa.aggregators.blocks import gather
from hansa.aggregators.krum import Krum, squared_distances
from hansa.aggregators.mean import Mean
from hansa.aggregators.trimmed_mean import TrimmedMean
from hansa.core.errors import InputError


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (Mean, {"weighting": "size"}, r'Mean\(weighting=\): expected "examples" or "clients"'),
        (Mean, {"max_weight": 0}, r"Mean\(max_weight=\): expected a positive number or None"),
        (Mean, {"denominator": float("inf")}, r"Mean\(denominator=\): expected a positive number or None"),
        (TrimmedMean, {"fraction": 0.5}, r"TrimmedMean\(fraction=\): expected 0 <= fraction < 0.5"),
        (TrimmedMean, {"fraction": -0.1}, r"TrimmedMean\(fraction=\)"),
        (Krum, {"num_byzantine": -1}, r"Krum\(num_byzantine=\): expected 0 or more"),
        (Krum, {"num_byzantine": 1, "num_selected": 0}, r"Krum\(num_selected=\): expected 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(kind, options, says):
    with pytest.raises(InputError, match=says):
        kind(**options)


def test_distances_are_those_between_rows():
    rows = np.array([[0.0, 0], [3, 4], [0, 1]], np.float32)
    np.testing.assert_allclose(squared_distances(rows), [[0, 25, 1], [25, 0, 18], [1, 18, 0]])


def test_rows_that_lie_together_are_not_copied():
    block = support.block(np.arange(12.0).reshape(4, 3))
    together = gather([(block, i) for i in (1, 2, 3)], ["b", "c", "d"])
    assert np.shares_memory(together.values, block.values)
    apart = gather([(block, i) for i in (3, 1)], ["d", "b"])
    assert apart.values.tolist() == block.values[[3, 1]].tolist()
    assert apart.clients == ("d", "b")
