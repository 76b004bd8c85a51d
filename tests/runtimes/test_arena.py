"""Arrays that grow, and move to files together."""

import numpy as np

from hansa.runtimes.arena import Arena, Room


def test_slots_that_were_freed_are_given_out_again_before_new_ones():
    room, arena = Room(1e9, None), Arena((2,), np.dtype(np.float32))
    assert arena.claim(3, room).tolist() == [0, 1, 2]
    arena.free.extend([1])
    assert arena.claim(2, room).tolist() == [1, 3]
    assert arena.used == 4


def test_rows_stay_where_they_are_when_an_arena_grows_and_moves(tmp_path):
    room = Room(100, tmp_path)
    small, large = Arena((2,), np.dtype(np.float32)), Arena((), np.dtype(np.int64))
    room.arenas += [small, large]
    small.claim(2, room)
    small.rows[:2] = [[1, 2], [3, 4]]
    for size in (5, 20, 100):
        slots = large.claim(size, room)
        large.rows[slots] = slots
    assert small.rows[:2].tolist() == [[1, 2], [3, 4]]
    assert large.rows[: large.used].tolist() == list(range(125))
    assert room.bytes == len(small.rows) * 8 + len(large.rows) * 8
    assert len(list(tmp_path.glob("hansa-memory-*/*.rows"))) == 2


def test_rows_of_no_bytes_need_no_file(tmp_path):
    room, arena = Room(0, tmp_path), Arena((0,), np.dtype(np.float32))
    room.arenas.append(arena)
    assert arena.claim(3, room).tolist() == [0, 1, 2]
    assert arena.rows.shape == (3, 0)
    assert not list(tmp_path.iterdir())
