"""One round by hand: two or three clients, three numbers."""

import dataclasses
import math

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.algorithms.fedavg import FedAvg
from hansa.core.chain import Transform
from hansa.core.errors import Abandoned, CheckError
from hansa.core.key import Key
from hansa.core.protocols import Memory, Slot
from hansa.core.round import begin, client_round, make_plan, server_round
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from hansa.work import Work

TWO = support.targets(a=(1, 0, 2), b=(3, 4, 0))
FIRST = Slot(0, 0, "")


def one_round(federation, population=TWO, cohort=None, block_size=2, lost=(), slot=FIRST):
    state, context, site = support.world(federation, population, block_size)
    runtime = support.Lossy(site, lost)
    parts = federation.task("train")
    state, mean = server_round(parts, state, runtime, cohort or population.ids, context, slot)
    return state, mean, site


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extra(FedAvg):
    """FedAvg with a tail column of each client's number of steps."""

    def client_update(self, received, fit, memory):
        step = fit(received["params"]) - received["params"]
        return fit.updates(step, tail={"num_steps": fit.num_steps.astype(float)}), {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared(Extra):
    """The same, saying how long its tail can be."""

    tail_bound = 4.0


# --------------------------------------------------------------------------------------------------------- a round


def test_a_round_of_two_clients_by_hand():
    """One step of rate 1/2 towards (1, 0, 2) and (3, 4, 0): the mean of (.5, 0, 1) and (1.5, 2, 0)."""
    state, mean, _ = one_round(support.quadratic())
    assert state.algorithm["params"].tolist() == [1, 1, 0.5]
    assert mean.values.tolist() == [1, 1, 0.5]
    assert mean.clients == ("a", "b")
    assert mean.num_population == 2
    assert mean.tail == {"train_loss": (5 / 2 + 25 / 2) / 2}


def test_examples_are_weights():
    rows = Population({"a": Dataset([[4.0, 0, 0]], [0]), "b": Dataset([[0.0, 8, 0]] * 3, [0] * 3)})
    state, _, _ = one_round(support.quadratic(), rows)
    assert state.algorithm["params"].tolist() == [0.5, 3, 0]
    state, _, _ = one_round(support.quadratic(aggregator=Mean(weighting="clients")), rows)
    assert state.algorithm["params"].tolist() == [1, 2, 0]


def test_a_lost_client_is_left_out():
    state, mean, _ = one_round(support.quadratic(), lost=[("before", "update", "b")])
    assert state.algorithm["params"].tolist() == [0.5, 0, 1]
    assert mean.clients == ("a",)


def test_everybody_lost_abandons_the_attempt_and_keeps_nothing():
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, TWO)
    lossy = support.Lossy(site, [("after", "update", "a"), ("before", "update", "b")])
    site.reports = lambda slot: iter([*_drained(site, slot)][:0])  # nobody answers
    with pytest.raises(Abandoned, match="round 0: expected at least one client's update, found none"):
        server_round(federation.task("train"), state, lossy, TWO.ids, context, FIRST)
    assert site.memory.kept() == site._pending == site._scratch == {}


def _drained(site, slot):
    return type(site).reports(site, slot)


