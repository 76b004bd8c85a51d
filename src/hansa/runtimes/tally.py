"""``Tally``: what became of everyone who was asked, and what of their work was wasted, on a simulated clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Tally:
    """Counts of clients asked to train: asked = accepted + refused + late + dropped + unavailable + under way.

    ``late`` reports came after their round had closed (or staler than allowed), ``dropped`` began and never reported,
    ``unavailable`` were asked while offline or busy, ``refused`` reported on time that they had nothing to give.
    """

    rounds: int = 0  # that closed, abandoned attempts included
    asked: int = 0
    accepted: int = 0
    refused: int = 0
    late: int = 0
    dropped: int = 0
    unavailable: int = 0
    examples: float = 0.0  # worked through, by everyone
    wasted_examples: float = 0.0  # of these, those that reached no model
    wasted_bytes: int = 0  # both ways, of late and dropped clients

    def summary(self, clock_s: float) -> dict[str, Any]:
        """For ``run.json``: the counts, the simulated hours, and the share of examples wasted."""
        share = self.wasted_examples / self.examples if self.examples else 0.0
        return {"hours": clock_s / 3600, **asdict(self), "wasted_share": share}
