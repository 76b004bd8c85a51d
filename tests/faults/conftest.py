"""What kill tests share: one undisturbed run to compare with, and folders in which a sync costs nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults import checkers
from faults.sites import watched_site
from faults.trial import COORDINATOR, NAMES, Trial, copied, enrolled, fast_folder, free_port

VICTIM = NAMES[0]
SHORT = 64  # bytes: less than any vector or report
BUFFER = "size=2, max_staleness=1"


@dataclass(frozen=True)
class Reference:
    """An undisturbed run, from nothing to its end, and a trial in which everybody has enrolled and nothing else.

    ``long`` is a run in which every body counts as a long one: it lies in files, and travels in parts. In ``buffered``
    rounds are buffered ones, so that the order of arrival, which no two runs share, decides about the bits. In
    ``noisy`` each release gets noise and each owner has a privacy budget.
    """

    whole: Trial
    begun: Trial
    long: Trial
    buffered: Trial
    noisy: Trial

    def phases(self, name: str) -> dict[str, list[str]]:
        """Where the coordinator, or a client, comes by a fail point."""
        run = self._comes_by(name)
        found = {who: run.reached(who).get(name, []) for who in (COORDINATOR, VICTIM)}
        return {who: phases for who, phases in found.items() if phases}

    def _comes_by(self, name: str) -> Trial:
        """The first of the runs that comes by a fail point."""
        for run in (self.whole, self.long, self.noisy):
            if any(name in run.reached(who) for who in (COORDINATOR, VICTIM)):
                return run
        return self.buffered

    def trial(self, folder: Path, kills=None, *, fresh: bool = False) -> Trial:
        """A trial that ends as ours did, if nothing goes wrong; ``fresh``: enrolment is part of it."""
        kills = kills or {}
        runs = [self._comes_by(name) for points in kills.values() for name, _ in points]
        small = SHORT if self.long in runs else None
        if self.buffered in runs:
            return Trial(folder, self.whole.port, kills=kills, buffer=BUFFER)
        if self.noisy in runs:
            return Trial(folder, self.whole.port, kills=kills, noisy=True)
        if fresh:
            return Trial(folder, self.whole.port, kills=kills, small=small)
        return copied(self.begun, folder, kills=kills, small=small)

    def check(self, trial: Trial) -> None:
        """All laws of a trial that has ended; where rounds are not buffered, it has the bits of ours."""
        checkers.everything(trial, None if trial.buffer else self.noisy if trial.noisy else self.whole)


@pytest.fixture(scope="session")
def reference():
    folder = fast_folder()
    whole = Trial(folder / "whole", free_port(), trace=True)
    try:
        whole.run()
        begun = enrolled(folder / "begun")
        long = copied(begun, folder / "long", trace=True, small=SHORT)
        long.run()
        checkers.everything(long, whole)
        buffered = Trial(folder / "buffered", whole.port, trace=True, buffer=BUFFER)
        buffered.run()
        checkers.everything(buffered)
        noisy = Trial(folder / "noisy", whole.port, trace=True, noisy=True)
        noisy.run()
        checkers.everything(noisy)
        yield Reference(whole, begun, long, buffered, noisy)
    finally:
        whole.end()
        shutil.rmtree(folder)


@pytest.fixture
def fast():
    """A folder for one test."""
    folder = fast_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def site(tmp_path):
    """A coordinator on loopback; when it has ended, this process is as it was and what it left is sound."""
    with watched_site(tmp_path) as made:
        yield made
