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
from faults.proxy import FaultProxy
from faults.trial import COORDINATOR, Trial, free_port
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


SLOW = ("client.plan.received", "train-1")


def in_the_middle_of_a_round(trial):
    """Berlin's report of round 1 has its receipt, and the others were killed when they had the plan."""
    trial.until(lambda: any(note["slot"].startswith("train-1-") for note in trial.notes("berlin", "receipt")))
    trial.until(lambda: not trial.is_running("paris") and not trial.is_running("rome"))


def test_case_01_a_coordinator_killed_while_it_collects_goes_on_with_the_same_round(begin, reference):
    trial = begin({"paris": [SLOW], "rome": [SLOW]})
    trial.start_everyone()
    in_the_middle_of_a_round(trial)
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


def test_case_03_asked_to_end_in_the_middle_of_a_round_it_ends_soon_and_goes_on_to_the_same_bits(begin, reference):
    trial = begin({"paris": [SLOW], "rome": [SLOW]})
    trial.start_everyone()
    in_the_middle_of_a_round(trial)
    [before] = accepted(trial, "train-1")
    coordinator, began = trial.processes.pop(COORDINATOR), time.monotonic()
    coordinator.terminate()
    coordinator.join(20)
    assert coordinator.exitcode == 0
    assert time.monotonic() - began < 10
    assert "stopped, as the system asked; the same line goes on" in trial.logs()
    trial.start(COORDINATOR)
    trial.finish()
    assert before in accepted(trial, "train-1")
    assert [note["slot"] for note in trial.notes("berlin", "receipt")].count("train-1-0-update") == 1
    assert len(trial.notes("berlin", "started")) == 1  # it was away for nobody
    checkers.everything(trial, reference.whole)


DAY_S = 86_400.0


def test_case_09_clocks_that_are_a_day_off_or_are_stepped_at_every_turn_change_no_bit(begin, reference):
    trial = begin()
    trial.clocks = {COORDINATOR: (0.0, DAY_S, -DAY_S), "berlin": (-DAY_S,), "paris": (DAY_S,), "rome": (DAY_S, -DAY_S)}
    trial.run()
    assert {len(accepted(trial, f"train-{number}")) for number in range(3)} == {3}
    times = [at for (at,) in trial.query("SELECT at FROM audit")]
    assert max(times) - min(times) > DAY_S
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


def test_case_32_a_coordinator_whose_lock_did_not_hold_stops_once_another_has_taken_over(reference, fast):
    with FaultProxy(0) as proxy:
        trial = Trial(fast / "trial", free_port(), url=proxy.url, kills={"paris": [SLOW], "rome": [SLOW]})
        proxy.target = trial.port
        try:
            trial.start_everyone()
            in_the_middle_of_a_round(trial)
            first = trial.processes.pop(COORDINATOR)
            (trial.folder / "fed" / "coordinator.lock").unlink()  # as on a disk that holds no locks
            trial.port = free_port()
            trial.start(COORDINATOR)
            first.join(30)
            assert first.exitcode == 1
            said = "its only coordinator (epoch 1), found that another one has taken over (epoch 2)"
            assert trial.logs().count(said) == 1
            proxy.target = trial.port
            proxy.cut()
            trial.finish()
        finally:
            trial.end()
    kinds = [kind for (kind,) in trial.query("SELECT kind FROM audit WHERE kind IN ('started', 'stopped')")]
    assert kinds == ["started", "started", "stopped"]  # the first wrote nothing more
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
