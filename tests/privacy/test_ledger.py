"""The ledger: one entry a noise, written before it counts; a simulation that was cut off counts what it released."""

import shutil

import pytest

import hansa
import support
from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.network.failpoints import Reached, watch
from hansa.privacy.events import GaussianEvent
from hansa.privacy.ledger import Entry, Ledger
from hansa.training.checkpoint import Checkpoint

EVENT = GaussianEvent(noise_multiplier=1.0)


def entry(number=0, attempt=0, secret=0, clients=("a", "b")):
    return Entry.of("train", number, attempt, Key.of(secret), clients, EVENT)


def test_a_replayed_release_is_written_and_counted_once():
    written = []
    ledger = Ledger(write=written.append)
    for _ in range(3):
        ledger.add(entry())
    assert (written, ledger.entries, ledger.counted) == ([entry()], (entry(),), {EVENT: 1})


def test_another_attempts_secret_is_another_release():
    ledger = Ledger([entry()])
    ledger.add(entry(attempt=1, secret=1))
    assert ledger.counted[EVENT] == 2
    assert len({one.noise for one in ledger.entries}) == 2


@pytest.mark.parametrize("other", [{"clients": ("a",)}, {"clients": ("a", "b", "c")}, {"attempt": 1}, {"number": 1}])
def test_noise_that_another_sum_has_got_is_refused_and_nothing_is_written(other):
    written = []
    ledger = Ledger([entry()], written.append)
    with pytest.raises(RunError, match=r"expected noise of its own, found that of round 0, attempt 0.*nothing was"):
        ledger.add(entry(**other))
    assert (written, ledger.entries) == ([], (entry(),))


def test_an_entry_that_could_not_be_written_does_not_count():
    def full(_entry):
        raise OSError("no space left")

    ledger = Ledger(write=full)
    with pytest.raises(OSError, match="no space"):
        ledger.add(entry())
    assert ledger.entries == ()


def test_what_is_restored_adds_to_what_is_there_and_never_takes_away():
    ledger = Ledger([entry(0), entry(1, secret=1)])
    ledger.restore([entry(0)])
    ledger.restore([entry(1, attempt=1, secret=2)])
    assert ledger.counted[EVENT] == 3


def test_an_entry_comes_back_from_json_and_anything_else_is_refused():
    assert Entry.of_json(entry().as_json()) == entry()
    with pytest.raises(InputError, match="ledger: expected an entry"):
        Entry.of_json({"task": "train"})


def simulated(path, num_rounds=3):
    federation = support.linear(
        transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(noise_multiplier=1.0, delta=1e-3)),
        aggregator=hansa.Mean(weighting="clients"),
    )
    return hansa.simulate(federation, support.regression(), num_rounds=num_rounds, checkpoint=path)


@pytest.fixture
def dying_at():
    """Let a simulation end at a fail point, the n-th time that it comes by."""

    def die(name, time):
        passed = []

        def at(reached):
            passed.append(reached)
            if reached == name and passed.count(name) == time:
                raise Reached(name)

        watch(at)

    yield die
    watch(None)


@pytest.mark.parametrize("name", ["coordinator.checkpoint.written", "coordinator.checkpoint.renamed"])
def test_a_simulation_that_was_cut_off_at_its_checkpoint_goes_on_to_the_same_bits_and_the_same_ledger(
    name, dying_at, tmp_path
):
    whole = simulated(tmp_path / "whole")
    dying_at(name, 2)
    with pytest.raises(Reached):
        simulated(tmp_path / "cut")
    watch(None)
    again = simulated(tmp_path / "cut")
    assert again.parameters.tobytes() == whole.parameters.tobytes()
    ledgers = [Checkpoint.read(tmp_path / name).ledger for name in ("whole", "cut")]
    assert ledgers[0] == ledgers[1]
    assert len({one.noise for one in ledgers[1]}) == 3
    assert again.history[-1].epsilon == whole.history[-1].epsilon > 0


def test_an_old_copy_of_a_checkpoint_releases_the_same_sums_again_and_counts_each_once(tmp_path):
    simulated(tmp_path / "one", num_rounds=1)
    shutil.copyfile(tmp_path / "one", tmp_path / "old")
    first, second = simulated(tmp_path / "one"), simulated(tmp_path / "old")
    assert first.parameters.tobytes() == second.parameters.tobytes()
    assert Checkpoint.read(tmp_path / "one").ledger == Checkpoint.read(tmp_path / "old").ledger
