"""Secure sums in a deployment: the same sums as in a simulation, whoever is lost; a server that lies is refused."""

import base64
import logging
from dataclasses import dataclass, replace

import numpy as np
import pytest

import hansa
from hansa.aggregators import secure_mean
from hansa.aggregators.careful import careful
from hansa.commands.dry_run import dry_run
from hansa.core.chain import Limits, Transform
from hansa.core.errors import Abandoned
from hansa.core.key import Key
from hansa.core.protocols import Slot
from hansa.network.credentials import witnessed
from hansa.network.ledgers import stored_ledger
from hansa.network.messages import Refusal, read_plan
from hansa.network.participant import Participant, signing
from hansa.network.uploads import Sent
from hansa.runtimes.inprocess import InProcess
from hansa.secagg.packing import pack
from hansa.secagg.server import Table
from hansa.terminal import console
from hansa.training.loop import Loop
from hansa.training.privacy import bound
from hansa.training.schedule import Schedule
from hansa.wire import pack as pack_tree
from hansa.wire import unpack
from support_town import Town

pytestmark = pytest.mark.network
NAMES = ("amsterdam", "berlin", "cologne", "dresden", "essen")
EXCHANGES = ("keys", "shares", "masked", "agree", "unmask")
ONE_ROUND = Schedule(num_rounds=1, min_clients=1)
TOLD = "secure aggregation: it does not go on; its own log says why"


@dataclass(frozen=True, kw_only=True)
class OnGrid(Transform):
    """Rows in whole steps, which no rounding changes: then secure sums are exact."""

    step: float = 2.0**-10

    def norm_bound(self, incoming, settings):
        return 2.0

    def limits(self, found, settings):
        return Limits(2.0, 2.0, self.step)

    def encode(self, updates, settings, memory, draws):
        values = np.rint(updates.values / self.step) * self.step
        return updates._replace(values=values.astype(np.float32)), {}


EXACT = (hansa.Clip(norm=1.0), OnGrid())


@pytest.fixture
def make_town(tmp_path, tools):
    """A town of five whose owners' logs are kept by name."""
    made = []

    def make(names=NAMES, **more):
        more.setdefault("aggregator", hansa.SecureMean())
        more.setdefault("transforms", EXACT)
        federation = bound(tools.federation(**more), ONE_ROUND, len(names))
        town = Town(tmp_path, federation, {name: tools.data(i) for i, name in enumerate(names)})
        made.append(town)
        town.tools = tools
        town.problems = {name: [] for name in names}
        for name, person in town.people.items():
            person.on_problem = town.problems[name].append
        return town

    yield make
    for town in made:
        town.close()


def plain(tools, names, transforms=EXACT):
    """The parameters after a round of plain means over some clients."""
    federation = tools.federation(transforms=transforms, aggregator=hansa.Mean(weighting="clients"))
    reference = tools.reference(federation, {n: tools.data(i) for i, n in enumerate(NAMES)})
    return tools.rounds(federation, reference, names).run(0)


def after(town, names, **more):
    """The parameters after a round of a town, whose cohort is ``names``, and the mean."""
    rounds = town.tools.rounds(town.coordinator.federation, town.make_runtime(**more), names)
    return rounds.run(0), rounds.mean


def loop_over(runtime, federation, clients, schedule):
    params = np.zeros(federation.learner.layout.num_params, np.float32)
    return Loop(
        federation=federation, schedule=schedule, runtime=runtime, key=Key.of(1), params=params, clients=lambda: clients
    )


def seen(town, name, act):
    """Let ``act(slot, work)`` see each plan of a client before it does; what it returns takes the work's place."""
    handle = town.people[name].handle

    def look(work, fetch):
        if work.plan is not None:
            work = act(read_plan(work.plan).slot, work) or work
        return handle(work, fetch)

    town.people[name].handle = look


# ---------------------------------------------------------------------------------------------------- the right sum


