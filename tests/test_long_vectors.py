"""Vectors that lie in files, and arrays that are made some columns at a time."""

import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.long_vectors import Later, NewVector, columns_of, columnwise, is_columnwise, let_go, map_file, mapping, spans


def later(values):
    return Later(values.shape, lambda first, stop: values[..., first:stop])


def test_a_new_vector_holds_what_was_added_and_has_no_name(tmp_path):
    with NewVector(tmp_path / "made", np.dtype(np.float64)) as vector:
        vector.add(np.arange(5.0))
        vector.add(np.arange(10.0)[::2])
        made = vector.done()
    assert made.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 2.0, 4.0, 6.0, 8.0]
    assert not made.flags.writeable
    assert list((tmp_path / "made").iterdir()) == []


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, hard))
    try:
        with NewVector(tmp_path, np.dtype(np.float64)) as vector, pytest.raises(OSError, match="File too large"):
            vector.add(np.zeros(2**12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_let_go_is_read_again_and_what_was_changed_in_memory_is_never_lost(tmp_path):
    (tmp_path / "file").write_bytes(np.arange(4.0).tobytes())
    changed = np.frombuffer(map_file(tmp_path / "file"), np.float64)
    changed[0] = 7.0
    let_go(changed)
    let_go(np.arange(4.0))
    read = np.frombuffer(map_file(tmp_path / "file", writable=False), np.float64)
    let_go(read[1:])
    assert changed.tolist() == [7.0, 1.0, 2.0, 3.0]
    assert read.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_an_array_lies_in_a_file_however_it_is_viewed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64))
    body = map_file(tmp_path / "file")
    view = np.frombuffer(body, np.uint8)[8:].view(np.float64).reshape(1, -1)[:, 2:]
    assert mapping(view) is mapping(body) is body.obj
    assert mapping(view.copy()) is mapping(bytes(8)) is None


@given(count=st.integers(0, 50), width=st.integers(1, 60), data=st.data())
def test_spans_lie_side_by_side(count, width, data):
    first = data.draw(st.integers(0, count))
    found = list(spans(count, width, first))
    assert [place for start, stop in found for place in range(start, stop)] == list(range(first, count))
    assert all(0 < stop - start <= width for start, stop in found)


def test_an_array_of_columns_to_come_is_one_in_every_use():
    values = np.arange(12.0).reshape(2, 6)
    lazy = later(values)
    assert (len(lazy), lazy.shape, lazy.ndim, lazy.dtype) == (2, (2, 6), 2, np.float64)
    assert np.array_equal(columns_of(lazy, 1, 4), columns_of(values, 1, 4))
    for use in (
        lambda a: a[0] * 2,
        lambda a: 1 - a,
        lambda a: np.add(a, a),
        lambda a: a.sum(axis=1),
        lambda a: np.asarray(a, np.float32),
        lambda a: a[:, ::-1],
        lambda a: np.concatenate([a, a]),
    ):
        found, expected = use(lazy), use(values)
        assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())


def test_added_to_in_place_it_becomes_an_array_and_its_source_stays():
    values = np.ones((1, 3))
    lazy = later(values)
    lazy += 1.0
    out = np.zeros((1, 3))
    assert np.add(later(values), 1, out=out) is out
    assert isinstance(lazy, np.ndarray)
    assert (lazy.tolist(), out.tolist(), values.tolist()) == ([[2.0] * 3], [[2.0] * 3], [[1.0] * 3])


def test_an_array_of_columns_to_come_has_no_names_of_its_own_that_python_asks_for():
    with pytest.raises(AttributeError):
        later(np.ones((1, 3))).__array_interface__  # noqa: B018  # asked for, not used


def test_what_a_mark_depends_on_is_asked_of_the_owner():
    class Step:
        def __init__(self, is_plain):
            self.is_plain = is_plain

        @columnwise(lambda step: step.is_plain)
        def step(self): ...

        def other(self): ...

    assert [is_columnwise(Step(plain).step) for plain in (True, False)] == [True, False]
    assert not is_columnwise(Step(True).other)
    assert not is_columnwise(None)
