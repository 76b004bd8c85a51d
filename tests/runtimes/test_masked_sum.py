"""The extra-exchange seam: a masked sum of four exchanges runs through the core unchanged."""

import dataclasses
import json

import numpy as np
import pytest

import support
from hansa.algorithms.fedavg import FedAvg
from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot
from hansa.core.round import server_round
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.data.prepare import Standardize
from hansa.federation import totals_of
from hansa.learners.linear import LinearLearner
from hansa.runtimes.inprocess import InProcess
from hansa.training.evaluate import on_clients
from hansa.training.simulate import simulate
from hansa.transforms.sparsify import TopK
from hansa.wire import pack, pack_report, unpack, unpack_report
from support_masked_sum import EXCHANGES, MaskedSum

CLIENTS = tuple(f"c{i}" for i in range(8))
ROUND = Slot(0, 0, "")
POPULATION = support.regression(sizes=(7, 1, 12, 5, 3, 9, 2, 4))
ALL_LOST = [(when, exchange, client) for exchange in EXCHANGES for client in CLIENTS for when in ("before", "after")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountingFedAvg(FedAvg):
    """FedAvg that also learns the weighted mean number of local steps, from a tail column."""

    def client_update(self, received, fit, memory):
        step = fit(received["params"]) - received["params"]
        return fit.updates(step, tail={"num_steps": fit.num_steps.astype(float)}), {}

    def server_update(self, state, mean):
        return {**super().server_update(state, mean), "num_steps": np.array(mean.tail["num_steps"])}


def one_round(federation, cohort=CLIENTS, lost=(), block_size=3):
    state, context, site = support.world(federation, POPULATION, block_size)
    runtime = support.Lossy(site, lost)
    state, mean = server_round(federation.task("train"), state, runtime, cohort, context, ROUND)
    return state.algorithm, mean, site


def survivors(lost):
    """Whose update counts: a client lost in the last exchange has already sent its masked row."""
    return tuple(c for c in CLIENTS if not any(c == client and exchange != "unmask" for _, exchange, client in lost))


def assert_plain_mean(lost, block_size=3):
    plain, plain_mean, _ = one_round(support.linear(), survivors(lost))
    secure, mean, _ = one_round(support.linear(aggregator=MaskedSum()), CLIENTS, lost, block_size)
    assert mean.clients == plain_mean.clients
    np.testing.assert_allclose(secure["params"], plain["params"], atol=1e-3)
    assert np.abs(plain["params"]).max() > 0.1


# ------------------------------------------------------------------------------------------------------ drop-outs


@pytest.mark.parametrize("lost", [[one] for one in ALL_LOST], ids=lambda lost: "-".join(lost[0]))
def test_losing_one_client_leaves_the_plain_mean_of_the_survivors(lost):
    assert_plain_mean(lost)


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_several_lost_in_different_exchanges_leave_the_plain_mean_of_the_survivors(block_size):
    lost = [("before", "keys", "c0"), ("after", "shares", "c2"), ("before", "masked", "c5"), ("after", "unmask", "c4")]
    assert_plain_mean(lost, block_size)


def test_nobody_lost_is_the_plain_mean():
    assert_plain_mean([])


def test_a_group_below_the_threshold_is_left_out_and_the_other_counts():
    lost = [("before", "shares", client) for client in ("c0", "c1", "c2")]
    secure, mean, _ = one_round(support.linear(aggregator=MaskedSum()), CLIENTS, lost)
    plain, _, _ = one_round(support.linear(), CLIENTS[4:])
    assert mean.clients == CLIENTS[4:]
    np.testing.assert_allclose(secure["params"], plain["params"], atol=1e-3)


def test_a_client_with_nothing_to_learn_from_is_a_dropout_like_any_other():
    clients = {c: POPULATION.load(c)[0] for c in CLIENTS} | {"c3": Dataset(np.zeros((0, 3)), np.zeros(0))}
    federation = support.linear(aggregator=MaskedSum())
    state, context, site = support.world(federation, Population(clients), 8)
    state, mean = server_round(federation.task("train"), state, site, CLIENTS, context, ROUND)
    assert mean.clients == tuple(c for c in CLIENTS if c != "c3")
    assert site.refusals() == [{"round": 0, "client": "c3", "reason": "no training examples"}]


# ----------------------------------------------------------------------------------------------------- abandoning


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_too_few_left_abandons_and_forgets_memory_and_scratch(exchange):
    federation = support.linear(transforms=(TopK(fraction=0.5),), aggregator=MaskedSum())
    state, context, site = support.world(federation, POPULATION, 3)
    stay = ("c0",) if exchange == "keys" else ("c0", "c4")  # one of each group: below the threshold of two
    runtime = support.Lossy(site, [("after", exchange, client) for client in CLIENTS if client not in stay])
    with pytest.raises(Abandoned, match="expected 2"):
        server_round(federation.task("train"), state, runtime, CLIENTS, context, ROUND)
    assert site.kept()["memory"] == {}
    assert site._scratch == {}
    assert site._pending == {}


def test_the_next_attempt_after_an_abandoned_one_is_the_plain_mean():
    federation = support.linear(aggregator=MaskedSum(threshold=4))
    state, context, site = support.world(federation, POPULATION, 3)
    lossy = support.Lossy(site, [("before", "masked", "c1"), ("before", "masked", "c6")])
    with pytest.raises(Abandoned):
        server_round(federation.task("train"), state, lossy, CLIENTS, context, ROUND)
    state, _ = server_round(federation.task("train"), state, site, CLIENTS, context, ROUND._replace(attempt=1))
    plain, plain_context, plain_site = support.world(support.linear(), POPULATION, 3)
    again = ROUND._replace(attempt=1)
    plain, _ = server_round(support.linear().task("train"), plain, plain_site, CLIENTS, plain_context, again)
    np.testing.assert_allclose(state.algorithm["params"], plain.algorithm["params"], atol=1e-3)


def test_memory_is_kept_for_counted_clients_only():
    federation = support.linear(transforms=(TopK(fraction=0.5),), aggregator=MaskedSum())
    _, mean, site = one_round(federation, CLIENTS, [("after", "masked", "c2"), ("before", "keys", "c5")])
    assert set(site.kept()["memory"]) == set(mean.clients) == set(CLIENTS) - {"c2", "c5"}
    assert site._scratch == {}


# ------------------------------------------------------------------------------------- what else goes through it


def test_a_tail_column_is_summed_with_the_values():
    own = CountingFedAvg(client_learning_rate=0.05, local_epochs=2, batch_size=4)
    secure, _, _ = one_round(support.linear(algorithm=own, aggregator=MaskedSum()), CLIENTS)
    plain, _, _ = one_round(support.linear(algorithm=own), CLIENTS)
    np.testing.assert_allclose(secure["params"], plain["params"], atol=1e-3)
    np.testing.assert_allclose(secure["num_steps"], plain["num_steps"], atol=1e-3)
    assert plain["num_steps"] > 2


def test_metrics_are_scored_through_the_masked_sum():
    learner = LinearLearner(num_features=3, num_classes=2, metrics=("accuracy", "auc"))
    pairs = {c: (data, data) for c in support.classes().ids for data in [support.classes().load(c)[0]]}
    scores = []
    for aggregator in ({"aggregator": MaskedSum()}, {}):
        federation = support.linear(learner=learner, **aggregator)
        state, context, site = support.world(federation, Population(pairs), 2)
        moved = {"params": np.array([0.5, 0.3, -0.2, 0.1], np.float32)}
        scores.append(on_clients(federation, site, state._replace(algorithm=moved), context, tuple(pairs), 0))
    (secure, each), (plain, _) = scores
    assert each == {}  # the server sees no client's own
    assert secure == pytest.approx(plain, abs=1e-4)
    assert 0.6 < plain["auc"] <= 1


def test_preparation_sums_go_through_the_masked_sum():
    federation = support.linear(prepare=(Standardize(min_rows=1),), aggregator=MaskedSum())
    secure = simulate(federation, POPULATION, num_rounds=2)
    plain = simulate(dataclasses.replace(federation, aggregator=support.linear().aggregator), POPULATION, num_rounds=2)
    np.testing.assert_allclose(secure.totals[0], plain.totals[0], atol=1e-3)
    np.testing.assert_allclose(secure.parameters, plain.parameters, atol=1e-3)
    assert totals_of({"prepare.0": plain.totals[0]})[0] is plain.totals[0]


# ----------------------------------------------------------------------------------------------- who is lied to


@pytest.mark.parametrize(
    ("mail", "mine"),
    [
        ({"alive": ["a", "b"], "gone": ["b"]}, {}),  # alive and gone at once
        ({"alive": ["b", "c"], "gone": []}, {}),  # I am not among the living
        ({"alive": ["a"], "gone": []}, {}),  # below the threshold
        ({"alive": ["a", "b"], "gone": []}, {"answered": {"alive": ["a", "b"], "gone": ["c"]}}),  # asked twice
    ],
)
def test_a_client_refuses_to_help_a_lying_server(mail, mine):
    plan = Plan(Slot(0, 0, "unmask"), False, {}, (), Key.of(0), {}, {"a": mail})
    held = {p: {"seed": [1, "2"], "key": [1, "3"]} for p in "abc"}
    payload, kept, refused = MaskedSum().answer(plan, None, {"a": {"held": held, **mine}}, [Key.of(1)])
    assert (payload, kept) == ({}, {})
    assert set(refused) == {"a"}


def test_a_client_refuses_to_share_under_a_key_that_is_not_its_own():
    plan = Plan(Slot(0, 0, "shares"), False, {}, (), Key.of(0), {}, {"a": {"a": "5", "b": "6"}})
    _, _, refused = MaskedSum().answer(plan, None, {"a": {"private": "4"}}, [Key.of(1)])
    assert refused == {"a": "the group is too small, or my own key was changed"}


# ------------------------------------------------------------------------------------------------------ the wire


def test_every_word_and_all_that_is_kept_survives_the_wire():
    """Plans, reports and scratch pass through bytes on the way: the same bits as without."""
    federation = support.linear(aggregator=MaskedSum())
    straight, _, _ = one_round(federation, block_size=1)
    state, context, site = support.world(federation, POPULATION, 1)

    class Wired(support.Lossy):
        def start(self, plan, clients):
            mail = unpack(pack(dict(plan.mail)))
            assert json.dumps(sorted(mail)) == json.dumps(sorted(plan.mail))
            self.inner.start(plan._replace(mail=mail), clients)

        def reports(self, slot):
            for report in self.inner.reports(slot):
                for where, scratch in self.inner._scratch.items():
                    self.inner._scratch[where] = unpack(pack(scratch))
                body = pack_report(report, federation.codec(slot))
                yield unpack_report(body, slot, report.clients[0], federation.codec(slot), None)

    parts = federation.task("train")
    wired, _ = server_round(parts, state, Wired(site, ()), CLIENTS, context, ROUND)
    assert (wired.algorithm["params"] == straight["params"]).all()


def test_the_server_sees_no_row_and_no_single_mask_opens_one():
    """A masked row is uniform: it differs from the row in nearly every bit, and from itself under another secret."""
    federation = support.linear(aggregator=MaskedSum())
    seen = []
    for name in ("one", "two"):
        state, context, _ = support.world(federation, POPULATION)
        site = InProcess(block_size=8).open(federation, POPULATION.load, Key.of(name))

        class Watch(support.Lossy):
            def reports(self, slot):
                for report in self.inner.reports(slot):
                    if slot.exchange == "masked":
                        seen.append(np.concatenate([report.payload[c]["row"] for c in report.clients]))
                    yield report

        server_round(federation.task("train"), state, Watch(site, ()), CLIENTS, context, ROUND)
    assert (seen[0] != seen[1]).all()
    assert np.abs(np.mean(seen[0] / 2**48) - 0.5) < 0.2


def test_a_report_of_a_masked_sum_names_only_its_own_client():
    report = Report(Slot(0, 0, "keys"), ("a",), {"a": "7"})
    body = pack_report(report, federation_codec := support.linear().codec(report.slot))
    assert unpack_report(body, report.slot, "other", federation_codec, None).payload == {"other": "7"}
