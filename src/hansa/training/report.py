"""The report of a run: one self-contained HTML file that a person would rather look at than read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hansa.training.report_audit import audit_panel
from hansa.training.report_charts import Line, line_chart
from hansa.training.report_client_charts import MAX_ROWS, class_styles, distribution, stacked_columns, stacked_rows
from hansa.training.report_clients import clients_section
from hansa.training.report_findings import deck, headline, mapping, notices, privacy_spent, run_started, tiles
from hansa.training.report_page import Key, Page, Panel, Section, Table, write_page
from hansa.training.report_read import RunRecord, number, read_run
from hansa.training.report_rounds import learning_section, rounds_section
from hansa.training.report_words import bytes_text, figure, power, whole

_MAX_CLASSES = 12
_NO_PRIVACY = (
    "No formal privacy guarantee is claimed for this run. Clients sent model updates, not rows; yet updates, and the "
    "final model, can reveal something about the rows behind them. Clipping and noise (hansa.Clip, "
    "hansa.GaussianNoise) put a number on how much."
)

_SECRET = (
    "No formal privacy guarantee is claimed for this run. The server saw sums of updates and no single one; yet sums, "
    "and the final model, can reveal something about the rows behind them. Noise (hansa.SkellamNoise, "
    "hansa.GaussianNoise) puts a number on how much."
)


def write_report(run_dir: Path, path: Path | None = None) -> Path:
    """Reads the run directory ``run_dir`` and writes its page to ``path`` (default: ``run_dir/report.html``).

    Returns the path written. Raises InputError where the directory is missing or malformed, or ``path`` cannot be
    written.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html" if path is None else Path(path)
    inside = path.resolve().parent == run_dir.resolve()
    return write_page(report_page(read_run(run_dir), run_dir.resolve().name if inside else path.stem), path)


def report_page(run: RunRecord, name: str) -> Page:
    """The page of a run under a name: what was learned first, how it was run last."""
    sections = (
        clients_section(run),
        learning_section(run),
        _data(run),
        rounds_section(run),
        _privacy(run),
        _what_ran(run),
    )
    return Page(
        title=f"hansa report: {name}",
        eyebrow=" · ".join(part for part in ("hansa report", name, run_started(run)) if part),
        headline=headline(run),
        deck=deck(run),
        tiles=tiles(run),
        notices=notices(run),
        sections=[section for section in sections if section is not None],
    )


def _data(run: RunRecord) -> Section | None:
    skew = mapping(run.info.get("skew"))
    stated = {str(name): mapping(value) for name, value in mapping(skew.get("clients")).items()}
    sizes = {name: size for name, value in stated.items() if (size := number(value.get("num_examples"))) is not None}
    sizes = sizes or {row.client: row.num_examples for row in run.clients if row.num_examples is not None}
    lead = str(skew.get("summary") or "")
    if not sizes:
        return Section(title="The data", lead=lead) if lead else None
    classes, amounts = _labels(skew, stated)
    order = sorted(sizes, key=lambda name: -sizes[name])
    panels = []
    if len(sizes) <= MAX_ROWS:
        bars = {name: amounts.get(name) or [sizes[name]] for name in order}
        panels.append(
            Panel(title="Examples by client", svg=stacked_rows(bars, classes, title="Examples of each client"))
        )
        if len(classes) > 1 and len(amounts) > 1:
            mix = {name: bars[name] for name in order if name in amounts}
            svg = stacked_rows(mix, classes, title="Share of each label by client", shares=True)
            panels.append(Panel(title="Mix of labels", hint=f"right: share of {classes[-1]}", svg=svg))
    elif len(classes) > 1 and len(amounts) > 1:
        svg = stacked_columns(amounts, classes, title="Share of each label by client")
        panels.append(Panel(title="Mix of labels", hint="clients of like mix side by side", svg=svg))
    if len(sizes) > MAX_ROWS:
        panels.append(Panel(title="Examples by client", svg=distribution(sizes, title="Examples by client")))
    legend = [
        Key(name=name, style=f"background:{style[5:]}")
        for name, style in zip(classes, class_styles(len(classes)), strict=True)
    ]
    return Section(title="The data", lead=lead, legend=legend if len(legend) > 1 else (), panels=panels, wide=True)


