"""``Rescale``: features scaled by public constants, so that no statistic of anybody's rows is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hansa.core.errors import InputError
from hansa.data.dataset import Array, Dataset
from hansa.data.prepare import Sums


@dataclass(frozen=True, kw_only=True)
class Rescale:
    """Every feature minus its ``center``, over its ``scale``: numbers that are known without looking at the data.

    One number for all features, or one each: (num_features,). Nothing leaves a client for it, where ``Standardize``
    sends exact sums; hence it is the preparation beside differential privacy. Give what a textbook says:
    ``center=50, scale=10`` for an age. The result is float32, missing cells stay NaN. ``InputError`` for a scale of 0
    and for features of another number.

    >>> Rescale(center=(50, 0), scale=(10, 1)).apply(Dataset([[60, 1], [45, 0]]), {}).x.tolist()
    [[1.0, 1.0], [-0.5, 0.0]]
    """

    center: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    keeps_shape = True
    is_public = True  # it has no sums, and no client is asked

    def __post_init__(self) -> None:
        for name in ("center", "scale"):
            numbers = np.ravel(getattr(self, name)).tolist()
            if not all(math.isfinite(n) and (name == "center" or n > 0) for n in numbers) or not numbers:
                wanted = "finite numbers" if name == "center" else "numbers above 0"
                raise InputError(f"Rescale({name}=): expected {wanted}, found {getattr(self, name)}")

    def sums(self, dataset: Dataset) -> Sums:
        """None."""
        return {}

    def apply(self, dataset: Dataset, totals: Mapping[str, Array]) -> Dataset:
        """The dataset with features scaled; ``y`` and weights as they were."""
        if isinstance(dataset.x, dict):
            raise InputError("Rescale: expected one array of features, found a dict; scale it in load_data")
        center, scale = np.asarray(self.center, np.float64), np.asarray(self.scale, np.float64)
        for numbers in (center, scale):
            if numbers.ndim and numbers.shape != dataset.x.shape[1:]:
                raise InputError(
                    f"Rescale: expected {len(numbers)} features, as it has constants, found x of shape "
                    f"{dataset.x.shape}; give one constant a feature"
                )
        return dataset.replace(x=((dataset.x - center) / scale).astype(np.float32))

    def check(self, totals: Mapping[str, Array], feature_names: Sequence[str] | None = None) -> list[str]:
        """There is nothing to say."""
        return []


__all__ = ["Rescale"]
