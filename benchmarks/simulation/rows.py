"""The rows of the table: hansa, the reference lines and the peers, with every setting tried and the best of each.

``--tune`` runs every setting once and prints what each takes; ``best`` holds the winners of such a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; ``best`` says which of ``settings`` runs a workload, and so which workloads it runs."""

    name: str
    title: str
    script: str
    kind: str  # "hansa", "line" (hand-written) or "peer"
    settings: Mapping[str, Options]
    best: Mapping[str, str]
    packages: tuple[str, ...] = ("torch", "numpy")
    rounds: Mapping[str, int] = field(default_factory=dict)  # fewer than the workload's, where it is slow
    only_clients: int = 0  # of the workload; 0: all. Its seconds are then a lower bound
    draws: str = "nothing"  # of its own: "nothing", "filling" (of a short batch), "order" (of rows) or "clients"
    tuned: str = ""  # in words, for the reader of the table

    def setting_for(self, workload: str) -> tuple[str, dict[str, Any]]:
        """The name and the options of the best setting."""
        name = self.best[workload]
        return name, dict(self.settings[name])

    def tried(self) -> list[Row]:
        """A row for each setting, for ``--tune``."""
        return [replace(self, best=dict.fromkeys(self.best, setting)) for setting in self.settings]


def _best(w1: str, w2: str, w3: str, lr_mnist: str) -> dict[str, str]:
    """Of each workload; "" where a row does not run it."""
    named = {"W1": w1, "W2": w2, "W3": w3, "lr_mnist": lr_mnist}
    return {name: setting for name, setting in named.items() if setting}


ONE, TWO = "1 thread", "2 threads"
_THREADS: dict[str, Options] = {ONE: {"threads": 1}, TWO: {"threads": 2}}
_OWN_LOADER: dict[str, Options] = {
    "DataLoader, 1 thread": {"threads": 1},
    "slices, 1 thread": {"threads": 1, "slices": True},
    "slices, 2 threads": {"threads": 2, "slices": True},
}
SLICES, SLICES_TWO = "slices, 1 thread", "slices, 2 threads"

ROWS = (
    Row(
        name="hansa",
        title="hansa, TorchLearner",
        script="hansa",
        kind="hansa",
        settings={"as it comes": {}},
        best=_best(*["as it comes"] * 4),
        packages=("hansa", "torch", "numpy"),
        draws="order",
        tuned="not tuned: runtime and blocks are its own choice",
    ),
    Row(
        name="hansa_linear",
        title="hansa, LinearLearner",
        script="hansa",
        kind="hansa",
        settings={"as it comes": {"learner": "linear"}},
        best=_best("", "", "as it comes", "as it comes"),
        packages=("hansa", "numpy"),
        draws="order",
        tuned="not tuned",
    ),
    Row(
        name="R0",
        title="bare PyTorch loop (R0)",
        script="bare_loop",
        kind="line",
        settings=_THREADS,
        best=_best(ONE, TWO, ONE, ONE),
        tuned="1 or 2 threads",
    ),
    Row(
        name="R1",
        title="bare loop in two processes (R1)",
        script="bare_loop_two",
        kind="line",
        settings={"2 processes": {"threads": 1}},
        best=_best(*["2 processes"] * 4),
        tuned="one thread each",
    ),
    Row(
        name="R2b",
        title="hand-written batched line (R2b)",
        script="batched_line",
        kind="line",
        settings={f"blocks of {b}, 2 threads": {"threads": 2, "block": b} for b in (10, 25, 100, 1000)}
        | {"blocks of 10, 1 thread": {"threads": 1, "block": 10}},
        best=_best("blocks of 25, 2 threads", "", "blocks of 1000, 2 threads", "blocks of 10, 1 thread"),
        tuned="blocks of 10 to 1,000, 1 or 2 threads; convolutions do not gain, so none for W2",
    ),
    Row(
        name="pfl",
        title="pfl",
        script="pfl",
        kind="peer",
        settings={"2 processes": {"threads": 1, "processes": 2}, **_THREADS},
        best=_best("2 processes", "2 processes", "2 processes", ONE),
        packages=("pfl", "torch", "numpy"),
        tuned="1 or 2 threads, or two processes under torchrun",
    ),
    Row(
        name="fedjax",
        title="fedjax",
        script="fedjax",
        kind="peer",
        settings={"jit": {}},
        best=_best(*["jit"] * 4),
        packages=("fedjax", "jax", "numpy"),
        rounds={"W2": 3},
        draws="filling",
        tuned="jit, its default (its pmap fails with today's JAX)",
    ),
    Row(
        name="fluke",
        title="fluke",
        script="fluke",
        kind="peer",
        settings=_THREADS,
        best=_best(ONE, TWO, ONE, ONE),
        packages=("fluke-fl", "torch", "numpy"),
        tuned="1 or 2 threads",
    ),
    Row(
        name="fedlab",
        title="FedLab",
        script="fedlab",
        kind="peer",
        settings=_OWN_LOADER,
        best=_best(SLICES, SLICES_TWO, SLICES, SLICES),
        packages=("fedlab", "torch", "numpy"),
        tuned="1 or 2 threads; slices of tensors instead of the documented DataLoader",
    ),
    Row(
        name="blazefl",
        title="BlazeFL",
        script="blazefl",
        kind="peer",
        settings=_OWN_LOADER
        | {
            "2 client threads": {"threads": 1, "mode": "thread", "slices": True},
            "2 client processes": {"threads": 1, "mode": "process", "slices": True},
        },
        best=_best(SLICES, "2 client threads", SLICES, SLICES),
        packages=("blazefl", "torch", "numpy"),
        tuned="serial, two threads, two processes; slices of tensors instead of the documented DataLoader",
    ),
    Row(
        name="flower",
        title="Flower (Ray)",
        script="flower",
        kind="peer",
        settings={
            "2 actors": {"threads": 1, "actors": 2},
            "1 actor, 2 threads": {"threads": 2, "actors": 1},
        },
        best=_best(*["2 actors"] * 4),
        packages=("flwr", "ray", "torch", "numpy"),
        rounds={"W3": 3},
        draws="clients",
        tuned="1 or 2 actors; examples memory-mapped and the model kept in each actor",
    ),
    Row(
        name="nvflare",
        title="NVFlare simulator",
        script="nvflare",
        kind="peer",
        settings={"4 clients only": {"threads": 1}},
        best=_best("4 clients only", "", "", ""),
        packages=("nvflare", "torch", "numpy"),
        rounds={"W1": 5},
        only_clients=4,
        tuned="as many threads as clients (with fewer, a client's process starts anew for each task)",
    ),
)
