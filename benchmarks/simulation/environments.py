"""One virtual environment a peer, outside the repository, with the versions of ``environments.toml``.

An environment is named by the peer and a hash of what it holds: a changed version makes a new one, an unchanged one is
used again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

FOLDER = Path.home() / ".cache" / "hansa-benchmarks"
TABLE = Path(__file__).with_name("environments.toml")


class InstallError(Exception):
    """A peer that could not be installed; the benchmark goes on without it."""


def python_of(peer: str, folder: Path = FOLDER) -> Path:
    """The interpreter of ``peer``'s environment, made where it is not there; hansa's own for who needs no other."""
    wanted = tomllib.loads(TABLE.read_text(encoding="utf-8")).get(peer)
    if wanted is None:
        return Path(sys.executable)
    content = json.dumps([wanted, sys.version_info[:2]]).encode()
    home = folder / f"{peer}-{hashlib.sha256(content).hexdigest()[:8]}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"installing {peer} into {home}", file=sys.stderr, flush=True)
        shutil.rmtree(home, ignore_errors=True)
        _run(peer, [sys.executable, "-m", "venv", str(home)])
        _pip(peer, python, wanted["packages"])
        if "alone" in wanted:
            _pip(peer, python, ["--no-deps", "--ignore-requires-python", *wanted["alone"]])
        (home / "complete").touch()
    return python


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of those of ``packages`` that are there."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.name.lower(): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({p: have[p] for p in sys.argv[1:] if p in have}))"
    )
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(said)
    return found


def _pip(peer: str, python: Path, packages: list[str]) -> None:
    _run(peer, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages])


def _run(peer: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InstallError(f"{peer}: {' '.join(command[2:])} ended with status {done.returncode}: {' '.join(last)}")
