"""How much memory a body of 200 MB takes on its way, in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow]
NUM_PARAMS = 50_000_000

COMMON = """
import gc, sys, re
from pathlib import Path
import numpy as np
from hansa.core.protocols import Report, Slot, Updates
SLOT, NUM = Slot(0, 0, "update"), {num}

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def start():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    return resident("VmRSS")
"""
SERVER = """
from hansa.algorithms.fedavg import FedAvg
from hansa.core.key import Key
from hansa.core.round import Context, begin, make_plan
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network.coordinator import Coordinator
from hansa.network.enrolment import enrol
from hansa.network.http import serve_in_thread
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.wire import lay_out

folder = Path(sys.argv[1])
learner = LinearLearner(num_features=3, num_classes=2)
federation = Federation(learner=learner, algorithm=FedAvg(client_learning_rate=0.1))
coordinator = Coordinator(Store(folder / "server"), federation, "ab" * 32)
server = serve_in_thread(coordinator, "127.0.0.1:0")
authority = coordinator.authority.fingerprint
enrol(coordinator.registry.invite("berlin", url=server.url, authority=authority), folder / "berlin")
parts = federation.task("train")
plan = make_plan(parts, begin(parts, np.zeros(4, np.float32)), Context(Key.of(1)), ("berlin",), SLOT)
NetworkRuntime(coordinator).start(plan, ("berlin",))
coordinator.sizes.num_params = NUM  # from here on a report is of that length
sha256 = coordinator.models.put(lay_out(np.arange(NUM, dtype=np.float32)))
before = start()
print(coordinator.run, sha256, flush=True)
sys.stdin.readline()
size = coordinator.rounds.frozen(SLOT)[0].size
print(resident("VmHWM") - before, size, flush=True)
server.close()
coordinator.close()
"""
CLIENT = """
from hansa.network.client import Connection
from hansa.network.client_store import ClientStore
from hansa.network.enrolment import Identity
from hansa.network.messages import Released
from hansa.network.released import keep_model
from hansa.wire import report_tree, unpack
from hansa.core.chain import Raw
from hansa.core.layout import Layout

folder, run, sha256 = Path(sys.argv[1]) / "berlin", *sys.argv[2:]
store = ClientStore(folder)
connection = Connection(Identity.of(folder), store)
connection.hello(("ab" * 32,))  # and so the key that signs receipts is known
values = np.ones((1, NUM), np.float32)
before = start()
parcel = store.pack(report_tree(Report(SLOT, ("b",), Updates(("b",), values, np.ones(1), {{}})), Raw()))
packing = resident("VmHWM") - before
del values
before = start()
status = connection.put_report(run, SLOT, parcel).status
sending = resident("VmHWM") - before
before = start()
body = connection.get_blob(sha256)
fetching = resident("VmHWM") - before
vector = unpack(body)
ends = vector[[0, -1]].tolist()
shapes, types, roles = ((NUM // 2, 1), (NUM // 2,)), ("float32",) * 2, ("parameter",) * 2
layout = Layout(names=("a", "b"), shapes=shapes, dtypes=types, roles=roles)
before = start()
keep_model(folder, Released(run=run, round=0, vectors={{}}), layout, {{"params": vector}}, None)
keeping = resident("VmHWM") - before
print(status, packing, sending, fetching, keeping, parcel.size, *ends, flush=True)
connection.close()
store.close()
"""


def process(code, *words):
    text = COMMON.format(num=NUM_PARAMS) + code.replace("{{", "{").replace("}}", "}")
    command = [sys.executable, "-c", text, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak of memory")
def test_a_body_of_200_mb_takes_little_memory_on_either_side(tmp_path):
    server = process(SERVER, tmp_path)
    run, sha256 = server.stdout.readline().split()
    client = process(CLIENT, tmp_path, run, sha256)
    status, *numbers = client.communicate(timeout=300)[0].split()
    peak, size = map(int, server.communicate("\n", timeout=60)[0].split())
    packing, sending, fetching, keeping, sent, first, last = (int(float(number)) for number in numbers)
    told = {"server": peak, "packing": packing, "sending": sending, "fetching": fetching, "keeping": keeping}
    print(json.dumps(told))
    assert status == "accepted"
    assert size == sent > 4 * NUM_PARAMS
    assert (first, last) == (0, NUM_PARAMS)  # in float32
    for growth in told.values():
        assert growth < 2**25
