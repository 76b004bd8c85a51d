"""Masks: the streams themselves, uniform, and gone when both sides of a pair have added theirs."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hansa.core.errors import InputError
from hansa.secagg import masks
from hansa.secagg.masks import add_masks

KEYS = [bytes([i] * 16) for i in range(1, 8)]


def whole_stream(key, count, dtype):
    encryptor = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(count * np.dtype(dtype).itemsize)), dtype)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_masks_are_whole_streams_however_they_are_cut(monkeypatch, dtype, num_threads):
    monkeypatch.setattr(masks, "_CHUNK", 64)
    monkeypatch.setattr(masks, "_PIECE", 160)
    monkeypatch.setattr(masks, "_KEYS", 2)
    for count in (0, 1, 3, 16, 1000, 1003):
        row = np.arange(count, dtype=dtype)
        expected = row.copy()
        for key in KEYS[:5]:
            expected += whole_stream(key, count, dtype)
        for key in KEYS[5:]:
            expected -= whole_stream(key, count, dtype)
        add_masks(row, KEYS[:5], KEYS[5:], num_threads=num_threads)
        assert (row == expected).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.integers(0, 300), st.sampled_from([np.uint32, np.uint64]))
def test_a_part_of_a_row_has_that_part_of_the_mask(start, count, dtype):
    part = np.zeros(count, dtype)
    add_masks(part, KEYS[:1], start=4 * start)
    assert (part == whole_stream(KEYS[0], 4 * start + count, dtype)[4 * start :]).all()


def test_a_long_row_is_its_stream_too():
    row = np.zeros(200_001, np.uint32)
    add_masks(row, KEYS[:1], num_threads=2)
    assert (row == whole_stream(KEYS[0], len(row), np.uint32)).all()


@given(st.permutations(KEYS))
def test_masks_cancel_in_any_order(order):
    row = np.arange(50, dtype=np.uint32)
    add_masks(row, KEYS)
    add_masks(row, [], order)
    assert row.tolist() == list(range(50))


def test_masked_words_are_uniform():
    row = np.full(2**17, 12_345, np.uint32)
    add_masks(row, KEYS[:1], KEYS[1:3])
    for shift in (0, 8, 16, 24):
        assert stats.chisquare(np.bincount(row >> shift & 255, minlength=256)).pvalue > 1e-4
    pairs = (row[:-1] & 15) * 16 + (row[1:] >> 28)
    assert stats.chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4


@pytest.mark.parametrize(
    "row", [np.zeros(4), np.zeros(4, np.int32), np.zeros((2, 2), np.uint32), np.zeros(8, "u4")[::2]]
)
def test_what_is_no_row_of_words_is_refused(row):
    with pytest.raises(InputError, match="contiguous words"):
        add_masks(row, KEYS)


def test_a_start_within_a_block_of_the_cipher_is_refused():
    with pytest.raises(InputError, match="multiple of four"):
        add_masks(np.zeros(4, np.uint32), KEYS, start=2)
