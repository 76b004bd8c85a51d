import math
from dataclasses import dataclass, field

import numpy as np
import pytest

import support
from hansa.core import chain
from hansa.core.chain import Raw, Transform
from hansa.core.key import Key
from hansa.core.protocols import Aggregate, Draws, Memory, Plan
from hansa.transforms.clip import Clip
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK


@dataclass(frozen=True, kw_only=True)
class Traced(Transform):
    """Scales by ``factor``, remembers what it saw, and writes down each call."""

    factor: float
    trace: list = field(default_factory=list, compare=False)

    def encode(self, updates, settings, memory, draws):
        self.trace.append(("encode", draws))
        seen = memory.get("seen", np.zeros(1)) + 1
        return updates._replace(values=updates.values * np.float32(self.factor)), {"seen": seen}

    def decode(self, values, settings, shared):
        self.trace.append(("decode", shared))
        return values / self.factor

    def release(self, mean, state, sensitivity, secret):
        self.trace.append(("release", sensitivity, secret))
        return mean._replace(values=mean.values + self.factor), (state or 0) + 1

    def norm_bound(self, incoming, settings):
        return incoming * self.factor

    def tail_bound(self, settings):
        return self.factor


TRACE: list = []
TWO = (Traced(factor=2.0, trace=TRACE), Traced(factor=5.0, trace=TRACE))
BLOCK = support.block([[1.0, 2.0], [3.0, 4.0]])


@pytest.fixture(autouse=True)
def _empty_trace():
    TRACE.clear()


def test_encodes_run_in_order_and_decodes_in_reverse():
    sent, _, plan = support.encoded(TWO, BLOCK)
    assert sent.values.tolist() == [[10, 20], [30, 40]]
    assert chain.decode(TWO, sent.values, plan).tolist() == BLOCK.values.tolist()
    shared = [call[1].shared if call[0] == "encode" else call[1] for call in TRACE]
    assert [call[0] for call in TRACE] == ["encode", "encode", "decode", "decode"]
    assert shared == [shared[0], shared[1], shared[1], shared[0]]  # a stage decodes with the key it encoded with


def test_each_stage_and_each_client_has_a_stream_of_its_own():
    _, _, plan = support.encoded(TWO, BLOCK)
    (_, first), (_, second) = TRACE
    streams = [first.shared, second.shared, *first.rows, *second.rows, *first.secret, *second.secret]
    assert len(set(streams)) == len(streams) == 10
    assert isinstance(first, Draws)
    assert first.rows[0] == plan.key.child("transform", 0, "c0")


def test_memory_is_filed_by_position():
    _, kept, _ = support.encoded(TWO, BLOCK)
    assert {name: value.tolist() for name, value in kept.items()} == {"0.seen": [[1], [1]], "1.seen": [[1], [1]]}
    rows = [{"0.seen": np.array([5.0]), "1.seen": np.array([7.0])}, {}]
    _, again, _ = support.encoded(TWO, BLOCK, rows)
    assert {name: value.tolist() for name, value in again.items()} == {"0.seen": [[6], [1]], "1.seen": [[8], [1]]}


def test_releases_run_once_a_round_in_reverse_each_with_state_and_secret_of_its_own():
    mean, states = chain.release(TWO, Aggregate(np.zeros(2), {}), (None, 3), 0.25, Key.of("secret"))
    assert mean.values.tolist() == [7, 7]
    assert states == (1, 4)
    assert [call[1] for call in TRACE] == [0.25, 0.25]
    assert TRACE[0][2] == Key.of("secret").child("release", 1)
    assert TRACE[1][2] == Key.of("secret").child("release", 0)


def test_the_default_transform_changes_and_claims_nothing():
    plain = Transform()
    assert plain.encode(BLOCK, None, Memory([{}, {}]), None) == (BLOCK, {})
    assert plain.norm_bound(1.0, None) == math.inf
    assert plain.tail_bound(None) == 0
    assert plain.init(3) is plain.settings(None) is None
    assert plain.codec(Raw()) == Raw()


def test_an_empty_chain_is_raw_and_proves_nothing():
    plan = Plan(support.SLOT, True, {}, (), Key.of(0))
    assert chain.decode((), BLOCK.values, plan) is BLOCK.values
    assert chain.norm_bound((), ()) == math.inf
    assert chain.codec(()) == Raw()


def test_the_bound_of_a_chain_is_that_of_its_stages_and_tails_together():
    settings = (None, None)
    assert chain.norm_bound((Clip(norm=3.0),), settings[:1]) == 3.0
    assert chain.norm_bound((Clip(norm=3.0),), settings[:1], tail=4.0) == 5.0
    assert chain.norm_bound((Clip(norm=3.0), Traced(factor=2.0)), settings) == math.hypot(6.0, 2.0)
    assert chain.norm_bound((Clip(norm=3.0), TopK()), settings) == math.inf


@pytest.mark.parametrize(
    ("transforms", "kind"),
    [
        ((Quantize(bits=8),), "Levels"),
        ((Quantize(bits=8), Clip(norm=1.0)), "Raw"),
        ((Clip(norm=1.0), Quantize(bits=8)), "Levels"),
        ((Quantize(bits=8), TopK()), "Sparse"),
        ((TopK(), Clip(norm=1.0)), "Raw"),
    ],
)
def test_the_codec_is_the_last_that_fits_the_values(transforms, kind):
    assert type(chain.codec(transforms)).__name__ == kind


@pytest.mark.parametrize("namespace", ["numpy", "torch"])
def test_finite_rows_are_told_from_others_even_where_their_sum_overflows(namespace):
    rows = np.array(
        [[1, 2], [3e38, 3e38], [np.inf, 1], [1, np.nan], [np.inf, -np.inf], [-3e38, 3e38], [1e-45, 0]], np.float32
    )
    values = rows if namespace == "numpy" else pytest.importorskip("torch").tensor(rows)
    assert chain.finite_rows(values).tolist() == [True, True, False, False, False, True, True]
    assert chain.finite_rows(values[:0]).tolist() == []


def test_raw_packs_a_rows_side_columns_beside_its_values():
    block = BLOCK._replace(side={"scale": np.array([1.0, 2.0])})
    values, side = Raw().unpack(Raw().pack(block), 2)
    assert values.tolist() == BLOCK.values.tolist()
    assert {name: column.tolist() for name, column in side.items()} == {"scale": [1.0, 2.0]}
