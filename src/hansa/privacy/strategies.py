"""Strategies of correlated noise: what of a round's noise later ones take back, so that sums of rounds get less.

A strategy is a lower triangular matrix C (num_rounds, num_rounds). Round t is released as ``x_t + (C^-1 z)_t`` with
fresh noise z, which is ``C x + z`` to whoever has all of them: the matrix mechanism (Li, Miklau, Hay, McGregor and
Rastogi, "The matrix mechanism", VLDB Journal 2015; for learning Denisov, McMahan, Rush, Smith and Thakurta, "Improved
differential privacy for SGD via optimal private linear operators on adaptive streams", NeurIPS 2022, theorem 2.1, which
lets x depend on what was released before). Every entry of every C here is 0 or more, so that a client that moves each
x_t by at most 1 in the rounds u moves ``C x`` by at most ``|C u|`` (Choquette-Choo, McMahan, Rush and Thakurta,
"Multi-epoch matrix factorization mechanisms for private machine learning", ICML 2023, section 2).

The buffered strategy is in ``blt.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError, RunError
from hansa.privacy.noise import in_pieces

Vector = npt.NDArray[np.float64]
Stream = Mapping[str, Any]  # {"step": rounds so far, "vectors": arrays (size,)}: what a stream of noise remembers


class Strategy(Protocol):
    """What a mechanism needs of a strategy."""

    is_toeplitz: bool  # a round's column of C is the first round's, moved down: the first rounds can change most

    def planned_for(self, num_rounds: int, min_separation: int) -> Strategy:
        """The strategy with all its numbers, for clients that take part every ``min_separation`` rounds at most."""
        ...

    def applied(self, takes: Vector) -> Vector:
        """``C takes``, for what a client adds to each round: (num_rounds,) both."""
        ...

    def variances(self, num_rounds: int) -> Vector:
        """The variance of the noise on the sum of the first 1, 2, ..., num_rounds rounds, for z of variance 1."""
        ...

    def next(self, stream: Stream, fresh: Vector) -> tuple[Vector, Stream]:
        """The next row of ``C^-1 z``, from its row of z, which is used up; ``stream`` stays as it is."""
        ...


def begin() -> Stream:
    """A stream before the first round; the first row says how long its vectors are."""
    return {"step": 0, "vectors": []}


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Tree aggregation: rounds are the leaves of a binary tree, and a sum of rounds gets the noise of a few nodes.

    Kairouz, McMahan, Song, Thakkar, Thakurta and Xu, "Practical and private (deep) learning without sampling or
    shuffling", ICML 2021, algorithm 1. Difference: a sum is read from the fewest nodes, and Honaker's
    estimator is left out, so that a round has one fresh node (the rows of C make a Fenwick tree).
    A stream remembers one vector a level: log2(num_rounds) of them.

    >>> Tree().applied(np.array([1.0, 0.0, 0.0, 0.0]))  # the first round is in the nodes that end at rounds 1, 2 and 4
    array([1., 1., 0., 1.])
    """

    is_toeplitz = False

    def planned_for(self, num_rounds: int, min_separation: int) -> Tree:
        """Nothing to find."""
        return self

    def applied(self, takes: Vector) -> Vector:
        """The sum of each node: round t's ends there and is as long as the lowest binary digit of t + 1."""
        ends = np.arange(1, len(takes) + 1)
        sums = np.concatenate([[0.0], np.cumsum(takes)])
        found: Vector = sums[ends] - sums[ends - (ends & -ends)]
        return found

    def variances(self, num_rounds: int) -> Vector:
        """As many nodes as the number of rounds has binary digits of 1."""
        return np.array([float(number.bit_count()) for number in range(1, num_rounds + 1)])

    def next(self, stream: Stream, fresh: Vector) -> tuple[Vector, Stream]:
        """A new node's noise, less that of the nodes that it takes the place of."""
        refuse_other_size(stream, fresh)
        step, nodes = int(stream["step"]), list(stream["vectors"])
        num_replaced = (step ^ (step + 1)).bit_count() - 1
        kept, replaced = nodes[: len(nodes) - num_replaced], nodes[len(nodes) - num_replaced :]
        node = fresh.copy()

        def subtract(first: int, stop: int) -> None:
            for old in replaced:
                fresh[first:stop] -= old[first:stop]

        in_pieces(len(fresh), subtract)
        return fresh, {"step": step + 1, "vectors": [*kept, node]}


