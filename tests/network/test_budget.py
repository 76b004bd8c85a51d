"""The owner's privacy budget: never overspent, never fresh again, paid before anything leaves."""

import dataclasses
import json
import math
import os
import shutil
import sqlite3
import stat
import threading
from contextlib import closing, contextmanager

import numpy as np
import pytest

import hansa
from hansa import cli
from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.data.prepare import Standardize
from hansa.network.budget import Budget, Overspent, budget_of
from hansa.network.client_store import ClientStore
from hansa.network.failpoints import Reached, watch
from hansa.network.messages import LASTING, Settlement, Work, write_plan
from hansa.network.participant import Participant
from hansa.network.pricing import HERE, SERVER, Price, priced
from hansa.network.record import FILE, KEY, Broken, Record
from hansa.network.runtime import NetworkRuntime
from hansa.privacy import events, gaussian
from hansa.privacy.accountant import PoissonSampling
from hansa.privacy.events import GaussianEvent, with_sampling
from hansa.training.loop import Loop
from hansa.training.privacy import bound
from hansa.training.schedule import Schedule
from hansa.wire import pack, unpack_report
from network.conftest import make_federation, rows

ONE = Price(GaussianEvent(noise_multiplier=2.0), SERVER)
DELTA = 1e-3
CLIP, NOISE = hansa.Clip(norm=1.0), hansa.GaussianNoise(noise_multiplier=2.0, delta=DELTA)
MEAN = hansa.Mean(weighting="clients")
UPDATE = Slot(0, 0, "update")


def epsilon_of(num_rounds):
    """What so many rounds of ``ONE`` cost, and a little more."""
    return gaussian.epsilon(DELTA, 2.0, num_rounds) + 1e-6


@pytest.fixture
def store(tmp_path):
    with closing(ClientStore(tmp_path / "state")) as made:
        yield made


@pytest.fixture
def budget(tmp_path, store):
    """A budget for two rounds."""
    return budget_of("rows.csv", tmp_path / "budgets", store, epsilon=epsilon_of(2), delta=DELTA)


@contextmanager
def dying_at(name):
    """End what is done inside at a fail point."""

    def at(reached):
        if reached == name:
            raise Reached(reached)

    watch(at)
    try:
        with pytest.raises(Reached):
            yield
    finally:
        watch(None)


def again(budget, **more):
    """The same data's budget, for somebody else who joins."""
    return budget_of("rows.csv", budget.record.folder.parent, **more)


# ------------------------------------------------------------------------------------------------------ spending


def test_a_budget_lets_so_many_rounds_pass_and_no_more(budget):
    for number in range(2):
        budget.check("run", Slot(number, 0, "update"), ONE)
        budget.spend("run", Slot(number, 0, "update"), "a", ONE)
    assert budget.spent == pytest.approx(gaussian.epsilon(DELTA, 2.0, 2))
    with pytest.raises(Overspent, match="this round would make it"):
        budget.check("run", Slot(2, 0, "update"), ONE)
    with pytest.raises(Overspent):
        budget.spend("run", Slot(2, 0, "update"), "a", ONE)
    assert again(budget).counted == {ONE.event: 2}


def test_the_same_bytes_are_paid_once_and_any_others_again(budget):
    for _ in range(3):
        budget.spend("run", UPDATE, "a", ONE)
    assert budget.counted[ONE.event] == 1
    budget.check("run", UPDATE, ONE)  # there may be room: it may be the same report
    budget.spend("run", UPDATE, "b", ONE)
    for slot in (UPDATE, UPDATE._replace(attempt=1), UPDATE._replace(exchange="other")):
        with pytest.raises(Overspent):
            budget.spend("another run", slot, "a", ONE)


def test_what_the_server_hears_of_a_budget_holds_no_figure(budget):
    budget.set(0.5, None)
    for price in (ONE, None):
        with pytest.raises(Overspent) as refused:
            budget.check("run", UPDATE, price)
        assert refused.value.told.startswith(LASTING)
        assert not any(letter.isdigit() for letter in refused.value.told)
        assert "0.5" in str(refused.value)