def _labels(skew: object, stated: Mapping[str, object]) -> tuple[list[str], dict[str, list[float]]]:
    """Class names and counts by client; beyond a dozen classes the rarest become one."""
    names = mapping(skew).get("classes")
    if not isinstance(names, list) or not names:
        return [], {}
    counts = {}
    for client, value in stated.items():
        labels = mapping(value).get("labels")
        if isinstance(labels, list) and len(labels) == len(names):
            counts[client] = [number(label) or 0.0 for label in labels]
    if len(names) <= _MAX_CLASSES:
        return [str(name) for name in names], counts
    totals = [sum(column) for column in zip(*counts.values(), strict=True)]
    common = sorted(sorted(range(len(totals)), key=lambda i: -totals[i])[: _MAX_CLASSES - 1])
    rest = f"{len(names) - len(common)} others"
    merged = {c: [*(v[i] for i in common), sum(v) - sum(v[i] for i in common)] for c, v in counts.items()}
    return [*(str(names[i]) for i in common), rest], merged


def _privacy(run: RunRecord) -> Section:
    stated = mapping(run.info.get("privacy"))
    epsilon, delta = privacy_spent(run)
    secrecy = [str(sentence) for sentence in run.info.get("secrecy") or ()]
    if epsilon is None:
        lead = str(stated.get("statement") or (_SECRET if secrecy else _NO_PRIVACY))
    else:
        spent = f"epsilon {figure(epsilon)}" + ("" if delta is None else f" at delta {power(delta)}")
        lead = str(stated.get("statement") or f"Spent: {spent}; the run states no neighbouring relation.")
    by_round = [row.get("epsilon") for row in run.history]
    panels = []
    if figures := _epsilons(stated):
        panels.append(Panel(title="Epsilon at several deltas", hint="smaller is stronger", table=figures))
    if sum(value is not None for value in by_round) > 1:
        line = Line(name="epsilon", x=[row["round"] or 0.0 for row in run.history], y=by_round)
        svg = line_chart([line], title="epsilon by round", zero=True, width=480.0)
        panels.append(Panel(title="Privacy spent", hint="epsilon, since the start", svg=svg))
    audited, bodies = audit_panel(run), _bodies(run)
    panels += [audited] if audited else []
    if bodies:
        panels.append(Panel(title="Everything that was sent", hint="bodies by kind", table=bodies))
    facts = [("secure aggregation", "\n".join(secrecy))] if secrecy else []
    facts += [(str(name), str(fact)) for name, fact in mapping(stated.get("facts")).items()]
    return Section(title="Privacy, and what left each client", lead=lead, panels=panels, facts=facts, wide=True)


def _epsilons(stated: Mapping[str, object]) -> Table | None:
    """A row a delta: epsilon by the accountant that the run relies on, and by RDP beside it."""
    figures = stated.get("epsilons")
    rows = []
    for one in map(mapping, figures if isinstance(figures, list) else ()):
        delta = number(one.get("delta"))
        if delta is not None:
            best, beside = figure(number(one.get("epsilon"))), figure(number(one.get("rdp")))
            rows.append((power(delta), best, str(one.get("accountant") or ""), beside))
    return Table(head=("delta", "epsilon", "accountant", "RDP"), rows=rows) if rows else None


def _bodies(run: RunRecord) -> Table | None:
    rows = []
    for body in map(mapping, run.info.get("bodies") or ()):
        num, size = number(body.get("count")), number(body.get("bytes"))
        mean = bytes_text(size / num) if num and size is not None else "–"
        way = {"up": "client to server", "down": "server to client"}.get(str(body.get("direction")), "")
        rows.append((" · ".join(filter(None, (str(body.get("kind")), way))), whole(num), bytes_text(size), mean))
    return Table(head=("body", "count", "in all", "each"), rows=rows) if rows else None


def _what_ran(run: RunRecord) -> Section:
    info, federation = run.info, mapping(run.info.get("federation"))
    facts = []
    for name, value in federation.items():
        facts.append((str(name), "\n".join(map(str, value)) if isinstance(value, list) else str(value)))
    schedule = ", ".join(
        f"{name}={value}" for name, value in mapping(info.get("schedule")).items() if value is not None
    )
    facts += [("schedule", schedule), ("runtime", str(info.get("runtime") or "")), ("seed", str(info.get("seed", "")))]
    versions = ", ".join(f"{name} {info[name]}" for name in ("hansa", "python", "numpy", "torch") if info.get(name))
    facts += [
        ("versions", versions),
        ("app fingerprint", str(info.get("fingerprint") or "")),
        ("started", run_started(run)),
    ]
    return Section(title="What ran", facts=[(name, value) for name, value in facts if value])