@dataclass(frozen=True, kw_only=True)
class Banded:
    """The first ``width`` coefficients of the square root of summing, so that ``width`` rounds apart nothing is shared.

        C[t, t - j] = c_j for j < width, 0 beyond;     sum_j c_j x^j = (1 - x)^(-1/2)

    The square root is Fichtenberger, Henzinger and Upadhyay's, "Constant matters: fine-grained error bound on
    differentially private continual observation", ICML 2023; cut to a band it is Kalinin and Lampert's,
    "Banded square root matrix factorization for differentially private model training", NeurIPS 2024. Difference
    from McKenna, "Scaling up the banded matrix factorization mechanism for large scale differentially private ML",
    2024: there the coefficients are optimised, which for 2,000 rounds and a width of 100 has 9 % less noise.
    ``width=None`` is the schedule's minimum separation. A stream remembers ``width - 1`` vectors: for
    models of a million parameters and more, choose ``BLT``.

    >>> Banded(width=3).coefficients(4)
    array([1.   , 0.5  , 0.375, 0.   ])
    """

    width: int | None = None

    is_toeplitz = True

    def __post_init__(self) -> None:
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise InputError(f"Banded(width=): expected a whole number of 1 or more, or None, found {self.width!r}")

    def planned_for(self, num_rounds: int, min_separation: int) -> Banded:
        """A band as wide as rounds of one client are apart, unless it is given."""
        return replace(self, width=min(self.width or min_separation, num_rounds))

    def coefficients(self, num_rounds: int) -> Vector:
        """The first column of C."""
        if self.width is None:
            raise InputError("Banded(width=None): expected a plan for a schedule, found none; call planned_for first")
        j = np.arange(1, num_rounds)
        found: Vector = np.cumprod(np.concatenate([[1.0], (j - 0.5) / j]))
        found[self.width :] = 0.0
        return found

    def applied(self, takes: Vector) -> Vector:
        """``C takes``."""
        return toeplitz_times(self.coefficients(len(takes)), takes)

    def variances(self, num_rounds: int) -> Vector:
        """Of prefix sums."""
        coefficients = self.coefficients(num_rounds)
        inverse, band = np.zeros(num_rounds), coefficients[1 : self.width]
        inverse[0] = 1.0
        for t in range(1, num_rounds):
            near = inverse[max(0, t - len(band)) : t][::-1]
            inverse[t] = -(band[: len(near)] @ near)
        return variances_of_sums(inverse)

    def next(self, stream: Stream, fresh: Vector) -> tuple[Vector, Stream]:
        """The fresh noise less its share of the last rounds' noise."""
        refuse_other_size(stream, fresh)
        past: Sequence[Vector] = stream["vectors"]
        shares = self.coefficients(len(past) + 1)[1:].tolist()

        def subtract(first: int, stop: int) -> None:
            for share, noise in zip(shares, past, strict=True):
                fresh[first:stop] -= share * noise[first:stop]

        in_pieces(len(fresh), subtract)
        assert self.width is not None
        kept = [fresh.copy(), *past][: self.width - 1]
        return fresh, {"step": int(stream["step"]) + 1, "vectors": kept}


def toeplitz_times(coefficients: Vector, takes: Vector) -> Vector:
    """``C takes`` for the C whose first column is ``coefficients``."""
    out = np.zeros(len(takes))
    for start in np.flatnonzero(takes).tolist():
        out[start:] += takes[start] * coefficients[: len(takes) - start]
    return out


def variances_of_sums(inverse: Vector) -> Vector:
    """Of sums of the first 1, 2, ... rows of the noise whose ``C^-1`` has the first column ``inverse``."""
    found: Vector = np.cumsum(np.cumsum(inverse) ** 2)
    return found


def refuse_other_size(stream: Stream, fresh: Vector) -> None:
    """Noise is taken back coordinate by coordinate, hence every round has the same ones."""
    for vector in stream["vectors"]:
        if len(vector) != len(fresh):
            raise RunError(
                f"correlated noise: expected {len(vector)} numbers in every round, as in the first, found "
                f"{len(fresh)}; parameters and noised columns must stay the same over the run"
            )


__all__ = ["Banded", "Strategy", "Stream", "Tree", "begin", "refuse_other_size", "toeplitz_times", "variances_of_sums"]
