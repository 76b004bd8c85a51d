"""Cases of a state folder that another version of hansa made.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import hashlib
import multiprocessing
import signal

import numpy as np
import pytest

from faults import checkers
from faults.sites import APP, make_federation
from faults.upgrade import contents, older, open_and_die
from hansa.commands.status import run_status
from hansa.core.errors import InputError
from hansa.core.key import Key
from hansa.core.protocols import Report, Slot, Updates
from hansa.core.round import Context, ServerState, begin, server_round
from hansa.network import audit
from hansa.network.coordinator import Coordinator
from hansa.network.journal import lines
from hansa.network.registry import invite
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store
from hansa.training.checkpoint import Checkpoint
from hansa.wire import pack_report, unpack


def go_on(folder):
    """End round 1 of the older version's run, in which berlin had reported and paris had not."""
    coordinator = Coordinator(Store(folder), make_federation(), APP)
    runtime, slot = NetworkRuntime(coordinator), Slot(1, 0, "update")
    assert coordinator.run == "2d91e004cbf20409"
    assert coordinator.work("berlin").plan is None
    assert coordinator.rounds.receipt(slot, "berlin").status == "accepted"
    updates = Updates(("x",), np.full((1, 4), 0.5, np.float32), np.array([4.0]), {"train_loss": np.array([0.5])})
    body = pack_report(Report(slot, ("x",), updates), coordinator.federation.codec(slot))
    assert coordinator.report("paris", slot, body).status == "accepted"
    parts, context = coordinator.federation.task("train"), Context(Key.of(1))
    state = begin(parts, unpack(coordinator.models.get(coordinator.released.vectors["params"])))
    state, mean = server_round(parts, state, runtime, ("berlin", "paris"), context, Slot(1, 0, ""))
    assert mean.clients == ("berlin", "paris")
    np.testing.assert_allclose(state.algorithm["params"], [0.4, 0.55, 0.7, 0.85], atol=1e-6)
    coordinator.finish()
    found = audit.check(lines(coordinator.store), coordinator.authority.certificate, live=True)
    assert (found.problems, found.num_reports) == ((), 2)
    coordinator.close()
    checkers.is_sound(folder / "coordinator.db")
    assert {(round, client) for _, _, round, _, client in checkers.counted_once(folder / "coordinator.db")} >= {
        (1, "berlin"),
        (1, "paris"),
    }
    checkers.no_temporary_files(folder)


def test_case_38_a_run_that_an_older_version_began_goes_on_in_the_middle_of_its_round(tmp_path):
    go_on(older(tmp_path / "old"))


@pytest.mark.parametrize("after", [0, 7, 15])
def test_case_38_killed_in_the_middle_of_its_migration_a_folder_is_the_older_versions(tmp_path, after):
    folder = older(tmp_path / "old")
    before = contents(folder)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=open_and_die, args=(folder, after))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert contents(folder) == before
    go_on(folder)


def test_case_38_an_older_version_refuses_a_newer_folder_and_leaves_it_as_it_is(tmp_path):
    store = Store(tmp_path)
    store.put("schema", b"99")  # to the newer one, this version is the older
    store.close()
    before = hashlib.sha256((tmp_path / "coordinator.db").read_bytes()).hexdigest()
    for look in (Store, Store.existing, lambda folder: run_status(folder, True), lambda folder: invite(folder, "x")):
        with pytest.raises(InputError, match=r"schema \d+ or older, found 99, of a newer hansa; install the version"):
            look(tmp_path)
    assert hashlib.sha256((tmp_path / "coordinator.db").read_bytes()).hexdigest() == before


def test_case_38_a_checkpoint_of_an_older_version_is_read(tmp_path):
    state = ServerState({"params": np.arange(3, dtype=np.float32)}, (None,))
    Checkpoint(state=state, totals=(), next_round=5, history=()).write(tmp_path / "checkpoint")
    (tmp_path / "checkpoint").write_bytes((tmp_path / "checkpoint").read_bytes()[40:])  # without mark and hash
    found = Checkpoint.read(tmp_path / "checkpoint")
    assert (found.next_round, found.state.algorithm["params"].tolist()) == (5, [0.0, 1.0, 2.0])
