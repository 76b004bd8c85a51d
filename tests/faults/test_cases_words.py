"""Cases of words: what one side writes into the other's logs and terminal, and secrets that must be in neither.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import json
import threading
from urllib.parse import quote

import httpx2 as httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import hansa
from faults import checkers
from faults.sites import APP, Rounds, ask, next_work, rows, stranger
from hansa import cli
from hansa.commands.join import _tell
from hansa.commands.log import run_log
from hansa.commands.status import run_status
from hansa.core.errors import HansaError, InputError
from hansa.core.protocols import Report
from hansa.network.identity import make_request
from hansa.network.messages import PROTOCOL, Enrol, Hello, Refusal, read_plan, write
from hansa.network.outbox import Parcel
from hansa.network.runtime import NetworkRuntime
from hansa.network.token import JoinToken
from hansa.terminal import console
from hansa.wire import pack_report

pytestmark = pytest.mark.network
EVIL = "\x1b[2J\x1b[31m[/red]\r\nforged: berlin was revoked\n\u202e\x07\x9b" + "x" * 3000


def assert_harmless(text, longest=600):
    """Nothing that a terminal acts upon, no line of somebody's own, and no flood."""
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not any(line.strip().startswith("forged") for line in text.splitlines())
    assert "x" * longest not in text


def test_case_36_what_a_client_says_does_nothing_to_a_terminal_or_a_log(site, capsys, tmp_path):
    site.join("berlin", rows(0))
    token = site.invite("*")
    with stranger(site, "mallory") as mallory:
        run = mallory.hello((APP,)).run
        for protocol in (PROTOCOL, PROTOCOL + 1):
            with contextlib.suppress(Refusal):
                ask(
                    mallory, "POST", "/v1/hello", write(Hello(protocol=protocol, version=EVIL, fingerprints=(APP, "y")))
                )
        runtime = NetworkRuntime(site.coordinator)
        runtime.wait_for_clients(2, timeout_s=30)
        rounds = Rounds(site.federation, runtime, ("berlin", "mallory"))
        training = threading.Thread(target=rounds.run, args=(0,))
        training.start()
        work = next_work(mallory, 0)
        slot = read_plan(work.plan).slot
        report = pack_report(Report(slot, (), {}, {"mallory": EVIL}), site.federation.codec(slot))
        receipt = mallory.put_report(run, slot, Parcel.of(report))
        training.join(30)
        with contextlib.suppress(Refusal):
            ask(mallory, "GET", f"/v1/{quote(EVIL[:200])}")
    with httpx.Client(base_url=site.url, verify=False, trust_env=False) as http:
        for secret, name in ((b"wrong", "y"), (token.secret, EVIL)):
            wish = Enrol(token=token.id, secret=secret, name=name, request=make_request("y")[1])
            assert http.post("/v1/enrol", content=write(wish)).status_code in (400, 403)
        http.get(f"/v1/{quote(EVIL[:200])}", headers={"Signature": quote(EVIL[:200])})
    assert receipt.status == "refused"
    assert_harmless(receipt.reason)
    capsys.readouterr()
    for show in (lambda: run_status(tmp_path / "server", False), lambda: run_log(tmp_path / "server", False, None)):
        show()
        assert_harmless(capsys.readouterr().out)
    with contextlib.suppress(SystemExit):
        run_status(tmp_path / "server", True)
    assert_harmless(capsys.readouterr().out)
    with site.store.read() as db:
        for line in db.exec_driver_sql("SELECT kind || who || what FROM audit").scalars():
            assert_harmless(line)
    assert not site.problems


def test_case_36_what_a_server_says_does_nothing_to_a_clients_terminal(site, capsys, monkeypatch):
    heard = []

    def hello(*_):
        heard.append("hello")
        raise Refusal("no-space" if len(heard) == 1 else "another-app", EVIL)

    monkeypatch.setattr(site.coordinator, "hello", hello)
    screen = console()
    thread = site.join("berlin", rows(0), on_event=lambda what, more: _tell(screen, what, more))
    thread.join(30)
    error = site.problems["berlin"]
    assert isinstance(error, InputError)
    assert str(error).isprintable()
    assert len(str(error)) <= 4000
    said = capsys.readouterr().out
    assert "trying again" in said
    assert_harmless(said)


@pytest.mark.parametrize("what", ["receipt", "unreachable", "another-app", "welcome", "connected"])
def test_case_36_no_event_does_anything_to_a_clients_terminal(capsys, what):
    more = dict.fromkeys(("run", "status", "reason", "url", "fingerprint"), EVIL[:200])
    _tell(console(), what, {**more, "task": "train", "round": 1})
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert_harmless(said)


def test_case_36_the_last_words_of_a_command_do_nothing_to_a_terminal(capsys, monkeypatch):
    def fail():
        raise HansaError(EVIL)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert all(c.isprintable() or c == "\n" for c in said)
    assert len(said) < 10_000


def test_case_36_a_reason_is_a_text_in_the_report(tmp_path):
    data = hansa.Dataset(np.array([[0.0], [1.0]], np.float32), np.array([1.0, 3.0], np.float32))
    learner = hansa.LinearLearner(num_features=1)
    federation = hansa.Federation(learner=learner, algorithm=hansa.FedAvg(client_learning_rate=0.5))
    run = hansa.simulate(federation, {"a": data}, num_rounds=1)
    run.info["refused"] = [{"round": 0, "client": "mallory", "reason": '"><script>forged()</script>'}]
    assert "<script>forged" not in run.report(tmp_path / "report.html").read_text()


def test_case_36_no_secret_is_in_a_log_a_table_or_a_file_that_is_not_its_own(reference, capsys):
    trial = reference.whole
    for part, show in (
        ("fed", lambda folder: run_log(folder, False, None)),
        *((part, lambda folder: run_status(folder, True)) for part in ("fed", *trial.names)),
    ):
        with contextlib.suppress(SystemExit):
            show(trial.folder / part)
    shown = capsys.readouterr().out.encode()
    secrets, holders = {}, set()
    for name in trial.names:
        path = trial.folder / f"{name}.token"
        token = JoinToken.decode(path.read_text())
        secrets[f"token of {name}"] = (token.secret, token.secret.hex().encode(), token.encode()[20:].encode())
        holders.add(path)
    for path in trial.folder.rglob("*.key"):
        number = load_pem_private_key(path.read_bytes(), None).private_numbers().private_value
        lines = path.read_bytes().splitlines()[1:-1]
        secrets[str(path)] = (number.to_bytes(32, "big"), b"%x" % number, str(number).encode(), lines[1])
        holders.add(path)
        assert path.stat().st_mode & 0o077 == 0
    assert len(secrets) >= 2 * len(trial.names) + 2
    texts = {path: path.read_bytes() for path in trial.folder.rglob("*") if path.is_file() and path not in holders}
    texts["what was shown"] = shown
    assert sum(path.suffix == ".log" for path in texts if path != "what was shown") == 1 + len(trial.names)
    found = [
        (whose, str(path))
        for whose, forms in secrets.items()
        for path, text in texts.items()
        if any(f in text for f in forms)
    ]
    assert found == []
    assert json.loads(shown[shown.index(b"{") : shown.index(b"\n}\n") + 2])["needs_a_person"] in (True, False)
    checkers.every_database_is_sound(trial)
