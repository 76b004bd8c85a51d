import contextlib
import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import load, save

from hansa.tensors import DTYPES, Packed, read_tensors, strict_json

MALFORMED = (ValueError, KeyError, TypeError, RecursionError)
LONGEST = 2**16

names = st.text(st.characters(codec="utf-8"), max_size=4).filter(lambda name: name != "__metadata__")
texts = st.one_of(st.just({}), st.fixed_dictionaries({"tree": st.text(st.characters(codec="ascii"))}))
shapes = arrays_of.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3)
arrays = st.dictionaries(
    names,
    st.sampled_from(DTYPES).flatmap(lambda dtype: arrays_of.arrays(dtype, shapes)),
    max_size=5,
)


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


# --------------------------------------------------------------------------------------------------------- writing


@given(arrays=arrays, texts=texts)
def test_a_file_is_byte_for_byte_that_of_safetensors(arrays, texts):
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    assert bytes(Packed(arrays, texts)) == save(plain, texts or None)


@given(arrays=arrays, texts=texts)
def test_what_was_written_is_read_bit_for_bit(arrays, texts):
    body = bytes(Packed(arrays, texts))
    for buffer in (body, bytearray(body), memoryview(body)):
        found, back = read_tensors(buffer, LONGEST)
        assert found == texts
        assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in back.items()} == {
            n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items()
        }


@given(arrays=arrays)
def test_the_pieces_are_the_file_and_their_hash_and_size_are_known(arrays):
    packed = Packed(arrays, {})
    body = b"".join(packed.pieces())
    assert (len(body), hashlib.sha256(body).hexdigest()) == (packed.size, packed.sha256)
    assert load(body).keys() == arrays.keys()


def test_no_piece_is_long_and_no_array_is_copied():
    packed = Packed({"a": np.zeros(2**20)}, {})
    tracemalloc.start()
    assert max(len(piece) for piece in packed.pieces()) == 2**20
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------- reading


def test_arrays_are_views_of_what_can_be_written_to_and_copies_of_what_cannot():
    body = bytearray(bytes(Packed({"a": np.zeros(3), "b": np.zeros(2, np.int8)}, {})))
    for name, array in read_tensors(body, LONGEST)[1].items():
        assert np.shares_memory(array, np.frombuffer(body, np.uint8)), name
    for array in read_tensors(bytes(body), LONGEST)[1].values():
        assert array.flags.writeable
        assert array.flags.owndata


def test_an_array_that_lies_askew_is_copied():
    header = json.dumps({"a": entry(0, 8, "F64", [1])}).encode()
    header += b" " * (3 - len(header) % 8)
    [array] = read_tensors(bytearray(file_of(header, struct.pack("<d", 2.5))), LONGEST)[1].values()
    assert array.flags.aligned
    assert array.tolist() == [2.5]


