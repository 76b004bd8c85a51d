"""Cases of secure aggregation: drop-outs and lies in each exchange over a bad line, and sums that could overflow.

Numbers are those of the table of forty fault and abuse cases; each case ends with the global checkers. Every client of
up to six lost at every step is ``tests/secagg/test_protocol.py``, every lie that a server may tell is there, too.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import hansa
from faults.proxy import FaultProxy, Faults
from faults.sites import Rounds, make_federation, move, rows, watched_site
from hansa.core.chain import Limits, Transform
from hansa.core.errors import Abandoned, CheckError
from hansa.core.protocols import Slot
from hansa.core.round import server_round
from hansa.network.messages import read_plan
from hansa.network.runtime import NetworkRuntime
from hansa.training.check import problems, refuse_unfit
from hansa.training.schedule import Schedule
from hansa.wire import pack, unpack
from network.conftest import OneByOne

pytestmark = pytest.mark.network

NAMES = ("a", "b", "c", "d")
CLIP = (hansa.Clip(norm=1.0),)


def federation_of(**options):
    return make_federation(transforms=CLIP, aggregator=hansa.SecureMean(**options))


def mean_of(names):
    """The parameters after a round of plain means over some clients."""
    plain = make_federation(transforms=CLIP, aggregator=hansa.Mean(weighting="clients"))
    return Rounds(plain, OneByOne(plain, {name: rows(i) for i, name in enumerate(NAMES)}), names).run(0)


def seen(site, look, said=None):
    """Let ``look(name, work)`` see what a client is told before it does, or change it; ``said`` hears of problems."""
    real = site.participant

    def participant(name, data):
        one = real(name, data)
        handle = one.handle
        one.on_problem = None if said is None else lambda error: said.append((name, str(error)))
        one.handle = lambda work, fetch: handle(look(name, work) or work, fetch)
        return one

    site.participant = participant


def joined(site, **options):
    """Everyone in a thread of its own, and the runtime."""
    for number, name in enumerate(NAMES):
        site.join(name, rows(number))
    runtime = NetworkRuntime(site.coordinator, **options)
    runtime.wait_for_clients(len(NAMES), timeout_s=30)
    return runtime


def test_case_30_a_line_that_is_cut_in_every_exchange_loses_nobody(fast):
    """Whenever a client is about to say its word its line is cut; the word comes once, over the next line."""
    federation, cuts = federation_of(), []
    with watched_site(fast, federation) as site, FaultProxy(site.server.port) as proxy:
        move(site, "c", proxy)

        def cut(name, work):
            if name == "c" and work.plan is not None:
                cuts.append(read_plan(work.plan).slot.exchange)
                proxy.cut()

        seen(site, cut)
        rounds = Rounds(federation, joined(site), NAMES)
        np.testing.assert_allclose(rounds.run(0), mean_of(NAMES), atol=2.0**-15)
        assert rounds.mean.clients == NAMES
        assert tuple(cuts) == federation.aggregator.exchanges
        rounds.runtime.release(0, rounds.state.algorithm["params"], {})


@pytest.mark.parametrize("exchange", ["masked", *(pytest.param(e, marks=pytest.mark.slow) for e in ("keys", "unmask"))])
def test_case_30_a_client_whose_line_is_dead_from_an_exchange_on_is_left_out_and_comes_back(fast, exchange):
    federation, clock = federation_of(), [0.0]
    with watched_site(fast, federation) as site, FaultProxy(site.server.port) as proxy:
        move(site, "c", proxy)

        def die(slot, waiting, accepted):
            if slot.round == 0 and waiting == ["c"] and slot.exchange == exchange:
                clock[0] += 100.0

        options = {"deadline_s": 60.0, "min_clients": 3, "on_wait": die, "monotonic": lambda: clock[0]}
        seen(site, lambda name, work: silence(work, proxy, exchange) if name == "c" else None)
        runtime = joined(site, **options)
        rounds = Rounds(federation, runtime, NAMES)
        survivors = NAMES if exchange == "unmask" else ("a", "b", "d")
        np.testing.assert_allclose(rounds.run(0), mean_of(survivors), atol=2.0**-15)
        assert rounds.mean.clients == survivors
        runtime.release(0, rounds.state.algorithm["params"], {})
        proxy.set(Faults())
        rounds.run(1)
        assert rounds.mean.clients == NAMES
        assert np.isfinite(rounds.state.algorithm["params"]).all()


def silence(work, proxy, exchange):
    """The line dies when a client is asked in an exchange of the first round: it works, and nobody hears of it."""
    if work.plan is not None and read_plan(work.plan).slot[:3] == (0, 0, exchange):
        proxy.set(Faults(silent=("up", "down")))


def test_case_30_who_is_lied_to_says_nothing_more_and_the_next_attempt_counts_all(fast):
    """The server swaps a peer's key in everyone's mail: nothing is released; told the truth they go on."""
    federation, said = federation_of(), []
    with watched_site(fast, federation) as site:
        seen(site, lambda name, work: with_a_lie(work), said)
        runtime = joined(site)
        rounds = Rounds(federation, runtime, NAMES)
        with pytest.raises(Abandoned):
            rounds.run(0)
        assert site.coordinator.released is None
        assert not rounds.state.algorithm["params"].any()
        assert {name for name, _ in said} == set(NAMES)
        assert all("found others" in reason for _, reason in said)
        assert all("found others" not in entry["reason"] for entry in runtime.refusals())
        state, mean = server_round(rounds.parts, rounds.state, runtime, NAMES, rounds.context, Slot(0, 1, ""))
        assert mean.clients == NAMES
        np.testing.assert_allclose(state.algorithm["params"], mean_of(NAMES), atol=0.05)
        runtime.release(0, state.algorithm["params"], {})


def with_a_lie(work):
    """Work whose list of keys is not what the peers sent, in the first attempt."""
    if work.plan is None or read_plan(work.plan).slot[:3] != (0, 0, "shares"):
        return work
    tree = unpack(bytes(work.plan))
    tree["mail"]["peers"][0]["share_key"] = bytes([7]) * 32
    return replace(work, plan=pack(tree))


@dataclass(frozen=True, kw_only=True)
class Finer(Transform):
    """A quantiser whose grid is so fine that the sum of a few rows has no room in a word."""

    def limits(self, found, settings):
        return Limits(1.0, 1.0, 2.0**-31)


def test_case_31_a_sum_that_could_overflow_is_refused_before_the_run_and_by_each_client_in_it(fast):
    wide = federation_of(bits=24)
    found = [str(problem) for problem in problems(wide, Schedule(num_rounds=1, cohort_size=300))]
    assert any("secure sums of 300 clients with 24 bits each need words of 33 bits" in problem for problem in found)
    federation, said = make_federation(transforms=(*CLIP, Finer()), aggregator=hansa.SecureMean()), []
    with pytest.raises(CheckError, match="need words of 35 bits"):
        refuse_unfit(federation, Schedule(num_rounds=1, cohort_size=len(NAMES)))
    with watched_site(fast, federation) as site:
        seen(site, lambda name, work: None, said)
        with pytest.raises(Abandoned):
            Rounds(federation, joined(site), NAMES).run(0)
        assert {name for name, reason in said if "need words of 35 bits" in reason} == set(NAMES)
        sent = [(site.folder / name / "sent.csv").read_text() for name in NAMES]
        assert not any(",update," in lines for lines in sent)
