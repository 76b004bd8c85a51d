"""Packed words: no gap, nothing lost, any range, and sums of rows as if they had never been packed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hansa.core.errors import InputError, ProtocolError
from hansa.secagg import packing
from hansa.secagg.packing import BLOCK, add_unpacked, pack, packed_size, unpack

SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 200, 256, 257, 700, 1025]


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 256)


def drawn(count, width, dtype):
    whole = np.random.default_rng(count + width).integers(0, 2**64, count, dtype=np.uint64)
    return (whole >> np.uint64(64 - width)).astype(dtype)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(
    ("dtype", "width"), [(t, w) for t in (np.uint32, np.uint64) for w in range(1, 65) if w <= 8 * t().itemsize]
)
def test_words_of_every_width_come_back(dtype, width):
    for count in SIZES:
        words = drawn(count, width, dtype)
        packed = pack(words, width)
        assert packed.shape == (packed_size(count, width),) == (-(-count * width // 8),)
        found = unpack(packed, width, count, dtype=dtype)
        assert found.dtype == dtype
        assert (found == words).all()


@pytest.mark.usefixtures("short_blocks")
@settings(deadline=None)
@given(st.integers(1, 32), st.integers(0, 600), st.integers(0, 700), st.integers(0, 700))
def test_any_range_is_that_part(width, count, first, stop):
    words = drawn(count, width, np.uint32)
    assert unpack(pack(words, width), width, count, first, stop).tolist() == words[first:stop].tolist()


@given(st.integers(1, 32), st.integers(0, 31))
def test_few_words_are_one_number_of_their_bits(width, count):
    words = drawn(count, width, np.uint32)
    bits = sum(int(word) << width * i for i, word in enumerate(words))
    assert pack(words, width).tobytes() == bits.to_bytes(packed_size(count, width), "little")


@pytest.mark.usefixtures("short_blocks")
@settings(deadline=None)
@given(st.integers(1, 32), st.integers(0, 600))
def test_every_bit_of_every_word_has_a_place_of_its_own(width, count):
    """Packing is one to one: as many bits are set as the words have, and words come back from any of them."""
    words = drawn(count, width, np.uint32)
    assert np.unpackbits(pack(words, width)).sum() == sum(int(word).bit_count() for word in words)


def test_bits_above_the_width_are_dropped():
    words = np.array([2**32 - 1] * 70, np.uint32)
    assert (unpack(pack(words, 5), 5, 70) == 31).all()


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(("dtype", "width"), [(np.uint32, 26), (np.uint32, 32), (np.uint64, 60)])
def test_sums_of_packed_rows_are_sums_of_rows_modulo_their_width(dtype, width):
    rows = [drawn(1025, width, dtype) + dtype(i) for i in range(9)]
    total = np.ones(800, dtype)
    for row in rows:
        add_unpacked(total, pack(row, width), width, 1025, first=130)
    difference = total - sum(rows, np.ones(1025, dtype))[130:930]
    assert (difference & dtype(2**width - 1) == 0).all()


def test_long_rows_are_read_from_disk_in_part(tmp_path):
    count, width = 2 * BLOCK + 77, 20
    words = drawn(count, width, np.uint32)
    (tmp_path / "row").write_bytes(b"odd" + pack(words, width).tobytes())
    mapped = np.memmap(tmp_path / "row", np.uint8, "r", offset=3)
    for first, stop in ((BLOCK - 5, BLOCK + 5), (2 * BLOCK - 3, count), (0, 9)):
        assert (unpack(mapped, width, count, first, stop) == words[first:stop]).all()


def test_rows_of_another_length_are_refused():
    packed = pack(np.arange(40, dtype=np.uint32), 7)
    for wrong in (packed[:-1], np.append(packed, packed[:1]), packed.astype(np.int64), packed[None]):
        with pytest.raises(ProtocolError, match="40 words of 7 bits in 35 bytes"):
            unpack(wrong, 7, 40)


@pytest.mark.parametrize(("dtype", "width"), [(np.uint32, 0), (np.uint32, 33), (np.uint64, 65), (np.int64, 8)])
def test_widths_that_words_do_not_have_are_refused(dtype, width):
    with pytest.raises(InputError, match="1 to 32 bits"):
        pack(np.zeros(3, dtype), width)
