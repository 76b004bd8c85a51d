"""Cases of real processes: who is killed, stopped, starved of memory or copied in mid-run, and what must come of it.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import os
import random
import re
import shutil
import signal
import time

import pytest

from faults import checkers
from faults.trial import COORDINATOR, Trial
from hansa.network.failpoints import FAILPOINTS

pytestmark = pytest.mark.network
# Every point from the closing of a slot to the release of what came of it. Once there is a checkpoint, a restart begins
# with the release; where a checkpoint is saved comes by again a round later.
COMMIT = [(name, "train-1") for name in FAILPOINTS if re.match(r"coordinator\.(slot|secret|round|checkpoint)\.", name)]
COMMIT += [(name, "start") for name in FAILPOINTS if name.startswith("coordinator.release.")]
COMMIT[COMMIT.index(("coordinator.checkpoint.saved", "train-1"))] = ("coordinator.checkpoint.saved", "evaluate-2")


@pytest.fixture
def begin(reference, fast):
    """Trials that begin where everybody has enrolled."""
    made = []

    def make(kills=None) -> Trial:
        made.append(reference.trial(fast / f"trial-{len(made)}", kills or {}))
        return made[-1]

    yield make
    for trial in made:
        trial.end()


def accepted(trial, slot):
    """The reports that count in a slot, with the time at which they came."""
    query = "SELECT client, sha256, received_at FROM reports JOIN slots ON slots.id = slot_id WHERE slots.slot LIKE ?"
    return set(trial.query(f"{query} AND status = 'accepted'", f"{slot}-%"))


def test_case_01_a_coordinator_killed_while_it_collects_goes_on_with_the_same_round(begin, reference):
    slow = ("client.plan.received", "train-1")
    trial = begin({"paris": [slow], "rome": [slow]})
    trial.start_everyone()
    trial.until(lambda: any(note["slot"].startswith("train-1-") for note in trial.notes("berlin", "receipt")))
    trial.until(lambda: not trial.is_running("paris") and not trial.is_running("rome"))
    [before] = accepted(trial, "train-1")
    trial.kill(COORDINATOR)
    trial.finish()
    assert before in accepted(trial, "train-1")
    assert len(accepted(trial, "train-1")) == 3
    assert len(trial.notes("berlin", "started")) == 1  # it was away for nobody
    checkers.everything(trial, reference.whole)


def test_case_02_killed_at_every_point_of_aggregation_and_commit_there_is_one_model_a_version(begin, reference):
    trial = begin({COORDINATOR: COMMIT})
    trial.run()
    assert len(trial.notes(COORDINATOR, "kill")) == len(COMMIT) >= 14
    checkers.everything(trial, reference.whole)


@pytest.mark.parametrize("attempt", range(3))
def test_case_21_what_was_acknowledged_before_the_power_went_stays(begin, reference, attempt):
    trial = begin()
    trial.start_everyone()
    trial.until(lambda: any(note["slot"].startswith("train-") for note in trial.notes("rome", "receipt")))
    time.sleep(random.uniform(0.0, 0.3))
    copy = lose_power(trial)
    told = {(name, note["slot"], note["sha256"]) for name in copy.names for note in copy.notes(name, "receipt")}
    trial.finish()
    try:
        copy.run()
        kept = {
            (n, slot, sha)
            for n, slot, sha in copy.query("SELECT client, slot, sha256 FROM reports JOIN slots ON slots.id = slot_id")
        }
        assert told
        assert told <= kept
        checkers.everything(copy, reference.whole)
    finally:
        copy.end()
    checkers.everything(trial, reference.whole)


def lose_power(trial):
    """All that is on disk at one moment, with torn ends: another trial, in which nobody is running."""
    stopped = [process for process in trial.processes.values() if process.exitcode is None]
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    folder = trial.folder.with_name(f"{trial.folder.name}-copy")
    try:
        shutil.copytree(trial.folder, folder, symlinks=True)
    finally:
        for process in stopped:
            os.kill(process.pid, signal.SIGCONT)
    for shared in folder.rglob("*-shm"):  # of a machine that is gone
        shared.unlink()
    for log in folder.rglob("*.db-wal"):  # what was being written and was not synced may be anything
        with log.open("ab") as file:
            file.write(os.urandom(random.randrange(1, 9000)))
    for blob in folder.rglob(".new-*"):
        os.truncate(blob, random.randrange(blob.stat().st_size + 1))
    return Trial(folder, trial.port, names=trial.names)


def test_case_32_a_second_coordinator_on_one_state_folder_is_refused(begin, reference):
    trial = begin()
    trial.start(COORDINATOR)
    trial.until(lambda: "serving on port" in trial.logs())
    first, port = trial.processes.pop(COORDINATOR), trial.port
    trial.port = port + 1
    trial.start(COORDINATOR)
    second = trial.processes[COORDINATOR]
    second.join(30)
    assert second.exitcode == 2
    assert re.search(
        rf"expected a state folder\s+that no coordinator is serving, found one at work \(process\s+{first.pid}\)",
        trial.logs(),
    )
    trial.processes[COORDINATOR], trial.port = first, port
    for name in trial.names:
        trial.start(name)
    trial.finish()
    checkers.everything(trial, reference.whole)


@pytest.mark.parametrize(
    "point", ["coordinator.slot.frozen", "coordinator.round.aggregated", "coordinator.report.stored"]
)
def test_case_33_a_coordinator_without_memory_fails_cleanly_and_loses_nothing(begin, reference, point):
    trial = begin()
    trial.starve = {COORDINATOR: (point, "train-1")}
    trial.start_everyone()
    trial.until(lambda: bool(trial.notes(COORDINATOR, "starved")))
    if point == "coordinator.report.stored":  # within a request: the server lives, and the client comes again
        trial.finish()
        assert len(trial.notes(COORDINATOR, "started")) == 1
    else:
        coordinator = trial.processes[COORDINATOR]
        coordinator.join(30)
        assert coordinator.exitcode == 1
        assert "expected enough memory, found none left" in trial.logs()
        trial.starve = {}
        trial.start(COORDINATOR)
        trial.finish()
    checkers.everything(trial, reference.whole)


@pytest.mark.parametrize("megabytes", [1, 4, 16])
def test_case_33_no_limit_on_memory_brings_a_run_to_another_end(begin, reference, megabytes):
    trial = begin()
    trial.start(COORDINATOR, memory_bytes=megabytes * 2**20)
    for name in trial.names:
        trial.start(name)
    trial.processes[COORDINATOR].join(2)
    trial.kill(COORDINATOR)
    trial.start(COORDINATOR)
    trial.finish()
    checkers.everything(trial, reference.whole)