def test_over_sockets_training_metrics_and_statistics_are_those_of_a_simulation(make_site, tools):
    data = {name: (tools.data(i)[0], tools.data(i + 10, 8)[0]) for i, name in enumerate(NAMES[:3])}
    federation = tools.federation(
        transforms=EXACT, aggregator=hansa.SecureMean(), prepare=(hansa.Standardize(min_rows=1),)
    )
    site = make_site(federation)
    for name, pair in data.items():
        site.join(name, pair)
    runtime = tools.runtime(site.coordinator, min_clients=2)
    clients = runtime.wait_for_clients(3, timeout_s=30)
    schedule = Schedule(num_rounds=2, min_clients=3, evaluate_every=2)
    far = loop_over(runtime, federation, clients, schedule=schedule).run()
    runtime.finish()
    assert not site.problems
    ideal = replace(federation, aggregator=hansa.SecureMean().simulated())
    near_site = InProcess(block_size=1).open(ideal, data.__getitem__, Key.of("clients"), keep=True)
    near = loop_over(near_site, ideal, clients, schedule=schedule).run()
    np.testing.assert_allclose(far.state.algorithm["params"], near.state.algorithm["params"], atol=1e-6)
    np.testing.assert_allclose(far.totals[0], near.totals[0], rtol=1e-12)
    for one, other in zip(far.history, near.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5, nan_ok=True)
    assert np.isfinite(far.history[-1].metrics["accuracy"])
    sent = (site.folder / NAMES[0] / "sent.csv").read_text()
    assert "cannot open them" in sent
    assert "sees this update" not in sent


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_client_lost_in_any_exchange_leaves_the_exact_sum_of_the_survivors(make_town, tools, exchange):
    town = make_town()
    town.people["cologne"].handle = Gone(town, "cologne", exchange)
    params, mean = after(town, NAMES, deadline_s="auto", min_clients=4)
    survivors = tuple(n for n in NAMES if n != "cologne" or exchange in ("agree", "unmask"))
    assert mean.clients == survivors
    np.testing.assert_array_equal(params, plain(tools, survivors))
    assert town.clock_s < (3700 if exchange == "masked" else 200)  # an answer without learning is quick
    assert not any(town.problems.values())


class Gone:
    """A client that is there until it is asked in one exchange, and then never again."""

    def __init__(self, town, name, exchange):
        self.town, self.name, self.exchange, self.real = town, name, exchange, town.people[name].handle

    def __call__(self, work, fetch):
        if work.plan is not None and read_plan(work.plan).slot.exchange == self.exchange:
            self.town.gone.add(self.name)
            return None
        return self.real(work, fetch)


def test_rounding_keeps_the_sum_within_a_step_a_client(make_town, tools):
    town = make_town(transforms=(hansa.Clip(norm=1.0),))
    params, _ = after(town, NAMES)
    np.testing.assert_allclose(params, plain(tools, NAMES, (hansa.Clip(norm=1.0),)), atol=2.0**-15)


def test_a_late_masked_row_is_not_looked_at(make_town, tools, monkeypatch):
    """Once the survivors are named its masks could be rebuilt: all but its own."""
    town, late = make_town(), []
    real = town.coordinator._check
    monkeypatch.setattr(town.coordinator, "_check", lambda slot, *a: late.append("read") or real(slot, *a))

    def slow(slot, work):
        town.delays["cologne"] = 1e6 if slot.exchange == "masked" else 1.0

    def meanwhile(slot, work):
        if slot.exchange == "agree" and "late" not in late:
            _, _, masked, parcel = town._due["cologne"]
            sent = Sent("cologne", masked, parcel.sha256)
            num_read = late.count("read")
            receipt = town.coordinator.report("cologne", masked, parcel.body)
            assert receipt.status == "late"
            assert town.coordinator.expect(town.coordinator.run, sent, parcel.size) == receipt
            assert town.coordinator.updates.path(parcel.sha256) is None
            assert late.count("read") == num_read
            late.append("late")

    seen(town, "cologne", slow)
    seen(town, "berlin", meanwhile)
    params, mean = after(town, NAMES, deadline_s=60.0)
    assert late.count("late") == 1
    assert "cologne" not in mean.clients
    np.testing.assert_array_equal(params, plain(tools, mean.clients))


# ------------------------------------------------------------------------------------------------- a server that lies


def tampered(exchange, change):
    """Work whose plan of one exchange ``change(tree)`` has changed on the way."""

    def act(slot, work):
        if slot.exchange != exchange:
            return None
        tree = unpack(bytes(work.plan))
        change(tree)
        return replace(work, plan=pack_tree(tree))

    return act


def swap_a_key(tree, town):
    tree["mail"]["peers"][0]["mask_key"] = bytes([9]) * 32


