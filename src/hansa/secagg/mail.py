"""Whether what a client says has the form of its step: all that a server can know of one client's word by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hansa.secagg.errors import SecAggError
from hansa.secagg.grid import LIMBS
from hansa.secagg.shamir import NUM_LIMBS, PRIME
from hansa.secagg.terms import SIGNATURE_SIZE, Advert

_MOST_WORDS, _MOST_NAMES = 2**40, 1000


def fault(exchange: str, said: Any) -> str:
    """What is wrong with a client's word in an exchange, or an empty text.

    >>> fault("agree", {"signature": b""}), fault("agree", {})
    ('', 'mail of agree is of another form')
    """
    checks: dict[str, Callable[[Any], bool]] = {
        "keys": _is_advert, "shares": _is_sealed, "masked": _is_masked, "agree": _is_signature, "unmask": _is_answer
    }  # fmt: skip
    try:
        fits = exchange in checks and checks[exchange](said)
    except (SecAggError, AttributeError, KeyError, TypeError, ValueError, IndexError):
        fits = False
    return "" if fits else f"mail of {exchange[:40]} is of another form"


def _is_advert(said: Any) -> bool:
    Advert.of("", said)
    return True


def _is_sealed(said: Any) -> bool:
    sealed = said["sealed"]
    return set(said) == {"sealed"} and sealed.dtype == np.uint8 and sealed.ndim == 2 and sealed.shape[1] == SEALED


def _is_masked(said: Any) -> bool:
    """Sizes only: of which width words are, and how many, shows beside the others'."""
    if set(said) != {"values", "count", "exact", "numbers", "names", "context"}:
        return False
    bytes_fit = all(
        array.dtype == np.uint8 and array.ndim == 1 and type(count) is int and 0 <= count <= _MOST_WORDS
        for array, count in ((said["values"], said["count"]), (said["exact"], said["numbers"]))
    )
    names = said["names"]
    named = isinstance(names, list) and len(names) <= _MOST_NAMES and all(isinstance(name, str) for name in names)
    is_whole = said["numbers"] % LIMBS == 0 and said["numbers"] > 0
    return bytes_fit and named and is_whole and isinstance(said["context"], bytes) and len(said["context"]) == 32


def _is_signature(said: Any) -> bool:
    return (
        set(said) == {"signature"}
        and type(said["signature"]) is bytes
        and len(said["signature"]) in (0, SIGNATURE_SIZE)
    )


def _is_answer(said: Mapping[str, Any]) -> bool:
    """Places that rise, and for each a share below the prime; none of one client twice."""
    if set(said) != {"seed_places", "seeds", "key_places", "keys"}:
        return False
    for places, shares in ((said["seed_places"], said["seeds"]), (said["key_places"], said["keys"])):
        if places.dtype != np.int64 or places.ndim != 1 or (places < 0).any() or (np.diff(places) <= 0).any():
            return False
        if shares.dtype != np.uint32 or shares.shape != (len(places), NUM_LIMBS) or (shares >= PRIME).any():
            return False
    return not set(said["seed_places"].tolist()) & set(said["key_places"].tolist())


SEALED = 4 * 2 * NUM_LIMBS + 16  # bytes of two shares, sealed
SHARE = 8 + 4 * NUM_LIMBS  # bytes of one with its place
LARGEST_ADVERT = 8192  # bytes: three of 32, a certificate and a signature, as text

__all__ = ["LARGEST_ADVERT", "SEALED", "SHARE", "fault"]
