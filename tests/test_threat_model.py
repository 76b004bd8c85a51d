"""The threat model names the tests that show what it says: each of them is there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "threat-model.md"


def test_every_test_that_the_threat_model_names_exists():
    files = [path for path in TESTS.rglob("test_*.py") if path != Path(__file__)]
    known = " ".join(
        [*(path.stem for path in files), *re.findall(r"def (test_\w+)", " ".join(map(Path.read_text, files)))]
    )
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| (`[^|]*`(?:, `[^|]*`)*) \|$", page, flags=re.MULTILINE)
    last = re.search(r"^Tests: (.*?)\n\n", page, flags=re.MULTILINE | re.DOTALL)
    named = re.findall(r"`(\w+)`", " ".join([*rows, last[1]]))
    assert len(named) > 40
    assert [name for name in named if name not in known] == []
