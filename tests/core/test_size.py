from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "hansa"


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_is_under_1150_lines_in_all():
    sizes = {path.name: lines(path) for path in (SOURCE / "core").glob("*.py")}
    assert len(sizes) > 5
    assert sum(sizes.values()) < 1150


def test_no_file_is_over_400_lines():
    sizes = {str(path.relative_to(SOURCE)): lines(path) for path in SOURCE.rglob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 400} == {}
    assert len(sizes) > 50


def test_every_file_says_its_idea_in_its_first_line():
    silent = [str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if not path.read_text().startswith('"""')]
    assert silent == []
