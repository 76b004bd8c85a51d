"""A whole run with a long model: the coordinator's memory is that of the model it starts from, and little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.network
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "network"
MODEL_MB = 80  # more than what counts as long
CODE = """
import json, sys
from pathlib import Path
from large import a_run
print(json.dumps(a_run(Path(sys.argv[1]), {num_params}, 3)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure a peak of memory")
def test_a_round_takes_no_memory_for_updates_nor_for_the_next_model(tmp_path):
    """110 MB are the libraries', 80 the model's: one vector more, of an update or a state, would not fit."""
    code = CODE.format(num_params=MODEL_MB * 250_000)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        cwd=BENCHMARK,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["wrong"] == 0
    assert MODEL_MB < found["peak"] < 160 + MODEL_MB
