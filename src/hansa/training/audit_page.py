"""The page of an audit: the verdict, the figures, and how far the canaries that took part stand out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hansa.training.audit import Audit
from hansa.training.report_charts import Line, line_chart
from hansa.training.report_page import Key, Page, Panel, Section, Tile
from hansa.training.report_words import count, figure, power

_CANNOT = (
    "An audit finds mistakes, never their absence: a bound below the claim is what a correct mechanism gives, and what "
    "a broken one gives that this attack does not meet.",
    "Canaries are the worst clients there can be; what leaks of an ordinary client's rows is usually less. hansa audit "
    "APP --show leaks shows that.",
    "The noise of a simulation follows from its seed. That a deployment draws it in secret and once only is for the "
    "ledger, not for this audit, to show.",
    "Secrecy of who took part, times and sizes were not attacked.",
)


def audit_page(found: Audit, name: str) -> Page:
    """The page of an audit under the app's name."""
    claimed = Tile(
        name="claimed", value=figure(found.claim.epsilon), note=f"epsilon at delta {power(found.claim.delta)}"
    )
    bound = Tile(name="proved", value=f"≥ {figure(found.lower_bound)}", note=f"with {found.confidence:.0%} confidence")
    likely = Tile(name="estimate", value=figure(found.estimate), note="of this attack; no bound")
    size = Tile(name="canaries", value=f"{found.num_canaries:,}", note=f"in {count(found.num_runs, 'run')}")
    rounds = Tile(name="rounds", value=f"{found.num_rounds:,}", note=f"{found.num_params:,} parameters")
    return Page(
        title=f"hansa audit: {name}",
        eyebrow=f"hansa audit · {name}",
        headline="The claim is broken" if found.is_broken else "Consistent with the claim",
        deck=found.verdict[0].upper() + found.verdict[1:] + ".",
        tiles=[claimed, bound, likely, size, rounds],
        sections=[_canaries(found), _figures(found), Section(title="What an audit cannot say", sentences=_CANNOT)],
    )


def _canaries(found: Audit) -> Section:
    groups = (("took part", found.cosines[found.took_part]), ("left out", found.cosines[~found.took_part]))
    low, high = float(found.cosines.min(initial=-3.0)), float(found.cosines.max(initial=3.0))
    edges = np.linspace(low, high, 41)
    lines = [_shares(name, values, edges, colour) for colour, (name, values) in enumerate(groups)]
    svg = line_chart(
        lines, title="Canaries by how far they stand out", x_name="standard deviations", zero=True, width=480.0,
        height=240.0, end_labels=False,
    )  # fmt: skip
    lead = (
        "Each canary is a client with a random direction for an update. The further the two curves are apart, the "
        "better the released values tell who took part."
    )
    panel = Panel(title="Cosine with the released values", hint="share of canaries", svg=svg)
    legend = [Key(name=name, style=f"background:var(--c{colour})") for colour, (name, _) in enumerate(groups)]
    return Section(title="How far canaries stand out", lead=lead, legend=legend, panels=[panel], wide=True)


def _shares(name: str, values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], colour: int) -> Line:
    """A histogram as a line through the middles of its bins."""
    heights = np.histogram(values, edges)[0] / max(1, len(values))
    middles = (edges[1:] + edges[:-1]) / 2
    return Line(name=name, x=middles.tolist(), y=heights.tolist(), colour=colour)


def _figures(found: Audit) -> Section:
    run, shot = found.one_run, found.one_shot
    facts = [
        ("claimed", f"{figure(found.claim.epsilon)} ({found.claim.accountant}; neighbours: {found.claim.neighbours})"),
        (
            "one-run audit",
            f"at least {figure(run.epsilon)}: {run.num_correct:,} of {run.num_guesses:,} guesses right; holds for any "
            "mechanism",
        ),
        (
            "one-shot audit, bound",
            f"at least {figure(shot.epsilon)}: {shot.num_above:,} of {shot.num_canaries:,} canaries have a cosine of "
            f"{figure(shot.threshold)} or more, {shot.false_positives:.2g} of random directions do; takes canaries for "
            "independent",
        ),
        *(
            (
                f"at delta {power(level.delta)}",
                f"at least {figure(level.proved)} by the one-shot audit; {figure(level.claimed)} is claimed",
            )
            for level in found.levels[1:]
        ),
        ("one-shot audit, estimate", f"{figure(found.estimate)}: two normal curves; no bound"),
    ]
    lead = (
        f"At delta {power(found.claim.delta)} unless it says another. The two bounds share the doubt: together they "
        "keep the confidence."
    )
    return Section(title="Epsilon", lead=lead, facts=facts)


__all__ = ["audit_page"]
