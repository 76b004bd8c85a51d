"""What the command line says: one sentence and exit status 2 for what cannot be used, and nothing half-written."""

import json
import shutil
import socket
import sys

import pytest

import hansa
from hansa import cli
from hansa.commands.simulate import runtime_of
from hansa.demo_data import write_hospitals
from hansa.wire import unpack


@pytest.fixture
def federation(tmp_path):
    """The demo's app and four hospitals' files."""
    write_hospitals(tmp_path / "fed", None, "hospital", None)
    return tmp_path / "fed"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``hansa WORDS``; gives exit status, output and error output."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["hansa", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def simulate(federation, *more):
    return ("simulate", federation / "app.py", "--data", federation / "hospitals", *more)


@pytest.mark.parametrize(("runtime", "more"), [("inprocess", "training"), ("processes:2", "workers, the mean of them")])
def test_profile_shows_where_a_rounds_time_goes(federation, command, tmp_path, runtime, more):
    few = ("--set", "schedule.num_rounds=3", "--out", tmp_path / "run", "--runtime", runtime)
    status, out, _ = command(*simulate(federation, "--profile", *few))
    assert status == 0
    for words in ("where a round's time goes", "share", "first round", "plan and broadcast", "100.0%", more):
        assert words in out, out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["profile"]["rounds"] == 3


def test_a_profile_of_each_seed_is_shown(federation, command):
    _, out, _ = command(*simulate(federation, "--profile", "--seed", "4,7", "--set", "schedule.num_rounds=1"))
    assert out.count("where a round's time goes, seed 4") == out.count("where a round's time goes, seed 7") == 1


def test_simulate_writes_a_run_directory_that_loads_and_predicts(federation, command, tmp_path):
    status, out, _ = command(*simulate(federation, "--out", tmp_path / "run", "--set", "schedule.num_rounds=3"))
    assert status == 0
    assert "after 3 rounds" in out
    run = hansa.load_run(tmp_path / "run", app=federation / "app.py")
    dataset = hansa.load_app(federation / "app.py").load_data(federation / "hospitals" / "berlin")
    assert (run.predict(dataset.x) == dataset.y).mean() > 0.9
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "app.py",
        "clients.csv",
        "history.csv",
        "parameters.safetensors",
        "report.html",
        "run.json",
    ]


def test_baselines_and_several_seeds_are_shown(federation, command, tmp_path):
    few = ("--set", "schedule.num_rounds=2")
    status, out, _ = command(*simulate(federation, "--baselines", *few))
    assert (status, "was joining worth it?" in out, "everyone" in out) == (0, True, True)
    status, out, _ = command(*simulate(federation, "--seed", "0-1", "--out", tmp_path / "runs", *few))
    assert (status, "of 2 seeds" in out) == (0, True)
    status, out, _ = command("compare", tmp_path / "runs", "--out", tmp_path / "page.html")
    assert (status, (tmp_path / "page.html").exists()) == (0, True)
    status, out, _ = command("report", tmp_path / "runs" / "seed-0")
    assert status == 0


def test_resume_goes_on_where_the_rounds_were_saved(federation, command, tmp_path):
    few, more = ("--set", "schedule.num_rounds=2"), ("--set", "schedule.num_rounds=4")
    command(*simulate(federation, "--resume", "--out", tmp_path / "a", *few))
    command(*simulate(federation, "--resume", "--out", tmp_path / "a", *more))
    command(*simulate(federation, "--out", tmp_path / "b", *more))
    one, other = (hansa.load_run(tmp_path / name) for name in "ab")
    assert (one.parameters == other.parameters).all()


@pytest.mark.parametrize(
    ("word", "runtime"),
    [
        (None, "InProcess(block_size=1024)"),
        ("inprocess:1", "InProcess(block_size=1)"),
        ("processes:2", "Processes(num_workers=2)"),
        ("auto", "auto: InProcess(block_size=1024)"),
        ("virtual", "VirtualTime(InProcess(block_size=1024), devices=Devices("),
        ("virtual:TRACE", "VirtualTime(InProcess(block_size=1024), devices=Devices.from_csv("),
    ],
)
def test_a_run_tells_where_its_clients_ran(federation, command, tmp_path, word, runtime):
    (tmp_path / "trace.csv").write_text("examples_per_s\n10\n")
    where = () if word is None else ("--runtime", word.replace("TRACE", str(tmp_path / "trace.csv")))
    status, out, error = command(
        *simulate(federation, *where, "--out", tmp_path / "r", "--set", "schedule.num_rounds=2")
    )
    assert (status, error) == (0, "")
    assert ("virtual time: " in out) == bool(word and "virtual" in word)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["runtime"].startswith(runtime)