def test_a_replayed_round_gives_the_same_bits():
    federation = support.quadratic(
        transforms=(Clip(norm=1.0), Quantize(bits=4), GaussianNoise(noise_multiplier=0.1)),
        aggregator=Mean(weighting="clients", denominator=2),
    )
    first, second = (one_round(federation)[0].algorithm["params"] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    other = one_round(federation, slot=FIRST._replace(attempt=1))[0].algorithm["params"]
    assert other.tobytes() != first.tobytes()  # another attempt, another secret


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_client_without_examples_is_refused_with_the_reason():
    rows = Population({"a": Dataset([[1.0, 0, 2]], [0]), "b": Dataset(np.zeros((0, 3)), np.zeros(0))})
    state, mean, site = one_round(support.quadratic(), rows)
    assert mean.clients == ("a",)
    assert state.algorithm["params"].tolist() == [0.5, 0, 1]
    assert site.refusals() == [{"round": 0, "client": "b", "reason": "no training examples"}]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("transforms", [(), (Quantize(bits=8),), (TopK(fraction=0.4), Clip(norm=1.0))], ids=repr)
def test_an_update_that_is_not_finite_is_refused_and_the_rest_go_on(bad, block_size, transforms):
    rows = {c: TWO.load(c)[0] for c in TWO.ids}
    federation = support.quadratic(transforms=transforms)
    with np.errstate(invalid="ignore"):
        state, mean, site = one_round(
            federation, Population({**rows, "x": Dataset([[bad, 0, 0]], [0])}), block_size=block_size
        )  # fmt: skip
    healthy, _, _ = one_round(federation, block_size=block_size)
    assert mean.clients == ("a", "b")
    assert state.algorithm["params"].tobytes() == healthy.algorithm["params"].tobytes()
    assert site.refusals() == [{"round": 0, "client": "x", "reason": "update is not finite"}]
    assert set(site.memory.kept()) <= {"a", "b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Louder(Transform):
    """Multiplies until float32 is left behind."""

    def encode(self, updates, settings, memory, draws):
        return updates._replace(values=updates.values * np.float64(1e39)), {"kept": np.ones((len(updates.clients), 1))}


def test_an_update_that_a_transform_makes_infinite_is_refused_too():
    rows = Population({"a": Dataset([[0.0, 0, 0]], [0]), "b": Dataset([[3.0, 4, 0]], [0])})
    _, mean, site = one_round(support.quadratic(transforms=(Louder(),)), rows)
    assert mean.clients == ("a",)
    assert site.refusals() == [{"round": 0, "client": "b", "reason": "update is not finite"}]
    assert set(site.memory.kept()) == {"a"}


@pytest.mark.parametrize(("weight", "reason"), [(-1.0, "no training examples"), (np.nan, "update is not finite")])
def test_a_weight_that_is_not_a_positive_number_is_refused(weight, reason):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Weighing(FedAvg):
        def client_update(self, received, fit, memory):
            own = np.array([weight if client == "b" else 1.0 for client in fit.clients])
            return fit.updates(fit(received["params"]) - received["params"], weights=own), {}

    _, mean, site = one_round(support.quadratic(Weighing(client_learning_rate=0.5, local_steps=1)))
    assert mean.clients == ("a",)
    assert site.refusals()[0]["reason"] == reason


# ---------------------------------------------------------------------------------------------------- client_round


def test_a_client_refuses_in_a_report_that_names_nobody():
    federation = support.quadratic()
    state, context, _ = support.world(federation, TWO)
    plan = make_plan(federation.task("train"), state, context, ("e",), Slot(0, 0, "update"))
    work = Work(
        federation.learner, federation.algorithm, ("e",), [Dataset(np.zeros((0, 3)), np.zeros(0))], keys=[Key.of(0)]
    )
    report, memory, scratch = client_round(federation.task("train"), plan, work, Memory([{}]), {}, [Key.of(1)])
    assert report.clients == ()
    assert dict(report.refused) == {"e": "no training examples"}
    assert (memory.clients, memory.arrays, scratch) == ((), {}, {})


def test_rows_are_cast_to_the_wires_type_before_aggregation():
    federation = support.quadratic(transforms=(Louder(),))
    rows = Population({"a": Dataset([[1e-3, 0, 0]], [0])})
    state, context, site = support.world(federation, rows)
    plan = make_plan(federation.task("train"), state, context, ("a",), Slot(0, 0, "update"))
    report, _, _ = federation.exchange(plan, ("a",), site.rows(plan, ("a",)), Memory([{}]), {}, [Key.of(1)])
    assert report.payload.values.dtype == np.float32


def test_memory_of_other_parts_is_kept_when_one_part_writes():
    federation = support.quadratic(transforms=(TopK(fraction=0.4),))
    state, context, site = support.world(federation, TWO)
    site.memory.put(("a",), {"a.control": np.array([[7.0]])})
    server_round(federation.task("train"), state, site, TWO.ids, context, FIRST)
    kept = site.memory.kept()
    assert set(kept["a"]) == {"a.control", "0.residual"}
    assert kept["a"]["a.control"].tolist() == [7.0]
    assert set(kept["b"]) == {"0.residual"}


# ----------------------------------------------------------------------------------------------- plans, sensitivity


def test_a_plan_is_a_pure_function_of_state_and_slot():
    federation = support.quadratic(transforms=(Quantize(bits=8),))
    state, context, _ = support.world(federation, TWO)
    parts = federation.task("train")
    first, second = (make_plan(parts, state, context, TWO.ids, Slot(2, 1, "update")) for _ in range(2))
    assert first.key == second.key
    assert first.settings == second.settings == (3,)
    assert first.key not in (context.key, make_plan(parts, state, context, TWO.ids, Slot(2, 0, "update")).key)
    exchange = make_plan(parts, state, context, TWO.ids, Slot(2, 1, "other"))
    assert exchange.key == first.key  # exchanges of one attempt share their streams


def test_constants_travel_with_every_broadcast():
    federation = support.quadratic()
    state, context, _ = support.world(federation, TWO)
    plan = make_plan(federation.task("train"), state, context._replace(constants={"prepare.0": np.ones(2)}), (), FIRST)
    assert list(plan.broadcast) == ["prepare.0", "params"]


def noisy(algorithm, seen):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watching(GaussianNoise):
        def release(self, mean, state, sensitivity, secret):
            seen.append(sensitivity)
            return super().release(mean, state, sensitivity, secret)

    return support.quadratic(
        algorithm, transforms=(Clip(norm=3.0), Watching(noise_multiplier=1.0)),
        aggregator=Mean(weighting="clients", denominator=2),
    )  # fmt: skip


def test_noise_is_sized_for_the_bound_over_the_denominator():
    seen = []
    one_round(noisy(FedAvg(client_learning_rate=0.5, local_steps=1), seen=seen))
    assert seen == [3.0 / 2]


def test_a_tail_that_says_its_bound_is_covered_together_with_the_values():
    seen = []
    one_round(noisy(Declared(client_learning_rate=0.5, local_steps=1), seen=seen))
    assert seen == [math.hypot(3, 4) / 2]


def test_a_tail_that_nothing_bounds_is_not_released_beside_noise():
    with pytest.raises(CheckError, match="finite bound"):
        one_round(noisy(Extra(client_learning_rate=0.5, local_steps=1), seen=[]))


def test_the_state_before_round_0_knows_the_length_of_an_update():
    parts = support.quadratic(transforms=(Quantize(bits=8),)).task("train")
    assert begin(parts, np.zeros(3, np.float32)).transforms == (3,)
    assert begin(parts, np.zeros(3, np.float32), 6).transforms == (6,)
