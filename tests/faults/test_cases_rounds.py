"""Cases of rounds that too few answer, and of a coordinator that is not the only one.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers.
"""

import contextlib
import sqlite3

import numpy as np
import pytest

from faults.lines import compose, in_step, once, sign
from faults.proxy import FaultProxy, Faults
from faults.sites import Rounds, move, rows, state_of, watched_site
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import Abandoned
from hansa.core.protocols import Slot
from hansa.core.round import server_round
from hansa.federation import Federation
from hansa.learners.linear import LinearLearner
from hansa.network.runtime import NetworkRuntime
from hansa.network.store import Store, Superseded
from support_quay import SLOT, Quay, federation_of, wait_until

pytestmark = pytest.mark.network


def client_rows(site, name, query):
    """What a client's own file says."""
    with contextlib.closing(sqlite3.connect(site.folder / name / "client.db", timeout=30)) as db:
        return db.execute(query).fetchall()


def test_case_29_below_the_minimum_nothing_is_released_or_remembered_and_the_next_attempt_counts_all(tmp_path):
    algorithm = SCAFFOLD(client_learning_rate=0.1, local_steps=3, batch_size=4)
    federation = Federation(learner=LinearLearner(num_features=3, num_classes=2), algorithm=algorithm)
    names, clock = ("a", "b", "c"), [0.0]

    def pass_time(slot, waiting, accepted):
        if slot.attempt == 0 and accepted == 2:
            assert waiting == ["c"]
            clock[0] += 100.0

    with watched_site(tmp_path, federation) as site, FaultProxy(site.server.port) as proxy:
        move(site, "c", proxy)
        for number, name in enumerate(names):
            site.join(name, rows(number))
        options = {"deadline_s": 60.0, "min_clients": 3, "on_wait": pass_time, "monotonic": lambda: clock[0]}
        runtime = NetworkRuntime(site.coordinator, **options)
        runtime.wait_for_clients(3, timeout_s=30)
        rounds = Rounds(federation, runtime, names)
        proxy.set(Faults(silent=("up", "down")))
        with pytest.raises(Abandoned, match="expected reports of at least 3 clients"):
            rounds.run(0)
        assert site.coordinator.released is None
        assert not rounds.state.algorithm["params"].any()
        assert list(site.coordinator.updates.folder.iterdir()) == []
        told = "SELECT attempt FROM answers WHERE counted = 0"
        wait_until(lambda: all(client_rows(site, name, told) == [(0,)] for name in "ab"))
        for name in "ab":
            assert client_rows(site, name, "SELECT * FROM memory") == []
            assert client_rows(site, name, "SELECT secret, pending FROM attempts") == []
        proxy.set(Faults())
        again = Slot(0, 1, "")
        state, mean = server_round(rounds.parts, rounds.state, runtime, names, rounds.context, again)
        assert mean.clients == names
        replayed, _ = server_round(rounds.parts, rounds.state, runtime, names, rounds.context, again)
        assert replayed.algorithm["params"].tobytes() == state.algorithm["params"].tobytes()
        assert np.isfinite(state.algorithm["params"]).all()
        runtime.release(0, state.algorithm["params"], {})
        assert site.coordinator.released.round == 0
        wait_until(lambda: all(len(client_rows(site, name, "SELECT * FROM memory")) == 1 for name in names))


def test_case_32_who_was_superseded_writes_nothing_and_sends_its_clients_to_the_other(tmp_path):
    with watched_site(tmp_path, federation_of(8)) as site, contextlib.closing(Quay(site, 8)) as quay:
        parcel, signer = quay.parcel(), in_step(site, quay.identities["berlin"])
        (site.folder / "server" / "coordinator.lock").unlink()  # as on a disk that holds no locks
        other = Store(site.folder / "server")
        other.lock()
        before, _ = state_of(site)
        for method, target, body in (("PUT", quay.path(parcel.sha256), parcel.body), ("POST", "/v1/goodbye", b"")):
            answer = once(site, compose(method, target, body, sign(signer, method, target, body)))
            assert (answer.status, answer.json["code"], answer.headers["retry-after"]) == (503, "superseded", "1")
        for write in (lambda: list(quay.runtime.reports(SLOT)), site.coordinator.finish, lambda: site.invite("rome")):
            with pytest.raises(Superseded, match=r"\(epoch 1\), found that another one has taken over \(epoch 2\)"):
                write()
        assert state_of(site)[0] == before
        other.close()
        site.restart()
        assert quay.send(parcel).status == "accepted"