GOOD = {"a": entry(0, 4), "b": entry(4, 8, "F32", [1])}
HOSTILE = {
    "no bytes": b"",
    "seven bytes": b"\0" * 7,
    "header longer than the body": struct.pack("<Q", 3) + b"{}",
    "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header over the limit": file_of(b"{}" + b" " * LONGEST),
    "header that is not utf-8": file_of(b'{"\xff": 1}'),
    "header in utf-16": file_of('{"a": 1}'.encode("utf-16")),
    "header that is a list": file_of([]),
    "header nested too deeply": file_of(b"[" * 30_000),
    "nan": file_of(b'{"a": NaN}'),
    "a number of many digits": file_of(b'{"a": %s}' % (b"1" * 5000)),
    "metadata that is no text": file_of({"__metadata__": {"tree": 1}}),
    "metadata that is no mapping": file_of({"__metadata__": ["tree"]}),
    "one name twice": file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"\0" * 4),
    "one field twice": file_of(b'{"a":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}', b"\0" * 4),
    "entry that is a number": file_of({"a": 4}),
    "missing field": file_of({"a": {"dtype": "U8", "shape": [0]}}),
    "extra field": file_of({"a": {**entry(0, 4), "more": 1}}, b"\0" * 4),
    "unknown type": file_of({"a": entry(0, 4, "BF16", [2])}, b"\0" * 4),
    "type that is a list": file_of({"a": entry(0, 4, ["U8"])}, b"\0" * 4),
    "negative length": file_of({"a": entry(0, 4, shape=[-4])}, b"\0" * 4),
    "two negative lengths": file_of({"a": entry(0, 4, shape=[-2, -2])}, b"\0" * 4),
    "length of 2**63": file_of({"a": entry(0, 4, shape=[2**63])}, b"\0" * 4),
    "lengths whose product is 2**64": file_of({"a": entry(0, 0, shape=[2**32, 2**32])}),
    "lengths whose product is 2**64 and a zero": file_of({"a": entry(0, 4, shape=[2**32, 2**32, 0])}, b"\0" * 4),
    "length that is a fraction": file_of({"a": entry(0, 4, shape=[4.0])}, b"\0" * 4),
    "length that is true": file_of({"a": entry(0, 1, shape=[True])}, b"\0"),
    "too many axes": file_of({"a": entry(0, 1, shape=[1] * 33)}, b"\0"),
    "shape that is a text": file_of({"a": entry(0, 4, shape="4")}, b"\0" * 4),
    "place before the data": file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, b"\0" * 4),
    "place that ends before it begins": file_of(
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b"\0" * 4
    ),
    "place of three numbers": file_of({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, b"\0" * 4),
    "place behind the data": file_of({"a": entry(0, 5)}, b"\0" * 4),
    "place far behind the data": file_of({"a": entry(2**62, 2**62 + 4)}, b"\0" * 4),
    "overlap": file_of({"a": entry(0, 4), "b": entry(2, 6)}, b"\0" * 6),
    "the same bytes twice": file_of({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4),
    "gap": file_of({"a": entry(0, 4), "b": entry(5, 8)}, b"\0" * 8),
    "gap at the beginning": file_of({"a": entry(1, 4)}, b"\0" * 4),
    "bytes behind the last": file_of(GOOD, b"\0" * 9),
    "bytes that are missing": file_of(GOOD, b"\0" * 7),
    "type of another size than the place": file_of({"a": entry(0, 4, "F32", [2])}, b"\0" * 4),
}


def test_the_neighbour_of_the_hostile_files_is_read():
    assert sorted(read_tensors(file_of(GOOD, b"\0" * 8), LONGEST)[1]) == ["a", "b"]


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_before_anything_is_allocated(body):
    tracemalloc.start()
    with pytest.raises(MALFORMED):
        read_tensors(body, LONGEST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 + 40 * len(body)


numbers = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**32, 2**63, 2**64, 2**70, 4.0, True, None, "4"]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["U8", "F32", "F64", "BOOL", "BF16", "O"]), numbers),
        "shape": st.one_of(st.lists(numbers, max_size=3), numbers),
        "data_offsets": st.one_of(st.lists(numbers, min_size=1, max_size=3), st.tuples(numbers, numbers)),
    }
)


@given(header=st.dictionaries(names, entries, max_size=3), size=st.integers(0, 16))
def test_any_numbers_in_a_header_are_refused_or_fit(header, size):
    with contextlib.suppress(*MALFORMED):
        _, found = read_tensors(file_of(header, bytes(size)), LONGEST)
        assert sum(array.nbytes for array in found.values()) == size


@given(body=st.binary(max_size=300))
def test_any_bytes_are_refused(body):
    with pytest.raises(MALFORMED):
        read_tensors(body, LONGEST)


@given(body=st.binary(max_size=100))
def test_any_header_is_refused_or_says_what_is_there(body):
    with contextlib.suppress(*MALFORMED):
        assert read_tensors(file_of(body), LONGEST)[1] == {}


def test_json_with_a_name_twice_is_refused():
    assert strict_json('{"a": {"a": 1}}') == {"a": {"a": 1}}
    with pytest.raises(ValueError, match="a name that comes twice"):
        strict_json('[{"a": 1, "b": 2, "a": 1}]')
