"""``Source``: where a run's clients get their rows from: a population, less what is held out."""

from __future__ import annotations

from collections.abc import Sequence

from hansa.core.key import Key
from hansa.data.dataset import Dataset, hold_out
from hansa.data.flat import FlatRows
from hansa.data.population import Population

_MANY = 100_000  # clients


class Source:
    """A population's clients by id: training rows, and held-out rows or None.

    >>> from hansa.data.partition import IID
    >>> population = Population.split(Dataset(range(8), [0, 1] * 4), by=IID(), num_clients=2)
    >>> [len(rows) for rows in Source(population, holdout=0.5)("client-000")]
    [2, 2]
    """

    def __init__(self, population: Population, holdout: float | None = None) -> None:
        self._population, self._holdout = population, holdout

    def __call__(self, client: str) -> tuple[Dataset, Dataset | None]:
        """One client's rows: its own pair, or a share set aside by its name."""
        train, test = self._population.load(client)
        return held_out(train, test, self._holdout, client)

    def position(self, client: str) -> int:
        """The client's place in the population."""
        return self._population.position(client)

    @property
    def keep(self) -> bool:
        """Whether rows stay where they are, so that they may be read once.

        What is held out of flat arrays is copied: of very many clients it is not kept.
        """
        many = self._population.flat is not None and len(self._population) > _MANY
        return (self._population.keeps or self._population.flat is not None) and not (self._holdout and many)

    @property
    def flat(self) -> FlatRows | None:
        """All training rows in flat arrays, where they lie so and nothing is held out."""
        return None if self._holdout else self._population.flat

    @property
    def in_memory(self) -> Sequence[str]:
        """The clients whose rows need no loading."""
        return self._population.ids if self.keep and self._population.sizes is not None else ()


def held_out(
    train: Dataset, test: Dataset | None, holdout: float | None, client: str
) -> tuple[Dataset, Dataset | None]:
    """Set ``holdout`` of ``train`` aside unless the client brings its own test rows. Depends on the name alone."""
    if test is not None or not holdout:
        return train, test
    return hold_out(train, holdout, Key.of("holdout").child(client))
