"""Which way trains a block: the faster of the loop and the batched way in a short trial, if both give the same.

One client alone always takes the plain loop, so that a run over the network has the bits of a run in one process.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hansa.core.errors import HansaError
from hansa.learners.failed import ClientFailed
from hansa.learners.torch_batched import Batched
from hansa.learners.torch_data import Rows
from hansa.learners.torch_job import Job, Losses, Others
from hansa.learners.torch_layers import chain_of
from hansa.learners.torch_left import Left
from hansa.learners.torch_loop import Loop
from hansa.learners.torch_losses import NamedLoss, OwnLoss
from hansa.learners.torch_module import FlatModel
from hansa.learners.torch_private import PrivateLoop
from hansa.learners.torch_vmap import Mapped
from hansa.local_training import protects_records

_LOG = logging.getLogger("hansa")
_TRIAL_STEPS = 2
_TRIAL_LOOPED = 2  # clients that the loop is timed on; one of them costs what any costs


class Trainer:
    """Trains jobs in the way that a trial found faster; ``forced`` says which, True only where it can be done.

    ``is_lower`` is whether the module trains in bfloat16; two ways may then differ by more.
    """

    def __init__(
        self, flat: FlatModel, loss: NamedLoss | OwnLoss, others: Others, forced: bool | None, is_lower: bool = False
    ) -> None:
        self._flat, self._loss, self._others, self._forced, self._is_lower = flat, loss, others, forced, is_lower
        self._loop, self._private = Loop(flat, loss, others), PrivateLoop(flat, loss, others)
        self._said: set[str] = set()
        self.choices: MutableMapping[str, str] = {}  # by situation: "loop" or "batched"
        self._chain = None if is_lower else chain_of(flat, loss)

    def fit(self, job: Job, out: Tensor) -> tuple[Losses, Sequence[Left]]:
        """Train every client of the job into its row of ``out``; the mean loss that each has seen (num_clients,).

        Second, what of the rows is left as products.
        """
        batched = self._fitted_at_once(job, out)
        return (self._one_by_one(job, out), ()) if batched is None else batched

    def _one_by_one(self, job: Job, out: Tensor) -> Losses:
        return (self._private if protects_records(job.local.optimizer) else self._loop).fit(job, out)

    def _fitted_at_once(self, job: Job, out: Tensor) -> tuple[Losses, Sequence[Left]] | None:
        """The same where a trial found that clients had better train at once; None where they had not."""
        if protects_records(job.local.optimizer):
            return None
        if self._forced is False or (job.sizes > 0).sum() < 2 or len(job.sizes) < 2:
            return None
        situation = self._situation(job) + (", in bfloat16" if self._is_lower else "")
        if situation not in self.choices:
            try:
                self.choices[situation] = self._choose(job)
            except ClientFailed:  # there is nothing to choose before this client is named, by its row in this job
                return None
        if self.choices[situation] == "batched":
            try:
                batched = self._batched(job)
                return batched.fit(job, out), batched.left
            except HansaError:
                raise
            except Exception as error:  # what one block allowed, another need not: the loop decides
                self.choices[situation] = "loop"
                self._flat.stacks.clear()  # the loop may do with what memory there is
                self._say(f"cannot train these clients at once: {_first_line(error)}")
        return None

    def _batched(self, job: Job) -> Batched:
        way = self._chain or Mapped(self._flat, self._loss, {name: self._others[name] for name in job.models})
        return Batched(self._flat, self._loss, way, self._others)

    def _choose(self, job: Job) -> str:
        """The way for jobs like this one."""
        if any(norm.momentum is None for norm in self._flat.batch_norms):
            self._say("BatchNorm without momentum counts its batches, which differ from client to client")
            return "loop"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # torch warns where mapping is slower than a loop
                ratio = self._trial(job) if self._pads(job) else None
        except HansaError as error:
            if isinstance(error.__cause__, Warning):
                self._say(f"it cannot be batched: {_first_line(error.__cause__)}")
                return "loop"
            raise
        except Exception as error:  # the reasons are as many as there are models
            self._say(f"it cannot be batched: {_first_line(error)}")
            return "loop"
        if ratio is None:
            self._say("batched, it gives other parameters than in the loop")
            return "loop"
        if ratio < 1 or self._forced:
            return "batched"
        _LOG.info("TorchLearner trains clients one by one: in a trial, batched took %.1f times as long", ratio)
        return "loop"

    def _trial(self, job: Job) -> float | None:
        """Seconds a client of the batched way over those of the loop, in two steps; None where they do not agree."""
        clients = np.flatnonzero(job.sizes)[: self._batched(job).chunk_size(job)]
        trial = job.take(clients)._replace(
            local=replace(job.local, epochs=None, steps=_TRIAL_STEPS), change=False, leaves_products=False
        )
        looped, batched = trial.part(0, _TRIAL_LOOPED), self._batched(job)
        theirs, ours = (torch.empty(part.params.shape, device=self._flat.device) for part in (looped, trial))
        loop_seconds = self._seconds(lambda: self._loop.fit(looped, theirs)) / len(theirs)
        batched_seconds = self._seconds(lambda: batched.fit(trial, ours)) / len(ours)
        agree = self._agree(looped.params, ours[: len(theirs)], theirs)
        return batched_seconds / loop_seconds if agree else None

    def _pads(self, job: Job) -> bool:
        """Whether padding leaves a client alone: two clients, one of which has an example less, take one step.

        A model that looks at other examples of its batch gives something else where some of them are padding.
        """
        clients = np.argsort(-job.sizes, kind="stable")[:2]
        width = int(min(job.local.batch_size or job.sizes.max(), job.sizes[clients].min()))
        if width < 2 or not isinstance(job.examples, Rows):
            return True
        sizes = np.array([width, width - 1])
        pair = job.take(clients)._replace(
            examples=Rows(job.examples.everyone, job.examples.starts[clients], sizes),
            sizes=sizes,
            local=replace(job.local, epochs=None, steps=1, batch_size=width),
            change=False,
            leaves_products=False,
        )
        theirs, ours = (torch.empty(pair.params.shape, device=self._flat.device) for _ in range(2))
        self._loop.fit(pair, theirs)
        self._batched(job).fit(pair, ours)
        return self._agree(pair.params, ours, theirs)

    def _seconds(self, work: Callable[[], Losses]) -> float:
        """How long ``work`` takes, after a first time for warming up."""
        work()
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self._flat.device.type == "cuda":
            torch.cuda.synchronize(self._flat.device)

    def _agree(self, before: Tensor, ours: Tensor, theirs: Tensor) -> bool:
        """Whether two ways moved the parameters, and the buffers, alike but for rounding.

        Diverged parameters say nothing: they agree.
        """
        if not torch.isfinite(theirs).all():
            return True
        mask = torch.from_numpy(self._flat.layout.mask("parameter")).to(before.device)
        for part in (mask, ~mask):
            gap, moved = (ours - theirs)[:, part].norm(), (theirs - before)[:, part].norm()
            if not gap <= (0.1 if self._is_lower else 0.02) * moved + 1e-6 * float(part.sum()) ** 0.5:
                return False
        return True

    def _situation(self, job: Job) -> str:
        """What the choice may depend on, in words."""
        kind = type(job.local.optimizer).__name__ + ("" if job.local.optimizer.is_plain else " with moments or decay")
        terms = "" if job.terms.is_none else ", corrected"
        models = "".join(f", {name}" for name in job.models)
        width = 1 << (min(len(job.sizes), self._batched(job).chunk_size(job)).bit_length() - 1)
        return f"{kind}{terms}{models}, batch_size={job.local.batch_size}, {width} clients or more"

    def _say(self, reason: str) -> None:
        """Log, once for each reason, that the loop is taken."""
        if reason not in self._said:
            self._said.add(reason)
            _LOG.warning("TorchLearner trains clients one by one: %s", reason)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
