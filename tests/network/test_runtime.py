import threading
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from hansa.aggregators.mean import Mean
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import Abandoned, InputError, RunError
from hansa.core.key import Key
from hansa.core.protocols import Ask, Report, Slot, Updates
from hansa.core.round import Context, ServerState, server_round
from hansa.data.prepare import Standardize
from hansa.learners.linear import LinearLearner
from hansa.network import client
from hansa.network.client_store import ClientStore
from hansa.network.messages import Refusal, read_plan
from hansa.network.outbox import Parcel
from hansa.network.runtime import NetworkRuntime
from hansa.runtimes.inprocess import InProcess
from hansa.training.loop import Loop
from hansa.training.schedule import Schedule
from hansa.wire import pack_report

pytestmark = pytest.mark.network


class Killed(BaseException):
    """A process that ends in the middle of something."""


def expected(tools, federation, data, *numbers):
    return tools.rounds(federation, tools.reference(federation, data), data).run(*numbers)


def test_three_rounds_give_the_bits_of_the_same_rounds_in_process(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2, 9)}
    for name, pair in data.items():
        site.join(name, pair)
    runtime = tools.runtime(site.coordinator, min_clients=2)
    assert runtime.wait_for_clients(2, timeout_s=30) == ("berlin", "paris")
    found = tools.rounds(site.federation, runtime, data).run(0, 1, 2)
    assert found.tobytes() == expected(tools, site.federation, data, 0, 1, 2).tobytes()
    assert np.abs(found).max() > 0.01
    assert runtime.finish() == ()
    for thread in site.threads:
        thread.join(10)
    assert not site.problems
    sent = (site.folder / "berlin" / "sent.csv").read_text().splitlines()
    assert sent[0] == "time,run,round,kind,bytes,sha256,protection"
    assert [line.split(",")[3] for line in sent[1:]] == ["certificate request", "hello", "update", "update", "update"]
    assert sent[-1].endswith("none: the server sees this update")


