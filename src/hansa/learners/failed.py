"""A client whose training failed: what went wrong and where, for whoever knows the client's name."""

from __future__ import annotations

from hansa.core.errors import RunError


class ClientFailed(RunError):
    """Training failed at row ``row`` of a block; ``reason`` is a sentence without its subject, the cause is chained.

    >>> raise ClientFailed(2, "ran out of memory in training")
    Traceback (most recent call last):
    hansa.learners.failed.ClientFailed: client number 2 of its block ran out of memory in training
    """

    def __init__(self, row: int, reason: str) -> None:
        self.row, self.reason = row, reason
        super().__init__(f"client number {row} of its block {reason}")

    def __reduce__(self) -> tuple[type[ClientFailed], tuple[int, str]]:
        return ClientFailed, (self.row, self.reason)


def why(error: Exception) -> str:
    """What happened to a client in training, and what to do, as the end of a sentence about it."""
    said = (str(error).strip().splitlines() or [""])[0]
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "not enough memory" in said or "can't allocate memory" in said:
        return "ran out of memory in training; give a smaller batch_size, or a smaller model"
    kind = type(error).__name__
    return f"could not be trained ({kind}{': ' + said if said else ''}); check its examples, the model and the loss"
