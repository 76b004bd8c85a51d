"""What is learned of how many to ask and how long to wait."""

import pytest

from hansa import pace


def test_over_selection_makes_up_for_the_share_that_is_missing():
    for share in (0.0, 0.1, 0.25, 0.4):
        assert pace.over_selection([share] * 7) == pytest.approx(1 / (1 - share))


def test_over_selection_is_1_3_before_the_first_round_and_never_above_2():
    assert pace.over_selection([]) == 1.3
    assert pace.over_selection([1.0]) == pace.over_selection([0.6]) == 2.0


def test_over_selection_follows_what_changes_and_forgets_what_was():
    factors = [pace.over_selection([0.0] * 10 + [0.5] * rounds) for rounds in (0, 1, 3, 10, 30)]
    assert factors == sorted(factors)
    assert factors[0] == 1.0
    assert factors[1] == pytest.approx(1 / 0.9)  # the newest round counts a fifth
    assert factors[-1] == pytest.approx(2.0, abs=0.01)


def test_a_deadline_is_twice_what_nine_tenths_of_the_cohort_are_expected_to_need():
    cohort = [[float(10 * i)] for i in range(1, 22)]  # 10 s to 210 s
    assert pace.deadline_s(cohort, []) == 2 * 190.0


def test_one_wild_time_of_a_client_and_one_wild_client_in_twelve_do_not_move_a_deadline():
    steady = [[100.0] * 5] * 12
    assert pace.deadline_s([[100.0, 1e9, 100.0], *steady], []) == 200.0
    assert pace.deadline_s([[1e9], *steady], []) == 200.0


def test_in_a_cohort_of_up_to_ten_the_slowest_is_waited_for():
    assert pace.deadline_s([[50.0]] * 9 + [[700.0]], []) == 1400.0


def test_a_deadline_has_a_floor_and_a_generous_beginning():
    assert pace.deadline_s([[0.1]], []) == 30.0
    assert pace.deadline_s([[]], []) == pace.deadline_s([], []) == 3600.0


def test_where_few_of_a_cohort_are_known_the_latest_times_of_anybody_stand_for_it():
    assert pace.deadline_s([[1000.0], [], []], [40.0] * 20) == 80.0
    assert pace.deadline_s([[1000.0], [900.0], []], [40.0] * 20) == 2000.0


def test_each_new_attempt_waits_longer_up_to_four_times():
    assert [pace.deadline_s([[50.0]], [], attempt) for attempt in range(5)] == [100, 200, 400, 400, 400]
