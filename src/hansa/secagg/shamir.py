"""Shares of a secret of which any ``threshold`` give it back and fewer tell nothing.

Shamir, "How to share a secret", Communications of the ACM, 1979, over the whole numbers modulo the prime
``p = 2**31 - 1``. A secret's 32 bytes are a little-endian number cut into nine limbs of 30 bits; each limb is the value
at 0 of a polynomial of its own of degree ``threshold - 1``, and the share of place ``x`` is the nine values at ``x``.
Secrets are joined by Lagrange's formula at 0, all of them at once. Shares carry no proof of who made them: whoever
sends them seals them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.secagg.errors import BadShares
from hansa.secagg.primitives import stream

PRIME = 2**31 - 1
NUM_LIMBS = 9
_BITS = 30  # of a limb
_SIZE = 32  # bytes of a secret
_P = np.uint64(PRIME)
_31 = np.uint64(31)

Numbers = npt.NDArray[np.uint64]


def split(
    secrets: npt.NDArray[np.uint8], threshold: int, places: Sequence[int] | npt.NDArray[np.integer], key: Key
) -> npt.NDArray[np.uint32]:
    """Shares (num_secrets, num_places, 9), each below the prime, of ``secrets`` (num_secrets, 32) bytes.

    ``key``'s stream (AES-256 in counter mode) makes the coefficients, uniform in the field; it must be secret and used
    for this alone. Raises ``InputError`` where places repeat, are not between 1 and the prime, or are fewer than
    ``threshold``.

    >>> secret = np.arange(32, dtype=np.uint8)[None]
    >>> shares = split(secret, 2, [1, 2, 3], Key.of(0))
    >>> bool((join(np.array([[3, 1]]), shares[:, [2, 0]]) == secret).all())
    True
    """
    at = np.asarray(places, dtype=np.int64)
    if not 1 <= threshold <= len(at):
        raise InputError(f"shares: expected a threshold from 1 to {len(at)} places, found {threshold}")
    if at.min() < 1 or at.max() >= PRIME or len(np.unique(at)) < len(at):
        raise InputError(f"shares: expected different places from 1 to {PRIME - 1}, found {_some(at)}")
    if secrets.ndim != 2 or secrets.shape[1] != _SIZE or secrets.dtype != np.uint8:
        raise InputError(f"shares: expected secrets (n, {_SIZE}) of uint8, found {secrets.shape} of {secrets.dtype}")
    limbs = _limbs(secrets)
    coefficients = _uniform(key, (threshold - 1) * limbs.size).reshape(threshold - 1, *limbs.shape)
    x = at.astype(np.uint64)[:, None]
    values = np.zeros((len(secrets), len(at), NUM_LIMBS), np.uint64)
    for coefficient in coefficients:
        values = _reduced((values + coefficient[:, None]) * x)
    return _reduced(values + limbs[:, None]).astype(np.uint32)


def join(places: npt.NDArray[np.integer], shares: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """The secrets (num_secrets, 32) of ``shares`` (num_secrets, threshold, 9), each with ``places`` of its own.

    ``places`` (num_secrets, threshold). As many shares as the threshold are enough; more only take longer. Raises
    ``BadShares`` where a secret's places repeat or are not between 1 and the prime, a share is not below the prime, or
    what comes out is not 32 bytes, as nearly always where a share is false or there are too few.

    >>> secrets = np.zeros((1, 32), np.uint8)
    >>> join(np.array([[1, 2]]), split(secrets, 2, [1, 2], Key.of(0))).sum()
    np.uint64(0)
    """
    at = np.asarray(places, dtype=np.int64)
    if shares.shape != (*at.shape, NUM_LIMBS) or at.ndim != 2 or not at.shape[1]:
        raise BadShares(f"expected shares (n, threshold, {NUM_LIMBS}) at places (n, threshold), found {shares.shape}")
    ordered = np.sort(at, axis=1)
    if (at < 1).any() or (at >= PRIME).any() or (ordered[:, 1:] == ordered[:, :-1]).any():
        raise BadShares(f"expected shares of different places from 1 to {PRIME - 1}, found {_some(at)}")
    if (shares >= PRIME).any():
        raise BadShares(f"expected shares below {PRIME}, found one of {int(shares.max())}")
    weight = _lagrange(at.astype(np.uint64))
    limbs = _reduced(_reduced(weight[:, :, None] * shares.astype(np.uint64)).sum(axis=1))
    if (limbs >> np.uint64(_BITS)).any() or (limbs[:, -1] >> np.uint64(8 * _SIZE - _BITS * (NUM_LIMBS - 1))).any():
        raise BadShares("expected shares of one secret, found others: one is false, or they belong to several")
    return _bytes(limbs)


def _lagrange(x: Numbers) -> Numbers:
    """For each row of ``x`` (n, t): what to multiply values at its places by, for their sum to be the value at 0.

    The product of all places, over ``x[i]`` and all ``x[j] - x[i]``: inverses are powers of ``p - 2`` (Fermat).
    """
    product = np.ones((len(x), 1), np.uint64)
    below = x.copy()
    for j in range(x.shape[1]):
        other = x[:, [j]]
        product = _reduced(product * other)
        difference = other + _P - x
        difference[:, j] = 1
        below = _reduced(below * _reduced(difference))
    inverse = np.ones_like(below)
    for bit in bin(PRIME - 2)[2:]:
        inverse = _reduced(inverse * inverse)
        if bit == "1":
            inverse = _reduced(inverse * below)
    return _reduced(product * inverse)


def _reduced(numbers: Numbers) -> Numbers:
    """Numbers below ``2**63`` modulo the prime: the bits from the 31st on are worth as much as the ones below."""
    once = (numbers & _P) + (numbers >> _31)
    once = (once & _P) + (once >> _31)
    return np.where(once >= _P, once - _P, once)


def _uniform(key: Key, count: int) -> Numbers:
    """``count`` numbers, each equally likely to be any below the prime: words of 31 bits without the one that is it."""
    words = stream(key.material)
    found = np.empty(0, np.uint64)
    while len(found) < count:
        more = np.frombuffer(words.update(bytes(4 * (count - len(found)))), "<u4").astype(np.uint64) & _P
        found = np.concatenate([found, more[more < _P]])
    return found


def _limbs(secrets: npt.NDArray[np.uint8]) -> Numbers:
    bits = np.zeros((len(secrets), NUM_LIMBS * _BITS), np.uint8)
    bits[:, : 8 * _SIZE] = np.unpackbits(secrets, axis=1, bitorder="little")
    places = np.uint64(1) << np.arange(_BITS, dtype=np.uint64)
    return np.asarray(bits.reshape(len(secrets), NUM_LIMBS, _BITS) @ places, dtype=np.uint64)


def _bytes(limbs: Numbers) -> npt.NDArray[np.uint8]:
    bits = (limbs[:, :, None] >> np.arange(_BITS, dtype=np.uint64)) & np.uint64(1)
    flat = bits.astype(np.uint8).reshape(len(limbs), -1)[:, : 8 * _SIZE]
    return np.packbits(flat, axis=1, bitorder="little")


def _some(places: npt.NDArray[np.int64]) -> str:
    shown = ", ".join(str(place) for place in places.ravel()[:8])
    return shown + (", ..." if places.size > 8 else "")


__all__ = ["NUM_LIMBS", "PRIME", "join", "split"]
