import pytest

from hansa.core.errors import InputError
from hansa.data.sampling import All, Poisson
from hansa.training.buffered import Buffered
from hansa.training.schedule import Schedule


@pytest.mark.parametrize(
    "options",
    [
        {"num_rounds": 0},
        {"num_rounds": 2.0},
        {"num_rounds": True},
        {"num_rounds": "five"},
        {"num_rounds": None},
        {"num_rounds": 1, "cohort_size": 0},
        {"num_rounds": 1, "min_clients": -1},
        {"num_rounds": 1, "evaluate_every": 0},
        {"num_rounds": 1, "evaluate_every": None},
        {"num_rounds": 1, "deadline_s": 0},
        {"num_rounds": 1, "deadline_s": "soon"},
        {"num_rounds": 1, "deadline_s": True},
        {"num_rounds": 1, "every_s": "auto"},
        {"num_rounds": 1, "every_s": -1.0},
        {"num_rounds": 1, "sampler": "uniform"},
        {"num_rounds": 1, "over_selection": 0.9},
        {"num_rounds": 1, "over_selection": True},
        {"num_rounds": 1, "over_selection": "30 %"},
        {"num_rounds": 1, "buffer": 10},
    ],
    ids=repr,
)
def test_an_option_that_cannot_be_is_refused_by_name(options):
    with pytest.raises(InputError, match=rf"Schedule\({list(options)[-1]}=\): expected"):
        Schedule(**options)


def test_more_clients_needed_than_asked_is_refused():
    with pytest.raises(InputError, match=r"expected min_clients up to cohort_size \(3\), found 4"):
        Schedule(num_rounds=1, cohort_size=3, min_clients=4)


@pytest.mark.parametrize(
    ("options", "needed"), [({}, 1), ({"cohort_size": 5}, 5), ({"cohort_size": 5, "min_clients": 2}, 2)]
)
def test_a_deployment_begins_with_the_fewest_it_may_close_with(options, needed):
    assert Schedule(num_rounds=1, **options).clients_needed == needed


def test_any_value_with_a_cohort_is_a_sampler():
    assert Schedule(num_rounds=1, sampler=All()).sampler == All()
    assert Schedule(num_rounds=1, sampler=Poisson()) != Schedule(num_rounds=1)


def test_over_selection_rounds_up_to_whole_clients_and_not_beyond_the_population():
    schedule = Schedule(num_rounds=1, cohort_size=10, over_selection=1.3)
    assert (schedule.num_asked(1000), schedule.num_counted(1000)) == (13, 10)
    assert (schedule.num_asked(11), schedule.num_counted(11)) == (11, 10)
    assert (schedule.num_asked(5), schedule.num_counted(5)) == (5, 5)
    assert Schedule(num_rounds=1, cohort_size=100, over_selection=1.1).num_asked(1000) == 110  # not 111: 100 * 1.1
    assert Schedule(num_rounds=1, over_selection=1.3).num_asked(50) == 50


def test_a_buffer_counts_its_size_and_asks_for_the_cohort_size_at_work():
    schedule = Schedule(num_rounds=1, cohort_size=100, buffer=Buffered(size=10))
    assert (schedule.num_asked(1000), schedule.num_counted(1000)) == (100, 10)


def test_what_is_learned_stands_for_auto():
    schedule = Schedule(num_rounds=1, cohort_size=10, over_selection="auto", deadline_s="auto")
    assert (schedule.num_asked(100, 1.25), schedule.num_counted(100)) == (13, 10)
    assert schedule.selects_more
    assert not Schedule(num_rounds=1, cohort_size=10).selects_more


@pytest.mark.parametrize(
    ("options", "needed"), [({}, 4), ({"cohort_size": 6}, 6), ({"cohort_size": 6, "min_clients": 2}, 4)]
)
def test_a_deployment_does_not_begin_with_fewer_clients_than_a_buffer_holds(options, needed):
    assert Schedule(num_rounds=1, buffer=Buffered(size=4), **options).clients_needed == needed


@pytest.mark.parametrize(
    "other", [{"over_selection": 1.3}, {"over_selection": "auto"}, {"deadline_s": 60.0}, {"deadline_s": "auto"}]
)
def test_a_buffer_beside_what_waits_for_others_is_refused(other):
    with pytest.raises(InputError, match=rf"expected buffer or {next(iter(other))}, found both"):
        Schedule(num_rounds=1, buffer=Buffered(size=3), **other)
