"""Every second is counted once, for the innermost stage."""

import contextvars
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.stopwatch import Stopwatch, add_worker, is_watched, one_round, stage, switch, watching

NAMES = ("plan", "rows", "client", "training")
TREES = st.recursive(
    st.integers(1, 9), lambda inner: st.tuples(st.sampled_from(NAMES), st.lists(inner, max_size=4)), max_leaves=20
)


class Clock:
    """A clock moved by hand."""

    def __init__(self):
        self.s = 0.0

    def __call__(self):
        return self.s


def spend(watch, clock, tree):
    """Let a number pass as time, and a pair as a stage with what is in it; each stage's own time."""
    if isinstance(tree, int):
        clock.s += tree
        return {}
    name, inner = tree
    own = {name: float(sum(part for part in inner if isinstance(part, int)))}
    with watch.stage(name):
        for part in inner:
            for other, count in spend(watch, clock, part).items():
                own[other] = own.get(other, 0.0) + count
    return own


@given(st.lists(TREES, max_size=5))
def test_nested_stages_add_up_to_all_the_time_that_passed_within_the_outermost(trees):
    clock = Clock()
    watch = Stopwatch(clock)
    own = spend(watch, clock, ("rest", trees))
    assert watch.seconds == own
    assert sum(watch.seconds.values()) == clock.s


def test_time_outside_of_all_stages_is_not_counted():
    clock = Clock()
    watch = Stopwatch(clock)
    for _ in range(2):
        clock.s += 5
        with watch.stage("rows"):
            clock.s += 1
    assert watch.seconds == {"rows": 2.0}


def test_an_error_closes_its_stages():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.stage("plan"):
        with pytest.raises(ZeroDivisionError), watch.stage("rows"):
            raise ZeroDivisionError
        clock.s += 2
    assert watch.seconds == {"plan": 2.0, "rows": 0.0}


def test_a_switch_renames_the_innermost_stage_from_then_on():
    clock = Clock()
    watch = Stopwatch(clock)
    watch.switch("combining")  # outside of all: nothing
    with watch.stage("rest"):
        with watch.stage("plan"):
            clock.s += 1
            watch.switch("combining")
            clock.s += 2
        clock.s += 4
    assert watch.seconds == {"rest": 4.0, "plan": 1.0, "combining": 2.0}


def test_without_a_stopwatch_nothing_is_counted_and_nothing_made():
    assert not is_watched()
    assert stage("rows") is stage("plan")
    with one_round(), stage("rows"):
        switch("plan")
        add_worker(0, {"rows": 1.0})
    with watching(on=False) as watch, one_round(), stage("rows"):
        assert not is_watched()
    assert (watch.rounds, watch.seconds) == ([], {})


def test_a_round_holds_its_own_seconds_and_its_workers():
    with watching() as watch:
        with stage("rows"):  # before the first round
            pass
        for number in range(2):
            with one_round(), stage("plan"):
                add_worker(number, {"training": 1.0})
                add_worker(number, {"training": 2.0, "rows": 1.0})
    assert [set(a_round.seconds) for a_round in watch.rounds] == [{"rest", "plan"}] * 2
    assert [a_round.workers for a_round in watch.rounds] == [
        {0: {"training": 3.0, "rows": 1.0}},
        {1: {"training": 3.0, "rows": 1.0}},
    ]
    assert not is_watched()


def test_a_round_that_raises_is_not_filed():
    with watching() as watch:
        with pytest.raises(ZeroDivisionError), one_round(), stage("rows"):
            raise ZeroDivisionError
        with one_round():
            pass
    assert [set(a_round.seconds) for a_round in watch.rounds] == [{"rest"}]


def test_what_is_not_to_be_looked_into_stays_one_stage():
    with watching() as watch:
        with stage("evaluation"), watching(on=False), stage("rows"):
            pass
        assert is_watched()
    assert set(watch.seconds) == {"evaluation"}


def test_another_thread_counts_for_nobody():
    seen = []
    with watching() as watch, stage("plan"):
        thread = threading.Thread(
            target=contextvars.Context().run, args=(lambda: seen.append((is_watched(), stage("rows").__enter__())),)
        )
        thread.start()
        thread.join()
    assert seen == [(False, None)]
    assert set(watch.seconds) == {"plan"}
