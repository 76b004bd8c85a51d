"""Secure sums in buffered rounds: rows of several rounds in one sum, each of them in one sum only."""

import dataclasses
import math

import numpy as np
import pytest

import hansa
import support
from hansa.aggregators.secure_mean import SecureMean
from hansa.core.chain import Transform
from hansa.core.errors import Abandoned, CheckError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Slot, Updates
from hansa.core.round import buffered_round, make_plan
from hansa.training.buffered import Buffered, together
from support_devices import Delays, clocked
from support_secagg import LIMITS, grid_rows

PEOPLE = support.regression((7, 12, 5, 9, 2, 4, 6, 8))
DELAYS = {f"c{i}": 1 + 0.37 * i + 2.9 * (i == 7) for i in range(8)}
CLIP = (hansa.Clip(norm=2.0),)
STEPS = ("keys", "shares", "masked", "agree", "unmask")


def run(aggregator, **options):
    options = {"transforms": CLIP, **options}
    return hansa.simulate(
        support.linear(aggregator=aggregator, **options), PEOPLE, num_rounds=5, buffer=Buffered(size=4), seed=2,
        holdout=0.2, runtime=hansa.VirtualTime(hansa.InProcess(block_size=1), devices=Delays(DELAYS)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "secure",
    [
        SecureMean(),
        SecureMean(server="honest", bits=8),
        SecureMean(weighting="examples", max_weight=6, bits=20),
        SecureMean(num_groups=2),
        hansa.SecureSum(),
    ],
    ids=repr,
)
def test_the_ideal_functionality_gives_the_bits_of_the_protocol_in_buffers_too(secure):
    short, whole = run(secure), run(dataclasses.replace(secure, simulate="protocol"))
    assert short.parameters.tobytes() == whole.parameters.tobytes()
    assert np.abs(short.parameters).max() > 0.01
    for a, b in zip(short.history, whole.history, strict=True):
        assert (a.num_clients, a.loss, a.clock_s) == (4, pytest.approx(b.loss), b.clock_s)


def test_a_secure_buffer_is_the_plain_one_up_to_its_grid():
    plain, secure = run(hansa.Mean(weighting="clients")), run(SecureMean(bits=20))
    np.testing.assert_allclose(secure.parameters, plain.parameters, atol=1e-5)
    assert [row.loss for row in secure.history] == pytest.approx([row.loss for row in plain.history], abs=1e-4)
    weighted, secure = run(hansa.Mean(max_weight=6)), run(SecureMean(bits=20, weighting="examples", max_weight=6))
    np.testing.assert_allclose(secure.parameters, weighted.parameters, atol=1e-4)
    assert [row.loss for row in secure.history] == pytest.approx([row.loss for row in weighted.history], abs=1e-3)


def test_central_noise_is_sized_and_accounted_as_for_a_plain_mean():
    noisy = (*CLIP, hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-3))
    plain, secure = (run(mean, transforms=noisy) for mean in (hansa.Mean(weighting="clients"), SecureMean(bits=20)))
    assert secure.history[-1].epsilon == plain.history[-1].epsilon
    np.testing.assert_allclose(secure.parameters, plain.parameters, atol=1e-4)


# ------------------------------------------------------------------------------------------------ one buffer by hand


class Lossy:
    """A runtime in which some clients say nothing in an exchange of a sum; the test hears what is said."""

    def __init__(self, site, lost):
        self.site, self.lost, self.said = site, lost, []

    def __getattr__(self, name):
        return getattr(self.site, name)

    def start(self, plan, clients):
        gone = self.lost.get(plan.slot.exchange.partition(".")[0], ())
        self.site.start(plan, [client for client in clients if client not in gone])

    def reports(self, slot):
        for report in self.site.reports(slot):
            self.said.append((slot, report))
            yield report


