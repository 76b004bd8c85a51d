"""Whose part of a round it was that raised: one clear sentence that names the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hansa.core.errors import RunError
from hansa.core.protocols import Client, Slot

_NAMED = 5


def blamed(error: Exception, slot: Slot, block: Sequence[Client], alone: Callable[[Client], object]) -> RunError:
    """The error to raise instead of ``error``; ``alone`` does one client's part, to find which it is of several."""
    guilty = list(block)
    if len(block) > 1:
        guilty = [client for client in block if _raises(alone, client)][:1] or guilty
    who, found = names(guilty), f"{type(error).__name__}: {first_line(error)}"
    if is_memory(error):
        return RunError(
            f"round {slot.round}: {who}: out of memory ({found}); give a smaller block_size=, fewer workers, or a "
            "smaller batch_size"
        )
    return RunError(
        f"round {slot.round}: {who}: expected this part of the round to run, found {found}; correct the client's data "
        "or the function that raised"
    )


def names(clients: Sequence[Client]) -> str:
    """Clients by name, as a sentence begins.

    >>> names(["a"]), names("abcdefgh")
    ("client 'a'", "clients 'a', 'b', 'c', 'd', 'e' and 3 more")
    """
    if len(clients) == 1:
        return f"client {clients[0]!r}"
    more = f" and {len(clients) - _NAMED} more" if len(clients) > _NAMED else ""
    return f"clients {', '.join(map(repr, clients[:_NAMED]))}{more}"


def is_memory(error: Exception) -> bool:
    """Whether memory ran out: Python, NumPy and PyTorch say it in different ways."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or ["nothing said"])[0]


def _raises(alone: Callable[[Client], object], client: Client) -> bool:
    try:
        alone(client)
    except Exception:  # whatever it is: the first error is the one that is told
        return True
    return False