def test_a_vector_is_downloaded_once_by_each_client(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    for name, pair in data.items():
        site.join(name, pair)
    runtime = tools.runtime(site.coordinator)
    rounds = tools.rounds(site.federation, runtime, data)
    rounds.run(0)
    runtime.release(0, rounds.state.algorithm["params"], {})
    rounds.run(1)
    runtime.release(1, rounds.state.algorithm["params"], {})
    runtime.finish()
    counts = {(body["kind"], body["direction"]): body["count"] for body in runtime.bodies()}
    assert counts["model", "down"] == 2 * 3  # the start, and the model after each round
    assert counts["update", "up"] == counts["plan", "down"] == 2 * 2
    assert (site.folder / "berlin" / "model").exists()


@pytest.mark.parametrize("moment", ["while it trains", "before it sends"])
def test_a_client_that_is_killed_goes_on_where_it_was(make_site, tools, moment):
    federation = replace(tools.federation(), algorithm=SCAFFOLD(client_learning_rate=0.1, local_steps=3, batch_size=4))
    site, loads, killed = make_site(federation), Counter(), threading.Event()
    data = {"berlin": tools.data(1), "paris": tools.data(2)}

    def load():
        loads["berlin"] += 1
        if moment == "while it trains" and loads["berlin"] == 2:
            killed.set()
            raise Killed
        return data["berlin"]

    def on_event(what, more):
        if moment == "before it sends" and what == "plan" and more["round"] == 1 and not killed.is_set():
            killed.set()
            raise Killed

    def start_again():
        killed.wait(30)
        site.threads[0].join(30)
        site.join("berlin", load)

    site.join("berlin", load, on_event=on_event)
    site.join("paris", data["paris"])
    again = threading.Thread(target=start_again)
    again.start()
    found = tools.rounds(federation, tools.runtime(site.coordinator), data).run(0, 1, 2)
    again.join(30)
    assert isinstance(site.problems.pop("berlin"), Killed)
    assert found.tobytes() == expected(tools, federation, data, 0, 1, 2).tobytes()
    assert loads["berlin"] == (4 if moment == "while it trains" else 3)  # what was committed is not trained again


def test_a_coordinator_that_is_killed_in_mid_round_goes_on_to_the_same_bits(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}

    def crash(slot, waiting, accepted):
        if slot.round == 1 and accepted == 1:
            raise Killed

    stop = threading.Event()
    site.join("berlin", data["berlin"])
    paris = site.join("paris", data["paris"], stop=stop)
    rounds = tools.rounds(site.federation, tools.runtime(site.coordinator), data)
    rounds.run(0)
    stop.set()
    site.coordinator.wake()
    rounds.runtime = tools.runtime(site.coordinator, on_wait=crash)
    paris.join(30)
    with pytest.raises(Killed):
        rounds.run(1)
    site.restart()
    site.join("paris", data["paris"])
    rounds.runtime = tools.runtime(site.coordinator)
    found = rounds.run(1, 2)
    assert found.tobytes() == expected(tools, site.federation, data, 0, 1, 2).tobytes()


def test_a_replay_reads_the_frozen_reports_and_the_same_secret(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    for name, pair in data.items():
        site.join(name, pair)
    first = tools.rounds(site.federation, tools.runtime(site.coordinator), data)
    found = first.run(0, 1)
    site.stop.set()
    site.restart()
    runtime = tools.runtime(site.coordinator, on_wait=lambda *_: pytest.fail("a replay waits for nobody"))
    assert tools.rounds(site.federation, runtime, data).run(0, 1).tobytes() == found.tobytes()
    assert runtime.once("secret train 0 0", lambda: bytes(32)) != Key(bytes(32))


def test_another_plan_for_a_slot_that_was_planned_is_refused(site, tools):
    data = {"berlin": tools.data(1)}
    site.join("berlin", data["berlin"])
    tools.rounds(site.federation, tools.runtime(site.coordinator), data).run(0)
    other = tools.rounds(site.federation, tools.runtime(site.coordinator), data)
    other.state.algorithm["params"][0] = 1.0
    with pytest.raises(RunError, match="expected the plan that was made before the restart, found another"):
        other.run(0)


def test_a_deadline_closes_a_round_with_those_who_answered(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    clock = [0.0]

    def pass_time(slot, waiting, accepted):
        if accepted:
            assert waiting == ["paris"]
            clock[0] += 100.0

    site.join("berlin", data["berlin"])
    runtime = NetworkRuntime(site.coordinator, deadline_s=60, on_wait=pass_time, monotonic=lambda: clock[0])
    rounds = tools.rounds(site.federation, runtime, data)
    rounds.run(0)
    assert rounds.mean.clients == ("berlin",)


def test_too_few_reports_abandon_the_attempt_again_after_a_restart(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    clock = [0.0]

    def pass_time(slot, waiting, accepted):
        clock[0] += 100.0 * accepted

    site.join("berlin", data["berlin"])
    options = {"deadline_s": 60, "min_clients": 2, "on_wait": pass_time, "monotonic": lambda: clock[0]}
    with pytest.raises(Abandoned, match="at least 2 clients"):
        tools.rounds(site.federation, NetworkRuntime(site.coordinator, **options), data).run(0)
    site.restart()
    with pytest.raises(Abandoned, match="at least 2 clients"):
        tools.rounds(site.federation, NetworkRuntime(site.coordinator, **options), data).run(0)


def test_a_client_that_sends_nan_is_left_out_and_the_round_goes_on(site, tools):
    data = {"berlin": tools.data(1)}
    site.join("berlin", data["berlin"])
    store = ClientStore(site.folder / "mallory")
    mallory = site.connect("mallory", store)
    run = mallory.hello((tools.app,)).run
    result = {}

    def attack():
        work = mallory.get_work()
        slot = read_plan(work.plan).slot
        bad = Updates(("m",), np.full((1, 4), np.nan, np.float32), np.array([1.0]), {"train_loss": np.array([0.0])})
        body = Parcel.of(pack_report(Report(slot, ("m",), bad), site.federation.codec(slot)))
        result["receipts"] = [mallory.put_report(run, slot, body) for _ in range(2)]
        try:
            mallory.put_report(run, slot, Parcel.of(body.body + b" "))
        except Refusal as error:
            result["conflict"] = error.code

    attacker = threading.Thread(target=attack)
    attacker.start()
    rounds = tools.rounds(site.federation, tools.runtime(site.coordinator), ("berlin", "mallory"))
    found = rounds.run(0)
    attacker.join(30)
    assert np.isfinite(found).all()
    assert rounds.mean.clients == ("berlin",)
    first, second = result["receipts"]
    assert first == second
    assert (first.status, first.reason) == ("refused", "update is not finite")
    assert rounds.runtime.refusals() == [{"round": 0, "client": "mallory", "reason": "update is not finite"}]
    assert result["conflict"] == "conflict"
    mallory.close()
    store.close()


def test_an_error_in_a_clients_data_is_a_refusal_that_shows_no_value(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}

    def load():
        raise ValueError("could not convert 'Jane Doe' to float")

    site.join("berlin", data["berlin"])
    site.join("paris", load)
    rounds = tools.rounds(site.federation, tools.runtime(site.coordinator), data)
    rounds.run(0)
    assert rounds.mean.clients == ("berlin",)
    [refusal] = rounds.runtime.refusals()
    assert refusal["reason"] == "an error at the client (ValueError); its own log says more"


def test_a_client_with_another_feature_count_is_refused_by_itself(site, tools):
    train, test = tools.data(2)
    data = {"berlin": tools.data(1), "paris": (type(train)(train.x[:, :2], train.y), test)}
    for name, pair in data.items():
        site.join(name, pair)
    rounds = tools.rounds(site.federation, tools.runtime(site.coordinator), data)
    rounds.run(0)
    assert "its data do not fit the learner (2 features a row)" in rounds.runtime.refusals()[0]["reason"]


def test_another_app_is_refused_with_both_fingerprints(site, tools):
    site.join("berlin", tools.data(1), app="cd" * 32).join(30)
    problem = site.problems.pop("berlin")
    assert isinstance(problem, InputError)
    assert "abababab..." in str(problem)
    assert "cdcdcdcd..." in str(problem)


def test_an_app_that_its_owner_takes_away_answers_no_more_plans(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    apps = {}
    for name in data:
        apps[name] = {tools.app: None}
        site.join(name, data[name], offered=apps[name])
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(2, timeout_s=30)
    apps["paris"].clear()
    rounds = tools.rounds(site.federation, runtime, data)
    rounds.run(0)
    assert rounds.mean.clients == ("berlin",)
    assert runtime.refusals()[0]["reason"] == "the owner withdrew this app"
    assert ",refusal," in (site.folder / "paris" / "sent.csv").read_text()


def test_a_revoked_client_stops_with_a_sentence(site, tools):
    thread = site.join("berlin", tools.data(1))
    tools.runtime(site.coordinator).wait_for_clients(1, timeout_s=30)
    site.coordinator.revoke("berlin")
    thread.join(30)
    problem = site.problems.pop("berlin")
    assert isinstance(problem, RunError)
    assert "berlin was revoked by the coordinator" in str(problem)


def test_a_client_that_joins_later_enters_after_the_next_release(site, tools):
    data = {"berlin": tools.data(1), "paris": tools.data(2)}
    runtime = tools.runtime(site.coordinator)
    site.join("berlin", data["berlin"])
    runtime.wait_for_clients(1, timeout_s=30)
    assert runtime.clients() == ("berlin",)
    site.join("paris", data["paris"])
    runtime.wait_for_clients(2, timeout_s=30)
    assert runtime.clients() == ("berlin",)  # a replay of this round asks the same clients
    runtime.release(0, np.zeros(4, np.float32), {})
    assert runtime.clients() == ("berlin", "paris")


def test_half_of_the_clients_gone_is_a_round_of_the_others_and_heals_without_a_restart(site, tools):
    data = {name: tools.data(i) for i, name in enumerate(("berlin", "lyon", "paris", "rome"))}
    clock, stop = [0.0], threading.Event()
    for name, pair in data.items():
        site.join(name, pair, stop=stop if name in ("berlin", "lyon") else None)

    def pass_time(slot, waiting, accepted):
        if slot.round == 1 and accepted == 2:
            assert waiting == ["berlin", "lyon"]
            clock[0] += 100.0

    options = {"deadline_s": 60, "min_clients": 2, "on_wait": pass_time, "monotonic": lambda: clock[0]}
    rounds = tools.rounds(site.federation, NetworkRuntime(site.coordinator, **options), data)
    rounds.run(0)
    assert len(rounds.mean.clients) == 4
    stop.set()
    site.coordinator.wake()
    for thread in site.threads[:2]:
        thread.join(30)
    rounds.run(1)
    assert rounds.mean.clients == ("paris", "rome")
    for name in ("berlin", "lyon"):
        site.join(name, data[name])
    rounds.run(2)
    assert len(rounds.mean.clients) == 4


def test_a_blob_that_is_not_what_its_hash_says_is_not_used(site, tools):
    store = ClientStore(site.folder / "berlin")
    connection = site.connect("berlin", store)
    sha256 = site.coordinator.models.put(b"model")
    (site.coordinator.models.folder / sha256).write_bytes(b"other")
    with pytest.raises(Exception, match="expected content with SHA-256"):
        connection.get_blob(sha256)
    connection.close()
    store.close()


def test_requests_go_on_after_the_server_was_away_and_say_so_once(site, tools):
    store, heard = ClientStore(site.folder / "berlin"), []
    connection = site.connect("berlin", store, lambda what, more: heard.append(what))
    connection.hello((tools.app,))
    port = site.server.port
    site.close()
    back = threading.Thread(target=lambda: (told.wait(30), site.open(port)))
    told = threading.Event()
    connection.on_event = lambda what, more: (heard.append(what), told.set())
    back.start()
    assert connection.get_work(wait_s=0).plan is None
    back.join(30)
    assert heard == ["unreachable", "connected"]
    connection.close()
    store.close()


def test_a_goodbye_to_a_coordinator_that_is_gone_for_good_is_given_up(site, tools, monkeypatch):
    monkeypatch.setattr(client, "_GOODBYES", 3)
    store, heard = ClientStore(site.folder / "berlin"), []
    connection = site.connect("berlin", store, lambda what, more: heard.append(what))
    connection.hello((tools.app,))
    site.close()
    connection.goodbye()
    assert heard == ["unreachable"]
    connection.close()
    store.close()


@dataclass(frozen=True, kw_only=True)
class ToyMask:
    """A masked sum of two exchanges: keys are swapped through the server, then masks cancel in the sum."""

    linear = True
    reveals_rows = False
    reduce, sensitivity = Mean.reduce, Mean.sensitivity
    denominator = None
    weighting = "clients"
    max_weight = None

    def ask(self, cohort, history):
        if "keys" not in history:
            return Ask("keys", cohort, False)
        if "masked" in history:
            return None
        keys = {c: r.payload[c] for r in history["keys"] for c in r.clients}
        return Ask("masked", tuple(keys), True, {c: {p: k for p, k in keys.items() if p != c} for c in keys})

    def answer(self, plan, updates, scratch, secret):
        [client] = scratch
        if plan.slot.exchange == "keys":
            key = int.from_bytes(secret[0].material[:4], "big")
            return {client: key}, {client: {"key": key}}, {}
        total = np.rint(updates.values[0] * 2.0**20).astype(np.int64).astype(np.uint32)
        mine = scratch[client]["key"]
        for peer, key in plan.mail[client].items():
            draw = np.random.default_rng(mine ^ key).integers(0, 2**32, total.size, dtype=np.uint32)
            total = total + draw if client < peer else total - draw
        return {client: {"masked": total}}, scratch, {}

    def open(self, cohort, history):
        rows = {c: r.payload[c]["masked"] for r in history["masked"] for c in r.clients}
        total = sum(rows.values(), np.zeros(4, np.uint32)).astype(np.int32) / 2.0**20
        return Updates(tuple(rows), total[None], np.array([float(len(rows))]), {}, {}, True)


def test_several_exchanges_with_mail_and_scratch_give_the_mean(make_site, tools):
    federation = replace(
        tools.federation(), aggregator=ToyMask(), algorithm=FedAvg(client_learning_rate=0.1, local_steps=4)
    )
    site = make_site(federation)
    data = {name: tools.data(i) for i, name in enumerate(("berlin", "paris", "rome"))}
    for name, pair in data.items():
        site.join(name, pair)
    found = tools.rounds(federation, tools.runtime(site.coordinator), data).run(0, 1)
    plain = replace(federation, aggregator=Mean(weighting="clients"))
    np.testing.assert_allclose(found, expected(tools, plain, data, 0, 1), atol=1e-5)


def test_the_training_loop_gives_the_bits_of_a_simulation_of_single_clients(make_site, tools):
    federation = tools.federation(prepare=(Standardize(),))
    site = make_site(federation)
    data = {name: (tools.data(i)[0], tools.data(10 + i)[0]) for i, name in enumerate(("berlin", "paris", "rome"))}
    for name, pair in data.items():
        site.join(name, pair)
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(3, timeout_s=30)
    shared = {"schedule": Schedule(num_rounds=3, cohort_size=2), "key": Key.of(3), "params": np.zeros(4, np.float32)}
    here = InProcess(block_size=1).open(federation, data.__getitem__, Key.of(3))
    loop = Loop(federation=federation, runtime=runtime, clients=runtime.clients, release=runtime.release, **shared)
    other = Loop(federation=federation, runtime=here, clients=lambda: tuple(data), **shared)
    found, simulated = loop.run(), other.run()
    assert found.state.algorithm["params"].tobytes() == simulated.state.algorithm["params"].tobytes()
    assert [row.loss for row in found.history] == [row.loss for row in simulated.history]
    assert loop.finish(found, tuple(data)) == other.finish(simulated, tuple(data))
    runtime.finish()


def test_a_client_without_rows_is_left_out_of_every_task_with_its_reason(make_site, tools):
    site = make_site(tools.federation(prepare=(Standardize(min_rows=1),)))
    rows, _ = tools.data(1)
    site.join("berlin", (rows, rows))
    site.join("empty", (rows.take([]), None))
    runtime = tools.runtime(site.coordinator)
    runtime.wait_for_clients(2, timeout_s=20)
    parts, context = site.federation.task("prepare"), Context(Key.of(7), site.federation.learner.layout)
    state, mean = server_round(
        parts, ServerState({}, ()), runtime, ("berlin", "empty"), context, Slot(0, 0, "", "prepare")
    )
    assert mean.clients == ("berlin",)
    assert state.algorithm["total"][0] == len(rows)
    assert [(entry["client"], entry["reason"]) for entry in runtime.refusals()] == [("empty", "no training examples")]


class FrozenLearner(LinearLearner):
    """A learner with frozen parameters."""

    frozen_hash = "ef" * 32


def test_a_client_says_which_frozen_parameters_it_has_before_it_takes_part(make_site, tools):
    site = make_site(tools.federation(learner=FrozenLearner(num_features=3, num_classes=2)))
    runtime = tools.runtime(site.coordinator)
    site.join("berlin", tools.data(1))
    assert runtime.wait_for_clients(1, 30) == ("berlin",)
    site.federation = tools.federation()
    site.join("paris", tools.data(2)).join(30)
    assert isinstance(site.problems["paris"], InputError)
    assert "expected frozen parameters with hash efefefef, found none" in str(site.problems["paris"])
