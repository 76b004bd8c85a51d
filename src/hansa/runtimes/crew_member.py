"""What runs in a worker process: it does what comes through its channel until nobody is at the other end."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from hansa.core.errors import RunError
from hansa.runtimes.blame import first_line
from hansa.runtimes.channel import Channel, Letter, Region, unwrap
from hansa.runtimes.failure import Failed
from hansa.runtimes.hand import Hand, Job, Outcome, collect, keep_memory, one_thread, own_output
from hansa.runtimes.worker import Worker

SUMS = "sums"
_ORPHAN_S = 5.0  # how often an idle worker looks whether its simulation still lives


class Begin(NamedTuple):
    """A new plan, to be read on the board."""

    letter: Letter
    width: int


class Order(NamedTuple):
    """A part to do; the first one of a plan comes with where that plan is."""

    begin: Begin | None
    job: Job


def serve(worker: Worker, channel: Channel, board: Region, others: Sequence[Connection], parent: int) -> None:
    """Do jobs until the other end hangs up, as it also does by dying."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the simulation ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for pipe in others:  # or else a channel would stay open as long as any worker lives
        pipe.close()
    own_output()
    one_thread()
    keep_memory()
    hand = Hand(worker, collect())
    try:
        while True:
            while not channel.pipe.poll(_ORPHAN_S):
                if os.getppid() != parent:  # killed, while another process happens to hold its end open
                    raise EOFError
            _answer(hand, channel, board)
    except (EOFError, OSError):
        os._exit(0)


def _answer(hand: Hand, channel: Channel, board: Region) -> None:
    message = channel.receive()
    try:
        answer: Any = _done(hand, message, board) if isinstance(message, Order) else hand.sums()
    except Exception as error:  # whatever a user's code raises: the simulation is told
        answer = Failed.of(error)
    try:
        channel.send(answer)
    except OSError:
        raise
    except Exception as error:  # there are many reasons why a value cannot be pickled
        told = f"expected what a client keeps or sends to travel between processes, found {first_line(error)}"
        channel.send(Failed.of(RunError(f"{told}; use runtime=hansa.InProcess()")))


def _done(hand: Hand, order: Order, board: Region) -> Outcome:
    if order.begin is not None:
        hand.begin(unwrap(order.begin.letter, board, writable=False), order.begin.width)
    return hand.do(order.job)