def name_another(tree, town):
    """The advert of one that never enrolled, in everyone's place for a peer."""
    tree["mail"]["peers"][0]["name"] = "mallory"


def send_another_model(tree, town):
    tree["broadcast"]["params"] = town.coordinator.models.put(pack_tree(np.ones(4, np.float32)))


def call_it_lost(tree, town):
    tree["mail"]["alive"] = np.packbits(np.array([1, 1, 0, 1, 1], np.uint8), bitorder="little")


def name_others(tree, town):
    tree["mail"]["alive"] = np.packbits(np.array([1, 1, 1, 1, 0], np.uint8), bitorder="little")


LIES = {
    "a swapped key": ("shares", swap_a_key, NAMES, "found others"),
    "a name that nobody enrolled": ("shares", name_another, NAMES, "found others"),
    "others than were signed": ("unmask", name_others, NAMES, "that I signed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_is_lied_to_refuses_and_says_why_to_its_owner_alone(make_town, lie):
    exchange, change, victims, why = LIES[lie]
    town = make_town()
    for name in victims:
        seen(town, name, tampered(exchange, lambda tree: change(tree, town)))
    with pytest.raises(Abandoned):
        after(town, NAMES)
    for name in victims:
        assert why in str(town.problems[name][0])
    assert {entry["client"] for entry in town.runtime.refusals()} == set(NAMES)
    assert {entry["reason"] for entry in town.runtime.refusals()} == {TOLD}


def test_another_model_for_one_leaves_it_out_or_is_refused_by_it_and_its_peers(make_town, tools, monkeypatch):
    """A server that keeps to the rest of the protocol leaves its row out; one that does not is refused by all."""
    town = make_town()
    seen(town, "cologne", tampered("masked", lambda tree: send_another_model(tree, town)))
    params, mean = after(town, NAMES)
    assert mean.clients == tuple(name for name in NAMES if name != "cologne")
    np.testing.assert_array_equal(params, plain(tools, mean.clients))
    monkeypatch.setattr(Table, "usual", lambda table, masked: masked)
    monkeypatch.setattr(Table, "believed", lambda table, masked, agreed, witness: agreed)
    rounds = tools.rounds(town.federation, town.runtime, NAMES)
    with pytest.raises(Abandoned):
        rounds.run(1)
    assert all("different models" in str(problems[0]) for problems in town.problems.values())


@pytest.mark.parametrize("exchange", ["keys", "agree"])
def test_a_client_that_signs_falsely_is_left_out_by_itself(make_town, tools, exchange):
    town = make_town()
    credentials = town.people["cologne"].federation.aggregator.credentials
    real, signed = credentials.sign, []

    def sign(message):
        signed.append(message)
        return real(message if (len(signed) == 1) == (exchange == "agree") else b"another")

    credentials.sign = sign
    params, mean = after(town, NAMES)
    counted = tuple(name for name in NAMES if exchange == "agree" or name != "cologne")
    assert mean.clients == counted
    np.testing.assert_array_equal(params, plain(tools, counted))
    refused = [(entry["client"], entry["reason"]) for entry in town.runtime.refusals()]
    assert refused == ([("cologne", "keys: another signature")] if exchange == "keys" else [])
    assert not any(town.problems.values())


def test_alive_for_some_and_lost_for_others_gives_no_sum_of_the_others_alone(make_town, tools):
    town = make_town()
    seen(town, "cologne", tampered("agree", lambda tree: call_it_lost(tree, town)))
    params, mean = after(town, NAMES)
    assert "listed as lost" in str(town.problems["cologne"][0])
    assert mean.clients == NAMES
    np.testing.assert_array_equal(params, plain(tools, NAMES))


def test_an_abandoned_attempt_releases_and_spends_nothing_and_the_next_has_fresh_keys(make_town):
    noise = hansa.GaussianNoise(epsilon=8.0, delta=1e-3)
    town, keys = make_town(NAMES[:4], transforms=(*EXACT, noise)), []
    for name in NAMES[:4]:

        def handle(work, fetch, real=town.people[name].handle, is_silent=name in NAMES[:2]):
            slot = None if work.plan is None else read_plan(work.plan).slot
            if is_silent and slot is not None and (slot.attempt, slot.exchange) == (0, "agree"):
                return None
            done = real(work, fetch)
            if done is not None and done[0].exchange == "keys":
                mail = unpack(bytes(done[1].body))["mail"]
                keys.extend([mail["mask_key"], mail["share_key"], mail["commitment"]])
            return done

        town.people[name].handle = handle
    ledger = stored_ledger(town.coordinator.store, town.coordinator.run)
    town.make_runtime(min_clients=4)
    point = town.train(replace(ONE_ROUND, deadline_s=60.0), ledger=ledger)
    assert [row.num_clients for row in point.history] == [4]
    assert [(entry.round, entry.attempt) for entry in ledger.entries] == [(0, 1)]
    assert len(keys) == len(set(keys)) == 2 * 4 * 3


def test_without_an_identity_a_client_sends_nothing_but_a_refusal(make_town, tools):
    town, problems = make_town(), []
    person = town.people["berlin"]
    bare = Participant(tools.federation(**parts_of(town)), "berlin", person.load, person.store)
    bare.on_problem = problems.append
    town.people["berlin"] = bare
    _, mean = after(town, NAMES)
    assert "berlin" not in mean.clients
    assert "expected the identity of an enrolled client" in str(problems[0])
    assert {entry["reason"] for entry in town.runtime.refusals()} == {
        "secure aggregation: it has no identity to sign with"
    }
    assert person.store.scratch(town.coordinator.run, Slot(0, 0, "keys")) is None


def parts_of(town):
    return {"transforms": town.federation.transforms, "aggregator": town.federation.aggregator}


def test_a_client_renews_its_key_between_attempts_and_not_within_one(make_site, tools, monkeypatch):
    federation, heard = tools.federation(transforms=EXACT, aggregator=hansa.SecureMean()), []
    monkeypatch.setattr(
        "hansa.network.client.renewal.is_due", lambda who, now: now is not None and who.name == "berlin"
    )
    site = make_site(federation)
    for number, name in enumerate(NAMES[:3]):
        site.join(name, tools.data(number), on_event=lambda what, more: heard.append(what))
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(3, timeout_s=30)
    rounds = tools.rounds(federation, runtime, NAMES[:3])
    for number in range(20):  # where settlement and next plan come in one answer, there is no moment between attempts
        rounds.run(number)
        assert rounds.mean.clients == NAMES[:3]
        if heard.count("renewed") >= 2:
            break
    assert runtime.refusals() == []
    assert heard.count("renewed") >= 2
    assert not site.problems


def test_a_deployments_sums_of_metrics_are_as_careful_as_its_updates(tools):
    served = tools.federation(transforms=EXACT, aggregator=careful(hansa.SecureMean()))
    for task in ("train", "evaluate"):
        assert type(served.task(task).aggregator) is type(served.aggregator)
    assert type(witnessed(served, None).aggregator) is type(served.aggregator)


def test_a_plain_federation_needs_no_identity(tools):
    federation = tools.federation()
    assert signing(federation, None) is federation


# ------------------------------------------------------------------------------------------------ what lies where


def test_no_update_is_in_clear_in_the_servers_files_its_database_or_its_log(make_site, tools, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    clear, masked, real = [], [], secure_mean.words_of

    def words_of(row, *more):
        values, numbers = real(row, *more)
        steps = values.copy()
        clear.extend([row.values[0].astype(np.float32), row.values[0].astype(np.float64), steps, steps.astype("<i8")])
        clear.extend(np.frombuffer(pack(steps.copy(), width), np.uint8) for width in (16, 17, 18, 19))
        return values, numbers

    def mask(*given, real=secure_mean.client.mask):
        said, kept = real(*given)
        masked.append(said["values"].tobytes())
        return said, kept

    monkeypatch.setattr(secure_mean, "words_of", words_of)
    monkeypatch.setattr(secure_mean.client, "mask", mask)
    num_features = 31
    learner = hansa.LinearLearner(num_features=num_features, num_classes=2)
    federation = tools.federation(learner=learner, transforms=(hansa.Clip(norm=1.0),), aggregator=hansa.SecureMean())
    site = make_site(federation)
    for i, name in enumerate(NAMES[:3]):
        x = np.random.default_rng(i).normal(size=(12, num_features)).astype(np.float32)
        site.join(name, (hansa.Dataset(x, (x.sum(axis=1) > 0).astype(np.int64)), None))
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(3, timeout_s=30)
    tools.rounds(federation, runtime, NAMES[:3]).run(0)
    with site.store.read() as db:
        dump = "\n".join(db.connection.driver_connection.iterdump()).encode()
        dump += db.connection.driver_connection.serialize()
    kept = [path.read_bytes() for path in (site.folder / "server").rglob("*") if path.is_file()]
    haystack = b"\0".join([dump, caplog.text.encode(), *kept])
    assert len(masked) == 3
    assert all(row in haystack for row in masked)  # so that what is not found is not there
    assert len(clear) == 3 * 8
    for row in clear:
        body = row.tobytes()
        assert not [i for i in range(0, len(body) - 15, 4) if body[i : i + 16] in haystack]


def test_a_clients_secrets_are_gone_with_its_last_word_and_from_its_files_with_the_settlement(make_town):
    town = make_town()
    person, secrets = town.people["berlin"], []

    def look(slot, work):
        store, run = person.store, town.coordinator.run
        if slot.exchange == "unmask":
            held = store.scratch(run, slot)
            secrets.extend([held["mask_secret"], held["share_secret"], held["seed"], store.secret(run, slot)])

    seen(town, "berlin", look)
    after(town, NAMES)
    slot = Slot(0, 0, "unmask")
    assert person.store.scratch(town.coordinator.run, slot) == {"step": "done"}
    assert person.store.secret(town.coordinator.run, slot) not in secrets
    town.settle()
    files = [path.read_bytes() for path in (town.folder / "berlin").rglob("*") if path.is_file()]
    for secret in secrets:
        assert not [file for file in files if secret in file or base64.b64encode(secret) in file]
    assert len(secrets) == 4


def test_an_attempt_is_under_way_from_the_first_word_to_the_last(make_town):
    town, amid = make_town(), []
    seen(town, "berlin", lambda slot, work: amid.append((slot.exchange, town.people["berlin"].is_amid)))
    after(town, NAMES)
    assert amid == [(exchange, exchange != "keys") for exchange in EXCHANGES]
    assert not town.people["berlin"].is_amid


def test_reports_may_be_little_longer_than_they_are(make_town, tools):
    learner = hansa.LinearLearner(num_features=199_999, num_classes=2)
    town, sizes = make_town(NAMES[:3], learner=learner), {}
    x = np.zeros((2, 199_999), np.float32)
    for name in town.data:
        town.data[name] = (hansa.Dataset(x, np.array([0, 1])), None)
    finish = town.finish

    def measured(name):
        _, _, slot, parcel = town._due[name]
        largest = town.coordinator.largest_report(slot, slot.exchange == "masked")
        sizes[slot.exchange] = (parcel.size, largest)
        with pytest.raises(Refusal, match=f"at most {largest} bytes"):
            town.coordinator.expect(town.coordinator.run, Sent(name, slot, parcel.sha256), largest + 1)
        return finish(name)

    town.finish = measured
    after(town, NAMES[:3])
    assert set(sizes) == set(EXCHANGES)
    assert all(size <= largest < size + 80_000 for size, largest in sizes.values())
    width = 13 + 2  # whole steps of 2**-10 up to 2 either way, of three
    assert sizes["masked"][0] <= 1.02 * 200_000 * width / 8


@pytest.mark.parametrize("options", [{}, {"server": "honest"}, {"num_groups": 3}], ids=repr)
def test_a_dry_run_shows_every_exchange_who_can_read_it_and_nothing_in_clear(tools, tmp_path, capsys, options):
    federation = tools.federation(transforms=EXACT, aggregator=hansa.SecureMean(**options))
    dry_run(console(), federation, "berlin", lambda: (tools.data(1)[0], tools.data(2)[0]), tmp_path)
    bodies = {path.stem: unpack(path.read_bytes()) for path in (tmp_path / "dry-run").iterdir()}
    named = {"masked": ("update", "metrics")}
    for number, task in enumerate(("train", "evaluate")):
        for exchange in federation.aggregator.exchanges:
            kind = named[exchange][number] if exchange in named else exchange
            assert bodies.pop(f"{task}-0-{kind}")["refused"] is None
    assert bodies == {}
    shown = capsys.readouterr().out
    assert "left out" not in shown
    assert "sees this" not in shown
