"""The main job: a coordinator and four hospital processes over mutual TLS, and a person sees that it was worth it."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from hansa.core.errors import RunError
from hansa.demo_secrecy import Copies, Pair, look
from hansa.wire import pack

pytestmark = pytest.mark.network


def demo(folder, *words):
    command = [sys.executable, "-m", "hansa", "demo", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=180)


def test_the_demo_shows_what_joining_brought_and_what_crossed_the_wire(tmp_path):
    done = demo(tmp_path, "--splits", "2", "--write", "fed")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "equals, bit for bit" in done.stdout
    for word in ("berlin", "munich", "everyone", "alone", "pooled", "what crossed the wire", "report"):
        assert word in done.stdout
    info = json.loads((tmp_path / "hansa-demo" / "run.json").read_text())
    kinds = {body["kind"] for body in info["bodies"] if body["direction"] == "up"}
    assert kinds == {"certificate request", "hello", "update", "metrics", "statistics"}
    assert info["baselines"]["everyone"]["federated"]["auc"] > 0.95
    assert (tmp_path / "hansa-demo" / "report.html").stat().st_size > 20_000
    with (tmp_path / "fed" / "state" / "berlin" / "sent.csv").open() as file:
        sent = list(csv.DictReader(file))
    ours = sum(int(line["bytes"]) for line in sent)
    patients = (tmp_path / "fed" / "hospitals" / "berlin" / "patients.csv").stat().st_size
    assert {line["kind"] for line in sent} == kinds
    assert 0 < ours < patients


def test_the_demo_takes_a_table_of_ones_own(tmp_path):
    rows = [f"{site},{i % 7},{i % 3},{int(i % 7 > 3)}" for site in ("a", "b") for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["ward,dose,kind,well", *rows]) + "\n")
    done = demo(tmp_path, "--data", "own.csv", "--client", "ward", "--splits", "1")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "everyone" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "no.csv"), "no.csv"),
        (("--data", "own.csv", "--client", "nobody"), "nobody"),
        (("--data", "own.csv", "--client", "ward"), "text"),
        (("--write", "taken"), "taken"),
    ],
)
def test_bad_input_to_the_demo_gets_one_sentence(tmp_path, words, said):
    (tmp_path / "own.csv").write_text("ward,note,well\na,x,1\nb,y,0\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    done = demo(tmp_path, *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert done.stderr.startswith("hansa: ")


def test_the_secure_demo_shows_that_the_coordinator_got_no_hospitals_update(tmp_path):
    rows = [f"{site},{i % 7},{i * i % 11},{int(i % 7 > 3)}" for site in ("a", "b", "c") for i in range(60)]
    (tmp_path / "own.csv").write_text("\n".join(["ward,dose,weight,well", *rows]) + "\n")
    words = ("--secure", "--rounds", "2", "--splits", "1", "--write", "fed")
    done = demo(tmp_path, "--data", "own.csv", "--client", "ward", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    said = " ".join(done.stdout.split())
    assert "all 6 updates were made again" in said
    assert "none is there" in said
    for words in ("the coordinator saw", "it did not see", "not hidden", "was joining worth it?", "sent.csv"):
        assert words in said
    assert sorted(path.name for path in (tmp_path / "fed").iterdir()) == [
        "app.py", "coordinator", "hospitals", "state", "tokens",
    ]  # fmt: skip
    assert "hansa.SecureMean(" in (tmp_path / "fed" / "app.py").read_text()
    info = json.loads((tmp_path / "hansa-demo" / "run.json").read_text())
    assert info["baselines"]["everyone"]["federated"]["auc"] > 0.9
    with (tmp_path / "fed" / "state" / "a" / "sent.csv").open() as file:
        protection = {line["kind"]: line["protection"] for line in csv.DictReader(file)}
    sums = "SecureMean: the server sees the sum only"
    assert {protection[kind] for kind in ("update", "metrics", "statistics")} == {sums}
    assert protection["mail"] == "shares of masks: enough of them open the sum, and no update"
    assert "keys were not signed" not in said


def test_the_demos_search_finds_an_update_that_was_sent_as_it_is():
    rng = np.random.default_rng(0)
    row, width = rng.normal(size=20), 18
    own = np.rint(row * 1000)
    clear = pack({"values": row.astype(np.float32)[None]})
    masked = Pair(rng.integers(0, 2**width, 20).astype(np.uint32), own, width)
    assert look([masked], {"other": pack({"values": rng.normal(size=20)})}, {"a": row}).is_clean
    assert look([masked], {"body": clear}, {"a": row}).in_clear == ("a in body",)
    unmasked = Pair((own.astype(np.int64) % 2**width).astype(np.uint32), own, width)
    found = look([unmasked], {}, {"a": row})
    assert (found.is_clean, found.num_near, round(found.correlation, 6)) == (False, 20, 1.0)


def test_copies_keep_what_a_coordinator_stores_and_removes(tmp_path):
    (tmp_path / "state" / "updates").mkdir(parents=True)
    name, path = "ab" * 32, tmp_path / "state" / "updates" / ("ab" * 32)
    copies = Copies(tmp_path / "state", tmp_path / "copies")
    path.write_bytes(b"report")
    copies.look()
    path.unlink()
    assert copies.get(name) == b"report"
    with pytest.raises(RunError, match="expected a copy"):
        copies.get("cd" * 32)
