"""``Failed``: an error as it travels from a worker to the simulation, in another process or on another machine."""

from __future__ import annotations

import pickle
import traceback
from typing import Any, NamedTuple

from hansa.core.errors import HansaError, RunError
from hansa.runtimes.blame import first_line

_NO_AUTOGRAD = "autograd's threading in combination with fork-based multiprocessing"
_FORKED_TOO_LATE = (
    "Processes: expected a process that has not trained with PyTorch before, found that this one has (beside a GPU, "
    "PyTorch then refuses to train in processes forked from it); start a new one, or use runtime=hansa.InProcess()"
)


class WorkerTraceback(Exception):
    """Where in a worker an error was raised, as text: the cause of the same error here."""


class Failed(NamedTuple):
    """An error in a worker, in a form that always travels: its class, arguments and fields where they can be sent."""

    kind: type[HansaError]
    arguments: tuple[Any, ...]
    fields: dict[str, Any]
    trace: str

    @staticmethod
    def of(error: BaseException) -> Failed:
        """The same kind of error where it is hansa's own; any other says what it was."""
        trace = "".join(traceback.format_exception(error))
        if _NO_AUTOGRAD in trace:
            return Failed(RunError, (_FORKED_TOO_LATE,), {}, trace)
        if isinstance(error, HansaError) and _travels((type(error), error.args, error.__dict__)):
            return Failed(type(error), error.args, dict(error.__dict__), trace)
        return Failed(RunError, (f"in a worker process: {type(error).__name__}: {first_line(error)}",), {}, trace)

    def error(self) -> HansaError:
        """The error to raise here; not made by its own constructor, which may want other arguments."""
        error = self.kind.__new__(self.kind, *self.arguments)
        error.args = self.arguments
        error.__dict__.update(self.fields)
        error.__cause__ = WorkerTraceback(f"\n{self.trace}")
        return error


def _travels(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # there are many reasons; all mean no
        return False
    return True