def test_two_joins_on_the_same_data_do_not_overspend_together(budget):
    budget.set(epsilon_of(10), None)
    refused = []

    def spend(name):
        mine = again(budget)
        for number in range(10):
            try:
                mine.spend(name, Slot(number, 0, "update"), "a", ONE)
            except Overspent:
                refused.append((name, number))

    threads = [threading.Thread(target=spend, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = again(budget)
    assert (found.counted[ONE.event], len(refused)) == (10, 10)
    assert found.spent <= found.epsilon


def test_an_entry_is_durable_before_the_point_that_says_so_and_not_before(budget):
    for name, count in (("client.budget.spending", 0), ("client.budget.spent", 1)):
        with dying_at(name):
            budget.spend("run", UPDATE, "a", ONE)
        assert again(budget).counted[ONE.event] == count


# ---------------------------------------------------------------------------------------------- the owner's word


def test_a_budget_binds_whoever_joins_with_the_same_data(tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").touch()
    (tmp_path / "link.csv").symlink_to(tmp_path / "rows.csv")
    assert budget_of("rows.csv", tmp_path / "b") is None
    made = budget_of("rows.csv", tmp_path / "b", store, epsilon=4)
    assert (made.epsilon, made.delta) == (4, 1e-6)
    for same in ("rows.csv", str(tmp_path / "rows.csv"), "link.csv"):
        assert budget_of(same, tmp_path / "b").data == str(tmp_path / "rows.csv")
    assert budget_of("mine.py:load", tmp_path / "b") is None
    assert budget_of("mine.py:load", tmp_path / "b", epsilon=1).data == f"{tmp_path / 'mine.py'}:load"
    assert budget_of("mine.py:other", tmp_path / "b") is None


def test_raising_and_lowering_are_entries_and_what_was_spent_stays(budget):
    budget.spend("run", UPDATE, "a", ONE)
    raised = again(budget, epsilon=9)
    assert (raised.epsilon, raised.delta, raised.counted[ONE.event]) == (9, DELTA, 1)
    again(budget, epsilon=9)
    lowered = again(budget, epsilon=0.1, delta=1e-5)
    assert lowered.left == 0
    with pytest.raises(Overspent):
        lowered.check("run", Slot(1, 0, "update"), ONE)
    kinds = [entry["kind"] for entry in lowered.record.entries]
    assert kinds == ["opened", "budget", "spent", "budget", "budget"]
    with pytest.raises(Overspent):  # a budget that another process lowered holds at once
        budget.check("run", Slot(1, 0, "update"), ONE)


@pytest.mark.parametrize("terms", [{"epsilon": 0}, {"epsilon": math.inf}, {"epsilon": 1, "delta": 1}, {"delta": 0.1}])
def test_a_budget_that_cannot_be_is_a_sentence_and_no_record(terms, tmp_path):
    with pytest.raises(InputError, match=r"expected .*, found"):
        budget_of("rows.csv", tmp_path / "budgets", **terms)
    assert not (tmp_path / "budgets").exists()


@pytest.mark.skipif(os.name == "nt", reason="modes are of POSIX systems")
def test_the_key_is_its_owners_alone_and_signs_every_entry(budget):
    assert stat.S_IMODE((budget.record.folder / KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(budget.record.folder.stat().st_mode) == 0o700


# ------------------------------------------------------------------------------------------------ broken records


def edit(budget, statement, *values):
    with closing(sqlite3.connect(budget.record.folder / FILE)) as db, db:
        db.execute(statement, values)


def one_byte(column, number):
    def change(budget):
        [[value]] = sqlite3.connect(budget.record.folder / FILE).execute(
            f"SELECT {column} FROM entries WHERE number = ?", (number,)
        )
        edit(budget, f"UPDATE entries SET {column} = ? WHERE number = ?", bytes([value[0] ^ 1]) + value[1:], number)

    return change


def epsilon_changed(budget):
    """The entry of the budget itself, with a hash that fits, by somebody without the key."""
    edit(budget, "UPDATE entries SET body = replace(body, '\"epsilon\":', '\"epsilon\":9')")


def rewritten_by_another(budget):
    """A whole new record in its place."""
    shutil.rmtree(budget.record.folder)
    Record.make(budget.record.folder, [("opened", {"data": budget.data}), ("budget", {"epsilon": 9, "delta": 0.1})])


def of_other_data(budget):
    other = budget_of("other.csv", budget.record.folder.parent, epsilon=9)
    shutil.rmtree(budget.record.folder)
    shutil.copytree(other.record.folder, budget.record.folder)


BREAKS = {
    "body": one_byte("body", 3),
    "signature": one_byte("signature", 1),
    "epsilon": epsilon_changed,
    "gone from the middle": lambda budget: edit(budget, "DELETE FROM entries WHERE number = 3"),
    "gone from the end": lambda budget: edit(budget, "DELETE FROM entries WHERE number = 4"),
    "all gone": lambda budget: edit(budget, "DELETE FROM entries"),
    "no table": lambda budget: edit(budget, "DROP TABLE entries"),
    "an empty file": lambda budget: (budget.record.folder / FILE).write_bytes(b""),
    "no database": lambda budget: (budget.record.folder / FILE).write_bytes(b"x" * 9000),
    "half a file": lambda budget: os.truncate(budget.record.folder / FILE, 5000),
    "no file": lambda budget: (budget.record.folder / FILE).unlink(),
    "no key": lambda budget: (budget.record.folder / KEY).unlink(),
    "no folder": lambda budget: shutil.rmtree(budget.record.folder),
    "another key": lambda budget: (budget.record.folder / KEY).write_bytes(b"x"),
    "another record": rewritten_by_another,
    "other data": of_other_data,
    "an older copy": lambda budget: None,
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_record_that_is_not_whole_refuses_everything_and_is_never_fresh_again(name, budget, store, tmp_path):
    budget.spend("run", UPDATE, "a", ONE)
    shutil.copytree(budget.record.folder, tmp_path / "copy")
    budget.spend("run", Slot(1, 0, "update"), "a", ONE)
    store.enter("run")  # any transaction writes the note of how far the record had come
    if name == "an older copy":
        shutil.rmtree(budget.record.folder)
        shutil.copytree(tmp_path / "copy", budget.record.folder)
    BREAKS[name](budget)
    for more in ({}, {"epsilon": 100.0}):
        with pytest.raises(Broken, match=r"expected .*, found"):
            budget_of("rows.csv", tmp_path / "budgets", store, **more)
    with pytest.raises((Broken, Overspent)):  # also whoever had opened it before, whose budget is spent
        budget.spend("run", Slot(2, 0, "update"), "a", ONE)


def test_a_budget_in_another_folder_is_missed(budget, store, tmp_path):
    with pytest.raises(Broken, match=r"found none; put it back from a copy, or give its --budget-dir"):
        budget_of("rows.csv", tmp_path / "elsewhere", store, epsilon=100)
    shutil.move(tmp_path / "budgets", tmp_path / "elsewhere")
    assert budget_of("rows.csv", tmp_path / "elsewhere", store).epsilon == budget.epsilon


# -------------------------------------------------------------------------------------------------------- prices


def federation(**more):
    return make_federation(**{"transforms": (CLIP, NOISE), "aggregator": MEAN, **more})


TOLD = (None, {"noise_multiplier": 2.0})


class ClaimsSampling(hansa.GaussianNoise):
    """Noise whose events claim that clients are drawn in secret."""

    def event(self, number, num_rounds):
        return with_sampling(super().event(number, num_rounds), PoissonSampling(0.01))


def test_a_plan_costs_what_it_says_in_the_owners_own_app_without_amplification():
    assert priced(federation(), UPDATE, TOLD) == ONE
    calibrated = hansa.GaussianNoise(epsilon=4, delta=1e-6)
    adaptive = federation(transforms=(hansa.AdaptiveClip(), calibrated))
    told = {"noise_multiplier": 3.0, "sampling": {"kind": "poisson", "rate": 0.01}}
    assert priced(adaptive, UPDATE, (0.1, told)).event == GaussianEvent(noise_multiplier=3.0)
    claims = federation(transforms=(CLIP, ClaimsSampling(noise_multiplier=1.0)))
    assert priced(claims, UPDATE, TOLD) == ONE


class LocalNoise(hansa.GaussianNoise):
    """Noise that a client adds itself; whoever makes such a noise says so in this attribute."""

    adds_noise, adds_local_noise = False, True


def test_noise_that_the_client_adds_itself_is_as_large_as_its_own_app_has_it():
    local = federation(transforms=(CLIP, LocalNoise(noise_multiplier=1.0)), aggregator=hansa.Median())
    assert priced(local, UPDATE, TOLD) == Price(GaussianEvent(noise_multiplier=1.0), HERE)
    both = federation(transforms=(CLIP, LocalNoise(noise_multiplier=1.0), NOISE))
    assert priced(both, UPDATE, (*TOLD, TOLD[1])).kept == HERE


CORRELATED = hansa.CorrelatedNoise(strategy=hansa.BLT(buffers=2), epsilon=4.0, delta=1e-6)


def priced_rounds(rounds, **changed):
    """What a client counts for ``rounds`` of a run of 20, of which it may be in every fifth."""
    planned = dataclasses.replace(CORRELATED, epsilon=None, noise_multiplier=2.0).planned_for(20, 5)
    told = {**planned.settings(None), **changed}
    own = federation(transforms=(CLIP, CORRELATED))
    return [priced(own, UPDATE._replace(round=number), (None, told)) for number in rounds]


def test_noise_of_a_whole_run_costs_what_the_clients_own_rounds_of_it_cost():
    def spent(rounds):
        return events.cost([price.event for price in priced_rounds(rounds)], 1e-6).epsilon

    whole = events.cost([GaussianEvent(noise_multiplier=2.0)], 1e-6).epsilon
    assert spent([0, 5, 10, 15]) == pytest.approx(whole)  # as often as may be, from the first round on: all of it
    once, late, often = spent([0]), spent([19]), spent(range(20))
    assert late < once < whole < often
    assert {price.kept for price in priced_rounds([0, 7])} == {SERVER}
    assert events.event_of(events.as_json(priced_rounds([7])[0].event)) == priced_rounds([7])[0].event


@pytest.mark.parametrize(
    "changed",
    [
        {"mechanism": None},
        {"mechanism": {"strategy": {"kind": "tree"}, "num_rounds": 10**12, "min_separation": 1}},
        {"mechanism": {"strategy": {"kind": "os"}, "num_rounds": 20, "min_separation": 1}},
        {"mechanism": {"strategy": {"kind": "tree"}, "num_rounds": 1, "min_separation": 1}},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": "much"},
    ],
    ids=repr,
)
def test_a_run_long_mechanism_that_cannot_be_read_has_no_price(changed):
    assert priced_rounds([3], **changed) == [None]


@pytest.mark.parametrize(
    "found",
    [
        (make_federation(), UPDATE, ()),
        (federation(), UPDATE._replace(task="evaluate"), ()),
        (federation(prepare=(Standardize(),)), UPDATE._replace(task="prepare"), ()),
        (federation(transforms=(NOISE,)), UPDATE, TOLD[1:]),
        (federation(transforms=(CLIP, NOISE, NOISE)), UPDATE, (*TOLD, TOLD[1])),
        (federation(aggregator=hansa.Mean()), UPDATE, TOLD),
        (federation(aggregator=hansa.Median()), UPDATE, TOLD),
        (federation(), UPDATE, TOLD[:1]),
        (federation(), UPDATE, (*TOLD, None)),
        (federation(transforms=(hansa.AdaptiveClip(), NOISE)), UPDATE, TOLD),
        (hansa.statistics.survey(hansa.statistics.Count(), noise_multiplier=1.0), UPDATE, TOLD),
    ],
)
def test_what_has_no_finite_price_has_none(found):
    assert priced(*found) is None


@pytest.mark.parametrize("told", [0, -1, math.nan, math.inf, 1e-9, 1e300, "2", None, [2.0], True, {}, 10**400])
def test_a_noise_multiplier_that_cannot_be_is_no_price(told):
    assert priced(federation(), UPDATE, (None, {"noise_multiplier": told})) in (
        None,
        Price(GaussianEvent(noise_multiplier=True), SERVER),
    )
    assert priced(federation(), UPDATE, (None, told)) in (None, ONE)  # without numbers: those of the app


# --------------------------------------------------------------------------------------------------- participant


class Asked:
    """A participant with a budget, and a server that asks it whatever it likes."""

    def __init__(self, store, budget, **more):
        self.federation, self.loads, self.fetches = federation(**more), 0, 0
        self.one = Participant(self.federation, "berlin", self.load, store, budget=budget)

    def load(self):
        self.loads += 1
        return rows(1)

    def plan(self, number=0, value=0.0, task="train", settings=None, **more):
        told = [None, {"noise_multiplier": 2.0}] if settings is None else settings
        fields = {"slot": [number, 0, "update", task], "learn": True, "settings": told, "key": bytes(32)}
        self.params = np.full(self.federation.learner.layout.num_params, value, np.float32)
        return write_plan({**fields, "variant": None, "mail": None, **more}, {"params": "0" * 64})

    def fetch(self, _sha256):
        self.fetches += 1
        return pack(self.params)

    def report(self, number=0, settled=(), **more):
        work = Work(run="run", plan=self.plan(number, **more), settlements=settled)
        slot, parcel = self.one.handle(work, self.fetch)
        size = self.federation.learner.layout.num_params
        return unpack_report(parcel.body, slot, "berlin", self.federation.codec(slot), size)


@pytest.fixture
def asked(store, budget):
    return Asked(store, budget)


def test_a_report_is_paid_before_it_is_listed_and_asked_again_it_costs_nothing(asked, budget):
    paid = []
    watch(lambda name: paid.append(again(budget).counted[ONE.event]) if name == "client.report.listed" else None)
    asked.report()
    asked.report()
    watch(None)
    assert (paid, asked.loads) == ([1], 1)
    assert budget.counted[ONE.event] == 1


def test_a_crash_between_payment_and_outbox_never_counts_too_little(asked, budget):
    for point in ("client.budget.spent", "client.report.listed", "client.outbox.committing"):
        with dying_at(point):
            asked.report()
        assert again(budget).counted[ONE.event] == 1
    assert asked.report().clients == ("berlin",)  # the same bytes, from the same plan
    assert again(budget).counted[ONE.event] == 1


def test_a_server_that_asks_the_same_slot_with_another_model_pays_again(asked, budget):
    assert asked.report(value=0.0).clients
    settled = (Settlement(number=1, run="run", task="train", round=0, attempt=0, counted=False),)
    assert asked.report(value=1.0, settled=settled).clients
    assert budget.counted[ONE.event] == 2


def test_without_room_no_row_is_read_and_no_vector_downloaded(asked, budget):
    for number in range(2):
        assert asked.report(number).clients
    loads, fetches = asked.loads, asked.fetches
    refused = asked.report(2).refused
    assert refused == {"berlin": LASTING + "this round would overspend it"}
    assert (asked.loads, asked.fetches) == (loads, fetches)
    assert asked.one.store.answers(1)[0]["round"] == 2


@pytest.mark.parametrize("more", [{"task": "evaluate", "settings": []}, {"settings": [None, {"noise_multiplier": 0}]}])
def test_work_without_noise_that_can_be_counted_is_refused_with_the_reason(more, asked):
    assert "adds no noise that could be counted" in asked.report(**more).refused["berlin"]
    assert asked.loads == 0


def test_a_refusal_is_not_paid_for(store, budget):
    asked = Asked(store, budget)
    asked.one.load = lambda: (rows(1)[0].take([]), None)
    assert asked.report().refused == {"berlin": "no training examples"}
    assert not budget.counted


def test_a_record_that_breaks_on_the_way_refuses_the_next_plan(asked, budget):
    asked.report()
    (budget.record.folder / FILE).unlink()
    problems = []
    asked.one.on_problem = problems.append
    assert asked.report(1).refused == {"berlin": LASTING + "its record cannot be trusted"}
    assert isinstance(problems[0], Broken)


# --------------------------------------------------------------------------------------------------- the network

NAMES = ("berlin", "paris", "rome")
ROUNDS = 5


def train(site, num_rounds=ROUNDS, **more):
    """A run on a site's coordinator; gives the clients that each round counted."""
    runtime = NetworkRuntime(site.coordinator)
    runtime.wait_for_clients(len(NAMES))
    loop = Loop(
        federation=site.federation,
        schedule=Schedule(num_rounds=num_rounds),
        runtime=runtime,
        key=Key.of(0),
        clients=runtime.clients,
        params=np.zeros(site.federation.learner.layout.num_params, np.float32),
        release=runtime.release,
        **more,
    )
    return loop.run()


def counts(point):
    return [row.num_clients for row in point.history]


def times_asked(site, name):
    return site.store.row("SELECT COUNT(*) FROM assignments WHERE client = ?", name)[0]


@pytest.fixture
def town(make_site):
    """A site whose clients' budgets last for so many rounds."""

    def make(**lasting):
        site = make_site(bound(federation(), Schedule(num_rounds=ROUNDS), len(NAMES)))
        site.budgets = {name: epsilon_of(count) if count else 1e-3 for name, count in lasting.items()}
        for number, name in enumerate(NAMES):
            site.join(name, rows(number))
        return site

    return make


@pytest.mark.network
def test_a_client_that_runs_out_midway_is_left_out_and_the_run_ends(town):
    site = town(berlin=2)
    found = train(site)
    assert counts(found) == [3, 3, 2, 2, 2]
    assert not found.stopped
    reason = LASTING + "this round would overspend it"
    assert NetworkRuntime(site.coordinator).refusals() == [{"round": 2, "client": "berlin", "reason": reason}]
    assert (times_asked(site, "berlin"), times_asked(site, "rome")) == (3, 5)


@pytest.mark.network
def test_a_run_whose_last_budget_is_spent_stops_with_what_it_has_learned(town):
    found = train(town(berlin=1, paris=2, rome=3))
    assert counts(found) == [3, 2, 1, 0]
    assert found.stopped


@pytest.mark.network
def test_a_run_that_no_budget_has_room_for_says_so(town):
    with pytest.raises(RunError, match="every client was refused: privacy budget: this round would overspend it"):
        train(town(berlin=0, paris=0, rome=0))


@pytest.mark.network
def test_an_owner_who_raises_its_budget_and_joins_again_is_asked_again(town):
    site = town(berlin=1)

    def on_round(row):
        if row.round == 2:
            raised = budget_of(str(site.folder / "berlin.csv"), site.folder / "budgets", epsilon=100)
            raised.record.close()
            who = site.connect("berlin", ClientStore(site.folder / "another process"))
            who.hello(("ab" * 32,))
            who.close()
            who.store.close()

    assert counts(train(site, on_round=on_round)) == [3, 2, 2, 3, 3]


# ------------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["hansa", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        captured = capsys.readouterr()
        return status, " ".join(captured.out.split()), captured.err

    return run


def test_status_shows_what_is_left_by_run_and_who_adds_the_noise(budget, store, command, tmp_path):
    budget.spend("first", UPDATE, "a", ONE)
    budget.spend("second", UPDATE, "a", ONE)
    store.enter("run")
    status, out, _ = command("status", "--state", tmp_path / "state")
    assert status == 0
    assert f"privacy budget for {budget.data}: epsilon {budget.epsilon:g} at delta 0.001" in out
    assert "spent in 2 entries, 1e-06 left (noise promised by the server: 2)" in out
    alone = gaussian.epsilon(DELTA, 2.0, 1)
    assert f"first 1 {alone:.3g} second 1 {alone:.3g}" in out
    _, out, _ = command("status", "--state", tmp_path / "state", "--json")
    [found] = json.loads(out)["budgets"]
    assert (found["entries"], found["spent"], found["problem"]) == (2, budget.spent, None)


def test_status_says_that_a_broken_record_needs_a_person(budget, store, command, tmp_path):
    store.enter("run")
    edit(budget, "DELETE FROM entries WHERE number = 2")
    _, out, _ = command("status", "--state", tmp_path / "state")
    assert "all work is refused" in out
    status, out, _ = command("status", "--state", tmp_path / "state", "--json")
    assert (status, "broken" in json.loads(out)["budgets"][0]["problem"]) == (1, True)


APP = """
import numpy as np
import hansa

def load(path):
    return hansa.Dataset(np.ones((8, 3), np.float32), np.array([0, 1] * 4))

app = hansa.App(
    federation=hansa.Federation(
        learner=hansa.LinearLearner(num_features=3, num_classes=2),
        algorithm=hansa.FedAvg(client_learning_rate=0.1),
        transforms=(hansa.Clip(norm=1.0), hansa.GaussianNoise(epsilon=8, delta=1e-6)),
        aggregator=hansa.Mean(weighting="clients"),
    ),
    schedule=hansa.Schedule(num_rounds=4, min_clients=3),
    load_data=load,
)
"""


def test_a_dry_run_says_what_a_round_costs_and_spends_nothing(command, tmp_path):
    from hansa.network.registry import invite

    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "rows.csv").touch()
    token = invite(tmp_path / "st", "berlin", url="https://127.0.0.1:9").encode()
    line = ("join", token, tmp_path / "app.py", "--data", tmp_path / "rows.csv", "--state", tmp_path / "c", "--dry-run")
    dry = (*line, "--budget-dir", tmp_path / "b")
    assert "privacy" not in command(*dry)[1]
    status, out, error = command(*dry, "--epsilon-budget", "9")
    assert (status, error) == (0, "")
    assert not (tmp_path / "b").exists()
    alone = gaussian.epsilon(1e-6, gaussian.noise_multiplier(8, 1e-6, 4), 1)
    assert f"a round costs epsilon {alone:.3g} at delta 1e-06 by itself (noise promised by the server)" in out
    assert f"of the budget of 9, {alone:.3g} would be spent after it" in out
    budget = budget_of(str(tmp_path / "rows.csv"), tmp_path / "b", epsilon=9)
    budget.spend("run", UPDATE, "a", priced_of(4))
    twice = gaussian.epsilon(1e-6, gaussian.noise_multiplier(8, 1e-6, 4), 2)
    assert f"of the budget of 9, {twice:.3g} would be spent" in command(*dry)[1]
    assert again_at(budget) == 1
    (tmp_path / "app.py").write_text(APP.replace("hansa.GaussianNoise(epsilon=8, delta=1e-6)", ""))
    assert "a privacy budget of epsilon 9 refuses this app: no noise to count" in command(*dry)[1]


def priced_of(num_rounds):
    return Price(GaussianEvent(noise_multiplier=gaussian.noise_multiplier(8, 1e-6, num_rounds)), SERVER)


def again_at(budget):
    return Budget(Record(budget.record.folder)).counted.total()


def test_correlated_noise_over_the_network_is_paid_for_by_round(make_site, tools):
    transforms = (hansa.Clip(norm=0.5), dataclasses.replace(CORRELATED, epsilon=2.0, delta=1e-3))
    schedule = Schedule(num_rounds=2, cohort_size=2)
    own = tools.federation(transforms=transforms, aggregator=hansa.Mean(weighting="clients"))
    site = make_site(bound(own, schedule, 2))
    site.budgets = {"berlin": 8.0, "paris": 8.0}
    for name in ("berlin", "paris"):
        site.join(name, rows(1))
    runtime = tools.runtime(site.coordinator, min_clients=2)
    clients = runtime.wait_for_clients(2, timeout_s=30)
    loop = Loop(
        federation=site.federation, schedule=schedule, runtime=runtime, key=Key.of(1), clients=lambda: clients,
        params=np.zeros(own.learner.layout.num_params, np.float32),
    )  # fmt: skip
    point = loop.run()
    runtime.finish()
    assert not site.problems
    assert [row.num_clients for row in point.history] == [2, 2]
    spent = budget_of(str(site.folder / "berlin.csv"), site.folder / "budgets")
    assert spent.spent == pytest.approx(point.history[-1].epsilon, rel=1e-3)
