"""Whoever is killed, wherever: started again by the same line, the run has the bits of one that nobody disturbed."""

from itertools import zip_longest

import pytest

from faults.trial import COORDINATOR
from hansa.network.failpoints import FAILPOINTS

pytestmark = pytest.mark.network

# A point of the coordinator and one of a client die in one run, as most of a run's time goes into starting it; each
# point dies alone, and in every round, in the slow matrix.
_CLIENTS = [
    name
    for name in FAILPOINTS
    if name.startswith("client.") and not name.startswith(("client.record.", "client.budget."))
]
_BUFFERED = [name for name in FAILPOINTS if name.startswith(("coordinator.buffer.", "coordinator.elapsed."))]
_NOISY = [name for name in FAILPOINTS if name.startswith(("coordinator.ledger.", "client.record.", "client.budget."))]
_OTHERS = [name for name in FAILPOINTS if name not in (*_CLIENTS, *_BUFFERED, *_NOISY)]
_AT = _OTHERS.index("coordinator.checkpoint.renamed")
_END, _AFTER = _OTHERS[_OTHERS.index("coordinator.slot.full") : _AT], _OTHERS[_AT:]
_AFTER = _AFTER[: _AFTER.index("coordinator.release.cleaned") + 1]
PAIRS = [tuple(name for name in pair if name) for pair in zip_longest(_OTHERS, _CLIENTS)]
PAIRS.append(tuple(_NOISY))


def one_a_task(phases):
    """One phase of each task: of training the second round, in which memory counts; the first of all others."""
    chosen = {}
    for phase in phases:
        chosen.setdefault(phase.partition("-")[0], phase)
    if "train-1" in phases:
        chosen["train"] = "train-1"
    return tuple(chosen.values())


def undergo(reference, folder, kills):
    """Run a trial with these kills, and ask everything of it."""
    fresh = any(phase == "start" for points in kills.values() for _, phase in points)
    trial = reference.trial(folder / "trial", kills, fresh=fresh)
    try:
        trial.run()
        died = [(who, note["point"], note["phase"]) for who in kills for note in trial.notes(who, "kill")]
        assert sorted(died) == sorted((who, *point) for who, points in kills.items() for point in points)
        reference.check(trial)
    finally:
        trial.end()


@pytest.mark.parametrize("names", [pytest.param(names, id="+".join(names)) for names in PAIRS])
def test_killed_there_once_in_every_task_the_run_has_the_same_bits(reference, fast, names):
    kills = {}
    for name in names:
        found = reference.phases(name)
        assert found, f"an undisturbed run does not come by {name}"
        for who, phases in found.items():
            kills.setdefault(who, []).extend((name, phase) for phase in one_a_task(phases))
    undergo(reference, fast, kills)


@pytest.mark.parametrize("last", [_AFTER[0], *(pytest.param(name, marks=pytest.mark.slow) for name in _AFTER[1:])])
def test_killed_at_each_step_of_a_rounds_end_a_run_of_long_vectors_has_the_same_bits(reference, fast, last):
    """The state lies in files, is made some columns at a time, and is read again from its checkpoint's file."""
    found = [name for name in _END if "train-1" in reference.phases(name).get(COORDINATOR, ())]
    assert "coordinator.columns.added" in found  # which only a run of long vectors comes by
    undergo(reference, fast, {COORDINATOR: [(name, "train-1") for name in (*found, last)]})


@pytest.mark.parametrize("name", _BUFFERED)
def test_killed_there_once_in_every_task_a_buffered_run_follows_from_its_reports(reference, fast, name):
    found = reference.phases(name)
    assert found.keys() == {COORDINATOR}, f"an undisturbed buffered run does not come by {name}"
    undergo(reference, fast, {COORDINATOR: [(name, phase) for phase in one_a_task(found[COORDINATOR])]})


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_there_in_any_round_the_run_has_the_same_bits(reference, fast, name):
    for who, phases in reference.phases(name).items():
        for phase in phases:
            undergo(reference, fast / f"{who}-{phase}", {who: [(name, phase)]})
