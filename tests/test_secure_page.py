"""The page about secure aggregation says what the code does: its tables are printed by it, and its tests are there."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from hansa.core.chain import Limits
from hansa.secagg.grid import width_of
from hansa.secagg.mail import SEALED
from hansa.secagg.shamir import NUM_LIMBS
from hansa.secagg.terms import SIGNATURE_SIZE

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "secure-aggregation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_table_of_degrees_and_thresholds_is_what_the_page_prints():
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(BLOCKS[1], {})
    assert len(printed.getvalue().splitlines()) == 8
    assert printed.getvalue() in PAGE


def test_the_table_of_liars_is_what_the_page_computes():
    pytest.importorskip("sklearn")
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[2], names)
    found = names["found"]
    assert len(found) == 3
    for name, accuracy in found.items():
        assert accuracy == pytest.approx(float(re.search(rf"\| {name} \| (0\.\d+) \|", PAGE)[1]), abs=0.03)


def test_every_test_that_the_page_names_exists():
    known = " ".join(re.findall(r"def (test_\w+)", " ".join(map(Path.read_text, TESTS.rglob("test_*.py")))))
    rows = re.findall(r"^\|.*\| (`\w+`(?:, `\w+`)*) \|$", PAGE, flags=re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row) if "_" in name and len(name) > 15]
    assert len(named) >= 10
    assert [name for name in named if name not in known] == []


def test_the_bytes_that_the_page_states_are_those_of_messages():
    assert f"a sealed share of {SEALED} bytes; down a signature of {SIGNATURE_SIZE}" in PAGE
    assert f"a share of {8 + 4 * NUM_LIMBS} " in PAGE  # whose it is, and the share
    words = [width_of(Limits(norm=1.0, value=1.0), 16, num_clients) for num_clients in (10, 100, 1000)]
    assert "bits: {} for 10 clients, {} for 100, {} for 1,000".format(*words) in PAGE
