"""The example of differential privacy says its accuracy and keeps its epsilon."""

import re
from pathlib import Path

import pytest

import hansa

APP = Path(__file__).parents[1] / "examples" / "private" / "app.py"


def test_the_private_digits_reach_what_the_example_says_at_its_epsilon():
    pytest.importorskip("sklearn")
    pytest.importorskip("dp_accounting")
    app = hansa.load_app(APP)
    run = hansa.simulate(app, evaluate_every=60)
    said = float(re.search(r"accuracy (0\.\d+)", APP.read_text(encoding="utf-8")).group(1))
    assert run.final["accuracy"] == pytest.approx(said, abs=0.02)
    assert run.history[-1].epsilon == pytest.approx(4.0, rel=1e-3)
    assert run.history[-1].epsilon <= 4.0
