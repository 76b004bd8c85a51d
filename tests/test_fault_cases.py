"""The page of fault cases has forty rows, and each has a test of its number."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "fault-cases.md"
ROW = re.compile(r"^\| (\d+) \| .* \| ([^|]*) \|$", flags=re.MULTILINE)


def test_each_case_of_the_page_has_its_test():
    shown = {int(number): last for number, last in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    source = " ".join(path.read_text(encoding="utf-8") for path in (TESTS / "faults").glob("test_*.py"))
    tested = {int(number) for number in re.findall(r"def test_case_(\d\d)_", source)}
    assert sorted(shown) == list(range(1, 41))
    assert all(last == f"`test_case_{number:02}`" for number, last in shown.items())
    assert tested == set(shown)
