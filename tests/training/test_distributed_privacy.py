"""Noise that clients add in shares, through a whole run: what is refused, sized, written down and said."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import support
from hansa.aggregators.mean import Mean
from hansa.aggregators.median import Median
from hansa.aggregators.secure_mean import SecureMean
from hansa.commands.check import run_check
from hansa.commands.join import Owner
from hansa.core.errors import CheckError, InputError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Slot
from hansa.data.prepare import Standardize
from hansa.data.sampling import Poisson
from hansa.data.separation import MinSeparation
from hansa.network.pricing import SHARED, priced
from hansa.privacy import events
from hansa.privacy.accountant import Everyone, Turn
from hansa.privacy.ledger import Ledger
from hansa.training import distributed_privacy
from hansa.training.audit import audit
from hansa.training.buffered import Buffered
from hansa.training.check import leaves, problems
from hansa.training.privacy import Accounts, bound, bound_locally, noise_of, planned
from hansa.training.privacy_statement import statement
from hansa.training.schedule import Schedule
from hansa.training.simulate import simulate
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.distributed_noise import SkellamNoise
from hansa.transforms.noise import GaussianNoise
from hansa.transforms.quantize import Quantize
from hansa.transforms.rotate import Rotate

SECURE = SecureMean(min_survivors=10, corrupt=0.1)
CHAIN = (Clip(norm=1.0), SkellamNoise(epsilon=8.0, delta=1e-3))
UPDATE = Slot(0, 0, "masked")
APP = """
import hansa

