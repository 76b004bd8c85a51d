"""Processes of a deployment: started with a log each, watched for their memory, killed, and none left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_LOOK_EVERY_S = 0.1
_LAST_WORDS = 1500


class Failed(Exception):
    """A side that did not do what it should; the benchmark says so and goes on with the next."""


class Started:
    """One process of its own session, its output in ``FOLDER/NAME.log``."""

    def __init__(self, name: str, words: Sequence[object], folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words], stdout=file, stderr=file, env=dict(environment), start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def said(self) -> str:
        """All that it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """``kill -9``, of this process alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def kill_family(self) -> None:
        """``kill -9``, of this process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """End it and whatever it started."""
        if self.is_running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.kill_family()


def call(words: Sequence[object], environment: Mapping[str, str], limit_s: float = 120.0) -> str:
    """What a command prints; ``Failed`` when it ends badly."""
    command = [str(word) for word in words]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command[:4])}: not within {limit_s:.0f} s") from error
    if done.returncode:
        raise Failed(f"{' '.join(command[:4])} ended with status {done.returncode}: {done.stderr[-300:]}")
    return done.stdout


def until(true: Callable[[], bool], limit_s: float, what: str, watched: Sequence[Started] = ()) -> None:
    """Wait for something; ``Failed`` after ``limit_s`` or when one of ``watched`` ends without it."""
    end = time.monotonic() + limit_s
    while not true():
        ended = [one for one in watched if not one.is_running]
        if ended and not true():
            raise Failed(f"{what}: {ended[0].name} ended, saying: {ended[0].said()[-_LAST_WORDS:]}")
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {limit_s:.0f} s")
        time.sleep(0.05)


def free_port() -> int:
    """A port below those that the system gives to calls, so that it stays free while its server is away."""
    for _ in range(1000):
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise Failed("no free port between 20000 and 32000")


def answers(port: int) -> bool:
    """Whether somebody answers an HTTP request over TLS, whatever the answer."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=2) as bare,
            context.wrap_socket(bare, server_hostname="127.0.0.1") as line,
        ):
            line.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return line.recv(16).startswith(b"HTTP/1.1 ")
    except OSError:
        return False


class Memory:
    """The peak memory of a process and of all that it starts, by what they run.

    ``peaks`` is the kernel's own high-water mark (VmHWM) of each kind of process, in bytes; ``together`` is the highest
    sum of what all of them held at one moment, looked at ten times a second. A kind that no process is of is 0.
    """

    def __init__(self, roots: Callable[[], Sequence[int]], kinds: Sequence[str]) -> None:
        self._roots, self._kinds, self._over = roots, kinds, threading.Event()
        self.peaks, self.together = dict.fromkeys(kinds, 0), 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            now = 0
            for pid in _family(self._roots()):
                status = _status(pid)
                kind = next((kind for kind in self._kinds if kind in status.get("command", "")), None)
                if kind is not None and "VmHWM" in status:
                    self.peaks[kind] = max(self.peaks[kind], _kilobytes(status["VmHWM"]))
                    now += _kilobytes(status["VmRSS"])
            self.together = max(self.together, now)


def _family(roots: Sequence[int]) -> list[int]:
    """Processes and all below them, by Linux's table of children."""
    family = list(roots)
    for one in family:
        for listed in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                family += [int(child) for child in listed.read_text().split()]
    return family


def _status(pid: int) -> dict[str, str]:
    """Lines of /proc about a process, and its command; empty where it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return {}
    found = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return found | {"command": command}


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024
