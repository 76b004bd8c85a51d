"""What is private in a simulation is as private over the network: same secrets, same bits, same ledger."""

import json

import numpy as np
import pytest

import hansa
from hansa.core.key import Key
from hansa.network.journal import lines
from hansa.network.ledgers import stored_ledger
from hansa.privacy.ledger import Entry
from hansa.runtimes.inprocess import InProcess
from hansa.training.loop import Loop
from hansa.training.privacy import bound

pytestmark = pytest.mark.network

SCHEDULE = hansa.Schedule(num_rounds=3, cohort_size=2)
NOISE = hansa.GaussianNoise(epsilon=8.0, delta=1e-3)
CHAINS = {
    "clip": (hansa.Clip(norm=0.5), NOISE),
    "adaptive clip": (hansa.AdaptiveClip(start=0.5), NOISE),
    "correlated noise": (
        hansa.Clip(norm=0.5),
        hansa.CorrelatedNoise(strategy=hansa.BLT(buffers=2), epsilon=8.0, delta=1e-3),
    ),
}


def training(transforms):
    return hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.Averaged(algorithm=hansa.FedAvg(client_learning_rate=0.1, local_epochs=2, batch_size=4)),
        transforms=transforms,
        aggregator=hansa.Mean(weighting="clients"),
    )


FEDERATIONS = {
    **{name: training(transforms) for name, transforms in CHAINS.items()},
    "survey": hansa.statistics.survey(
        hansa.statistics.Count(), hansa.statistics.Mean(0, low=-2, high=2), epsilon=8.0, delta=1e-3
    ),
}


def loop_over(runtime, federation, clients, **more):
    return Loop(
        federation=federation,
        schedule=SCHEDULE,
        runtime=runtime,
        key=Key.of(1),
        clients=lambda: clients,
        params=np.zeros(federation.learner.layout.num_params, np.float32),
        **more,
    )


@pytest.mark.parametrize("name", FEDERATIONS)
def test_a_private_run_has_the_bits_and_the_ledger_of_its_simulation(make_site, tools, monkeypatch, name):
    data = {"berlin": tools.data(1), "paris": tools.data(2, 9)}
    federation = bound(FEDERATIONS[name], SCHEDULE, len(data))
    site = make_site(federation)
    for client, pair in data.items():
        site.join(client, pair)
    runtime = tools.runtime(site.coordinator, min_clients=2)
    clients = runtime.wait_for_clients(2, timeout_s=30)
    ledger = stored_ledger(site.coordinator.store, site.coordinator.run)
    far = loop_over(runtime, federation, clients, ledger=ledger).run()
    secrets = [runtime.once(f"secret train {number} 0", lambda: b"") for number in range(3)]
    runtime.finish()
    assert not site.problems

    near_site = InProcess(block_size=1).open(federation, data.__getitem__, Key.of("clients"), keep=True)
    monkeypatch.setattr(near_site, "once", lambda name, make: secrets[int(name.split()[2])])
    near_loop = loop_over(near_site, federation, clients)
    near = near_loop.run()
    assert far.state.algorithm["params"].tobytes() == near.state.algorithm["params"].tobytes()
    assert [row.epsilon for row in far.history] == [row.epsilon for row in near.history]
    assert far.history[-1].epsilon == pytest.approx(8.0, rel=1e-3)
    assert ledger.entries == near_loop.ledger.entries == near.ledger
    assert len(ledger.entries) == 3
    read_again = stored_ledger(site.coordinator.store, site.coordinator.run)
    assert read_again.entries == ledger.entries
    assert len(set(secrets)) == 3


def test_the_ledger_is_a_part_of_the_signed_log(make_site):
    federation = bound(FEDERATIONS["clip"], SCHEDULE, 2)
    coordinator = make_site(federation).coordinator
    ledger = stored_ledger(coordinator.store, coordinator.run)
    ledger.add(Entry.of("train", 0, 0, Key.of(1), ("berlin",), federation.transforms[1].event(0, 3)))
    assert stored_ledger(coordinator.store, "another run").entries == ()
    entries = [json.loads(line) for line in lines(coordinator.store)]
    [noised] = [entry for entry in entries if entry.get("kind") == "noised"]
    assert noised["what"]["noise"] == ledger.entries[0].noise
    assert Entry.of_json(noised["what"]) == ledger.entries[0]
