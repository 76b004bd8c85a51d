"""The laws of update transforms, each asked of every member: a new transform is one line of ``TRANSFORMS``."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import support
from hansa.core import chain
from hansa.core.protocols import Report
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.correlated_noise import CorrelatedNoise
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.random_mask import RandomMask
from hansa.transforms.rotate import Rotate
from hansa.transforms.sparsify import TopK
from hansa.wire import pack, pack_report, unpack, unpack_report

TRANSFORMS = [
    Clip(norm=1.0),
    Clip(norm=1e-3),
    AdaptiveClip(start=1.0),
    Quantize(bits=2),
    Quantize(bits=5),
    Quantize(bits=8),
    Quantize(bits=16),
    TopK(fraction=0.3),
    TopK(fraction=0.3, error_feedback=False),
    GaussianNoise(noise_multiplier=1.0),
    CorrelatedNoise(noise_multiplier=1.0),
    Rotate(),
    RandomMask(fraction=0.4),
]


def needs_whole_rows(first, second):
    """Whether the second transform refuses rows that the first one shortens."""
    return hasattr(first, "encoded_size") and isinstance(second, Rotate | RandomMask)


# Equal on average, with the stated variance of a row of length n and largest magnitude m.
UNBIASED = {Quantize(bits=bits): (lambda n, m, levels: n * (m / levels) ** 2 / 4) for bits in (2, 3, 8)}

_rng = np.random.default_rng(0)
NASTY = {
    "random": _rng.normal(size=(3, 40)),
    "many sizes": _rng.normal(size=(3, 40)) * 10.0 ** _rng.integers(-30, 30, (3, 40)),
    "huge": np.full((2, 17), 1e30),
    "huge and small": np.array([[1e30, 1.0, -1e-30, 0.0], [1.0, 1e-20, -3e29, 7.0]]),
    "subnormal": np.array([[1e-42, -3e-44, 0.0], [-1e-45, -1e-40, 1e-39]]),
    "zero": np.zeros((2, 9)),
    "minus zero": -np.zeros((2, 9)),
    "one-hot": np.eye(3, 11) * -4.2,
    "one parameter": np.array([[0.37], [-1e30], [0.0], [1e-42]]),
    "equal": np.full((2, 8), -0.1),
    "two alike": np.array([[3.0, -4.0], [3.0, -4.0]]),
}
BLOCKS = {name: support.block(values) for name, values in NASTY.items()}
PAIRS = [pair for pair in itertools.product(TRANSFORMS, repeat=2) if not needs_whole_rows(*pair)]
CHAINS = [(t,) for t in TRANSFORMS] + PAIRS

every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
every_chain = pytest.mark.parametrize("transforms", CHAINS, ids=lambda c: " ".join(map(repr, c)))
finite_blocks = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 9)),
    elements=st.floats(-(2.0**120), 2.0**120, width=32, allow_subnormal=True),
)


def norms(rows):
    return np.sqrt((np.asarray(rows, np.float64) ** 2).sum(axis=1))


def memory_rows(remembered, count):
    return [{name: value[i] for name, value in remembered.items()} for i in range(count)]


def mixed(transforms):
    """Whether small values are differences of large ones, and no more exact than those are."""
    return any(isinstance(transform, Rotate) for transform in transforms)


def bits(array):
    return np.ascontiguousarray(array).tobytes()


def assert_bounded(transforms, block):
    """Each row's decoded norm is within the chain's bound for that row's own norm."""
    sent, _, plan = support.encoded(transforms, block)
    after = norms(chain.decode(transforms, sent.values, plan))
    for before, found in zip(norms(block.values), after, strict=True):
        bound = before
        for transform, settings in zip(transforms, plan.settings, strict=True):
            bound = transform.norm_bound(bound, settings)
        assert found <= bound


# --------------------------------------------------------------------------------------------------- norm bounds


@every_chain
def test_no_row_comes_out_longer_than_the_claimed_bound(transforms):
    for block in BLOCKS.values():
        assert_bounded(transforms, block)


@every_transform
@given(values=finite_blocks)
def test_no_generated_row_comes_out_longer_than_the_claimed_bound(transform, values):
    assert_bounded((transform,), support.block(values))


@every_transform
def test_a_bound_never_falls_when_the_incoming_one_rises(transform):
    settings = transform.settings(transform.init(10))
    found = [transform.norm_bound(bound, settings) for bound in (0.0, 0.5, 2.0, math.inf)]
    assert found == sorted(found)


def test_a_claimed_bound_that_is_too_small_is_found():
    class Boast(Clip):
        def norm_bound(self, incoming, settings):
            return self.norm * 0.99

    with pytest.raises(AssertionError):
        assert_bounded((Boast(norm=1.0),), BLOCKS["random"])


@pytest.mark.parametrize("transform", [TopK(fraction=0.3)], ids=repr)
def test_what_remembers_claims_no_bound(transform):
    block = BLOCKS["random"]
    _, kept, _ = support.encoded((transform,), block)
    assert kept
    assert transform.norm_bound(1.0, None) == math.inf


# --------------------------------------------------------------------------------------- determinism and blocks


@every_chain
def test_equal_keys_give_equal_bits(transforms):
    first, kept, _ = support.encoded(transforms, BLOCKS["random"])
    second, again, _ = support.encoded(transforms, BLOCKS["random"])
    assert bits(first.values) == bits(second.values)
    assert {n: bits(v) for n, v in kept.items()} == {n: bits(v) for n, v in again.items()}


