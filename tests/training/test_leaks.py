"""What leaks of an app's own rows, and what the page and the command say of it."""

import json
import sys

import pytest

import hansa
from hansa import cli
from hansa.training.leaks import RAW, RELEASED, SERVER, find_leaks
from hansa.training.leaks_page import headline, leaks_page
from hansa.training.report_page import render

APP = """
import numpy as np
import hansa


def population():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, {features})).astype(np.float32)
    rows = hansa.Dataset(x, (x[:, 0] > 0).astype(int), feature_names=[f"f{{i}}" for i in range({features})])
    return hansa.Population.split(rows, by=hansa.IID(), num_clients=6)


app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features={features}, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.5),
        aggregator=hansa.Mean(weighting="clients"),
        {more}
    ),
    schedule=hansa.Schedule(num_rounds=3),
    population=population,
    holdout=0.5,
)
"""
NOISE = "transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=4, delta=1e-5)),"


@pytest.fixture
def app_file(tmp_path):
    def write(more="", features=99):
        (tmp_path / "app.py").write_text(APP.format(features=features, more=more))
        return tmp_path / "app.py"

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``hansa audit WORDS``; gives exit status, output and error output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["hansa", "audit", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_clip_hides_nothing_and_noise_does(app_file):
    app = hansa.load_app(app_file(NOISE))
    found = find_leaks(app, app.population())
    assert found.views == (RAW, SERVER, RELEASED)
    assert len(found.readbacks) == 4
    for one in found.readbacks:
        assert one.likeness(RAW) > 0.999
        assert one.likeness(SERVER) > 0.999
        assert abs(one.likeness(RELEASED)) < 0.5
    assert set(found.members) == {RAW, RELEASED}
    assert headline(found) == "A bare update gives its row away; what this app releases does not"


def test_an_app_without_transforms_is_shown_bare(app_file):
    app = hansa.load_app(app_file())
    found = find_leaks(app, app.population(), num_rows=1)
    assert found.views == (RAW,)
    page = render(leaks_page(found, "bare"))
    assert "this app&#39;s settings do not change that" in page
    assert "Epsilon is infinite" in page
    assert "f29" in page
    assert "69 more features are not shown" in page


def test_images_are_drawn(app_file):
    app = hansa.load_app(app_file(NOISE, features=64))
    page = render(leaks_page(find_leaks(app, app.population(), num_rows=1), "images"))
    assert page.count('shape-rendering="crispEdges"') > 20


def test_the_command_writes_the_claims_audit_and_the_report_shows_it(app_file, command, tmp_path):
    run = hansa.simulate(hansa.load_app(app_file(NOISE)))
    run.save(tmp_path / "run")
    few = ("--canaries", 60, "--out", tmp_path / "run")
    status, out, _ = command(app_file(NOISE), *few)
    assert status == 0
    assert "consistent with the claim" in out
    record = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert record["claimed"]["epsilon"] == pytest.approx(run.history[-1].epsilon, rel=1e-3)
    assert record["lower_bound"] <= record["claimed"]["epsilon"]
    assert "Consistent with the claim" in (tmp_path / "run" / "audit.html").read_text()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "proved by attack" in report
    assert "another version of the app" not in report


def test_a_broken_claim_ends_with_status_1(app_file, command, tmp_path):
    broken = (
        "transforms=(hansa.Clip(norm=1.0), type('Half', (hansa.GaussianNoise,), {'release': lambda own, mean, state, "
        "bound, secret: hansa.GaussianNoise.release(own, mean, state, bound / 9, secret)})(epsilon=4, delta=1e-5)),"
    )
    status, out, _ = command(app_file(broken, features=599), "--canaries", 150, "--out", tmp_path / "audit")
    assert status == 1
    assert "the claim is broken" in out
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["broken"] is True


def test_without_noise_the_command_says_what_it_shows_instead(app_file, command, tmp_path):
    status, out, _ = command(app_file(), "--out", tmp_path / "audit")
    assert status == 0
    assert "its epsilon is infinite" in out
    assert (tmp_path / "audit" / "leaks.html").exists()


def test_bad_words_are_refused_with_a_sentence(app_file, command, tmp_path):
    (tmp_path / "file").write_text("")
    for words, sentence in (
        (("--show", "all"), "expected claim or leaks, found 'all'"),
        (("--canaries", 2), "--canaries: expected 16 or more, found 2"),
        (("--rounds", 99), "--rounds: expected 1 to the schedule's 3, found 99"),
        (("--out", tmp_path / "file"), "expected a folder, found a file"),
    ):
        status, _, error = command(app_file(NOISE), *words)
        assert status == 2
        assert sentence in error


def test_a_damaged_audit_is_refused_by_the_report(app_file, tmp_path):
    from hansa.core.errors import InputError
    from hansa.training.report import write_report

    hansa.simulate(hansa.load_app(app_file(NOISE)), num_rounds=1).save(tmp_path / "run")
    for text in ("{", json.dumps({"claimed": {"epsilon": "x"}})):
        (tmp_path / "run" / "audit.json").write_text(text)
        with pytest.raises(InputError, match=r"audit\.json: expected"):
            write_report(tmp_path / "run")
