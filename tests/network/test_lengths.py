"""Rows longer than their plan allows are refused, whatever the client's software did."""

from dataclasses import dataclass

import numpy as np
import pytest

from hansa.aggregators.mean import Mean
from hansa.core.chain import Transform
from hansa.core.protocols import Updates
from hansa.long_vectors import Later
from hansa.network.lengths import TOO_LONG, Lengths
from hansa.transforms.adaptive_clip import AdaptiveClip
from hansa.transforms.clip import Clip
from hansa.transforms.noise import GaussianNoise
from support_desk import SLOT, Desk

ROW = np.array([[0.6, 0.0, 0.8, 0.0]], np.float32)  # of length 1
NOISY = (Clip(norm=1.0), GaussianNoise(noise_multiplier=1.0))


@pytest.fixture
def make_desk(tmp_path, tools):
    made = []

    def make(transforms):
        federation = tools.federation(transforms=transforms, aggregator=Mean(weighting="clients", denominator=2.0))
        desk = Desk(tmp_path / str(len(made)), federation, tools.app)
        made.append(desk)
        for name in desk.cohort:
            desk.enrol(name)
            desk.hello(name)
        desk.open_slot()
        return desk

    yield make
    for desk in made:
        desk.coordinator.close()


def sent(desk, values, name="berlin", **tail):
    receipt = desk.coordinator.report(name, SLOT, desk.body(values, 1.0, **tail))
    return receipt.status, receipt.reason


def test_a_row_of_the_norm_counts_and_a_longer_one_is_refused(make_desk):
    desk = make_desk(NOISY)
    assert sent(desk, ROW) == ("accepted", "")
    assert sent(desk, ROW * np.float32(1.001), "paris") == ("refused", TOO_LONG)


def test_a_chain_without_a_bound_lets_any_length_pass(make_desk):
    assert sent(make_desk(()), ROW * np.float32(1e6)) == ("accepted", "")


def test_the_indicator_of_adaptive_clipping_counts_to_the_length(make_desk):
    desk = make_desk((AdaptiveClip(start=1.0), GaussianNoise(noise_multiplier=1.0)))
    assert sent(desk, ROW, **{"clip.below": 0.1}) == ("accepted", "")
    assert sent(desk, ROW, "paris", **{"clip.below": 1.0}) == ("refused", TOO_LONG)


def test_rows_are_decoded_before_they_are_measured(make_desk):
    @dataclass(frozen=True, kw_only=True)
    class Halved(Transform):
        def norm_bound(self, incoming, settings):
            return incoming

        def decode(self, values, settings, shared):
            return values * 2

    desk = make_desk((Clip(norm=1.0), Halved()))
    assert sent(desk, ROW / np.float32(2)) == ("accepted", "")
    assert sent(desk, ROW, "paris") == ("refused", TOO_LONG)


def test_what_clients_were_told_is_read_again_after_a_restart(make_desk, tmp_path):
    desk = make_desk(NOISY)
    again = Lengths(desk.coordinator.rounds, desk.federation)
    for factor, says in ((1.0, ""), (1.001, TOO_LONG)):
        assert again.fault(SLOT, Updates(("berlin",), ROW * np.float32(factor), np.ones(1))) == says


def test_a_row_whose_columns_come_later_is_measured_as_any_other(make_desk):
    desk = make_desk(NOISY)
    for factor, says in ((1.0, ""), (1.001, TOO_LONG)):
        row = ROW * np.float32(factor)
        later = Later(row.shape, lambda start, stop, row=row: row[:, start:stop])
        assert desk.coordinator.lengths.fault(SLOT, Updates(("berlin",), later, np.ones(1))) == says
