"""Small federations of real processes, killed at random: what a soak does in one lane, and what it counts."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields

from faults import checkers
from faults.trial import COORDINATOR, Failure, Trial, copied, enrolled, fast_folder

_MOST_KILLS = 40  # of one federation: then it may end
_LONGEST_GAP_S = 0.5  # between two kills
_BUFFERS = (None, "size=2, max_staleness=1")  # in half of the lanes rounds are buffered ones


@dataclass
class Tally:
    """What a soak found; all but the first five must stay at zero."""

    seconds: float = 0.0
    federations: int = 0
    kills: int = 0
    coordinator_kills: int = 0
    receipts: int = 0
    lost_receipts: int = 0
    double_counts: int = 0
    wrong_parameters: int = 0
    damaged_files: int = 0
    stuck: int = 0
    sentences: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """How much went wrong."""
        return self.lost_receipts + self.double_counts + self.wrong_parameters + self.damaged_files + self.stuck

    def __add__(self, other: Tally) -> Tally:
        mine, yours = asdict(self), asdict(other)
        return Tally(**{one.name: mine[one.name] + yours[one.name] for one in fields(self)})


# Which counter a broken law raises.
_LAWS: tuple[tuple[str, Callable[[Trial], None]], ...] = (
    ("lost_receipts", checkers.every_receipt_stands),
    ("double_counts", checkers.each_report_counts_once),
    ("wrong_parameters", checkers.every_version_is_one_model),
    ("wrong_parameters", checkers.the_parameters_follow_from_the_reports),
    ("damaged_files", checkers.every_database_is_sound),
    ("damaged_files", checkers.nothing_temporary_is_left),
    ("damaged_files", checkers.the_logs_are_whole),
)


def lane(seconds: float, seed: int, most_kills: int | None = None) -> Tally:
    """One federation after another for so long, or until so many kills; those that went wrong stay on disk.

    Whether rounds are buffered ones, and who is killed when, follows from the ``seed``.
    """
    began, draw, tally, folder = time.monotonic(), random.Random(seed), Tally(), fast_folder()
    begun = enrolled(folder / "begun", seeded=False, buffer=_BUFFERS[seed % 2])
    while (left := seconds - (time.monotonic() - began)) > 0 and (most_kills is None or tally.kills < most_kills):
        number = tally.federations
        trial = copied(begun, folder / f"{number}")
        found = _one(trial, draw, time.monotonic() + left)
        tally += found
        if not found.failures:
            shutil.rmtree(trial.folder)
    tally.seconds = time.monotonic() - began
    if not tally.failures:
        shutil.rmtree(folder)
    return tally


def _one(trial: Trial, draw: random.Random, end: float) -> Tally:
    """One federation, tormented until it ends or has been killed often enough."""
    tally = Tally(federations=1)
    try:
        trial.start_everyone()
        while trial.num_kills < _MOST_KILLS and trial.is_running(COORDINATOR) and time.monotonic() < end:
            trial.tend(draw.uniform(0.0, _LONGEST_GAP_S))
            name = draw.choice([COORDINATOR, *trial.names])
            if trial.kill(name):
                tally.coordinator_kills += name == COORDINATOR
                trial.start(name)
        trial.finish(limit_s=120)
    except Failure as error:
        tally.stuck += 1
        tally.sentences.append(f"{trial.folder}: {error}")
    trial.end()
    tally.kills, tally.receipts = trial.num_kills, sum(len(trial.notes(name, "receipt")) for name in trial.names)
    if not tally.stuck:
        _judge(trial, tally)
    return tally


def _judge(trial: Trial, tally: Tally) -> None:
    """Ask every law, and count those that are broken."""
    for counter, law in _LAWS:
        try:
            law(trial)
        except checkers.Broken as error:
            setattr(tally, counter, getattr(tally, counter) + 1)
            tally.sentences.append(f"{trial.folder}: {error}")
