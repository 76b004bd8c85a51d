"""The example of secure aggregation: as short as it says, and as accurate as the plain mean."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "examples" / "secure" / "app.py"


def test_the_secure_mean_of_the_example_is_as_accurate_as_the_plain_one():
    pytest.importorskip("sklearn")
    source = APP.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 40
    done = subprocess.run([sys.executable, str(APP)], capture_output=True, text=True, check=True, timeout=120)
    plain, secure = (float(found) for found in re.findall(r"mean: accuracy (0\.\d+)", done.stdout))
    said = float(re.search(r"plain mean, (0\.\d+)", source).group(1))
    assert plain == pytest.approx(said, abs=0.01)
    assert secure == pytest.approx(plain, abs=0.004)  # one of 297 digits