def train(aggregator, people, delays, *, size, num_rounds, lost=None, rate=0.5):
    """Buffered rounds of quadratics; the state, what each buffer counted, and the runtime."""
    federation = support.quadratic(aggregator=aggregator, transforms=(hansa.Clip(norm=32.0),))
    state, context, site = clocked(federation, people, Delays(delays))
    parts, rounds, site.concurrency, staleness = federation.task("train"), [], len(people), Buffered(size=size).weight
    site = Lossy(site, lost or {})
    number = attempt = 0
    while number < num_rounds:
        newest = Slot(number, attempt, "update")

        def refill(count, slot=newest, state=state):
            there = site.available(people.ids)
            cohort = [c for c, is_there in zip(people.ids, there, strict=True) if is_there][:count]
            if cohort:
                site.site.start(make_plan(parts, state, context, cohort, slot), cohort)

        one = together(parts, state, site, context, newest, staleness)
        try:
            state, mean = buffered_round(
                parts, state, site, site.plans, context, number, buffer_size=size, staleness=staleness,
                refill=refill, together=one,
            )  # fmt: skip
        except Abandoned:
            rounds.append(())
            site.lost, attempt = {}, attempt + 1
            continue
        rounds.append(mean.clients)
        number, attempt = number + 1, 0
    return state.algorithm["params"], rounds, site


@pytest.mark.parametrize("aggregator", [SecureMean(bits=20), SecureMean(bits=20).simulated(buffered=True)], ids=repr)
def test_a_late_row_is_scaled_before_it_is_summed_by_hand(aggregator):
    """a and b (1 s, 2 s) make version 1; then c (3 s, version 0, late) meets a, who was replaced at 2 s."""
    people = support.targets(a=(4, 0, 0), b=(8, 0, 0), c=(-8, 0, 0))
    params, rounds, _ = train(aggregator, people, {"a": 1, "b": 2, "c": 3}, size=2, num_rounds=2)
    first = (2 + 4) / 2
    second = first + ((4 - first) / 2 + -4 / math.sqrt(2)) / 2
    assert [sorted(counted) for counted in rounds] == [["a", "b"], ["a", "c"]]
    np.testing.assert_allclose(params, [second, 0, 0], atol=1e-3)


SIX = support.targets(**{f"c{i}": (i, -i, 2) for i in range(6)})


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_is_lost_in_the_sum_is_left_out_until_it_has_sent_its_masked_row(step):
    """From then on it counts, and what it says no more, its neighbours do. The sum is exact either way."""
    params, (counted,), site = train(SecureMean(bits=20), SIX, {}, size=6, num_rounds=1, lost={step: ("c3",)})
    everyone = set(SIX.ids)
    assert set(counted) == (everyone if step in ("agree", "unmask") else everyone - {"c3"})
    mean = np.mean([SIX.load(c)[0].x[0] / 2 for c in counted], axis=0)
    np.testing.assert_allclose(params, mean, atol=1e-3)
    assert site.inner._scratch == {}


def test_a_sum_of_which_too_few_are_left_counts_nobody_and_the_next_one_begins_afresh():
    lost = {"masked": ("c0", "c1", "c2", "c3")}
    params, rounds, site = train(SecureMean(bits=20), SIX, {}, size=6, num_rounds=1, lost=lost)
    assert [len(counted) for counted in rounds] == [0, 6]
    np.testing.assert_allclose(params, np.mean([SIX.load(c)[0].x[0] / 2 for c in SIX.ids], axis=0), atol=1e-3)
    keys = {}
    for slot, report in site.said:
        if slot.exchange.startswith("keys"):
            keys.setdefault(slot.exchange, {}).update({c: said["mask_key"] for c, said in report.payload.items()})
    assert keys.keys() == {"keys.0.0", "keys.0.1"}
    assert not set(keys["keys.0.0"].values()) & set(keys["keys.0.1"].values())


# ------------------------------------------------------------------------------------------ what clients do not do


def answer(aggregator, exchange, *, mail=None, held=None, learn=False, name="a"):
    """One client's answer: what it says, keeps and refuses."""
    plan = Plan(Slot(3, 0, exchange), learn, {}, (), Key.of(7), {}, {} if mail is None else {name: mail})
    row = Updates((name,), grid_rows(1).astype(np.float32), np.ones(1), {"train_loss": np.array([0.5])})
    held = {} if held is None else {name: held}
    payload, kept, refused = aggregator.fitted(LIMITS).answer(
        plan, row if learn else None, held if held or learn else {name: {}}, [Key.of(name)]
    )
    return payload.get(name), kept.get(name), refused.get(name, "")


