"""Whoever is killed in whichever exchange of secure aggregation: the run has the bits of one that nobody disturbed."""

import shutil

import pytest

from faults import checkers
from faults.trial import COORDINATOR, NAMES, copied, enrolled, fast_folder
from hansa.network.credentials import own_line
from hansa.network.enrolment import Identity

pytestmark = pytest.mark.network

VICTIM = NAMES[0]
EXCHANGES = ("keys", "shares", "masked", "agree", "unmask")
# One of each side a trial, in every exchange of the second round; every point by itself in the slow matrix.
SHORT = (
    ("coordinator.slot.frozen", "client.outbox.committed"),
    pytest.param(("coordinator.report.recorded", "client.outbox.committing"), marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def undisturbed():
    """A secure run that nobody disturbed, and one in which everybody has enrolled and nothing else.

    Its owners have exchanged lists of peers.
    """
    folder = fast_folder()
    begun = enrolled(folder / "begun", secure=True, num_rounds=2)
    lines = [own_line(Identity.of(begun.folder / name)) for name in NAMES]
    (begun.folder / "peers.txt").write_text("\n".join(lines))
    whole = copied(begun, folder / "whole", trace=True)
    try:
        whole.run()
        checkers.everything(whole)
        yield begun, whole
    finally:
        whole.end()
        shutil.rmtree(folder)


def undergo(undisturbed, folder, kills):
    """Run a trial with these kills, and ask everything of it."""
    begun, whole = undisturbed
    trial = copied(begun, folder / "trial", kills=kills)
    try:
        trial.run()
        died = [(who, note["point"], note["phase"]) for who in kills for note in trial.notes(who, "kill")]
        assert sorted(died) == sorted((who, *point) for who, points in kills.items() for point in points)
        checkers.everything(trial, whole)
    finally:
        trial.end()


@pytest.mark.parametrize("names", SHORT, ids=str)
def test_killed_there_in_every_exchange_a_secure_run_has_the_same_bits(undisturbed, fast, names):
    phases = [f"train-1-{exchange}" for exchange in EXCHANGES]
    kills = {who: [(name, phase) for phase in phases] for who, name in zip((COORDINATOR, VICTIM), names, strict=True)}
    undergo(undisturbed, fast, kills)


def test_killed_there_in_every_exchange_of_a_buffers_sum_the_run_follows_from_its_reports(fast):
    """Everybody is in every buffer: before it is summed a row waits, and then everyone says all that a sum takes."""
    begun = enrolled(fast / "begun", secure=True, num_rounds=2, buffer=f"size={len(NAMES)}")
    phases = ["train-1-update", *(f"train-1-{exchange}.1.0" for exchange in EXCHANGES)]
    kills = {
        COORDINATOR: [("coordinator.report.recorded", phase) for phase in phases[1:]],
        VICTIM: [("client.outbox.committed", phase) for phase in phases],
    }
    undergo((begun, None), fast, kills)


@pytest.mark.slow
@pytest.mark.parametrize("who", [COORDINATOR, VICTIM])
def test_killed_at_any_point_of_any_exchange_a_secure_run_has_the_same_bits(undisturbed, fast, who):
    _, whole = undisturbed
    for name, phases in whole.reached(who).items():
        in_rounds = [phase for phase in phases if phase.startswith("train-1-")]
        if in_rounds:
            undergo(undisturbed, fast / name, {who: [(name, phase) for phase in in_rounds]})