def test_the_word_ray_is_the_runtime_of_that_name():
    assert (runtime_of("ray"), runtime_of("ray:3")) == (hansa.Ray(), hansa.Ray(num_workers=3))


def test_check_lists_what_leaves_a_client(federation, command):
    status, out, _ = command("check", federation / "app.py", "--data", federation / "hospitals")
    assert (status, "no problem found" in out, "who can read it" in out) == (0, True, True)


def edit(federation, old, new):
    path = federation / "app.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def one_cell(path, row, column, value):
    lines = path.read_text().splitlines()
    cells = lines[row].split(",")
    cells[lines[0].split(",").index(column)] = value
    lines[row] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


def missing_app(federation):
    (federation / "app.py").unlink()


def missing_folder(federation):
    shutil.rmtree(federation / "hospitals")


def missing_column(federation):
    edit(federation, 'label="malignant"', 'label="malign"')


def other_label(federation):
    one_cell(federation / "hospitals" / "cologne" / "patients.csv", 3, "malignant", "7")


def one_more_feature(federation):
    path = federation / "hospitals" / "munich" / "patients.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0] + ",extra", *(line + ",1" for line in lines[1:])]) + "\n")


def broken_app(federation):
    edit(federation, "import hansa\n", "import hansa\nimport no_such_module\n")


def no_app_in_file(federation):
    edit(federation, "app = hansa.App(", "other = hansa.App(")


def unknown_category(federation):
    edit(federation, 'label="malignant"', 'label="malignant", categories={"mean_radius": [1, 2]}')


def empty_labels(federation):
    path = federation / "hospitals" / "berlin" / "patients.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line.rsplit(",", 1)[0] + "," for line in lines[1:])]) + "\n")


def everything_missing(federation):
    edit(federation, 'label="malignant"', 'label="malignant", drop_missing=True')
    path = federation / "hospitals" / "berlin" / "patients.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *("," + line.split(",", 1)[1] for line in lines[1:])]) + "\n")


def all_empty(federation):
    for path in (federation / "hospitals").glob("*/patients.csv"):
        path.write_text(path.read_text().splitlines()[0] + "\n")


def no_rate(federation):
    edit(federation, "client_learning_rate=0.1, ", "")


def unequal_estimator(federation):
    edit(
        federation,
        'hansa.LinearLearner(num_features=30, num_classes=2, metrics=("auc", "accuracy"))',
        "hansa.SklearnLearner(make, classes=(0, 1), num_features=30)",
    )
    edit(
        federation,
        "import hansa\n",
        "import hansa\nfrom sklearn.ensemble import HistGradientBoostingClassifier as make\n",
    )


BAD_INPUT = [
    (missing_app, (), "expected an app file"),
    (missing_folder, (), "hospitals"),
    (missing_column, (), "malign"),
    (other_label, (), "cologne"),
    (one_more_feature, (), "munich"),
    (broken_app, (), "no_such_module"),
    (no_app_in_file, (), "expected app = hansa.App("),
    (unknown_category, (), "mean_radius"),
    (empty_labels, (), "malignant"),
    (everything_missing, (), "Standardize"),
    (all_empty, (), "expected"),
    (no_rate, (), "client_learning_rate=0.1"),
    (unequal_estimator, (), "cannot be averaged"),
    (None, ("--seed", "x"), "--seed x"),
    (None, ("--runtime", "gpu"), "--runtime gpu"),
    (None, ("--runtime", "gpu"), "inprocess[:BLOCK_SIZE], processes[:NUM_WORKERS], auto, ray[:NUM_WORKERS] or virtual"),
    (None, ("--runtime", "processes:0"), "--runtime processes:0: expected inprocess["),
    (None, ("--runtime", "inprocess:"), "--runtime inprocess:"),
    (None, ("--runtime", "auto:2"), "--runtime auto:2"),
    (None, ("--runtime", "virtual:"), "--runtime virtual:"),
    (None, ("--runtime", "virtual:no-such.csv"), "no-such.csv"),
    (None, ("--set", "schedule.rounds=3"), "no option 'rounds'"),
    (None, ("--set", "schedule.num_rounds=-3"), "num_rounds"),
    (None, ("--set", "schedule.min_clients=9"), "min_clients"),
    (None, ("--resume",), "--out"),
]


