"""``benchmarks/simulation`` in small: nothing is installed, and the figures themselves are in its results.md."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    """``run.py`` as a module, with its folder on the path as where it is run as a script."""
    pytest.importorskip("torch", reason="the reference lines are PyTorch's")
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS / "simulation"))
    spec = importlib.util.spec_from_file_location("benchmark_simulation", BENCHMARKS / "simulation" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


def record(row: str, seconds: list[float], **more: Any) -> Any:
    """One run on W1 that ended with a loss of 1 in the loop's and in its own rounds."""
    measure: Any = sys.modules["measure"]
    given = {"workload": "W1", "setting": "any", "repeat": 0, "loss": 1.0} | more
    return measure.Record(row=row, seconds=seconds, **given)


def bare(simulation: ModuleType) -> Any:
    """The bare loop: 4 seconds a round, loss 1 after three rounds."""
    return record("R0", [9.0, 4.0, 4.0], reference={"3": 1.0})


def test_a_quick_run_trains_hansa_and_the_lines_and_their_losses_agree(
    simulation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulation.main(["--quick", "--workloads", "W3", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "results.json").read_text())
    assert {line["row"] for line in stored["lines"]} == {"hansa", "R0", "R2b"}
    assert all(line["agrees"] and line["off"] is not None and line["num_rounds"] == 3 for line in stored["lines"])
    assert all(line["rss"] >= line["pss"] for line in stored["lines"])
    assert "**hansa, TorchLearner**" in (tmp_path / "results.md").read_text()
    assert "final losses agree: 0, met" in capsys.readouterr().out


def test_without_mnist_the_rest_is_measured(
    simulation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulation.main(["--quick", "--workloads", "lr_mnist", "--mnist", str(tmp_path)]) == 0
    assert "give its folder with --mnist" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--workloads", "W9"], ["--peers", "nobody"], ["--repeats", "0"]])
def test_what_cannot_be_meant_is_one_sentence_and_status_2(
    simulation: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        simulation.main(arguments)
    assert left.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["W2", "W3"])
def test_a_workload_is_the_same_after_a_folder_and_fits_its_model(
    simulation: ModuleType, name: str, tmp_path: Path
) -> None:
    workloads, models = sys.modules["workloads"], sys.modules["models"]
    made = workloads.synthetic(name, num_rounds=2)
    made.save(tmp_path / name)
    read = workloads.load(tmp_path / name, mapped=True)
    assert read.setting == made.setting
    assert np.array_equal(read.client(7)[0], made.client(7)[0])
    assert [value.shape for value in made.initial] == [tuple(p.shape) for p in models.build(name).parameters()]
    assert all(len(set(cohort)) == made.setting.cohort_size for cohort in made.schedule.tolist())


def test_the_power_law_gives_two_classes_and_at_least_nine_rows_to_each(simulation: ModuleType, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    pixels, labels = drawn.integers(0, 256, (12_000, 2, 2), np.uint8), np.arange(12_000) % 10
    halves = {"x_train": pixels[:9000], "y_train": labels[:9000], "x_test": pixels[9000:], "y_test": labels[9000:]}
    np.savez(tmp_path / "mnist_writers.npz", **halves)
    made = simulation.mnist.power_law(simulation.mnist.find(tmp_path), seed=1)
    assert made.sizes.min() == 9
    assert made.sizes.max() > 5 * np.median(made.sizes)
    assert all(set(made.client(c)[1].tolist()) <= {c % 10, (c + 1) % 10} for c in range(1000))
    assert len(made.test_y) >= 1000
    assert np.abs(np.concatenate([made.x, made.test_x]).mean(axis=0)).max() < 0.2


def test_a_peer_that_fails_is_a_sentence_not_an_end(simulation: ModuleType, tmp_path: Path) -> None:
    few = simulation.first_clients(sys.modules["workloads"].synthetic("W3", num_rounds=1), 2)
    few.save(tmp_path / "few")
    absent = replace(simulation.ROWS[0], script="nobody")
    made = simulation.measure(
        absent, few, tmp_path / "few", Path(sys.executable), 0, num_rounds=1, keep=set(), options={}
    )
    assert made.error.startswith("exit status 2")
    assert "nobody.py" in made.error


def test_a_figure_leaves_the_first_round_out_and_is_the_median_over_repeats(simulation: ModuleType) -> None:
    repeats = [record("hansa", [50.0, 1.0, seconds], repeat=i) for i, seconds in enumerate((2.0, 3.0, 9.0))]
    (line,) = simulation.lines(simulation.ROWS, repeats)
    assert line.repeats == (1.5, 2.0, 5.0)
    assert line.seconds == 2.0


def test_bars_are_met_missed_or_not_measured(simulation: ModuleType) -> None:
    records = [bare(simulation), record("hansa", [9.0, 1.0, 1.0]), record("pfl", [9.0, 3.0, 3.0])]
    said = [str(bar) for bar in simulation.bars(simulation.lines(simulation.ROWS, records))]
    assert said[0].endswith("at most 1.3: not measured")
    assert said[1].endswith("at least 4: 3, MISSED")
    assert said[-1] == "final losses agree: 0, met"


def test_another_loss_is_said_to_disagree(simulation: ModuleType) -> None:
    records = [bare(simulation), record("pfl", [9.0, 3.0, 3.0], loss=1.2)]
    found = simulation.lines(simulation.ROWS, records)
    assert str(simulation.bars(found)[-1]) == "final losses agree (pfl on W1 does not): 1, MISSED"
    assert "20.00% DISAGREES" in simulation.results.markdown(found, records, {}, "here")


def test_rows_without_an_environment_of_their_own_run_in_this_one(simulation: ModuleType, tmp_path: Path) -> None:
    assert simulation.environments.python_of("hansa", tmp_path) == Path(sys.executable)
    assert not list(tmp_path.iterdir())


def test_every_best_setting_is_one_of_those_tried(simulation: ModuleType) -> None:
    for row in simulation.ROWS:
        assert set(row.best.values()) <= set(row.settings)
        assert (BENCHMARKS / "simulation" / "peers" / f"{row.script}.py").is_file()
