"""Membership inference: whoever has the model guesses which rows it was trained on, by how low its loss on them is.

Yeom, Giacomelli, Fredrikson and Jha, "Privacy risk in machine learning: analyzing the connection to overfitting", CSF
2018, section 3.2 (the bounded-loss adversary), at every threshold. The share of members found while a hundredth of the
others is taken for members says more than an average does: Carlini, Chien, Nasr, Song, Terzis and Tramer, "Membership
inference attacks from first principles", S&P 2022, section III.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hansa.core.errors import InputError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Membership:
    """How well members are told from others: chance is ``auc`` 0.5, and ``found_at_1`` 0.01.

    ``false_alarms`` and ``found`` (num_thresholds,) are shares of the others and of the members at each threshold.
    """

    auc: float
    found_at_1: float
    false_alarms: Floats
    found: Floats


def membership(member_losses: npt.ArrayLike, other_losses: npt.ArrayLike) -> Membership:
    """Losses of rows that were trained on, and of rows that were not; equal losses are told apart by nothing.

    A loss that is not finite counts as the greatest.

    >>> told = membership([0.1, 0.2, 0.9], [0.5, 0.9, 1.0])
    >>> round(told.auc, 3), round(told.found_at_1, 3)
    (0.833, 0.667)
    """
    members, others = (np.nan_to_num(np.asarray(x, np.float64), nan=np.inf) for x in (member_losses, other_losses))
    if not (len(members) and len(others)):
        raise InputError(
            f"membership: expected losses of rows trained on and of others, found {len(members)} and {len(others)}"
        )
    thresholds = np.unique(np.concatenate([members, others]))
    found = np.searchsorted(np.sort(members), thresholds, side="right") / len(members)
    alarms = np.searchsorted(np.sort(others), thresholds, side="right") / len(others)
    found, alarms = np.concatenate([[0.0], found]), np.concatenate([[0.0], alarms])
    return Membership(
        auc=float(np.trapezoid(found, alarms)),
        found_at_1=float(found[alarms <= 0.01].max()),
        false_alarms=alarms,
        found=found,
    )


__all__ = ["Membership", "membership"]
