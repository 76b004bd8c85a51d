"""What would have travelled: counted once a client, added up from wherever it was counted, equal to the packing."""

import pickle

import numpy as np
import pytest

import support
from hansa.aggregators.median import Median
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot
from hansa.core.round import server_round
from hansa.data.prepare import Standardize
from hansa.runtimes.inprocess import InProcess
from hansa.runtimes.traffic import Bodies, ReportSizes, Traffic
from hansa.training.simulate import simulate
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from hansa.wire import pack, pack_report, plan_parts

LOCAL = {"client_learning_rate": 0.05, "local_epochs": 1}
UPDATE = Slot(0, 0, "update")
CLIENTS = ("a", "b", "c")


def plan(slot=UPDATE, **broadcast):
    return Plan(slot, True, broadcast, (), Key.of(0))


def down(traffic):
    return {b["kind"]: (b["count"], b["bytes"]) for b in traffic.as_json() if b["direction"] == "down"}


# ---------------------------------------------------------------------------------------------------------- bodies


def test_bodies_add_up_by_kind_and_direction():
    one, two = Bodies(), Bodies()
    one.count("update", "up", 2, 20)
    two.count("update", "up", 1, 10)
    two.count("plan", "down", 3, 9)
    one.add(two)
    assert one.as_json() == [
        {"kind": "plan", "direction": "down", "count": 3, "bytes": 9},
        {"kind": "update", "direction": "up", "count": 3, "bytes": 30},
    ]
    assert two.as_json()[1]["count"] == 1  # what was added stays as it was


def test_no_body_is_no_entry():
    bodies = Bodies()
    bodies.count("update", "up", 0, 0)
    bodies.add(Bodies())
    assert bodies.as_json() == []


def test_bodies_go_to_another_process_and_go_on_there():
    bodies = Bodies()
    bodies.count("update", "up", 2, 20)
    there = pickle.loads(pickle.dumps(bodies))
    assert there.as_json() == bodies.as_json()
    there.count("update", "up", 1, 10)
    there.count("refusal", "up", 1, 5)
    assert [(b["kind"], b["count"]) for b in there.as_json()] == [("refusal", 1), ("update", 3)]
    assert bodies.as_json()[0]["count"] == 2


# ------------------------------------------------------------------------------------------------------------ down


def test_a_plan_goes_to_every_client_and_a_vector_to_those_who_lack_it():
    traffic, model, sums = Traffic(), np.ones(5, np.float32), np.arange(3.0)
    body, other = len(pack(model)), len(pack(sums))
    traffic.down(plan(params=model, control=sums), ("a", "b"))
    assert (down(traffic)["model"], down(traffic)["control"]) == ((2, 2 * body), (2, 2 * other))
    traffic.down(plan(Slot(1, 0, "update"), params=model, control=sums), ("b", "c"))
    assert (down(traffic)["model"], down(traffic)["control"]) == ((3, 3 * body), (3, 3 * other))
    assert down(traffic)["plan"][0] == 4


def test_a_vector_of_the_same_bits_in_another_array_is_the_same_vector():
    traffic = Traffic()
    for number in range(3):
        traffic.down(plan(Slot(number, 0, "update"), params=np.ones(5, np.float32)), CLIENTS)
    assert down(traffic)["model"][0] == 3


def test_another_vector_of_the_name_is_sent_to_everyone_again():
    traffic, one, two = Traffic(), np.ones(5, np.float32), np.zeros(5, np.float32)
    traffic.down(plan(params=one), CLIENTS)
    traffic.down(plan(Slot(1, 0, "update"), params=two), ("a",))
    assert down(traffic)["model"][0] == 4
    traffic.down(plan(Slot(2, 0, "update"), params=one), ("a", "b"))  # the newest is what is kept: nobody has the old
    assert down(traffic)["model"][0] == 6


@pytest.mark.parametrize("settings", [(), ({},), ({"norm": 0.25},)])
def test_a_plan_is_as_long_as_its_packed_body_with_vectors_by_their_hash(settings):
    for number in (0, 7, 9, 10, 99, 100, 12345):
        traffic = Traffic()
        for slot in (Slot(0, 0, "update"), Slot(number, 1, "update"), Slot(number, 0, "sums", "evaluate")):
            before = down(traffic).get("plan", (0, 0))[1]
            own = plan(slot, params=np.ones(5, np.float32))._replace(settings=settings, key=Key.of(number))
            traffic.down(own, CLIENTS)
            small = {**plan_parts(own, "a")[0], "broadcast": {"params": "0" * 64}}
            assert down(traffic)["plan"][1] - before == 3 * len(pack(small))


def test_plans_with_a_clients_own_variant_or_mail_are_measured_one_by_one():
    mail = {"a": "x", "b": "x" * 1000}
    for own in (plan()._replace(variants=mail), plan()._replace(mail=mail)):
        traffic, bodies = Traffic(), [len(pack({**plan_parts(own, c)[0], "broadcast": {}})) for c in CLIENTS]
        traffic.down(own, CLIENTS)
        assert down(traffic)["plan"] == (3, sum(bodies))
        assert bodies[1] >= bodies[0] + 900


def test_nobody_is_sent_nothing():
    traffic = Traffic()
    traffic.down(plan(params=np.ones(5)), ())
    assert (traffic.as_json(), traffic.totals()) == ([], (0, 0))


def test_what_was_counted_and_who_holds_what_survives_a_checkpoint():
    traffic, model = Traffic(), np.ones(5, np.float32)
    traffic.down(plan(params=model), ("a", "b"))
    traffic.bodies.count("update", "up", 2, 20)
    again = Traffic()
    again.restore(traffic.kept())
    assert (again.as_json(), again.totals()) == (traffic.as_json(), traffic.totals())
    for one in (traffic, again):
        one.down(plan(Slot(1, 0, "update"), params=model.copy()), CLIENTS)
    assert again.as_json() == traffic.as_json()
    assert down(again)["model"][0] == 3


