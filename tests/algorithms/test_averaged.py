import numpy as np
import pytest

import support
from hansa.algorithms.averaged import Averaged
from hansa.algorithms.fedavg import FedAvg
from hansa.algorithms.fedopt import FedAvgM
from hansa.algorithms.scaffold import SCAFFOLD
from hansa.core.errors import InputError
from hansa.training.simulate import simulate

INNER = FedAvg(client_learning_rate=0.05, local_epochs=2, batch_size=4)


def models(algorithm, num_rounds, **options):
    """The model after each round of a run of its own."""
    return [
        simulate(support.linear(algorithm=algorithm), support.regression(), num_rounds=n, **options).parameters
        for n in range(1, num_rounds + 1)
    ]


@pytest.mark.parametrize("inner", [INNER, FedAvgM(client_learning_rate=0.05), SCAFFOLD(client_learning_rate=0.05)])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_the_result_is_the_running_average_of_the_algorithms_own_models(inner, decay):
    newest = models(inner, 4)
    found = models(Averaged(algorithm=inner, decay=decay), 4)
    average = np.zeros_like(newest[0])
    for number, (model, averaged) in enumerate(zip(newest, found, strict=True), 1):
        keep = min(decay, (number - 1) / number)
        average = keep * average + (1 - keep) * model
        assert averaged == pytest.approx(average, rel=1e-5, abs=1e-7)
    assert (found[-1] == newest[-1]).all() == (decay == 0.0)


def test_clients_score_the_average():
    runs = [
        simulate(support.linear(algorithm=algorithm), support.regression(), num_rounds=3, holdout=0.3)
        for algorithm in (INNER, Averaged(algorithm=INNER, decay=0.9))
    ]
    plain, averaged = (run.history[-1].loss for run in runs)
    assert averaged != plain
    own = runs[1].evaluate(support.regression().load(support.regression().ids[0])[0])["loss"]
    assert np.isfinite(own)
    assert runs[1].history[0].loss == runs[0].history[0].loss  # of one model the average is that model


def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_average(tmp_path):
    federation = support.linear(algorithm=Averaged(algorithm=INNER))
    whole = simulate(federation, support.regression(), num_rounds=4)
    simulate(federation, support.regression(), num_rounds=2, checkpoint=tmp_path / "c")
    resumed = simulate(federation, support.regression(), num_rounds=4, checkpoint=tmp_path / "c")
    assert (whole.parameters == resumed.parameters).all()


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"algorithm": "FedAvg"}], ids=repr)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(InputError, match="expected"):
        Averaged(**{"algorithm": INNER, **options})
