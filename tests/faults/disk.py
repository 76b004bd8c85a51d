"""Disks that fail: a small one that can be filled to its last byte, and files that are not what they were."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A disk of its own in the place of a folder, with what the folder held. It takes root to mount one."""

    def __init__(self, folder: Path, megabytes: int = 8) -> None:
        self.folder, self._filler = folder, folder / "filler"
        before = folder.with_name(f"{folder.name}-before")
        folder.mkdir(exist_ok=True)
        folder.rename(before)
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")
        shutil.copytree(before, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(before)

    def fill(self) -> None:
        """Leave no byte free."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def clear(self) -> None:
        """Have room again."""
        self._filler.unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmount it; what it held is gone."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def damage(path: Path, how: str) -> None:
    """A flipped bit, half of the file, or nothing of it."""
    body = bytearray(path.read_bytes())
    if how == "flip":
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    else:
        os.truncate(path, len(body) // 2 if how == "half" else 0)
