"""How long a coordinator is away when it is killed and started again: a real process, with all its imports."""

import subprocess
import sys
import time

import httpx2 as httpx
import pytest

from faults.trial import COORDINATOR

pytestmark = pytest.mark.network
LIMIT_S = 10.0  # the bar is 3 s on a quiet machine


def test_a_killed_coordinator_answers_again_within_seconds(reference, fast, record_property, capsys):
    trial = reference.trial(fast / "trial", {COORDINATOR: [("coordinator.slot.frozen", "train-1")]})
    try:
        trial.start_everyone()
        trial.until(lambda: not trial.is_running(COORDINATOR))
        began = time.monotonic()
        line = ("serve", "app.py", "--state", "fed", "--listen", f"127.0.0.1:{trial.port}", "--out", "run")
        with (trial.folder / "again.log").open("wb") as log:
            again = subprocess.Popen([sys.executable, "-m", "hansa", *line], cwd=trial.folder, stdout=log, stderr=log)
        try:
            seconds = first_answer(trial.port, began)
            assert again.wait(60) == 0
        finally:
            again.kill()
            again.wait()
        trial.processes.pop(COORDINATOR)
        for process in trial.processes.values():
            process.join(30)
            assert process.exitcode == 0
    finally:
        trial.end()
    record_property("recovery_s", round(seconds, 2))
    with capsys.disabled():
        print(f"\n  serving again {seconds:.2f} s after its start (with an existing state, kill -9 in mid-round)")
    assert seconds < LIMIT_S


def first_answer(port, began):
    """Seconds until a request is answered."""
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=False, trust_env=False) as http:
        while time.monotonic() - began < 60:
            try:
                assert http.get("/v1/authority").status_code == 200
                return time.monotonic() - began
            except (OSError, httpx.TransportError):
                time.sleep(0.01)
    pytest.fail("no answer within a minute")
