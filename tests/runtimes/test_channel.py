import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hansa.runtimes.channel import SAFE_BYTES, Channel, Region, room, unwrap, wrap

SHAPES = st.sampled_from([(), (0,), (3,), (1000,), (40, 50), (3, 700)])
ARRAYS = st.lists(st.tuples(SHAPES, st.sampled_from(["float32", "float64", "int8", "bool"])), max_size=6)


def arrays(forms):
    draw = np.random.default_rng(0)
    return [(draw.normal(size=shape) * 9).astype(dtype) for shape, dtype in forms]


def same(found, expected):
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(found, expected, strict=True)
    )


@given(ARRAYS, st.sampled_from([1, 1 << 14, 1 << 20]), st.booleans(), st.booleans())
def test_what_is_unwrapped_is_what_was_wrapped_however_little_room_there_is(forms, size, owned, turned):
    value = [array.T if turned else array for array in arrays(forms)]
    region = Region(size)
    found, words = unwrap(wrap([value, "x" * 5000], region), region, owned=owned)
    assert same(found, value)
    assert words == "x" * 5000


def test_large_arrays_lie_in_the_region_and_their_letter_is_short():
    region, array = Region(1 << 20), np.arange(50_000.0)
    letter = wrap({"params": array}, region)
    assert len(letter.places) == 1
    assert len(letter.head) < 500
    seen = unwrap(letter, region)["params"]
    owned = unwrap(letter, region, owned=True)["params"]
    wrap({"params": -array}, region)  # clears it
    assert (seen[1:] < 0).all()
    assert (owned == array).all()


def test_arrays_may_be_read_only():
    region = Region(1 << 20)
    found = unwrap(wrap(np.zeros(5000), region), region, writable=False)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def channels(size=1 << 20):
    """Both ends."""
    ours, theirs = multiprocessing.Pipe()
    there, back = (Region(size), Region(size)), (Region(size), Region(size))
    return Channel(ours, there, back), Channel(theirs, back, there)


def test_what_was_read_stays_as_it_is_while_one_more_letter_waits():
    here, there = channels()
    first, second = np.full(5000, 1.0), np.full(5000, 2.0)
    here.send(first)
    here.send(second)
    found = there.receive()
    assert (found == first).all()
    assert (there.receive() == second).all()
    assert (found == first).all()


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_many_letters_go_both_ways_in_turn(size):
    here, there = channels(size)
    for i in range(7):
        here.send(np.full(6000, i))
        there.send(there.receive() + 1)
        assert (here.receive(owned=i % 2 == 0) == i + 1).all()


def test_a_message_whose_arrays_find_room_fits_into_any_pipe():
    here, _ = channels()
    value = {f"client-{i}": np.full(3000, i) for i in range(30)}
    assert len(here.wrap(value)) <= SAFE_BYTES
    assert len(here.wrap(["words"] * 10_000)) <= SAFE_BYTES


def test_a_message_that_was_wrapped_and_not_posted_is_as_if_it_had_never_been():
    here, there = channels()
    here.wrap(np.zeros(5000))
    here.send(np.ones(5000))
    assert (there.receive() == 1).all()


def test_an_end_that_hangs_up_is_noticed_at_the_other():
    here, there = channels()
    there.close()
    there.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        here.send("hello")
    with pytest.raises((EOFError, OSError)):
        here.receive()


def test_a_value_that_cannot_be_sent_leaves_the_channel_usable():
    here, there = channels()
    with pytest.raises(Exception, match=r"lambda|pickle"):
        here.send([np.zeros(5000), lambda: 0])
    here.send([np.ones(5000)])
    assert (there.receive()[0] == 1).all()


def test_room_is_what_is_wanted_within_a_share_of_the_memory():
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert room(5 << 20, 8) == 5 << 20
    assert room(1 << 60, 8) == memory // 8
    assert room(0, 8) == 1 << 20
