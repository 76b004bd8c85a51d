"""One simulated round of hansa with the whole protocol: ``SecureMean(simulate="protocol")`` over the same updates.

    python hansa_side.py '{"clients": 100, "params": 1000000, "dropped": 10, "bits": 22}'

Prints one line of JSON. ``whole_s`` is ``hansa.simulate`` from beginning to end, ``round_s`` its round without the
scoring of the new model, which Flower's side has not: keys, signatures' exchanges, shares, training (a look-up),
rounding, masks, packing, sums, the checks of what clients sent and the new model. Whoever drops does not answer the
third exchange, after its shares have been given out.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import vectors

import hansa
from hansa.core.protocols import Client, Plan
from hansa.runtimes.inprocess import InProcessRuntime


class _Losing(InProcessRuntime):
    """A runtime whose clients ``lost`` fall silent when masked rows are asked for."""

    lost: frozenset[Client] = frozenset()

    def start(self, plan: Plan, clients: Sequence[Client]) -> None:
        left = [client for client in clients if plan.slot.exchange != "masked" or client not in self.lost]
        self.start_some(plan, left, left)


@dataclass(frozen=True, kw_only=True)
class Losing:
    """``InProcess``, except that ``lost`` drop out."""

    lost: frozenset[Client]

    def open(self, federation: Any, load: Callable[[Client], Any], key: Any, keep: bool = True) -> InProcessRuntime:
        made = hansa.InProcess().open(federation, load, key, keep)
        runtime = _Losing(federation, made.worker, key, made.block_size)
        runtime.lost = self.lost
        return runtime


def main() -> None:
    given = json.loads(sys.argv[1])
    numbers, params = list(range(2, given["clients"] + 2)), given["params"]
    names = {number: f"client {number:03d}" for number in numbers}
    dropped = numbers[: given["dropped"]]
    updates = {number: vectors.update(number, params) for number in numbers}
    learner = hansa.FunctionLearner(
        initial=lambda: {"vector": np.zeros(params, np.float32)},
        train=lambda tensors, rows, settings: {"vector": updates[int(rows.x[0, 0])]},
        predict=lambda tensors, x: np.zeros(len(x), np.float32),
    )
    federation = hansa.Federation(
        learner=learner,
        algorithm=hansa.FedAvg(client_learning_rate=1.0),
        transforms=(hansa.Clip(norm=float(vectors.LIMIT * np.sqrt(params))),),
        aggregator=hansa.SecureMean(bits=given["bits"], simulate="protocol"),
    )
    rows = {names[n]: hansa.Dataset(np.array([[n]], np.float32), np.zeros(1, np.float32)) for n in numbers}
    runtime = Losing(lost=frozenset(names[number] for number in dropped))
    began, at_work = time.perf_counter(), time.process_time()
    run = hansa.simulate(federation, rows, num_rounds=1, runtime=runtime, profile=True)
    seconds, worked = time.perf_counter() - began, time.process_time() - at_work
    mean = vectors.expected([number for number in numbers if number not in dropped], params)
    error = float(np.abs(run.parameters - mean).max())
    stages = run.info["profile"]["first_round"]
    evaluation = stages.pop("evaluation")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in stages.items() if value >= 0.005)
    said = f"{parts}; beside it {evaluation:.2f} s for the clients' metrics, by a secure sum of their own"
    step = 2.0 ** math.ceil(math.log2(vectors.LIMIT * np.sqrt(params) / 2 ** (given["bits"] - 1)))
    found = {
        "round_s": sum(stages.values()),
        "whole_s": seconds,
        "core_s": worked,
        "error": error,
        "tolerance": step,
        "said": said,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
