import numpy as np
import pytest

import support
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import InputError
from hansa.core.protocols import Slot
from hansa.core.round import server_round
from hansa.data.dataset import Dataset
from hansa.data.population import Population
from hansa.local_training import SGD, Adam
from hansa.training.simulate import simulate

TWO = support.targets(a=(1, 0, 2), b=(3, 4, 0))


def rounds(federation, population, cohorts):
    state, context, site = support.world(federation, population)
    for number, cohort in enumerate(cohorts):
        slot = Slot(number, 0, "")
        state, _ = server_round(federation.task("train"), state, site, cohort, context, slot)
    return state.algorithm, {client: rows["a.control"] for client, rows in site.memory.kept().items()}


def test_the_control_variates_of_two_clients_by_hand():
    """Curvature 1, one step of rate 0.5: gradient w - target, so the first controls are -target at w = 0.

    Round 0: w_a = (.5, 0, 1), w_b = (1.5, 2, 0); c_i+ = 0 - 0 + (0 - w_i) / (1 * 0.5).
    w = mean = (1, 1, .5), c = mean = (-2, -2, -1).
    """
    federation = support.quadratic(SCAFFOLD(client_learning_rate=0.5, local_steps=1))
    state, own = rounds(federation, TWO, [("a", "b")])
    assert state["params"].tolist() == [1, 1, 0.5]
    assert own["a"].tolist() == [-1, 0, -2]
    assert own["b"].tolist() == [-3, -4, 0]
    assert state["control"].tolist() == [-2, -2, -1]


def test_a_second_round_with_one_of_two_clients_by_hand():
    """Client a from w = (1, 1, .5): gradient (0, 1, -1.5) + c - c_a = (-1, -2, 1) gives (-1, -1, -.5), rate 0.5.

    w_a = (1.5, 1.5, .75); c_a+ = c_a - c + (w - w_a) / 0.5 = (0, 1, -1.5); c moves by 1/2 of c_a+ - c_a = (1, 1, .5).
    """
    federation = support.quadratic(SCAFFOLD(client_learning_rate=0.5, local_steps=1))
    state, own = rounds(federation, TWO, [("a", "b"), ("a",)])
    assert state["params"].tolist() == [1.5, 1.5, 0.75]
    assert own["a"].tolist() == [0, 1, -1.5]
    assert own["b"].tolist() == [-3, -4, 0]
    assert state["control"].tolist() == [-1.5, -1.5, -0.75]


def test_several_local_steps_divide_by_their_number():
    federation = support.quadratic(SCAFFOLD(client_learning_rate=0.5, local_steps=2))
    _, own = rounds(federation, TWO, [("a", "b")])
    # w_a = 3/4 target: the control is the mean gradient met on the way, -(1 + 1/2) / 2 target
    assert own["a"].tolist() == [-0.75, 0, -1.5]


def test_it_reaches_the_optimum_where_fedavg_drifts():
    """Clients of unlike curvature: with many local steps FedAvg settles near the mean of the targets instead."""
    rows = {"flat": Dataset([[4.0, 0, 0]], [0], [0.2]), "steep": Dataset([[0.0, 4, 8]], [0], [2.0])}
    optimum = (0.2 * rows["flat"].x[0] + 2.0 * rows["steep"].x[0]) / 2.2
    same = {"client_learning_rate": 0.2, "local_steps": 10}
    scaffold, fedavg = (
        simulate(support.quadratic(kind(**same)), Population(rows), num_rounds=60).parameters
        for kind in (SCAFFOLD, FedAvg)
    )
    assert np.abs(scaffold - optimum).max() < 1e-3
    assert np.abs(fedavg - optimum).max() > 0.5


def test_update_and_control_travel_as_one_vector():
    assert support.quadratic(SCAFFOLD(client_learning_rate=0.5)).update_size() == 6


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), SGD(weight_decay=0.1), Adam()])
def test_it_refuses_local_training_for_which_its_formula_does_not_hold(optimizer):
    with pytest.raises(InputError, match=r"SCAFFOLD\(client_optimizer=\): expected plain SGD"):
        SCAFFOLD(client_learning_rate=0.1, client_optimizer=optimizer)
