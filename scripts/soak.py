"""A soak: small federations of real processes, whose coordinator and clients are killed at random moments.

    python scripts/soak.py --minutes 10            as ``make soak MINUTES=10``
    python scripts/soak.py --minutes 600 --kills 10000

Every federation must end with each report counted once, no receipt lost, and parameters that follow bit for bit from
the committed reports. Prints a summary and, last, one line of JSON; the exit status is 1 when anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of many small processes keeps to one thread

from faults.torment import Tally, lane


def main() -> int:
    """Run the lanes, each in a process of its own, and say what they found."""
    asked = _arguments()
    most = None if asked.kills is None else -(-asked.kills // asked.lanes)
    print(f"soak: {asked.lanes} lanes, {asked.minutes:g} minutes, seed {asked.seed}", flush=True)
    with ProcessPoolExecutor(asked.lanes, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(lane, asked.minutes * 60, asked.seed + i, most) for i in range(asked.lanes)]
        tally = sum((one.result() for one in running), Tally())
    tally.seconds /= asked.lanes
    for sentence in tally.sentences:
        print(sentence)
    print(
        f"{tally.kills} kills ({tally.coordinator_kills} of coordinators) in {tally.federations} federations, "
        f"{60 * tally.kills / tally.seconds:.0f} a minute; {tally.receipts} receipts, {tally.lost_receipts} lost; "
        f"{tally.double_counts} counted twice, {tally.wrong_parameters} with wrong parameters, "
        f"{tally.damaged_files} with damaged files, {tally.stuck} that did not end"
    )
    found = {name: value for name, value in asdict(tally).items() if name != "sentences"}
    print(json.dumps({**found, "seconds": round(tally.seconds, 1), "seed": asked.seed, "failures": tally.failures}))
    return int(tally.failures > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill coordinators and clients at random; every run must end well.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--kills", type=int, help="end after so many kills in all")
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1, help="federations at a time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the moments")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
