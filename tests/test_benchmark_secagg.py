"""The benchmark of secure aggregation runs, in small, and finds its own masks right."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[1] / "benchmarks" / "secagg" / "run.py"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("benchmark_secagg", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("setting", None)


def test_every_part_is_measured(run, capsys):
    assert run.main(["--quick", "--check"]) == 0
    said = capsys.readouterr().out
    for line in ("mask and add, one core", "a client's round", "unmasking, 20 clients", "34 masks of 10,000 words"):
        assert line in said


def test_masks_that_are_not_those_end_the_benchmark(run, monkeypatch, capsys):
    monkeypatch.setattr(run, "add_masks", lambda *masks, num_threads: None)
    with pytest.raises(SystemExit):
        run.main(["--quick", "--parts", "server"])
    assert "not those" in capsys.readouterr().err


def test_a_missed_bar_is_the_exit_status(run, monkeypatch):
    size = run.QUICK
    monkeypatch.setitem(run.PARTS, "aes", (lambda size: iter([run.Figure("slow", 2.0, "s", "", 1.0)]), size))
    assert run.main(["--parts", "aes", "--check"]) == 1
    assert run.main(["--parts", "aes"]) == 0


def test_hansas_side_of_the_comparison_finds_the_mean_of_those_that_are_left(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(RUN.parent))
    spec = importlib.util.spec_from_file_location("benchmark_secagg_side", RUN.parent / "hansa_side.py")
    side = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, side)
    spec.loader.exec_module(side)
    told = {"clients": 8, "params": 1000, "dropped": 2, "bits": 22}
    monkeypatch.setattr(sys, "argv", ["hansa_side.py", json.dumps(told)])
    side.main()
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["error"] <= found["tolerance"] < 1e-5
    del sys.modules["vectors"]