app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
        transforms=(hansa.Clip(norm=1.0), hansa.SkellamNoise(epsilon=8.0, delta=1e-3)),
        aggregator=hansa.SecureMean(min_survivors=10, corrupt=0.1),
    ),
    schedule=hansa.Schedule(num_rounds=7, cohort_size=15),
)
"""


def shared(transforms=CHAIN, **options):
    return support.linear(transforms=transforms, **{"aggregator": SECURE, **options})


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("federation", "schedule", "says"),
    [
        (shared(aggregator=Mean()), {}, "Mean shows the server each client's update with that share alone"),
        (shared(aggregator=SecureMean()), {}, "SecureMean names none"),
        (shared(aggregator=SecureMean(min_survivors=1)), {}, "SecureMean names none"),
        (shared(aggregator=replace(SECURE, weighting="examples", max_weight=5)), {}, "weights by examples"),
        (shared(aggregator=replace(SECURE, num_groups=3, across=Median())), {}, "in a random group fewer may be"),
        (shared(aggregator=replace(SECURE, group_size=10)), {}, "in a random group fewer may be"),
        (shared(prepare=(Standardize(),)), {}, "beside which SkellamNoise protects nothing"),
        (shared(), {"buffer": Buffered(size=2)}, "late ones count less"),
        (shared(CHAIN[1:]), {}, "SkellamNoise needs a bound on one client's update"),
        (shared((*CHAIN, Rotate())), {}, "put SkellamNoise last"),
        (shared((*CHAIN, Quantize())), {}, "Quantize after SkellamNoise"),
        (shared((*CHAIN[:1], Quantize(), *CHAIN[1:])), {}, "quantize_step would leave beside it"),
        (shared((AdaptiveClip(), *CHAIN[1:])), {}, "clip.below would leave beside it"),
        (shared((*CHAIN[:1], GaussianNoise(noise_multiplier=1.0), *CHAIN[1:])), {}, "in several places"),
        (shared((*CHAIN[:1], SkellamNoise(noise_multiplier=9.0, bits=10))), {}, "SkellamNoise(bits=10) is too coarse"),
        (shared((*CHAIN[:1], SkellamNoise(noise_multiplier=40.0, bits=8))), {}, "has no room for noise"),
        (shared((*CHAIN[:1], SkellamNoise(epsilon=1.0, delta=0.5))), {}, "delta 0.5 is not below 1 / 20"),
    ],
)
def test_what_does_not_fit_is_one_sentence(federation, schedule, says):
    found = [problem.sentence for problem in problems(federation, Schedule(num_rounds=3, **schedule), 20)]
    assert len([sentence for sentence in found if says in sentence]) == 1
    assert not any("sized by a schedule" in sentence for sentence in found)


def test_what_fits_has_no_problems():
    for transforms in (CHAIN, (Clip(norm=1.0), Rotate(), *CHAIN[1:])):
        assert problems(shared(transforms), Schedule(num_rounds=3), 20) == []


def test_a_client_refuses_exact_sums_and_rounds_beyond_those_its_noise_is_for():
    own = bound_locally(shared(), Schedule(num_rounds=3))
    for slot, says in ((Slot(0, 0, "masked", "evaluate"), "exact sums"), (Slot(3, 0, "masked"), "sized for 3 rounds")):
        plan = Plan(slot, True, {}, (), Key.of(0))
        with pytest.raises(CheckError, match=says):
            own.exchange(plan, ("a",), [], None, {}, [Key.of(0)])


def test_an_audit_that_makes_up_clients_is_refused():
    with pytest.raises(InputError, match="found noise of the clients' own"):
        audit(shared(), support.regression(), Schedule(num_rounds=3))


# -------------------------------------------------------------------------------------------------- how it is sized


def test_noise_is_sized_for_the_honest_of_the_fewest_survivors():
    for fewest, corrupt, expected in ((10, 0.1, 9), (50, 0.1, 45), (7, 0.3, 4), (3, 0.0, 3), (1, 0.1, 0)):
        assert distributed_privacy.num_noising(SecureMean(min_survivors=fewest, corrupt=corrupt)) == expected
    assert distributed_privacy.num_noising(Mean()) == 0


@pytest.mark.parametrize("bits", [10, 16])
def test_the_planned_rounds_keep_to_epsilon_and_the_least_less_noise_does_not(bits):
    federation = shared((Clip(norm=1.0), SkellamNoise(epsilon=2.0, delta=1e-6, bits=bits)))
    schedule = Schedule(num_rounds=40)
    noise = noise_of(bound(federation, schedule, 100))
    assert (noise.epsilon, noise.budget, noise.num_noising, noise.num_rounds) == (None, 2.0, 9, 40)
    assert events.cost(planned(noise, schedule, 100), 1e-6).epsilon == pytest.approx(2.0, rel=1e-4)
    less = replace(noise, noise_multiplier=noise.noise_multiplier * 0.999)
    assert events.cost(planned(less, schedule, 100), 1e-6).epsilon > 2.0


def test_client_and_server_size_it_alike_each_from_its_own_copy(tmp_path):
    federation, schedule = shared(), Schedule(num_rounds=7, cohort_size=15)
    assert noise_of(bound_locally(federation, schedule)) == noise_of(bound(federation, schedule, 1000))
    assert noise_of(bound(bound_locally(federation, schedule), schedule, 20)) == noise_of(
        bound_locally(federation, schedule)
    )
    file = tmp_path / "app.py"
    file.write_text(APP)
    _, joined = Owner(file, "data", None).app(file)
    assert noise_of(joined) == noise_of(bound_locally(federation, schedule))


def test_no_sampling_amplifies_and_turns_count():
    noise = SkellamNoise(noise_multiplier=3.0, num_noising=5)
    assert {e.sampling for e in planned(noise, Schedule(num_rounds=3, cohort_size=5, sampler=Poisson()), 50)} == {
        Everyone()
    }
    schedule = Schedule(num_rounds=2, sampler=MinSeparation(rounds=4))
    assert {e.sampling for e in planned(noise, schedule, 50)} == {Turn(0, 4), Turn(1, 4)}


# ---------------------------------------------------------------------------------------------------- a whole run


def run(federation, num_rounds=3, **options):
    return simulate(federation, support.regression([6] * 12), num_rounds=num_rounds, seed=0, **options)


def test_every_opened_sum_is_in_the_ledger_and_epsilon_is_what_they_cost():
    found = run(shared())
    own = noise_of(bound(shared(), Schedule(num_rounds=3), 12))
    costs = [events.cost([own.event(0, 3)] * count, 1e-3).epsilon for count in (1, 2, 3)]
    assert [row.epsilon for row in found.history] == pytest.approx(costs)
    assert costs[-1] == pytest.approx(8.0, rel=1e-4)


def test_the_ideal_sum_is_the_protocols_bit_for_bit():
    for transforms in (CHAIN, (Clip(norm=1.0), Rotate(), *CHAIN[1:])):
        ideal = run(shared(transforms), 1)
        real = run(shared(transforms, aggregator=replace(SECURE, simulate="protocol")), 1)
        assert np.asarray(ideal.parameters).tobytes() == np.asarray(real.parameters).tobytes()


def test_a_run_stops_before_its_budget_is_overspent():
    noise = SkellamNoise(noise_multiplier=3.0, delta=1e-3, budget=2.5)
    affordable = [
        n for n in range(1, 9) if events.cost([replace(noise, num_noising=9).event(0, 8)] * n, 1e-3).epsilon <= 2.5
    ]
    assert len(run(shared((Clip(norm=1.0), noise)), 8).history) == len(affordable) in range(1, 8)


def test_a_round_again_with_other_reports_counts_again_and_a_replay_does_not():
    federation, schedule = bound(shared(), Schedule(num_rounds=3), 12), Schedule(num_rounds=3)
    accounts, summed = Accounts(federation, schedule, Ledger()), []
    for secret in (b"a", b"a", b"b"):
        noted = accounts.noting(
            lambda *_: summed.append(len(accounts.ledger.entries)), number=0, attempt=0, num_clients=12
        )
        noted(None, None, [], [], Key(secret * 32), None)
    assert summed == [1, 1, 2]


def test_the_statement_says_who_adds_the_noise_and_against_whom_it_holds():
    own = bound(shared(), Schedule(num_rounds=3), 12)
    said = statement(own, Counter(planned(noise_of(own), Schedule(num_rounds=3), 12)), 12, simulated=False)
    assert said["epsilon"] == pytest.approx(8.0, rel=1e-4)
    for words in (
        "Distributed Skellam noise on secure sums",
        "holds against the server itself, if at most 10% of the clients in a sum collude with it",
        "the noise of the other 9 is what is accounted",
        "Renyi divergences of Skellam noise",
    ):
        assert words in said["statement"]
    assert "sized for 9 honest clients: the fewest survivors, 10, less 10%" in said["facts"]["noise"]
    assert all(figure["rdp"] is None for figure in said["epsilons"])


def test_no_losses_and_no_metrics_leave_beside_it():
    own = bound(shared(), Schedule(num_rounds=3), 12)
    assert (own.sends_metrics, own.is_private, own.is_locally_private) == (False, True, False)
    [update] = leaves(own, 0.2)
    assert "with the client's share of the noise" in update["what"]
    assert "sum" in update["reader"]


def test_an_owner_is_told_its_price_by_its_own_copy_and_none_where_the_server_sees_rows():
    own = bound_locally(shared(), Schedule(num_rounds=3))
    told = (None, {"noise_multiplier": 1e5})  # whatever a server says
    price = priced(own, UPDATE, told)
    assert price == (noise_of(own).event(0, 1), SHARED)
    assert priced(replace(own, aggregator=Mean(weighting="clients")), UPDATE, told) is None
    assert priced(shared(), UPDATE, told) is None


def test_hansa_check_says_what_keeps_noise_from_being_sized(tmp_path):
    app = tmp_path / "app.py"
    app.write_text(APP.replace("min_survivors=10", "min_survivors=0"))
    with pytest.raises(CheckError, match="SecureMean names none"):
        run_check(app, None, [])
    app.write_text(APP)
    run_check(app, None, [])
