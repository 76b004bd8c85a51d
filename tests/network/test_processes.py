"""The README's two apps, unchanged, in a simulation and in real processes over real sockets: the same bits."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import hansa
from hansa.demo_data import write_hospitals

pytestmark = pytest.mark.network
EXAMPLES = Path(__file__).parents[2] / "examples"


def start(*words):
    """A hansa process whose output can be read line by line."""
    command = [sys.executable, "-u", "-m", "hansa", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def say(process, pattern, lines):
    """Read lines until one matches; fails with all of them when the process ends first."""
    for line in process.stdout:
        lines.append(line)
        if found := re.search(pattern, line):
            return found
    pytest.fail(f"no line with {pattern!r} in\n{''.join(lines)}")


def finish(process, lines=()):
    """Wait for the end of a process; fails with its output unless its status is 0."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, "".join(lines) + out
    return out


def federate(folder, app, data, options=(), restart=None):
    """Serve ``app`` and join with every file of ``data``, each in a process; gives the run directory.

    ``restart`` names a client that is killed after its first accepted update, and started again by the same line.
    """
    coordinator = start(
        "serve", app, "--state", folder / "fed", "--listen", "127.0.0.1:0", "--out", folder / "run", *options
    )
    said = []
    say(coordinator, "serving on", said)
    clients = []
    for path in sorted(data.iterdir()):
        name = path.name.split(".")[0]
        invited = subprocess.run(
            [sys.executable, "-m", "hansa", "invite", name, "--state", str(folder / "fed")],
            capture_output=True,
            text=True,
            check=True,
        )
        token = folder / f"{name}.token"
        token.write_text(invited.stdout)
        line = ("join", f"@{token}", app, "--data", path, "--state", folder / f"state-{name}")
        clients.append((name, line, start(*line)))
    readers = [threading.Thread(target=finish, args=(client,)) for name, _, client in clients if name != restart]
    for reader in readers:
        reader.start()
    for name, line, client in clients:
        if name == restart:
            say(client, "update accepted", [])
            client.kill()
            client.communicate()
            finish(start(*line))
    finish(coordinator, said)
    for reader in readers:
        reader.join()
    finish(start("log", folder / "run", "--verify"))
    return folder / "run"


def same_bits(network, simulated):
    one = hansa.load_run(network)
    assert one.parameters.dtype == simulated.parameters.dtype
    assert np.array_equal(one.parameters, simulated.parameters)
    assert [row.bytes_up for row in one.history[1:]] == [row.bytes_up for row in simulated.history[1:]]  # then no hello
    rows = [(row.round, row.loss, dict(row.metrics), row.num_clients) for row in one.history]
    assert rows == [(row.round, row.loss, dict(row.metrics), row.num_clients) for row in simulated.history]


def test_the_csv_app_gives_the_same_bits_over_the_network_even_when_a_client_is_killed(tmp_path):
    write_hospitals(tmp_path, None, "hospital", None)
    app, data = tmp_path / "app.py", tmp_path / "hospitals"
    options = ("--set", "schedule.num_rounds=4")
    network = federate(tmp_path, app, data, options, restart="cologne")
    loaded = hansa.load_app(app)
    population = hansa.Population.from_folder(data, load=loaded.load_data)
    simulated = hansa.simulate(loaded, population, num_rounds=4, runtime=hansa.InProcess(block_size=1))
    same_bits(network, simulated)
    sent = (tmp_path / "state-berlin" / "sent.csv").read_text()
    assert sent.count(",update,") == 4
    released = hansa.load_run(tmp_path / "state-berlin" / "model", app=app)
    assert np.array_equal(released.parameters, simulated.parameters)
    some = loaded.load_data(data / "berlin")
    assert np.array_equal(released.predict(some.x), simulated.predict(some.x))


def test_the_pytorch_app_gives_the_same_bits_over_the_network(tmp_path):
    pytest.importorskip("torch")
    app = EXAMPLES / "own_model" / "app.py"
    data = tmp_path / "digits"
    data.mkdir()
    loaded = hansa.load_app(app)
    population = loaded.population()
    for client in population.ids[:2]:
        rows, _ = population.load(client)
        np.savez(data / f"{client}.npz", x=rows.x, y=rows.y)
    options = ("--set", "schedule.num_rounds=2", "--set", "schedule.cohort_size=2")
    network = federate(tmp_path, app, data, options)
    few = hansa.Population.from_folder(data, load=loaded.load_data)
    simulated = hansa.simulate(loaded, few, num_rounds=2, cohort_size=2, runtime=hansa.InProcess(block_size=1))
    same_bits(network, simulated)
