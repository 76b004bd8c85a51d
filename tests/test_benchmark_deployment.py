"""``benchmarks/deployment`` in small: Flower is not installed, and the figures themselves are in its results.md."""

from __future__ import annotations

import importlib.util
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HERE = BENCHMARKS / "deployment"


@pytest.fixture(scope="module")
def deployment() -> Iterator[ModuleType]:
    """``run.py`` as a module, with its folder on the path as where it is run as a script."""
    for needed in ("fastapi", "cryptography"):
        pytest.importorskip(needed, reason="a deployment needs the server's packages")
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(HERE))
    spec = importlib.util.spec_from_file_location("benchmark_deployment", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


def timed(deployment: ModuleType, row: str, seconds: float, **more: Any) -> Any:
    """A run of the 1 MB model with a warm-up round of 9 s and two rounds around ``seconds``."""
    given = {
        "setup_s": 7.0,
        "off": 1e-8,
        "server_together": 100_000_000,
        "server_bytes": {"flower-superlink": 1},
    } | more
    return deployment.trials.Timed(row=row, megabytes=1.0, seconds=[9.0, seconds, seconds], **given)


def results(deployment: ModuleType, *timed: Any, killed: tuple[Any, ...] = ()) -> Any:
    """What a call of the benchmark measured."""
    return deployment.page.Results(rows=deployment.trials.ROWS, timed=timed, traffic=(), killed=killed)


def said(deployment: ModuleType, found: Any) -> dict[str, str]:
    """What became of each bar."""
    return dict(str(bar).rsplit(": ", 1) for bar in deployment.page.bars(found))


@pytest.mark.slow
@pytest.mark.network
def test_a_quick_run_kills_hansas_coordinator_and_meets_its_bars(
    deployment: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployment.trials, "SLOW_S", 2.0)
    assert deployment.main(["--quick", "--output", str(tmp_path)]) == 0
    measured, counted, killed = json.loads((tmp_path / "results.json").read_text())["records"]
    assert len(measured["seconds"]) == 3
    assert measured["off"] < 1e-6
    assert 300_000 < counted["up"] < 400_000  # three updates of 0.1 MB
    assert 300_000 < counted["down"] < 400_000
    assert killed["goes_on"]
    assert killed["same_bits"]
    assert (killed["reported"], killed["again"]) == (1, 0)
    assert "| kill -9: lost | nothing; 0 trainings done again; the result has the same bits |" in (
        tmp_path / "results.md"
    ).read_text().replace("**", "")


@pytest.mark.parametrize(
    "arguments", [["--sizes", "big"], ["--sides", "nobody"], ["--rounds", "0"], ["--clients", "1"], ["--sizes", "0"]]
)
def test_what_cannot_be_meant_is_one_sentence_and_status_2(
    deployment: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        deployment.main(arguments)
    assert left.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_rounds_of_the_clients_training_come_to_what_numpy_expects(deployment: ModuleType) -> None:
    task = sys.modules["task"]
    values = task.initial(5)
    for _ in range(3):
        answers = [task.train(values, client) for client in range(4)]
        values = np.average(answers, axis=0, weights=[task.num_examples(client) for client in range(4)])
    assert np.allclose(values, task.expected(5, 4, 3), atol=1e-6)


def test_no_two_chunks_of_flowers_size_are_equal(deployment: ModuleType) -> None:
    chunk = 5_242_880 // 4
    first, second, third = np.split(sys.modules["task"].initial(3 * chunk), 3)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert not np.array_equal(second, third)


def test_a_figure_leaves_the_first_round_out(deployment: ModuleType) -> None:
    assert deployment.page.median_s(timed(deployment, "hansa", 2.0)) == 2.0


def test_a_faster_smaller_peer_and_a_wrong_result_are_missed_bars(deployment: ModuleType) -> None:
    own, peer = timed(deployment, "hansa", 2.0), timed(deployment, "flower", 1.0, server_together=1, off=0.5)
    found = said(deployment, results(deployment, own, peer))
    assert found["every result is NumPy's"] == "MISSED"
    assert found["1 MB: hansa's round is the fastest"] == "MISSED"
    assert found["1 MB: hansa's server needs the least memory"] == "MISSED"
    assert found["kill -9: hansa's run goes on to the same bits"] == "not measured"
    assert "5e-01 WRONG" in deployment.page.table(results(deployment, own, peer))


def test_a_run_that_does_not_survive_its_server_is_said_to_be_lost(deployment: ModuleType) -> None:
    killed = deployment.trials.Killed
    own = killed(row="hansa", serving_s=4.0, goes_on=True, again=2)
    peer = killed(row="flower-database", status="finished:failed", waited_s=9.0, reported=5, afresh_s=60.0)
    found = results(deployment, killed=(own, peer))
    bars = said(deployment, found)
    assert [bars[name] for name in bars if name.startswith("kill -9")] == ["MISSED"] * 3
    table = deployment.page.table(found)
    assert "2 trainings done again; the result has other bits" in table
    assert "does not go on: finished:failed after 9 s; `flwr run` by hand: done 60 s later, from round 1" in table
    assert "the run: round 1, and 5 updates of round 2" in table


def test_a_side_that_fails_is_a_line_and_misses_what_it_was_to_show(deployment: ModuleType) -> None:
    failed = deployment.trials.Killed(row="hansa", error="hansa serve ended")
    found = results(deployment, timed(deployment, "flower", 1.0, error="no port"), killed=(failed,))
    assert found.errors() == ["flower, 1 MB: no port", "hansa, kill -9: hansa serve ended"]
    assert said(deployment, found)["kill -9: hansa answers again within 3 s"] == "MISSED"
    assert "no port" in deployment.page.markdown(
        found, "here", {}, {"num_rounds": 2, "num_clients": 3, "killed_mb": 1, "slow_s": 2}
    )


@pytest.mark.network
def test_the_proxy_counts_both_ways_between_two_moments(deployment: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = sys.modules["counting"].CountingProxy(server.getsockname()[1])

        def answer() -> None:
            line, _ = server.accept()
            with line:
                line.sendall(b"x" * len(line.recv(100)) * 3)

        answering = threading.Thread(target=answer)
        answering.start()
        began = time.time()
        with socket.create_connection(("127.0.0.1", proxy.port)) as line:
            line.sendall(b"four")
            assert line.makefile("rb").read(12) == b"x" * 12
        answering.join()
        assert proxy.between(began, time.time()) == (4, 12)
        assert proxy.between(0.0, began) == (0, 0)
        proxy.close()


@pytest.mark.network
def test_the_servers_certificate_holds_for_this_machine_and_its_authority_alone(
    deployment: ModuleType, tmp_path: Path
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        sys.modules["certificates"].server_certificate(folder)
    assert shaken(own, own / "ca.crt")
    assert not shaken(own, other / "ca.crt")


def shaken(folder: Path, authority: Path) -> bool:
    """Whether a client that trusts ``authority`` shakes hands with the server of ``folder``."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "server.crt", folder / "server.key")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client_context = ssl.create_default_context(cafile=authority)
    client = client_context.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return client.version() == "TLSv1.3"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_the_kinds_asked_for(deployment: ModuleType, tmp_path: Path) -> None:
    processes = sys.modules["processes"]
    code = "import time; held = bytearray(50_000_000); time.sleep(100)"
    child = processes.Started("child", [sys.executable, "-c", code, "of-this-kind"], tmp_path, {})
    memory = processes.Memory(lambda: [child.process.pid], ("of-this-kind", "of-none"))
    try:
        processes.until(lambda: memory.together > 50_000_000, 20, "its memory")
    finally:
        memory.stop()
        child.end()
    assert memory.peaks["of-this-kind"] >= memory.together
    assert memory.peaks["of-none"] == 0
