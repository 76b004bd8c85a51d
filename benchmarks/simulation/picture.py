"""results.svg: how many times hansa's seconds each row takes, a panel a workload, on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from summary import Line
from table import times
from workloads import SETTINGS

COLOURS = {"hansa": "#0b7a75", "line": "#b8b8b8", "peer": "#d98e04"}


def draw(lines: Sequence[Line], path: Path) -> None:
    """Nothing is drawn without matplotlib, or where hansa's row is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print(f"no {path.name}: expected matplotlib, found none; pip install matplotlib")
        return
    hansa = {line.workload: line.seconds for line in lines if line.row.name == "hansa"}
    names = [name for name in dict.fromkeys(line.workload for line in lines) if name in hansa]
    if not names:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    matplotlib.rcParams.update({"svg.hashsalt": "hansa", "svg.fonttype": "none", "font.size": 9})
    counts = [sum(line.workload == name for line in lines) for name in names]
    figure, panels = pyplot.subplots(
        len(names),
        1,
        figsize=(8, sum(0.27 * count + 0.75 for count in counts)),
        height_ratios=[count + 1 for count in counts],
        squeeze=False,
        layout="constrained",
    )
    for panel, name in zip(panels[:, 0], names, strict=True):
        own = [line for line in lines if line.workload == name]
        ratios = [line.seconds / hansa[name] for line in own]
        bars = panel.barh([line.row.title for line in own], ratios, color=[COLOURS[line.row.kind] for line in own])
        panel.bar_label(bars, [f" {times(line, hansa[name])}" for line in own])
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:,g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlim(min(*ratios, 0.5) / 2, max(ratios) * 3)
        panel.invert_yaxis()
        panel.axvline(1, color=COLOURS["hansa"], linewidth=1, zorder=0)
        panel.set_title(f"{name}: {SETTINGS[name].says}", loc="left", x=-0.37, fontsize=9, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("seconds a round, in times hansa's (logarithmic); green: hansa, grey: written by hand", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