@every_chain
def test_a_block_equals_its_rows_one_by_one(transforms):
    for block in BLOCKS.values():
        nothing: list[dict] = [{}] * len(block.clients)
        memory = memory_rows(support.encoded(transforms, block)[1], len(block.clients))
        for remembered in (nothing, memory):
            whole, keeps, _ = support.encoded(transforms, block, remembered)
            for i in range(len(block.clients)):
                row, keep, _ = support.encoded(transforms, block.take([i]), remembered[i : i + 1])
                assert bits(row.values[0]) == bits(whole.values[i])
                assert {n: bits(v[0]) for n, v in keep.items()} == {n: bits(v[i]) for n, v in keeps.items()}
                assert {n: bits(v[0]) for n, v in row.side.items()} == {n: bits(v[i]) for n, v in whole.side.items()}


@every_chain
def test_a_row_does_not_depend_on_its_place(transforms):
    block = BLOCKS["random"]
    whole, _, _ = support.encoded(transforms, block)
    turned, _, _ = support.encoded(transforms, block.take([2, 0, 1]))
    assert bits(whole.values[[2, 0, 1]]) == bits(turned.values)


@every_chain
def test_weights_tail_and_names_pass_unchanged(transforms):
    block = support.block([[1.0, 2.0, 3.0], [0.5, 0.0, -9.0]], weights=[2, 5], loss=[0.25, 0.5])
    sent, _, _ = support.encoded(transforms, block)
    assert sent.clients == block.clients
    assert sent.weights.tolist() == [2, 5]
    assert sent.tail["loss"].tolist() == [0.25, 0.5]


# --------------------------------------------------------------------------------------------- sums and averages


@every_chain
def test_the_decoded_sum_is_the_sum_of_the_decoded(transforms):
    sent, _, plan = support.encoded(transforms, BLOCKS["random"])
    values = np.asarray(sent.values, np.float64)
    together = chain.decode(transforms, values.sum(axis=0, keepdims=True), plan)
    apart = chain.decode(transforms, values, plan).sum(axis=0, keepdims=True)
    np.testing.assert_allclose(together, apart, rtol=1e-12, atol=1e-12 * mixed(transforms) * np.abs(apart).max())


@pytest.mark.parametrize("transform", UNBIASED, ids=repr)
def test_rounding_is_right_on_average_with_at_most_the_stated_variance(transform):
    row, draws = np.array([1.0, -0.61, 0.02, 0.0, 0.333, -1e-5]), 4000
    sent, _, _ = support.encoded((transform,), support.block(np.tile(row, (draws, 1))))
    error = np.asarray(sent.values, np.float64) - row.astype(np.float32)
    step = 1.0 / transform.levels
    assert np.abs(error.mean(axis=0)).max() < 5 * step / 2 / math.sqrt(draws)
    assert (error**2).sum(axis=1).mean() <= UNBIASED[transform](len(row), 1.0, transform.levels) * 1.05
    assert error.std() > 0


# ------------------------------------------------------------------------------------------------------ the wire


@every_chain
def test_what_is_sent_survives_its_bytes_bit_for_bit(transforms):
    codec = chain.codec(transforms)
    for block in BLOCKS.values():
        sent, _, plan = support.encoded(transforms, block._replace(tail={"loss": np.arange(len(block.clients)) / 3}))
        for i, client in enumerate(sent.clients):
            row = sent.take([i])
            body = pack_report(Report(plan.slot, (client,), row), codec)
            back = unpack_report(body, plan.slot, client, codec, row.values.shape[1]).payload
            assert back.values.dtype == np.float32
            assert bits(back.values) == bits(row.values)
            assert bits(back.weights) == bits(row.weights)
            assert bits(back.tail["loss"]) == bits(row.tail["loss"])


@every_transform
@given(values=finite_blocks)
def test_what_is_generated_survives_its_codec_bit_for_bit(transform, values):
    sent, _, _ = support.encoded((transform,), support.block(values))
    codec = chain.codec((transform,))
    back, _ = codec.unpack(codec.pack(sent), values.shape[1])
    assert bits(back) == bits(sent.values)


@every_transform
def test_what_clients_are_told_is_data(transform):
    settings = transform.settings(transform.init(10))
    assert unpack(pack({"settings": settings}))["settings"] == settings


@every_transform
def test_what_clients_remember_is_finite_float32(transform):
    for block in BLOCKS.values():
        _, kept, _ = support.encoded((transform,), block)
        for value in kept.values():
            assert value.dtype == np.float32
            assert np.isfinite(value).all()


# --------------------------------------------------------------------------------------------------- namespaces


@every_chain
def test_torch_rows_give_what_numpy_rows_give(transforms):
    torch = pytest.importorskip("torch")
    for name in ("random", "one-hot", "zero", "huge and small", "one parameter"):
        block = BLOCKS[name]
        tensor = block._replace(values=torch.tensor(block.values))
        expected, kept, _ = support.encoded(transforms, block)
        found, keeps, plan = support.encoded(transforms, tensor)
        within = 1e-6 * mixed(transforms) * np.abs(expected.values).max()
        np.testing.assert_allclose(np.asarray(found.values), expected.values, rtol=1e-6, atol=within)
        for part, value in kept.items():
            np.testing.assert_allclose(np.asarray(keeps[part]), value, rtol=1e-6)
        pack_report(Report(plan.slot, found.clients[:1], found.take([0])), chain.codec(transforms))


@every_transform
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_transform_that_says_so_leaves_rows_that_are_not_finite_so(transform, value):
    block = support.block([[1.0, value, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    with np.errstate(all="ignore"):
        sent, _, _ = support.encoded((transform,), block)
    if getattr(transform, "shows_nonfinite", False):
        assert not np.isfinite(np.asarray(sent.values[0])).all()
    assert np.isfinite(np.asarray(sent.values[1])).all()
