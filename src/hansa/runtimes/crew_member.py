"""What runs in a worker process: it does what comes through its channel until nobody is at the other end."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from hansa.core.errors import HansaError, RunError
from hansa.runtimes.blame import first_line
from hansa.runtimes.channel import Channel, Letter, Region, unwrap
from hansa.runtimes.hand import Hand, Job, collect, keep_memory, one_thread
from hansa.runtimes.worker import Worker

SUMS = "sums"


class Begin(NamedTuple):
    """A new plan, to be read on the board."""

    letter: Letter
    width: int


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


def serve(worker: Worker, channel: Channel, board: Region, others: Sequence[Connection]) -> None:
    """Do jobs until the other end hangs up, as it also does by dying."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the simulation ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for pipe in others:  # or else a channel would stay open as long as any worker lives
        pipe.close()
    one_thread()
    keep_memory()
    hand = Hand(worker, collect())
    try:
        while True:
            _answer(hand, channel, board)
    except (EOFError, OSError):
        os._exit(0)


def _answer(hand: Hand, channel: Channel, board: Region) -> None:
    message = channel.receive()
    try:
        if isinstance(message, Begin):
            hand.begin(unwrap(message.letter, board, writable=False), message.width)
            return
        answer: Any = hand.do(message) if isinstance(message, Job) else hand.sums()
    except Exception as error:  # whatever a user's code raises: the simulation is told
        answer = Failed.of(error)
    try:
        channel.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        channel.send(Failed.of(RunError(f"what a client keeps or sends cannot be sent on: {first_line(error)}")))


def _travels(value: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # there are many reasons; all mean no
        return False
    return True
