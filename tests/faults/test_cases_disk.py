"""Cases of disks: full ones, damaged files, and the state folder of another version.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

from types import SimpleNamespace

import pytest

from faults import checkers
from faults.conftest import SHORT, VICTIM
from faults.disk import SmallDisk, damage
from faults.sites import Rounds, rows
from faults.trial import COORDINATOR, copied
from hansa.commands.status import run_status
from hansa.network.room import NoRoom
from hansa.network.runtime import NetworkRuntime

pytestmark = pytest.mark.network


@pytest.fixture
def begin(reference, fast):
    """Trials that begin where everybody has enrolled."""
    made = []

    def make(kills=None, **more):
        made.append(copied(reference.begun, fast / f"trial-{len(made)}", kills=kills, **more))
        return made[-1]

    yield make
    for trial in made:
        trial.end()


@pytest.fixture
def disk(fast):
    """Disks in the place of folders."""
    made = []

    def make(folder):
        made.append(SmallDisk(folder))
        return made[-1]

    yield make
    for one in made:
        one.remove()


def receipts(trial):
    return {(name, note["slot"]) for name in trial.names for note in trial.notes(name, "receipt")}


def refuses(trial, sentence):
    """A coordinator that is started now ends with a sentence."""
    trial.start(COORDINATOR)
    trial.processes[COORDINATOR].join(30)
    assert trial.processes[COORDINATOR].exitcode == 2
    assert sentence in " ".join(trial.logs().split())


def test_case_18_a_full_disk_acknowledges_nothing_and_the_run_goes_on_when_there_is_room(disk, begin, reference):
    trial = begin()
    small = disk(trial.folder / "fed")
    trial.start_everyone()
    trial.until(lambda: any(slot.startswith("train-0") for _, slot in receipts(trial)))
    small.fill()
    trial.until(lambda: "found it full; try again later" in trial.logs() or "the disk is full" in trial.logs())
    told = receipts(trial)
    kept = {(name, slot) for name, slot in trial.query("SELECT client, slot FROM reports JOIN slots ON id = slot_id")}
    assert told <= kept
    assert len(trial.notes(COORDINATOR, "started")) == 1
    small.clear()
    trial.finish()
    assert len(trial.notes(COORDINATOR, "started")) == 1
    checkers.everything(trial, reference.whole)


def test_case_18_a_round_begins_when_there_is_room_for_its_reports(site, monkeypatch, tmp_path, capsys):
    site.join("berlin", rows(0))
    runtime = NetworkRuntime(site.coordinator)
    runtime.wait_for_clients(1, timeout_s=30)
    rounds = Rounds(site.federation, runtime, ("berlin",))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=10))
        with pytest.raises(NoRoom, match=r"MB free for a round \(clients asked: 1\), found 1e-05"):
            rounds.run(0)
        run_status(tmp_path / "server", False)
        assert "the disk of the state folder has 10 B left" in capsys.readouterr().out
        with pytest.raises(SystemExit):  # a person is needed
            run_status(tmp_path / "server", True)
    rounds.run(0)
    assert rounds.mean.clients == ("berlin",)


def test_case_18_a_run_directory_on_a_full_disk_is_written_when_there_is_room(disk, begin, reference):
    trial = begin()
    small = disk(trial.folder / "run")
    small.fill()
    trial.start_everyone()
    trial.until(lambda: "the disk is full" in trial.logs())
    small.clear()
    trial.finish()
    assert len(trial.notes(COORDINATOR, "started")) == 1
    checkers.everything(trial, reference.whole)


@pytest.mark.parametrize("how", ["flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("half", "nothing"))])
def test_case_20_a_damaged_checkpoint_or_model_is_replaced_and_never_trained_from(begin, reference, how):
    trial = begin({COORDINATOR: [("coordinator.plan.shown", "train-2")]})
    trial.start_everyone()
    trial.until(lambda: not trial.is_running(COORDINATOR))
    [checkpoint] = (trial.folder / "fed" / "runs").rglob("checkpoint")
    copy = checkpoint.with_name("checkpoint.copy")
    good = copy.read_bytes()
    assert good == checkpoint.read_bytes()
    for path in (checkpoint, copy, *(trial.folder / "fed" / "blobs").iterdir()):
        damage(path, how)
    refuses(trial, "expected it or its copy undamaged, found neither")
    checkpoint.unlink()
    copy.unlink()
    refuses(trial, "expected the one of 2 rounds that are done, found none")
    checkpoint.write_bytes(good)
    damage(checkpoint, how)
    copy.write_bytes(good)
    trial.start(COORDINATOR)
    trial.finish()
    assert f"{checkpoint.name} is damaged" in " ".join(trial.logs().split())
    checkers.everything(trial, reference.whole)


def test_case_20_a_damaged_report_is_not_counted_and_its_round_is_asked_for_again(begin):
    trial = begin({COORDINATOR: [("coordinator.slot.full", "train-1")]})
    trial.start_everyone()
    trial.until(lambda: not trial.is_running(COORDINATOR))
    for path, how in zip(sorted((trial.folder / "fed" / "updates").iterdir()), ("flip", "half"), strict=False):
        damage(path, how)
    trial.finish()
    assert "is damaged or gone" in trial.logs()
    rounds = trial.query("SELECT attempt, state FROM slots WHERE task = 'train' AND round = 1 ORDER BY attempt")
    assert rounds == [(0, "abandoned"), (1, "aggregated")]
    checkers.everything(trial)


@pytest.mark.parametrize(
    ("who", "point", "folder"),
    [
        (COORDINATOR, "coordinator.upload.grown", "fed/uploads"),
        pytest.param(COORDINATOR, "coordinator.upload.whole", "fed/uploads", marks=pytest.mark.slow),
        (VICTIM, "client.outbox.committed", f"{VICTIM}/outbox"),
        pytest.param(VICTIM, "client.download.whole", f"{VICTIM}/downloads", marks=pytest.mark.slow),
    ],
)
def test_case_20_what_was_damaged_on_its_way_is_sent_once_more(begin, reference, fast, who, point, folder):
    trial = begin({who: [(point, "train-1")]}, small=SHORT)
    trial.start_everyone()
    trial.until(lambda: not trial.is_running(who))
    files = [path for path in (trial.folder / folder).rglob("*") if path.is_file() and path.stat().st_size]
    assert files  # beside those into which nothing was written yet
    for path in files:
        damage(path, "flip")
    trial.finish()
    checkers.everything(trial, reference.whole)
