"""The page of what leaks: rows beside what was read back of them, and how well members are told from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hansa.training.leaks import RAW, RELEASED, SERVER, Leaks, Readback, as_image
from hansa.training.report_charts import Line, line_chart
from hansa.training.report_page import Key, Page, Panel, Section, Table, Tile
from hansa.training.report_svg import drawing, element, label
from hansa.training.report_words import count, figure

_SIDE = 116.0  # of a picture, in pixels
_GAP = 26.0
_LEVELS = 16  # of grey
_MOST_FEATURES = 30
_CLEAR = 0.9  # correlation from which a person would know the row again
_READS = {
    RAW: "with no transforms at all",
    SERVER: "after the app's transforms: clipping and rounding change a row's length, not what it says",
    RELEASED: "the mean with its noise, less what all others added",
}


def leaks_page(found: Leaks, name: str) -> Page:
    """The page of what leaks, under the app's name."""
    return Page(
        title=f"hansa audit, what leaks: {name}",
        eyebrow=f"hansa audit · what leaks · {name}",
        headline=headline(found),
        deck=_deck(found),
        tiles=[*_inversion_tiles(found), *_member_tiles(found)],
        notices=_advice(found),
        sections=[_rows(found), *_together(found), _membership(found), _settings(found)],
    )


def headline(found: Leaks) -> str:
    """What an update gives away, in one sentence."""
    raw, last = (_mean_likeness(found, view) for view in (RAW, found.views[-1]))
    if raw < _CLEAR:
        return "These attacks do not read rows back from this model's updates"
    if last >= _CLEAR:
        return "One update gives its row away, and this app's settings do not change that"
    return "A bare update gives its row away; what this app releases does not"


def _deck(found: Leaks) -> str:
    told = ", ".join(f"{figure(_mean_likeness(found, view))} from {_plain(view)}" for view in found.views)
    return (
        f"Rows of {found.client} that make up a client's whole update, read back ({found.method}). Correlation of row "
        f"and what was read: {told}. 1 is the row itself."
    )


def _plain(view: str) -> str:
    return {RAW: "the raw update", SERVER: "what the server sees", RELEASED: "what is released"}[view]


def _mean_likeness(found: Leaks, view: str) -> float:
    return float(np.mean([one.likeness(view) for one in found.readbacks])) if found.readbacks else 0.0


def _inversion_tiles(found: Leaks) -> list[Tile]:
    return [
        Tile(name=view, value=figure(_mean_likeness(found, view)), note="likeness to the row") for view in found.views
    ]


def _member_tiles(found: Leaks) -> list[Tile]:
    names = {RAW: "members, raw", SERVER: "members, this app", RELEASED: "members, this app"}
    return [Tile(name=names[view], value=figure(m.auc), note="AUC; 0.5 is chance") for view, m in found.members.items()]


def _advice(found: Leaks) -> list[str]:
    said = []
    if SERVER in found.views and _mean_likeness(found, SERVER) >= _CLEAR:
        said.append(
            "The server sees each client's update before it adds noise, and could read this. Noise protects from those "
            "who see the model; to keep updates from the server itself takes secure aggregation, or noise by each "
            "client."
        )
    if RELEASED not in found.views:
        said.append(
            "No noise is added: whoever sees one update, or knows all others, sees the row. Epsilon is infinite."
        )
    said.append(
        "A client of one row is the worst case. Of many rows in one update these attacks give a mixture; others give "
        "single rows back from batches of a hundred and more."
    )
    return said


def _rows(found: Leaks) -> Section:
    titles = ["row", *found.views]
    lead = "; ".join(f"{view}: {_READS[view]}" for view in found.views) + "."
    if as_image(found.readbacks[0].truth) is not None:
        svg = _pictures(found.readbacks, titles, "Rows and what was read back of them")
        return Section(
            title="One row, from one update", lead=lead, panels=[Panel(title="Pictures", svg=svg)], wide=True
        )
    panels = [Panel(title=f"Row {i + 1}", table=_values(found, one)) for i, one in enumerate(found.readbacks)]
    return Section(title="One row, from one update", lead=lead, panels=panels, wide=True)


def _together(found: Leaks) -> list[Section]:
    several = found.together
    if not several:
        return []
    if len(several) > 1:
        title, first = f"{len(several)} rows in one update", "row"
        lead = "The labels are taken as known; they tell which row is which."
    else:
        title, first = f"All rows of {found.client} in one update", "mean of the rows"
        lead = "What comes back is a mixture by the rows' errors; beside it their plain mean."
    if as_image(several[0].truth) is None:
        panels = [Panel(title=first, table=_values(found, one)) for one in several]
    else:
        panels = [Panel(title="Pictures", svg=_pictures(several, [first, *found.views], title))]
    return [Section(title=title, lead=lead, panels=panels, wide=True)]


