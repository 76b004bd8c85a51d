"""The record-level heart benchmark, in small; its figures are in ``benchmarks/README.md``."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def heart(monkeypatch):
    pytest.importorskip("sklearn", reason="FLamby's splits are scikit-learn's")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_privacy_heart", BENCHMARKS / "privacy" / "heart.py")
    module = importlib.util.module_from_spec(spec)
    known = set(sys.modules)
    spec.loader.exec_module(module)
    yield module
    for name in {"setting", "flamby"} - known:
        sys.modules.pop(name, None)


def test_one_split_keeps_to_epsilon_and_learns_without_a_look_at_its_test_rows(heart, monkeypatch):
    if not heart.DATA.is_file():
        pytest.skip(f"no {heart.DATA}: the UCI heart table with a hospital column")
    monkeypatch.setattr(heart, "CANDIDATES", heart.CANDIDATES[2:4])
    by_hospital = heart.flamby.hospitals(heart.DATA)
    parts = heart.flamby.split(by_hospital, 0)
    folds = heart.inner(parts, 0, seed=0)
    for name, (train, held_out) in folds.items():
        own = {tuple(row) for row in parts[name][0].x.tolist()}
        assert len(train) + len(held_out) == len(parts[name][0])
        assert all(tuple(row) in own for row in [*train.x.tolist(), *held_out.x.tolist()])
    found = heart.measured(by_hospital, 1.0, num_splits=1, num_seeds=1)
    assert 0.99 < found.spent <= 1.0
    assert found.accuracies[0] > 0.7
