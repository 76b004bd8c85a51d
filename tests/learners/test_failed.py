"""A client whose data, model or loss fails in training is named by its row, in the loop and in blocks."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hansa.core.errors import InputError, RunError
from hansa.core.key import Key
from hansa.data.dataset import Dataset
from hansa.learners.failed import ClientFailed, why
from hansa.learners.torch import TorchLearner
from hansa.local_training import Correction, LocalTraining


def build():
    return nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))


def words(size, seed, largest=5):
    generator = np.random.default_rng([size, seed])
    return Dataset(generator.integers(0, largest, (size, 2)), generator.integers(0, 2, size))


def fit(learner, datasets):
    params = np.stack([learner.initial(Key.of(0))] * len(datasets))
    local = LocalTraining(learning_rate=0.1, epochs=2, batch_size=4)
    return learner.fit(params, datasets, local, Correction(), [Key.of(i) for i in range(len(datasets))])


@pytest.mark.parametrize("batched", [None, True, False])
@pytest.mark.parametrize("row", [0, 3])
def test_a_client_with_a_word_that_the_model_does_not_know_is_named_by_its_row(row, batched):
    datasets = [words(6, i) for i in range(5)]
    datasets[row] = words(6, row, largest=60)
    with pytest.raises(ClientFailed, match=r"could not be trained \(IndexError: .*check its examples") as found:
        fit(TorchLearner(build, batched=batched), datasets)
    assert found.value.row == row
    assert isinstance(found.value.__cause__, IndexError)
    assert isinstance(found.value, RunError)


@pytest.mark.parametrize("batched", [None, False])
def test_a_client_that_fails_after_a_choice_was_made_is_named_too(batched):
    learner = TorchLearner(build, batched=batched)
    fit(learner, [words(6, i) for i in range(5)])
    with pytest.raises(ClientFailed) as found:
        fit(learner, [*(words(6, i) for i in range(4)), words(6, 4, largest=60)])
    assert found.value.row == 4


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_client_that_runs_out_of_memory_is_named_with_what_helps(error):
    def loss(model, x, y):
        if len(y) == 3:
            raise error
        return nn.functional.cross_entropy(model(x), y)

    with pytest.raises(ClientFailed, match="ran out of memory in training; give a smaller batch_size") as found:
        fit(TorchLearner(build, loss=loss, num_classes=2), [words(8, 0), words(3, 1), words(8, 2)])
    assert found.value.row == 1
    assert found.value.__cause__ is error


def test_what_pytorch_says_when_memory_is_out_is_understood():
    said = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried")
    assert why(said).startswith("ran out of memory")
    assert why(ValueError("")).startswith("could not be trained (ValueError); check")


def test_what_hansa_itself_refuses_keeps_its_sentence():
    def loss(model, x, y):
        raise InputError("expected one thing, found another")

    with pytest.raises(InputError, match="one thing"):
        fit(TorchLearner(build, loss=loss, num_classes=2), [words(8, 0), words(3, 1)])


def test_it_travels_between_processes():
    copy = pickle.loads(pickle.dumps(ClientFailed(3, "ran out of memory")))
    assert (copy.row, copy.reason) == (3, "ran out of memory")
