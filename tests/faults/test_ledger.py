"""Killed anywhere between secret, noise, ledger and publication: never a release without its entry."""

import hashlib
import shutil
from contextlib import closing

import numpy as np
import pytest

from faults.sites import make_federation, rows, watched_site
from faults.test_kill_everywhere import undergo
from faults.trial import COORDINATOR
from hansa.aggregators.mean import Mean
from hansa.core.errors import RunError
from hansa.core.key import Key
from hansa.network.failpoints import FAILPOINTS, Reached, watch
from hansa.network.ledgers import stored_ledger
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.privacy.ledger import Entry
from hansa.training.loop import Loop
from hansa.training.privacy import bound
from hansa.training.schedule import Schedule
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise

pytestmark = pytest.mark.network
_ALL = list(FAILPOINTS)
_DURABLE = _ALL.index("coordinator.checkpoint.renamed")  # from here on a restart goes on with the next round
_BEFORE = _ALL[_ALL.index("coordinator.secret.stored") : _DURABLE]
_AFTER = _ALL[_DURABLE : _ALL.index("coordinator.release.named") + 1]
NAMES = ("berlin", "paris", "rome")


def test_case_40_killed_between_noise_ledger_and_release_each_release_has_its_entry(reference, fast):
    """The bits, the ledger and the owners' records are those that the checkers of a noisy trial ask for."""
    reached = reference.noisy.reached(COORDINATOR)
    before = [name for name in _BEFORE if "train-1" in reached.get(name, ())]
    assert {"coordinator.secret.stored", "coordinator.ledger.noting", "coordinator.ledger.noted"} < set(before)
    assert {"coordinator.slot.settled", "coordinator.checkpoint.written"} < set(before)
    after = list(zip(_AFTER, ("train-0", "train-1", "train-2", "train-3"), strict=True))
    assert all(phase in reached[name] for name, phase in after)
    undergo(reference, fast, {COORDINATOR: [*((name, "train-1") for name in before), *after]})


def noisy():
    """A federation with noise, bound for three clients."""
    transforms = (Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0, delta=1e-3))
    made = make_federation(transforms=transforms, aggregator=Mean(weighting="clients"))
    return bound(made, Schedule(num_rounds=3), len(NAMES))


def the_loop(site, num_rounds=2, **more):
    """The loop of a coordinator on what is stored at a site."""
    runtime = NetworkRuntime(site.coordinator)
    return Loop(
        federation=site.federation,
        schedule=Schedule(num_rounds=num_rounds),
        runtime=runtime,
        key=Key.of(0),
        clients=runtime.clients,
        params=np.zeros(site.federation.learner.layout.num_params, np.float32),
        release=runtime.release,
        ledger=stored_ledger(site.store, site.coordinator.run),
        **more,
    )


@pytest.fixture
def noisy_site(tmp_path):
    with watched_site(tmp_path, noisy()) as site:
        for number, name in enumerate(NAMES):
            site.join(name, rows(number))
        NetworkRuntime(site.coordinator).wait_for_clients(len(NAMES))
        yield site
        watch(None)


def entries_of(site):
    return stored_ledger(site.store, site.coordinator.run).entries


def dying_at(name, when=lambda: True):
    """Raise ``Reached`` at a fail point, in the thread that came by."""

    def at(reached):
        if reached == name and when():
            raise Reached(name)

    watch(at)


def test_an_attempt_that_released_nothing_has_no_entry_and_the_next_has_noise_of_its_own(noisy_site, monkeypatch):
    """The disk damages a report of the first attempt: it is abandoned, and everybody is asked again."""
    secrets, real, damaged = [], NetworkRuntime._report, []

    def report(runtime, slot, row):
        if slot.attempt == 0 and slot.round == 0:
            damaged.append(row.client)
            raise KeyError("damaged")
        return real(runtime, slot, row)

    def once(runtime, name, make, *, real=NetworkRuntime.once):
        secrets.append((name, real(runtime, name, make).material))
        return Key(secrets[-1][1])

    monkeypatch.setattr(NetworkRuntime, "_report", report)
    monkeypatch.setattr(NetworkRuntime, "once", once)
    the_loop(noisy_site, 2).run()
    found = entries_of(noisy_site)
    assert damaged
    assert [(entry.round, entry.attempt) for entry in found] == [(0, 1), (1, 0)]
    assert [name for name, _ in secrets] == ["secret train 0 1", "secret train 1 0"]
    drawn = [hashlib.sha256(b"hansa noise " + secret).hexdigest() for _, secret in secrets]
    assert [entry.noise for entry in found] == drawn
    assert len(set(drawn)) == 2


def test_the_same_attempt_after_a_crash_is_the_same_release_and_counts_once(noisy_site):
    dying_at("coordinator.round.aggregated")
    for _ in range(2):
        with pytest.raises(Reached):
            the_loop(noisy_site, 1).run()
        noisy_site.restart()
    watch(None)
    the_loop(noisy_site, 1).run()
    assert len(entries_of(noisy_site)) == 1


def test_an_entry_that_was_not_committed_released_nothing(noisy_site):
    dying_at("coordinator.ledger.noting")
    with pytest.raises(Reached):
        the_loop(noisy_site, 1).run()
    watch(None)
    assert entries_of(noisy_site) == ()
    assert noisy_site.coordinator.released is None


def test_an_older_checkpoint_beside_a_newer_database_over_counts_and_never_under_counts(noisy_site):
    """Round 1 is released and its checkpoint lost: it is done again with other noise, and both count."""
    points, released = [], []
    the_loop(noisy_site, 2, save=points.append).run()
    released += [entry.noise for entry in entries_of(noisy_site)]
    the_loop(noisy_site, 3).run(points[0])
    found = entries_of(noisy_site)
    assert [(entry.round, entry.attempt) for entry in found] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert {entry.noise for entry in found} > set(released)
    assert len({entry.noise for entry in found}) == 4


def test_an_older_database_beside_a_newer_checkpoint_counts_what_the_checkpoint_knows(tmp_path, noisy_site):
    points = []
    the_loop(noisy_site, 1, save=points.append).run()
    noisy_site.close()
    shutil.copytree(tmp_path / "server", tmp_path / "older")
    noisy_site.open(int(noisy_site.url.rpartition(":")[2]))
    the_loop(noisy_site, 2, save=points.append).run(points[0])
    with closing(Store(tmp_path / "older")) as store:
        ledger = stored_ledger(store, noisy_site.coordinator.run)
    assert len(ledger.entries) == 1
    ledger.restore(points[-1].ledger)  # as ``Loop.run`` does
    assert ledger.entries == entries_of(noisy_site)


def test_noise_that_another_set_of_reports_has_got_is_refused(noisy_site):
    the_loop(noisy_site, 1).run()
    ledger, [first] = stored_ledger(noisy_site.store, noisy_site.coordinator.run), entries_of(noisy_site)
    others = hashlib.sha256(b"berlin\nparis").hexdigest()
    with pytest.raises(RunError, match=r"expected noise of its own.*nothing was released"):
        ledger.add(Entry(**{**vars(first), "counted": others}))
    assert entries_of(noisy_site) == (first,)
