"""Correlated noise over the network, with crashes: a replay draws the same noise, and the ledger is never short."""

import numpy as np
import pytest

from hansa.aggregators.mean import Mean
from hansa.data.separation import MinSeparation
from hansa.network.ledgers import stored_ledger
from hansa.privacy import gaussian
from hansa.training.privacy import bound
from hansa.training.schedule import Schedule
from hansa.transforms.clip import Clip
from hansa.transforms.correlated_noise import CorrelatedNoise
from support_town import Killed, Town

NAMES = tuple("abcdefghijkl")
SCHEDULE = Schedule(num_rounds=9, cohort_size=2, sampler=MinSeparation(rounds=3))


@pytest.fixture
def town(tmp_path, tools):
    noise = CorrelatedNoise(noise_multiplier=0.9, delta=1e-3)
    federation = tools.federation(transforms=(Clip(norm=1.0), noise), aggregator=Mean(weighting="clients"))
    data = {name: tools.data(i) for i, name in enumerate(NAMES)}
    made = Town(tmp_path, bound(federation, SCHEDULE, len(NAMES)), data)
    yield made
    made.close()


def trained(town):
    """Train to the end, begun again after each crash."""
    while True:
        try:
            return town.train(SCHEDULE, ledger=stored_ledger(town.coordinator.store, town.coordinator.run))
        except Killed:
            town.restart()


def test_a_deployment_keeps_turns_and_replays_noise_to_the_bit_after_a_crash(town, monkeypatch):
    """Killed after the entry of rounds 2, 4 and 8 was written, and before anything of their noise was kept."""
    kills, noises = [2, 4, 8], {}
    release = CorrelatedNoise.release

    def released(self, mean, state, sensitivity, secret):
        found = release(self, mean, state, sensitivity, secret)
        noises.setdefault(state["step"], []).append((secret, found[0].values.tobytes()))
        if kills and state["step"] == kills[0]:
            kills.pop(0)
            raise Killed
        return found

    monkeypatch.setattr(CorrelatedNoise, "release", released)
    point = trained(town)
    assert not kills
    assert [len(noises[step]) for step in range(9)] == [1, 1, 2, 1, 2, 1, 1, 1, 2]
    assert all(len(set(draws)) == 1 for draws in noises.values())
    assert len({draws[0][0] for draws in noises.values()}) == 9
    entries = stored_ledger(town.coordinator.store, town.coordinator.run).entries
    assert [entry.event.round for entry in entries] == list(range(9))
    assert point.history[-1].epsilon == pytest.approx(gaussian.epsilon(1e-3, 0.9, 1))
    with town.coordinator.store.read() as db:
        asked = db.exec_driver_sql(
            "SELECT slots.round, reports.client FROM reports JOIN slots ON slots.id = reports.slot_id"
        ).fetchall()
    for name in NAMES:
        assert np.diff(sorted({row.round for row in asked if row.client == name})).min(initial=99) >= 3