# -------------------------------------------------------------------------------------------------------------- up


FEDERATIONS = {
    "plain": support.linear(),
    "SCAFFOLD": support.linear(algorithm=SCAFFOLD(**LOCAL)),
    "TopK": support.linear(transforms=(TopK(fraction=0.4),)),
    "Quantize": support.linear(transforms=(Quantize(bits=4),)),
    "TopK, Quantize": support.linear(transforms=(TopK(fraction=0.4), Quantize(bits=8))),
    "rows": support.linear(aggregator=Median()),
    "prepared": support.linear(prepare=(Standardize(min_rows=1),)),
    "classes": support.linear(learner=support.LinearLearner(num_features=3, num_classes=2, metrics=("auc",))),
}


class Bodied(support.Lossy):
    """A runtime whose clients' bodies are packed one by one as the network does."""

    def __init__(self, federation, inner):
        super().__init__(inner, ())
        self.federation, self.packed = federation, []

    def start(self, plan, clients):
        for client in clients:
            memory = self.inner.memory.rows((client,))
            secret = [self.inner.worker._key.child("client", client, plan.slot.task, plan.slot.round, 0)]
            rows = self.inner.rows(plan, (client,))
            report, _, _ = self.federation.exchange(plan, (client,), rows, memory, {}, secret)
            self.packed.append(len(pack_report(report, self.federation.codec(plan.slot))))
        super().start(plan, clients)


@pytest.mark.parametrize("block_size", [1, 3, "auto"])
@pytest.mark.parametrize("name", [n for n in FEDERATIONS if n != "classes"])
def test_bytes_up_are_those_of_every_clients_packed_report(name, block_size):
    """Over several rounds, with a client that has nothing to learn from: whatever the blocks, folded or not."""
    federation = FEDERATIONS[name]
    people = support.regression((7, 1, 12, 0, 5, 3, 9, 2, 4, 6))
    state, context, _ = support.world(federation, people)
    context = context._replace(constants={"prepare.0": np.array([9.0] * 3 + [2, 2, 4] + [40, 20, 80])})
    site = InProcess(block_size=block_size).open(federation, people.load, Key.of("secrets"))
    runtime = Bodied(federation, site)
    for number in range(3):
        slot = Slot(number, 0, "")
        state, _ = server_round(federation.task("train"), state, runtime, people.ids, context, slot)
    assert site.traffic_totals()[0] == sum(runtime.packed)
    counts = {b["kind"]: b["count"] for b in site.traffic.as_json() if b["direction"] == "up"}
    assert counts == {"update": 27, "refusal": 3}


@pytest.mark.parametrize("task", ["evaluate", "prepare"])
def test_sums_are_measured_row_by_row_since_zeros_are_left_out(task):
    federation = FEDERATIONS["classes" if task == "evaluate" else "prepared"]
    slot = Slot(0, 0, "update", task)
    rows = np.zeros((2, 40))
    rows[0, :3], rows[1] = 1, 1
    block = support.block(rows, clients=["a", "b"])._replace(values=rows)
    each = [Report(slot, (c,), block.take([i])) for i, c in enumerate("ab")]
    sizes = [len(pack_report(one, federation.codec(slot))) for one in each]
    assert sizes[0] < sizes[1]
    found = ReportSizes(federation).bodies(plan(slot), Report(slot, ("a", "b"), block))
    kind = {"evaluate": "metrics", "prepare": "statistics"}[task]
    assert found.as_json() == [{"kind": kind, "direction": "up", "count": 2, "bytes": sum(sizes)}]


def test_rows_of_another_form_are_measured_anew():
    sizes, federation = ReportSizes(support.linear()), support.linear()

    def size(block):
        return sizes.bodies(plan(), Report(UPDATE, block.clients, block)).as_json()[0]["bytes"]

    for block in (support.block([[1.0] * 4]), support.block([[1.0] * 400]), support.block([[1.0] * 4], loss=[1.0])):
        assert size(block) == len(pack_report(Report(UPDATE, block.clients, block), federation.codec(UPDATE)))


def test_words_that_are_no_rows_are_measured_one_by_one():
    slot, federation = Slot(0, 0, "keys"), support.linear()
    report = Report(slot, ("a", "b"), {"a": "1", "b": "1" * 500}, {"c": "no"})
    found = {b["kind"]: b for b in ReportSizes(federation).bodies(plan(slot), report).as_json()}
    each = [len(pack_report(Report(slot, (c,), {c: report.payload[c]}), federation.codec(slot))) for c in "ab"]
    assert found["update"]["bytes"] == sum(each)
    assert found["refusal"]["bytes"] == len(pack_report(Report(slot, (), {}, {"c": "no"}), federation.codec(slot)))


@pytest.mark.parametrize("name", FEDERATIONS)
def test_the_bytes_of_a_run_do_not_depend_on_its_blocks(name):
    people = (support.classes if name == "classes" else support.regression)((7, 1, 12, 5, 3, 9, 2, 4, 6, 8))
    runs = [
        simulate(FEDERATIONS[name], people, num_rounds=3, cohort_size=6, holdout=0.2, runtime=InProcess(block_size=n))
        for n in (1, 4, "auto")
    ]
    assert runs[0].info["bodies"] == runs[1].info["bodies"] == runs[2].info["bodies"]
    totals = [(row.bytes_up, row.bytes_down) for row in runs[0].history]
    assert totals == [(row.bytes_up, row.bytes_down) for row in runs[1].history]
    assert sum(sum(pair) for pair in totals) <= sum(body["bytes"] for body in runs[0].info["bodies"])
