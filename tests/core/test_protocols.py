import numpy as np

import support
from hansa.core.protocols import Memory, Slot, Updates


def test_taking_rows_takes_every_column_with_them():
    block = Updates(
        ("a", "b", "c"), np.arange(6.0).reshape(3, 2), np.array([1.0, 2.0, 3.0]), {"t": np.array([7, 8, 9])},
        {"s": np.array([4, 5, 6])},
    )  # fmt: skip
    some = block.take([2, 0])
    assert some.clients == ("c", "a")
    assert some.values.tolist() == [[4, 5], [0, 1]]
    assert (some.weights.tolist(), some.tail["t"].tolist(), some.side["s"].tolist()) == ([3, 1], [9, 7], [6, 4])
    assert block.take([]).values.shape == (0, 2)


def test_what_is_taken_is_a_copy():
    block = support.block([[1.0], [2.0]])
    block.take([0]).values[:] = 9
    assert block.values.tolist() == [[1], [2]]


def test_memory_gives_a_client_without_an_entry_the_default_row():
    memory = Memory([{"bias": np.ones(2)}, {}, {"other": np.ones(9)}])
    assert memory.get("bias", np.array([5.0, 6.0])).tolist() == [[1, 1], [5, 6], [5, 6]]


def test_a_slot_names_itself_in_one_word():
    assert str(Slot(3, 1, "update")) == "train-3-1-update"


def test_a_part_sees_its_own_memory_only():
    memory = Memory([{"a.bias": np.ones(2), "0.bias": np.zeros(2)}, {"0.inner.bias": np.full(2, 7.0)}])
    default = np.array([5.0, 6.0])
    assert len(memory) == len(memory.part("a")) == 2
    assert memory.part("a").get("bias", default).tolist() == [[1, 1], [5, 6]]
    assert memory.part("0").get("bias", default).tolist() == [[0, 0], [5, 6]]
    assert memory.part("1").get("bias", default).tolist() == [[5, 6], [5, 6]]
    assert memory.part("0").part("inner").get("bias", default).tolist() == [[5, 6], [7, 7]]