def test_what_is_said_of_a_row_that_waits_is_nothing():
    said, kept, refused = answer(SecureMean(), "update", learn=True)
    assert (said, refused) == ({}, "")
    assert SecureMean().check_mail("update", said) == ""
    assert SecureMean().check_mail("update", {"row": 1}) != ""
    np.testing.assert_array_equal(kept["row"]["values"], grid_rows(1)[0])


def test_a_row_is_in_one_sum_only():
    """Two sums of one row among different others would tell it."""
    secure = SecureMean()
    _, ready, _ = answer(secure, "update", learn=True)
    assert "learn" in answer(secure, "update", held=ready, learn=True)[2]
    said, begun, _ = answer(secure, "keys.7.0", held=ready)
    assert said["mask_key"]
    for again in ("keys.8.0", "keys.7.1", "keys.7.0", "keys"):
        assert "begin once" in answer(secure, again, held=begun)[2]
    assert "begin once" in answer(secure, "keys", held=ready)[2]
    assert "a round and of a buffer" in answer(secure, "shares", held=begun, mail={})[2]


def test_a_buffers_sum_needs_a_row_and_a_rounds_sum_none():
    _, begun, _ = answer(SecureMean(), "keys")
    assert "begin once" in answer(SecureMean(), "keys.7.0")[2]
    assert "a round and of a buffer" in answer(SecureMean(), "shares.7.0", held=begun, mail={})[2]
    assert "was asked for" in answer(SecureMean(), "keys.7", held=begun)[2]


def test_keys_are_for_one_buffer():
    """Aims differ, and with them what is signed, by version and attempt; the slot in which a client learned is none."""
    aims = [answer(SecureMean(), "keys", held=None)[1]["aim"]]
    for exchange in ("keys.7.0", "keys.7.1", "keys.8.0"):
        _, ready, _ = answer(SecureMean(), "update", learn=True)
        aims.append(answer(SecureMean(), exchange, held=ready)[1]["aim"])
    assert len(set(aims)) == 4


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, math.nan, math.inf, 1 / 17, None, "1"])
def test_a_client_does_not_count_more_than_once_or_next_to_nothing(scale):
    """A row among others that count next to nothing would not be hidden by them; hence none counts so little."""
    names = ("a", "b", "c")
    secure, held, said = SecureMean().fitted(LIMITS), {}, {}
    for name in names:
        held[name] = answer(secure, "update", learn=True, name=name)[1]
        said[name], held[name], _ = answer(secure, "keys.7.0", held=held[name], name=name)
    from hansa.secagg.server import Table

    table = Table.of(said, secure.terms)
    for name, told in table.lists().items():
        said[name], held[name], _ = answer(secure, "shares.7.0", held=held[name], mail=told, name=name)
    told = table.shares(said)["a"]
    assert answer(secure, "masked.7.0", held=held["a"], mail={**told, "scale": 1.0})[2] == ""
    assert "count from 0.0625 to 1" in answer(secure, "masked.7.0", held=held["a"], mail={**told, "scale": scale})[2]


def problems_of(**options):
    with pytest.raises(CheckError) as raised:
        run(SecureMean(), **options)
    return str(raised.value)


def test_chains_whose_rows_differ_by_round_are_refused_in_one_sentence():
    adaptive = (hansa.AdaptiveClip(), hansa.GaussianNoise(noise_multiplier=1.0))
    assert "AdaptiveClip changes from round to round" in problems_of(transforms=adaptive)
    assert "Turned decodes each round's apart" in problems_of(transforms=(*CLIP, Turned()))
    assert "hansa.Buffered(size=5)" in str(few())


class Turned(Transform):
    """Rows the other way round."""

    def norm_bound(self, incoming, settings):
        return incoming

    def decode(self, values, settings, shared):
        return -values


def few():
    with pytest.raises(CheckError) as raised:
        run(SecureMean(min_survivors=5))
    return raised.value