@pytest.mark.parametrize(("spoil", "more", "said"), BAD_INPUT, ids=lambda v: getattr(v, "__name__", None))
def test_bad_input_gets_one_sentence_status_2_and_writes_nothing(federation, command, tmp_path, spoil, more, said):
    if spoil:
        spoil(federation)
    out = () if "--resume" in more else ("--out", tmp_path / "run")
    status, _, error = command(*simulate(federation, *out, *more))
    assert (status, said in error) == (2, True), error
    assert error.startswith("hansa: ")
    assert "Traceback" not in error or spoil is broken_app
    assert not (tmp_path / "run").exists()


def test_a_failing_app_shows_the_users_own_line(federation, command):
    edit(federation, "import hansa\n", "import hansa\n\n1 / 0\n")
    status, _, error = command(*simulate(federation))
    assert (status, "ZeroDivisionError" in error, "1 / 0" in error, "training/apps.py" in error) == (
        2,
        True,
        True,
        False,
    )


def test_debug_shows_the_traceback(federation, command):
    missing_app(federation)
    with pytest.raises(hansa.InputError):
        command(*simulate(federation, "--debug"))


def test_ctrl_c_ends_a_simulation_with_one_sentence_and_leaves_nothing(federation, command, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hansa.commands.simulate.simulate", interrupted)
    status, _, error = command(*simulate(federation, "--out", tmp_path / "run"))
    assert (status, "stopped by you" in error) == (130, True)
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_is_refused_with_status_2(command):
    assert command("simulate", "--no-such-option")[0] == 2


def test_out_refuses_a_folder_with_other_files(federation, command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    status, _, error = command(*simulate(federation, "--out", tmp_path / "mine"))
    assert (status, "nothing written" in error) == (2, True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_serve_names_a_port_in_use(federation, command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, error = command(
            "serve", federation / "app.py", "--state", tmp_path / "st", "--listen", f"127.0.0.1:{port}"
        )
    assert (status, f"port {port}" in error) == (2, True)


def test_invite_needs_a_coordinator(command, tmp_path):
    status, _, error = command("invite", "berlin", "--state", tmp_path)
    assert (status, "hansa serve" in error) == (2, True)


@pytest.fixture
def token(tmp_path):
    """A good token of a coordinator that nobody runs."""
    from hansa.network.registry import invite

    made = invite(tmp_path / "st", "berlin", url="https://127.0.0.1:9").encode()
    (tmp_path / "berlin.token").write_text(f"a line for people\n{made}\n")
    return f"@{tmp_path / 'berlin.token'}"


def test_a_dry_run_writes_what_would_be_sent_and_sends_nothing(federation, command, tmp_path, token):
    own = federation / "hospitals" / "berlin"
    words = ("--data", own, "--state", tmp_path / "c", "--dry-run")
    status, out, error = command("join", token, federation / "app.py", *words)
    assert (status, error) == (0, "")
    assert "nothing was sent" in out
    bodies = {path.name: unpack(path.read_bytes()) for path in (tmp_path / "c" / "dry-run").iterdir()}
    assert set(bodies) == {
        "prepare-0-statistics.safetensors",
        "train-0-update.safetensors",
        "evaluate-0-metrics.safetensors",
    }
    assert bodies["train-0-update.safetensors"]["updates"]["arrays"]["values"].shape == (1, 31)
    assert not (tmp_path / "c" / "identity").exists()


def test_the_owners_own_function_may_read_the_data(federation, command, tmp_path, token):
    path = federation / "hospitals" / "berlin" / "patients.csv"
    own = tmp_path / "my_data.py"
    own.write_text(
        f"import hansa\n\ndef load():\n    return hansa.Dataset.from_table({str(path)!r}, label='malignant')\n"
    )
    words = ("--data", f"{own}:load", "--state", tmp_path / "c", "--dry-run")
    assert command("join", token, federation / "app.py", *words)[0] == 0
    status, _, error = command("join", token, federation / "app.py", "--data", f"{own}:read", "--dry-run")
    assert (status, "read" in error) == (2, True)


def test_a_folder_of_apps_and_a_missing_device_are_named(federation, command, tmp_path, token):
    own = ("--data", federation / "hospitals" / "berlin", "--state", tmp_path / "c", "--dry-run")
    (tmp_path / "apps").mkdir()
    status, _, error = command("join", token, tmp_path / "apps", *own)
    assert (status, "expected at least one app" in error) == (2, True)
    shutil.copy(federation / "app.py", tmp_path / "apps" / "v1.py")
    assert command("join", token, tmp_path / "apps", *own)[0] == 0
    status, _, error = command("join", token, tmp_path / "apps", *own, "--device", "cuda:1")
    assert (status, "LinearLearner" in error) == (2, True)


def test_join_names_a_missing_token_file_and_missing_data(federation, command, tmp_path, token):
    status, _, error = command("join", "@no.token", federation / "app.py", "--data", federation)
    assert (status, "no.token" in error) == (2, True)
    status, _, error = command("join", token, federation / "app.py", "--data", tmp_path / "nothing")
    assert (status, "nothing" in error) == (2, True)


def test_status_needs_a_state_folder(command, tmp_path):
    status, _, error = command("status", "--state", tmp_path)
    assert (status, "coordinator or of a client" in error) == (2, True)


def test_join_names_a_damaged_token(federation, command):
    status, _, error = command(
        "join", "hansa1_abc", federation / "app.py", "--data", federation / "hospitals" / "berlin"
    )
    assert (status, "token" in error) == (2, True)


@pytest.mark.parametrize(
    "name", ["demo", "simulate", "check", "serve", "invite", "revoke", "join", "status", "report", "compare"]
)
def test_every_help_has_an_example(command, name):
    status, out, _ = command(name, "--help")
    assert (status, "Example:" in out) == (0, True)


@pytest.fixture
def logged(tmp_path):
    """A run directory and a state folder with an audit log."""
    pytest.importorskip("sqlalchemy")
    from hansa.network.identity import Authority
    from hansa.network.journal import append, save_log
    from hansa.network.receipts import Seal
    from hansa.network.store import Store

    store = Store(tmp_path / "fed")
    authority = Authority.open(tmp_path / "fed" / "authority")
    with store.write() as db:
        append(db, 1_800_000_000.0, "invited", "berlin", {"uses": 1})
        append(db, 1_800_000_001.0, "enrolled", "paris", {"certificate": "ab" * 32})
        append(
            db, 1_800_000_002.0, "frozen", "", {"run": "r", "slot": "train-0-0-update", "reports": [], "refused": []}
        )
    (tmp_path / "run").mkdir()
    save_log(store, Seal.open(authority), authority.certificate, tmp_path / "run")
    store.close()
    return tmp_path


@pytest.mark.parametrize("where", ["run", "fed"])
def test_the_log_is_shown_and_checked(logged, command, where):
    status, out, _ = command("log", logged / where)
    assert (status, "berlin" in out, "paris" in out, "2027-01-15" in out) == (0, True, True, True)
    status, out, _ = command("log", logged / where, "--client", "paris")
    assert (status, "berlin" in out, "paris" in out) == (0, False, True)
    status, out, error = command("log", logged / where, "--verify")
    assert (status, "3 entries" in out, "whole" in out, error) == (0, True, True, "")


def test_a_log_of_which_one_byte_was_changed_is_status_1(logged, command):
    path = logged / "run" / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b"paris", b"Paris"))
    status, out, error = command("log", logged / "run", "--verify")
    assert (status, "line 2:" in out, "expected a log that is whole" in error) == (1, True, True)
    assert command("log", logged / "run")[0] == 0


def test_a_log_that_is_none_is_bad_input(logged, command, tmp_path):
    assert command("log", tmp_path / "nothing", "--verify")[0] == 2
    (logged / "run" / "log.jsonl").write_bytes(b"\x1b[31mnonsense\n")
    status, out, error = command("log", logged / "run")
    assert (status, "line 1" in error, "\x1b" in out + error) == (2, True, False)
    (logged / "run" / "authority.pem").unlink()
    status, _, error = command("log", logged / "run", "--verify")
    assert (status, "authority's certificate" in error) == (2, True)


def test_a_client_counts_its_receipts(tmp_path, command):
    from hansa.network.client_store import ClientStore
    from hansa.network.messages import Receipt

    store = ClientStore(tmp_path)
    for number in range(3):
        store.received("r", Receipt(slot=f"train-{number}-0-update", sha256="ab" * 32, status="accepted"))
    store.close()
    status, out, _ = command("status", "--state", tmp_path)
    assert (status, "signed receipts: 3 accepted" in out) == (0, True)


def test_what_others_wrote_can_do_nothing_to_the_terminal(tmp_path, command):
    from hansa.core.protocols import Slot
    from hansa.network.client_store import ClientStore
    from hansa.network.messages import Receipt
    from hansa.network.outbox import Parcel

    store = ClientStore(tmp_path)
    store.commit("r", Slot(0, 0, "update"), Parcel.of(b"report"), None, None)
    reason = "[/bold] \x1b[31m\nround 2: accepted"
    store.received("r", Receipt(slot="train-0-0-update", sha256="ab" * 32, status="refused", reason=reason))
    store.close()
    status, out, _ = command("status", "--state", tmp_path)
    assert (status, "[/bold]" in out, "\x1b" in out) == (0, True, False)