def _values(found: Leaks, one: Readback) -> Table:
    """Features down, views across."""
    truth = np.ravel(one.truth)
    names = found.feature_names or [f"feature {i}" for i in range(len(truth))]
    columns = [np.ravel(one.found[view]) for view in found.views]
    shown = range(min(len(truth), _MOST_FEATURES))
    rows = [(names[i], figure(float(truth[i])), *(figure(float(c[i])) for c in columns)) for i in shown]
    rows.append(("likeness", "1", *(figure(one.likeness(view)) for view in found.views)))
    more = len(truth) - _MOST_FEATURES
    note = f"{more} more features are not shown." if more > 0 else ""
    return Table(head=("", "the row", *found.views), rows=rows, note=note)


def _pictures(readbacks: Sequence[Readback], titles: Sequence[str], title: str) -> str:
    """One picture a row and view, each on its own scale from black to white."""
    step, parts = _SIDE + _GAP, []
    for column, words in enumerate(titles):
        parts.append(label(column * step, 12.0, words))
    for line, one in enumerate(readbacks):
        top = 22.0 + line * (step + 12.0)
        for column, x in enumerate([one.truth, *(one.found[view] for view in titles[1:])]):
            parts += _picture(x, column * step, top)
        for column, view in enumerate(titles[1:], 1):
            parts.append(label(column * step, top + _SIDE + 13.0, f"likeness {figure(one.likeness(view))}"))
        if not np.isnan(one.label):
            parts.append(label(0.0, top + _SIDE + 13.0, f"label {one.label:g}"))
    height = 22.0 + len(readbacks) * (step + 12.0)
    return drawing(max(480.0, len(titles) * step), height, title, "; ".join(titles), parts)


def _picture(x: npt.NDArray[Any], left: float, top: float) -> list[str]:
    """A grey image as one path a level of grey; neighbours of one level in a line are one piece."""
    image = as_image(np.nan_to_num(np.asarray(x, np.float64)))
    assert image is not None, "all rows of a data set have one form"
    low, high = float(image.min()), float(image.max())
    levels = np.rint((image - low) / ((high - low) or 1.0) * (_LEVELS - 1)).astype(int)
    size = _SIDE / max(levels.shape)
    paths: dict[int, list[str]] = {}
    for y, line in enumerate(levels.tolist()):
        start = 0
        for end in range(1, len(line) + 1):
            if end == len(line) or line[end] != line[start]:
                at, wide = f"M{left + start * size:.2f} {top + y * size:.2f}", (end - start) * size
                paths.setdefault(line[start], []).append(f"{at}h{wide:.2f}v{size:.2f}h{-wide:.2f}z")
                start = end
    grey = [f"{round(255 * level / (_LEVELS - 1)):02x}" * 3 for level in range(_LEVELS)]
    return [
        element("path", d="".join(pieces), fill=f"#{grey[level]}", shape_rendering="crispEdges")
        for level, pieces in sorted(paths.items())
    ]


def _membership(found: Leaks) -> Section:
    lines = [
        Line(name=view if view == RAW else "this app", x=told.false_alarms.tolist(), y=told.found.tolist(), colour=i)
        for i, (view, told) in enumerate(found.members.items())
    ]
    chance = Line(name="chance", x=[0.0, 1.0], y=[0.0, 1.0], colour=7)
    svg = line_chart(
        [*lines, chance], title="Members found by false alarms", x_name="false alarms", zero=True, width=480.0,
        height=300.0, end_labels=False,
    )  # fmt: skip
    legend = [Key(name=line.name, style=f"background:var(--c{line.colour})") for line in (*lines, chance)]
    rows = [
        ("no transforms" if view == RAW else "this app's settings", figure(told.auc), f"{told.found_at_1:.1%}")
        for view, told in found.members.items()
    ]
    table = Table(
        head=("trained with", "AUC", "found at 1% false alarms"), rows=[*rows, ("chance", "0.5", "1.0%")],
        note=f"{found.num_rows[0]:,} rows trained on, {found.num_rows[1]:,} held out.",
    )  # fmt: skip
    lead = (
        f"After {count(found.num_rounds, 'round')}, whoever has the model takes the rows with the lowest loss for "
        "those that it was trained on."
    )
    panels = [
        Panel(title="Members found", hint="by share of false alarms", svg=svg),
        Panel(title="In figures", table=table),
    ]
    return Section(title="Who was in the training data", lead=lead, legend=legend, panels=panels, wide=True)


def _settings(found: Leaks) -> Section:
    used = "\n".join(found.protections) or "none"
    facts = [("transforms", used), ("read back by", found.method), ("members told by", "the loss on each row")]
    sentences = [
        "An attack that fails shows nothing but that this attack fails; the claimed epsilon holds against all.",
        "Members are told here without shadow models, which would find more.",
    ]
    return Section(title="What was done", facts=facts, sentences=sentences)


__all__ = ["headline", "leaks_page"]
