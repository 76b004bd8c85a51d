"""A step taken some columns at a time, of rows and a state in files, has the bits of one taken as a whole."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hansa
from hansa import long_vectors
from hansa.core import round as core
from hansa.core.chain import Transform
from hansa.core.key import Key
from hansa.core.layout import Layout
from hansa.core.protocols import Plan, Report, Slot, Updates
from hansa.core.round import Context
from hansa.core.tasks import Parts
from hansa.long_vectors import Later
from hansa.server_optimizers import ServerAdam
from hansa.training.long_rounds import LongRounds


@dataclass(frozen=True, kw_only=True)
class Normed(hansa.FedAvg):
    """FedAvg that must see the whole mean: its step has norm 1."""

    def server_update(self, state, mean):
        return super().server_update(state, mean._replace(values=mean.values / np.linalg.norm(mean.values)))


class Bounded(hansa.FedAvg):
    """FedAvg that claims a bound on the losses beside its updates, so that noise can be sized."""

    tail_bound = 1.0


@dataclass(frozen=True, kw_only=True)
class Largest(ServerAdam):
    """A server optimizer that must see the whole update."""

    def second(self, v, square):
        return np.full_like(v, square.max())


@dataclass(frozen=True, kw_only=True)
class FedLargest(hansa.FedAdam):
    def optimizer(self):
        return Largest()


@dataclass(frozen=True, kw_only=True)
class Reverse(Transform):
    """A transform whose decode must see the whole sum."""

    def decode(self, values, settings, shared):
        return values[:, ::-1] * 1


@dataclass(frozen=True, kw_only=True)
class Shift(Transform):
    """A transform whose release must see the whole mean."""

    def release(self, mean, state, sensitivity, secret):
        return mean._replace(values=mean.values - np.mean(mean.values)), state


@dataclass(frozen=True, kw_only=True)
class Halved(hansa.Mean):
    def reduce(self, blocks, scales):
        mean = super().reduce(blocks, scales)
        return mean._replace(values=mean.values * (0.5 if np.abs(mean.values).sum() > 1 else 1.0))


ALGORITHMS = {
    "FedAvg": hansa.FedAvg(client_learning_rate=0.1),
    "FedProx": hansa.FedProx(client_learning_rate=0.1, strength=0.5),
    "FedAvgM": hansa.FedAvgM(client_learning_rate=0.1),
    "FedAdagrad": hansa.FedAdagrad(client_learning_rate=0.1),
    "FedAdam": hansa.FedAdam(client_learning_rate=0.1),
    "FedYogi": hansa.FedYogi(client_learning_rate=0.1),
    "SCAFFOLD": hansa.SCAFFOLD(client_learning_rate=0.1, server_learning_rate=0.7),
}
MEANS = (hansa.Mean(), hansa.Mean(weighting="clients"), hansa.Mean(max_weight=2.0), hansa.Mean(denominator=3.7))


def vectors(rng, *shape):
    """Numbers of which every order of addition rounds in another way."""
    return (rng.normal(size=shape) * 10.0 ** rng.integers(-9, 9, shape)).astype(np.float32)


def reports(rng, count, size):
    """Some clients of a cohort of ``count`` that answered, in any order, a row each."""
    cohort = tuple(f"c{i}" for i in range(count))
    present = [cohort[i] for i in rng.permutation(count)[: rng.integers(1, count + 1)]]
    rows = [
        Updates((c,), vectors(rng, 1, size), rng.uniform(0.5, 9, 1), {"train_loss": rng.normal(size=1)})
        for c in present
    ]
    slot = Slot(0, 0, "update")
    return cohort, {"update": tuple(Report(slot, row.clients, row) for row in rows)}


def some_packed(answers):
    """The same answers, of which every other row is unpacked when its columns are asked for."""

    def packed(number, report):
        values = report.payload.values
        lazy = Later(values.shape, lambda first, stop: values[:, first:stop].copy(), np.float32)
        return report._replace(payload=report.payload._replace(values=lazy)) if number % 2 else report

    return [
        (cohort, {"update": tuple(packed(number, report) for number, report in enumerate(history["update"]))})
        for cohort, history in answers
    ]


def rounds(parts, params, answers, scales, context, begin):
    """The state and the mean after two rounds of the same reports."""
    state = begin(parts, params, None)
    plan = Plan(Slot(0, 0, "update"), True, {}, tuple(t.settings(None) for t in parts.transforms), Key.of(0))
    for _ in range(2):
        groups = [(plan, parts.aggregator.open(cohort, history)) for cohort, history in answers]
        combine = context.combine or core.combine
        state, mean = combine(parts, state, groups, scales, Key.of(1), context)
    return state, mean


def bits(state, mean):
    tail = {name: float(value) for name, value in mean.tail.items()}
    named = {name: (value.dtype, value.tobytes()) for name, value in state.algorithm.items()}
    return (
        list(named),
        named,
        state.transforms,
        np.asarray(mean.values).tobytes(),
        tail,
        mean._replace(values=0, tail=0),
    )


@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    mean=st.sampled_from(MEANS),
    num_params=st.one_of(st.integers(1, 40), st.integers(8_190, 8_200)),
    width=st.sampled_from([1, 2, 7, 8_192]),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_some_columns_at_a_time_a_step_has_the_bits_of_the_whole(name, mean, num_params, width, counts, seed):
    rng = np.random.default_rng(seed)
    width = max(width, num_params // 40)
    size = 2 * num_params if name == "SCAFFOLD" else num_params
    parts = Parts(ALGORITHMS[name], (hansa.Clip(norm=1.0),), mean)
    layout = Layout.of(
        {"w": np.zeros((num_params // 2, 1)), "b": np.zeros(num_params - num_params // 2)}, {"b": "buffer"}
    )
    context = Context(Key.of(2), layout, num_population=100)
    params, answers = vectors(rng, num_params), [reports(rng, count, size) for count in counts]
    scales = rng.uniform(0.1, 1.0, len(counts)).tolist()
    whole = rounds(parts, params, answers, scales, context, core.begin)
    with tempfile.TemporaryDirectory() as folder:
        long = LongRounds(Path(folder))
        with mock.patch.multiple(long_vectors, LONG=1, _WIDTH=width):
            cut = rounds(
                parts,
                long.keep(params),
                some_packed(answers),
                scales,
                context._replace(combine=long.combine),
                long.begin,
            )
            assert bits(*cut) == bits(*whole)
        assert all(long_vectors.mapping(vector) is not None for vector in cut[0].algorithm.values())
        assert not list(Path(folder).iterdir())


@given(num_params=st.integers(2, 9_000), count=st.integers(2, 60), seed=st.integers(0, 2**32 - 1))
def test_rows_that_are_long_only_together_have_the_bits_of_the_whole_and_stay_in_memory(num_params, count, seed):
    rng = np.random.default_rng(seed)
    cohort, answers = reports(rng, count, num_params)
    whole = hansa.Mean().open(cohort, answers)
    with mock.patch.multiple(long_vectors, LONG=4 * num_params + 1):
        cut = hansa.Mean().open(cohort, answers)
    assert isinstance(cut.values, np.ndarray)
    assert cut.values.tobytes() == whole.values.tobytes()
    assert (cut.clients, cut.weights.tobytes()) == (whole.clients, whole.weights.tobytes())
    assert {name: column.tobytes() for name, column in cut.tail.items()} == {
        name: column.tobytes() for name, column in whole.tail.items()
    }


FEDAVG = ALGORITHMS["FedAvg"]
WHOLE = {
    "the algorithm": Parts(Normed(client_learning_rate=0.1), (), hansa.Mean()),
    "the server optimizer": Parts(FedLargest(client_learning_rate=0.1), (), hansa.Mean()),
    "the decoding": Parts(FEDAVG, (Reverse(),), hansa.Mean()),
    "the release": Parts(FEDAVG, (Shift(),), hansa.Mean()),
    "the noise": Parts(
        Bounded(client_learning_rate=0.1),
        (hansa.Clip(norm=1.0), hansa.GaussianNoise(noise_multiplier=0.5)),
        hansa.Mean(weighting="clients", denominator=5),
    ),
    "the reduction": Parts(FEDAVG, (), Halved()),
    "the rows": Parts(FEDAVG, (), hansa.Median()),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_must_see_whole_vectors_is_given_them(what, tmp_path):
    rng, parts, size = np.random.default_rng(3), WHOLE[what], 9_000
    params, answers, context = vectors(rng, size), [reports(rng, 9, size)], Context(Key.of(2))
    whole = rounds(parts, params, answers, [1.0], context, core.begin)
    long = LongRounds(tmp_path)
    with mock.patch.multiple(long_vectors, LONG=1, _WIDTH=512):
        given = rounds(
            parts, long.keep(params), some_packed(answers), [1.0], context._replace(combine=long.combine), long.begin
        )
        assert bits(*given) == bits(*whole)


def test_what_is_short_stays_in_memory(tmp_path):
    rng, parts = np.random.default_rng(3), Parts(FEDAVG, (), hansa.Mean())
    long, params = LongRounds(tmp_path), vectors(rng, 100)
    context = Context(Key.of(2), combine=long.combine)
    state, mean = rounds(parts, params, [reports(rng, 9, 100)], [1.0], context, long.begin)
    assert long.keep(params) is params
    assert long_vectors.mapping(state.algorithm["params"]) is None
    assert isinstance(mean.values, np.ndarray)
