"""The server's half of a run in a thread that goes on only when it is told: of two threads one runs at a time.

So a test decides what happens between any two looks of the server, and the same choices give the same run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from hansa.network import failpoints


class Killed(BaseException):
    """The process ends here."""


class Turns:
    """A function in a thread of its own; ``wait`` is what it calls where it would wait for something to happen.

    It stands in for the condition that a coordinator notifies, too: nobody has to be woken.
    """

    def __init__(self) -> None:
        self._theirs, self._ours = threading.Semaphore(0), threading.Semaphore(0)
        self._is_killed, self.is_over = False, True
        self.error: BaseException | None = None

    def begin(self, what: Callable[[], None]) -> None:
        """Run ``what``, as soon as ``go_on`` is called."""
        self._is_killed, self.is_over, self.error = False, False, None

        def run() -> None:
            self._theirs.acquire()
            try:
                if not self._is_killed:
                    what()
            except BaseException as error:  # whoever called go_on decides what it means
                self.error = error
            self.is_over = True
            self._ours.release()

        threading.Thread(target=run, daemon=True).start()

    def go_on(self) -> None:
        """Let it run until it waits or ends."""
        assert not self.is_over
        self._theirs.release()
        assert self._ours.acquire(timeout=60), "the server neither waits nor ends"

    def kill(self) -> None:
        """End it where it waits, if it has not ended."""
        if not self.is_over:
            self._is_killed = True
            self.go_on()

    def wait(self, timeout: float | None = None) -> bool:
        """Hand over, from within."""
        self._ours.release()
        self._theirs.acquire()
        if self._is_killed:
            raise Killed
        return True

    def notify_all(self) -> None:
        """Nobody sleeps."""

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Fuse:
    """Ends the process at the so-many-th fail point that it comes by, whichever that is."""

    def __init__(self) -> None:
        self.left, self.reached = 0, list[str]()

    def __call__(self, name: str) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                self.reached.append(name)
                raise Killed

    def __enter__(self) -> Fuse:
        failpoints.watch(self)
        return self

    def __exit__(self, *_: object) -> None:
        failpoints.watch(None)
