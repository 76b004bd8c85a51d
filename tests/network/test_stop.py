"""SIGTERM, as a service manager sends it: the coordinator ends soon with status 0, and the next one goes on."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from hansa.demo_data import write_hospitals
from hansa.network.client import Connection, run_participant
from hansa.network.client_store import ClientStore
from hansa.network.enrolment import enrol
from hansa.network.participant import Participant
from hansa.network.token import JoinToken

pytestmark = pytest.mark.network


def hansa(*words):
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "hansa", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def line_with(process, text):
    for line in process.stdout:
        if text in line:
            return line
    pytest.fail(f"no line with {text!r}")


def test_sigterm_ends_with_status_0_and_the_next_line_goes_on_with_the_same_round(tmp_path):
    import threading

    import hansa as package

    write_hospitals(tmp_path, None, "hospital", None)
    app = package.load_app(tmp_path / "app.py")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = ("serve", tmp_path / "app.py", "--state", tmp_path / "fed", "--listen", f"127.0.0.1:{port}")
    serve += ("--set", "schedule.num_rounds=2", "--set", "schedule.cohort_size=2", "--out", tmp_path / "run")
    first = hansa(*serve)
    line_with(first, "serving on")
    heard, stop, threads = [], threading.Event(), []
    slow = threading.Event()  # the second client trains only once the coordinator was stopped

    def take_part(name):
        words = [sys.executable, "-m", "hansa", "invite", name, "--state", str(tmp_path / "fed")]
        token = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        who = enrol(JoinToken.decode(token), tmp_path / name)
        store = ClientStore(tmp_path / name)
        data = app.load_data(tmp_path / "hospitals" / name)

        def load():
            if name == "cologne":
                slow.wait(60)
            return data, None

        connection = Connection(who, store, on_event=lambda what, more: heard.append((name, what, more)), stop=stop)
        one = Participant(app.federation, name, load, store)
        run_participant(connection, lambda: {app.fingerprint: lambda: one})
        connection.close()
        store.close()

    for name in ("berlin", "cologne"):
        threads.append(threading.Thread(target=take_part, args=(name,), daemon=True))
        threads[-1].start()
    end = time.monotonic() + 60
    while not any(who == "berlin" and what == "receipt" for who, what, _ in heard):
        assert time.monotonic() < end, heard
        time.sleep(0.05)
    began = time.monotonic()
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=30)
    assert (first.returncode, time.monotonic() - began < 10) == (0, True), said
    assert "stopped, as the system asked" in said
    slow.set()
    second = hansa(*serve)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    for thread in threads:
        thread.join(30)
    trained = [more for who, what, more in heard if (who, what) == ("berlin", "receipt") and more["task"] == "train"]
    assert [(more["round"], more["status"]) for more in trained] == [(0, "accepted"), (1, "accepted")]
    assert package.load_run(tmp_path / "run").history[-1].num_clients == 2
