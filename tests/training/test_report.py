"""The report says what the run directory says, in one file that fetches nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hansa.core.errors import InputError
from hansa.training.report import write_report
from hansa.training.report_charts import Line, line_chart
from hansa.training.report_client_charts import distribution, stacked_columns

WriteRun = Callable[..., Path]

BASELINES = {
    "clients": {
        "berlin": {
            "alone": {"loss": 0.5, "auc": 0.7},
            "federated": {"loss": 0.45, "auc": 0.8},
            "pooled": {"auc": 0.82},
        },
        "oslo": {"alone": {"loss": 0.5, "auc": 0.75}, "federated": {"loss": 0.6, "auc": 0.7}, "pooled": {"auc": 0.72}},
    },
    "everyone": {"alone": {"auc": 0.71}, "federated": {"auc": 0.75}, "pooled": {"auc": 0.77}},
}


def page_of(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees: the text outside tags, style and script, with single spaces."""
    words: list[str] = []
    skipped: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag in ("style", "script"):
                skipped.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if skipped and skipped[-1] == tag:
                skipped.pop()

        def handle_data(self, data: str) -> None:
            if not skipped:
                words.append(data)

    Reader().feed(page)
    return re.sub(r"\s+", " ", " ".join(words))


def charts_of(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def test_headline_says_who_learned_what_and_what_it_cost(write_run: WriteRun) -> None:
    text = text_of(page_of(write_run()))
    assert (
        "2 clients learned one model in 3 rounds: AUC 0.750 on the clients' held-out rows, 1.5 kB sent by each." in text
    )


def test_page_is_one_file_that_fetches_nothing(write_run: WriteRun) -> None:
    page = page_of(write_run(baselines=BASELINES))
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_every_chart_is_well_formed_and_described(write_run: WriteRun) -> None:
    charts = [svg for svg in charts_of(page_of(write_run(baselines=BASELINES))) if svg.get("class") == "chart"]
    assert len(charts) >= 8
    for svg in charts:
        assert (svg[0].tag, svg[1].tag) == ("title", "desc")
        assert svg[0].text
        assert svg[1].text


def test_names_and_reasons_are_escaped(write_run: WriteRun) -> None:
    nasty = '<script>alert("x")</script>&'
    page = page_of(
        write_run(
            clients=[{"client": nasty, "num_examples": 5, "num_test": 2, "auc": 0.5}],
            refused=[{"round": 0, "client": nasty, "reason": nasty}],
            skew={"summary": nasty, "classes": [nasty, "b"], "clients": {nasty: {"num_examples": 5, "labels": [2, 3]}}},
            notes=[nasty],
            federation={"learner": nasty},
        )
    )
    assert "<script>alert" not in page
    assert charts_of(page)
    assert nasty in text_of(page)


def test_baselines_show_whom_joining_helped_and_whom_not(write_run: WriteRun) -> None:
    text = text_of(page_of(write_run(baselines=BASELINES)))
    assert "Was it worth joining?" in text
    assert "Joining improved AUC at 1 of 2 clients: most at berlin (+0.100), least at oslo (−0.050)." in text
    assert "Better alone: oslo." in text
    assert "scores AUC 0.710 on average; the federated model 0.750; pooling all rows" in text


def test_spread_over_clients_names_the_worst_and_the_best(write_run: WriteRun) -> None:
    text = text_of(page_of(write_run()))
    assert "AUC ranges from 0.700 (oslo) to 0.800 (berlin); the median client has 0.750." in text


def test_refusals_are_listed_with_their_reason(write_run: WriteRun) -> None:
    refused = [{"round": r, "client": "oslo", "reason": "update is not finite"} for r in (1, 2)]
    text = text_of(page_of(write_run(refused=refused)))
    assert "2 updates of 1 client were left out (update is not finite)." in text
    assert "Left out 2 times: update is not finite" in text


def test_no_privacy_is_claimed_where_none_was_stated(write_run: WriteRun) -> None:
    assert "No formal privacy guarantee is claimed" in text_of(page_of(write_run()))


def test_stated_privacy_is_shown_as_stated(write_run: WriteRun) -> None:
    privacy = {"statement": "One client is hidden at (4, 1e-6).", "epsilon": 4.0, "delta": 1e-6}
    text = text_of(page_of(write_run(privacy=privacy)))
    assert "One client is hidden at (4, 1e-6)." in text
    assert "at delta 1e-6" in text
    assert "No formal privacy guarantee" not in text


def test_what_secure_sums_hide_is_said(write_run: WriteRun) -> None:
    text = text_of(page_of(write_run(secrecy=["SecureMean: the server sees sums of at least 5 clients."])))
    assert "secure aggregation SecureMean: the server sees sums of at least 5 clients." in text
    assert "The server saw sums of updates and no single one" in text


def test_bodies_are_listed_by_kind(write_run: WriteRun) -> None:
    bodies = [{"kind": "update", "direction": "up", "count": 6, "bytes": 3000}]
    assert "update · client to server 6 3.0 kB 500 B" in text_of(page_of(write_run(bodies=bodies)))


def test_what_is_not_known_is_a_dash_and_never_nan(write_run: WriteRun) -> None:
    history = [
        {"round": 0, "loss": math.nan, "auc": "", "num_clients": 2, "bytes_up": "", "seconds": ""},
        {"round": 1, "loss": math.inf, "auc": 0.6, "num_clients": 2, "bytes_up": "", "seconds": ""},
    ]
    clients = [
        {"client": "a", "num_examples": 3, "num_test": "", "loss": math.nan, "auc": ""},
        {"client": "b", "num_examples": "", "num_test": 1, "loss": 0.5, "auc": 0.5},
    ]
    page = page_of(write_run(history=history, clients=clients, final=None, skew=None, seconds=None, schedule=None))
    assert "–" in page
    assert not re.search(r"\bnan\b|\binf\b|None", text_of(page))
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', page)
    assert charts_of(page)


def test_an_almost_empty_run_still_has_a_page(write_run: WriteRun) -> None:
    run_dir = write_run(history=[{"round": 0, "loss": 0.5}], clients=())
    (run_dir / "run.json").write_text("{}")
    assert "1 round" in text_of(page_of(run_dir))


def test_no_round_at_all_is_said(write_run: WriteRun) -> None:
    run_dir = write_run(rounds_done=0, clients=(), final=None)
    (run_dir / "history.csv").write_text("\n")
    (run_dir / "clients.csv").write_text("\n")
    assert "2 clients, and no round was completed." in text_of(page_of(run_dir))


def test_one_round_with_one_client_is_drawn(write_run: WriteRun) -> None:
    clients = [{"client": "only", "num_examples": 9, "num_test": 40, "mse": 4.0}]
    history = [{"round": 0, "mse": 4.0, "num_clients": 1, "bytes_up": 10, "bytes_down": 10, "seconds": 2.0}]
    page = page_of(
        write_run(history=history, clients=clients, num_clients=1, rounds_done=1, final={"mse": 4.0}, task="regression",
                  skew={"summary": "s", "classes": None, "clients": {"only": {"num_examples": 9, "labels": None}}})
    )  # fmt: skip
    assert "1 client learned a model in 1 round: MSE 4.00 on the clients' held-out rows, 10 B sent by it." in text_of(
        page
    )
    assert charts_of(page)


def test_a_thousand_clients_are_a_distribution(write_run: WriteRun) -> None:
    names = [f"gateway-{i:04d}" for i in range(1000)]
    clients = [{"client": n, "num_examples": 10 + i, "num_test": 40, "auc": i / 1000} for i, n in enumerate(names)]
    skew = {"summary": "s", "classes": [str(c) for c in range(30)],
            "clients": {n: {"num_examples": 30, "labels": [1] * 30} for n in names}}  # fmt: skip
    page = page_of(write_run(clients=clients, num_clients=1000, skew=skew))
    assert len(page) < 600_000
    assert "The 200 weakest of 1,000" in page
    assert "200 of 1,000 clients, evenly chosen" in page
    assert "19 others" in text_of(page)


def test_own_metric_is_shown_without_claiming_a_direction(write_run: WriteRun) -> None:
    history = [{"round": 0, "my_score": 1.0}, {"round": 1, "my_score": 3.0}]
    clients = [{"client": c, "num_examples": 1, "num_test": 40, "my_score": s} for c, s in (("a", 1.0), ("b", 2.0))]
    text = text_of(page_of(write_run(history=history, clients=clients, final={"my_score": 3.0})))
    assert "my score 3.00" in text
    assert "is better" not in text
    assert "worst or lowest" in text


def test_runs_scored_on_their_training_rows_carry_a_warning(write_run: WriteRun) -> None:
    assert "which flatters it" in text_of(page_of(write_run(scored_on="the rows trained on")))


def test_few_held_out_rows_carry_a_warning(write_run: WriteRun) -> None:
    clients = [{"client": "tiny", "num_examples": 5, "num_test": 4, "auc": 0.5}]
    assert "Read with care: tiny (4 held-out rows)." in text_of(page_of(write_run(clients=clients)))


def test_a_loss_that_rose_again_is_pointed_out(write_run: WriteRun) -> None:
    losses = [0.9, 0.5, 0.4, 0.5, 0.6, 0.7]
    history = [{"round": i, "loss": loss} for i, loss in enumerate(losses)]
    assert "The loss was lowest in round 2 (0.400) and ended at 0.700" in text_of(page_of(write_run(history=history)))


def test_report_goes_where_it_is_told(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_report(write_run(), tmp_path / "new" / "results.html")
    assert path == tmp_path / "new" / "results.html"
    assert [file.name for file in path.parent.iterdir()] == ["results.html"]


def test_a_missing_run_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a directory at .*, found nothing; give the folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize("name", ["run.json", "history.csv"])
def test_a_missing_file_is_named(write_run: WriteRun, name: str) -> None:
    run_dir = write_run()
    (run_dir / name).unlink()
    with pytest.raises(InputError, match=rf"expected a file {name}, found none"):
        write_report(run_dir)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run.json", "{", "expected JSON, found"),
        ("run.json", "[]", "expected a JSON object, found list"),
        ("run.json", '{"final": []}', "expected an object for 'final'"),
        ("history.csv", "loss\n0.5\n", "expected a column 'round'"),
        ("history.csv", "round,loss\n0,high\n", "expected a number or nothing in column 'loss', line 2, found 'high'"),
        ("history.csv", "round,loss\n0\n", "expected 2 cells in line 2"),
        ("history.csv", "round,loss\n,0.5\n", "expected a round in line 2"),
        ("clients.csv", "name\nx\n", "expected a column 'client'"),
    ],
)
def test_a_malformed_file_is_one_sentence_and_writes_nothing(
    write_run: WriteRun, name: str, content: str, sentence: str
) -> None:
    run_dir = write_run()
    (run_dir / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(sentence)):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_directory_is_no_path_for_a_report(write_run: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected the path of a file"):
        write_report(write_run(), tmp_path)


def test_long_lines_are_thinned_but_keep_their_extremes() -> None:
    values: list[float | None] = [0.0] * 5000
    values[1234] = 9.0
    svg = line_chart([Line(name="loss", x=list(range(5000)), y=values)], title="t")
    path = re.search(r'<path d="M([^"]*)"', svg)
    assert path
    heights = {point.split()[1] for point in path[1].split("L")}
    assert len(heights) == 2
    assert len(svg) < 60_000


def test_wide_ranges_get_a_logarithmic_axis_and_say_so() -> None:
    assert "log scale" in line_chart([Line(name="loss", x=[0, 1], y=[1000.0, 0.1])], title="t")
    assert "log scale" not in line_chart([Line(name="loss", x=[0, 1], y=[1000.0, 0.0])], title="t")


def test_charts_of_nothing_are_still_charts() -> None:
    for svg in (line_chart([], title="t"), distribution({}, title="t"), stacked_columns({}, ["a", "b"], title="t")):
        assert ElementTree.fromstring(svg)[0].text == "t"


def test_the_statement_of_a_noisy_run_is_on_the_page_with_epsilon_at_several_deltas(write_run: WriteRun) -> None:
    privacy = {
        "statement": "Central noise.",
        "epsilon": 4.0,
        "delta": 1e-6,
        "facts": {"unit": "one client", "neighbours": "zero-out"},
        "epsilons": [
            {"delta": 1e-6, "epsilon": 4.0, "accountant": "PLD", "rdp": 4.56},
            {"delta": 1e-7, "epsilon": 4.37, "accountant": "PLD", "rdp": None},
            {"delta": "many", "epsilon": 1.0},
        ],
    }
    text = text_of(page_of(write_run(privacy=privacy)))
    for part in ("Central noise.", "zero-out", "1e-6", "4.56", "1e-7", "4.37", "Epsilon at several deltas"):
        assert part in text
    assert "many" not in text
