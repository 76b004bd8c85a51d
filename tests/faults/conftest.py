"""What kill tests share: one undisturbed run to compare with, and folders in which a sync costs nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults import checkers
from faults.sites import Site, make_federation
from faults.trial import COORDINATOR, NAMES, Trial, copied, enrolled, fast_folder, free_port

VICTIM = NAMES[0]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run, from nothing to its end, and a trial in which everybody has enrolled and nothing else."""

    whole: Trial
    begun: Trial

    def phases(self, name: str) -> dict[str, list[str]]:
        """Where the coordinator, or a client, comes by a fail point."""
        found = {who: self.whole.reached(who).get(name, []) for who in (COORDINATOR, VICTIM)}
        return {who: phases for who, phases in found.items() if phases}

    def trial(self, folder: Path, kills, *, fresh: bool = False) -> Trial:
        """A trial with the same outcome, if nothing goes wrong; ``fresh``: enrolment is part of it."""
        if fresh:
            return Trial(folder, self.whole.port, kills=kills)
        return copied(self.begun, folder, kills=kills)


@pytest.fixture(scope="session")
def reference():
    folder = fast_folder()
    whole = Trial(folder / "whole", free_port(), trace=True)
    try:
        whole.run()
        yield Reference(whole, enrolled(folder / "begun"))
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
    """A coordinator on loopback; when it has ended, this process is as it was and the store is sound."""
    with checkers.returns_to_baseline():
        made = Site(tmp_path, make_federation())
        yield made
        made.end()
    checkers.is_sound(tmp_path / "server" / "coordinator.db")
    checkers.counted_once(tmp_path / "server" / "coordinator.db")
    checkers.no_temporary_files(tmp_path)
