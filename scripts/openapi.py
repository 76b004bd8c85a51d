"""Write ``docs/openapi.json``: run it after a change of ``hansa.network.openapi``."""

from pathlib import Path

from hansa.network.openapi import text

if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "openapi.json").write_text(text())
