import contextlib
import hashlib
import json
import math
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import support
from hansa.core import chain
from hansa.core.chain import Raw
from hansa.core.errors import ProtocolError
from hansa.core.key import Key
from hansa.core.protocols import Plan, Report, Slot, Updates
from hansa.long_vectors import map_file
from hansa.transforms.quantize import Quantize
from hansa.transforms.sparsify import TopK
from hansa.wire import DTYPES, Nonzeros, lay_out, pack, pack_report, plan_parts, unpack, unpack_report

SLOT = Slot(3, 1, "update")
CODECS = {
    "raw": Raw(),
    "levels": Quantize(bits=5).codec(Raw()),
    "sparse": TopK(fraction=0.5).codec(Raw()),
    "sums": Nonzeros(),
}
LENGTH = 6

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=5),
    st.binary(max_size=5),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


def own_report(codec, weight=2.0):
    transform = {"Levels": Quantize(bits=5), "Sparse": TopK(fraction=0.5)}.get(type(codec).__name__)
    block = support.block([[1.0, 0, -2, 0, 0.5, 0]], [weight], ["a"], loss=[0.25])
    sent = support.encoded((transform,), block)[0] if transform else block
    return Report(SLOT, ("a",), sent)


def body_of(tree, **tensors):
    """A body whose JSON is ``tree``, whatever it is, with float32 tensors of one value each."""
    header, data = {"__metadata__": {"tree": json.dumps(tree)}}, b""
    for name, value in tensors.items():
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += struct.pack("<f", value)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


# ---------------------------------------------------------------------------------------------------------- bodies


@given(tree=trees)
def test_trees_of_numbers_names_and_bytes_come_back_as_they_were(tree):
    assert unpack(pack(tree)) == tree


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_arrays_come_back_bit_for_bit_in_shape_and_type(dtype, shape):
    array = np.asarray(np.arange(math.prod(shape)).reshape(shape) - 1).astype(dtype)
    back = unpack(pack({"a": [array]}))["a"][0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_arrays_that_lie_oddly_in_memory_come_back_in_order():
    array = np.arange(12.0).reshape(3, 4)
    for odd in (array.T, array[:, ::2], array[::-1], np.asfortranarray(array)):
        assert (unpack(pack(odd)) == odd).all()


def test_numbers_that_json_has_not_come_back():
    back = unpack(pack({"a": math.inf, "b": -math.inf, "c": math.nan, "d": np.float32(0.1), "e": np.int64(-3)}))
    assert (back["a"], back["b"], back["d"], back["e"]) == (math.inf, -math.inf, float(np.float32(0.1)), -3)
    assert math.isnan(back["c"])


def test_mappings_keep_their_order_and_tuples_become_lists():
    assert list(unpack(pack({"z": 1, "a": (2, 3)})).items()) == [("z", 1), ("a", [2, 3])]


def test_names_that_look_like_marks_are_only_names():
    tree = {"#m": {"#a": "0", "s": [1]}, "#f": "nan", "#b": "AA==", "__class__": "os.system"}
    assert unpack(pack(tree)) == tree


def test_equal_trees_are_equal_bytes():
    tree = {"b": np.arange(3), "a": {"x": np.ones(2), "y": 0.1}}
    assert pack(tree) == pack({"b": np.arange(3), "a": {"x": np.ones(2), "y": 0.1}})


def test_a_torch_tensor_is_packed_as_its_values():
    torch = pytest.importorskip("torch")
    assert unpack(pack(torch.tensor([1.0, 2.0]))).tolist() == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [object(), {1: 2}, {"a": {3}}, np.array(["text"]), np.array([1j]), np.array([None]), print],
    ids=range(7),
)
def test_only_data_can_be_packed(wrong):
    with pytest.raises(TypeError, match="body: expected"):
        pack({"a": wrong})


# --------------------------------------------------------------------------------------------------- hostile bodies


@given(body=st.binary(max_size=200))
def test_any_bytes_give_a_protocol_error_and_nothing_else(body):
    with pytest.raises(ProtocolError, match="expected a safetensors body"):
        unpack(body)


@given(data=st.data())
def test_a_damaged_body_gives_a_protocol_error_or_data(data):
    body = bytearray(pack({"a": np.arange(4.0), "b": [1, "x", None, b"yz"], "c": {"d": math.inf}}))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        unpack(bytes(body[: data.draw(st.integers(0, len(body)))]))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["0", "1", "nan", "x", ""])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["#m", "#a", "#f", "#b", "s", "updates", "a"]), inner, max_size=3),
    ),
)


@given(tree=json_values)
def test_any_json_in_a_body_gives_a_protocol_error_or_data(tree):
    with contextlib.suppress(ProtocolError):
        unpack(body_of(tree, **{"0": 1.0}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        b"\xff" * 64,
        pickle.dumps({"a": 1}),
        pickle.dumps(print),
        b"PK\x03\x04" + b"\x00" * 60,
        pack({"a": np.ones(3)})[:-1],
        pack({"a": np.ones(3)}) + b"\x00",
        struct.pack("<Q", 2**60) + b"{}",
        body_of({"#m": [1]}),
        body_of({"#m": 3}),
        body_of({"#a": "9", "s": [1]}),
        body_of({"#a": ["0"], "s": [1]}, **{"0": 1.0}),
        body_of({"#a": "0"}, **{"0": 1.0}),
        body_of({"#a": "0", "s": [2]}, **{"0": 1.0}),
        body_of({"#a": "0", "s": [10**30]}, **{"0": 1.0}),
        body_of({"#a": "0", "s": "one"}, **{"0": 1.0}),
        body_of({"#a": "0", "s": [1] * 100}, **{"0": 1.0}),
        body_of({"#f": "1e3"}),
        body_of({"#b": "not base64!"}),
        body_of({}),
        body_of({"#a": "0", "s": [-1]}, **{"0": 1.0}),
        body_of([{"#a": "0", "s": [1]}, {"#a": "0", "s": [1]}], **{"0": 1.0}),
        body_of({"#a": "0", "s": [1]}, **{"0": 1.0, "1": 1.0}),
        pack(3).replace(b'"tree"', b'"tre2"'),
    ],
    ids=range(25),
)
def test_a_body_that_is_not_ours_is_a_protocol_error(body):
    with pytest.raises(ProtocolError):
        unpack(body)


def test_a_tree_nested_too_deeply_is_a_protocol_error():
    deep: list = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ProtocolError, match="nested too deeply"):
        unpack(body_of(deep))
    text = "[" * 100_000 + "]" * 100_000
    header = json.dumps({"__metadata__": {"tree": text}}).encode()
    with pytest.raises(ProtocolError):
        unpack(struct.pack("<Q", len(header)) + header)


def test_a_body_of_many_names_has_a_limit_which_the_caller_may_raise():
    body = pack({"names": ["x" * 1000] * 5000})
    with pytest.raises(ProtocolError, match="a header of"):
        unpack(body)
    assert len(unpack(body, longest_header=2**24)["names"]) == 5000


def test_what_is_said_of_a_hostile_body_is_short():
    with pytest.raises(ProtocolError) as caught:
        unpack(body_of({"#a": "x" * 10_000, "s": []}))
    assert len(str(caught.value)) < 500


def test_a_file_mapped_as_memory_is_read_without_a_copy(tmp_path):
    values = np.arange(2.0**17)
    (tmp_path / "body").write_bytes(pack({"values": values, "few": np.ones(3, np.int8)}))
    body = map_file(tmp_path / "body")
    tracemalloc.start()
    tree = unpack(body)
    assert tracemalloc.get_traced_memory()[1] < 2**17
    tracemalloc.stop()
    assert np.shares_memory(tree["values"], np.frombuffer(body, np.uint8))
    assert tree["values"].flags.writeable  # torch wants that; nothing reaches the file
    tree["values"] += 1
    assert (unpack((tmp_path / "body").read_bytes())["values"] == values).all()


@given(tree=trees)
def test_a_body_in_pieces_is_the_same_body(tree):
    tree = {"tree": tree, "array": np.arange(3)}
    packed = lay_out(tree)
    assert b"".join(packed.pieces()) == pack(tree)
    assert packed.sha256 == hashlib.sha256(pack(tree)).hexdigest()


# --------------------------------------------------------------------------------------------------------- reports


@every_codec
@given(length=st.integers(1, 300))
def test_a_codec_says_how_long_a_row_is_at_most(codec, length):
    transform = {"Levels": Quantize(bits=5), "Sparse": TopK(fraction=0.5)}.get(type(codec).__name__)
    block = support.block(np.random.default_rng(length).normal(size=(1, length)))
    sent = support.encoded((transform,), block)[0] if transform else block
    size = sum(np.asarray(array).nbytes for array in codec.pack(sent).values())
    assert size <= codec.row_bytes(length) + 8
    if not isinstance(codec, Nonzeros):
        assert size == codec.row_bytes(length)


@every_codec
def test_a_report_comes_back_under_the_name_that_the_certificate_gives(codec):
    report = own_report(codec)
    body = pack_report(report, codec)
    back = unpack_report(body, SLOT, "mallory", codec, LENGTH)
    assert back.clients == back.payload.clients == ("mallory",)
    assert back.slot == SLOT
    assert back.payload.values.tolist() == report.payload.values.tolist()
    assert (back.payload.weights.tolist(), back.payload.tail["loss"].tolist()) == ([2.0], [0.25])
    assert b"a" not in [back.clients[0]]


def test_a_refusal_and_mail_come_back():
    refusal = unpack_report(
        pack_report(Report(SLOT, (), {}, {"a": "no training examples"}), Raw()), SLOT, "a", Raw(), 6
    )
    assert (refusal.clients, dict(refusal.refused)) == ((), {"a": "no training examples"})
    mail = unpack_report(pack_report(Report(SLOT, ("a",), {"a": {"key": "7"}}), Raw()), SLOT, "a", Raw(), 6)
    assert (mail.clients, mail.payload, dict(mail.refused)) == (("a",), {"a": {"key": "7"}}, {})


def test_a_long_excuse_is_cut():
    body = pack({"updates": None, "refused": "x" * 10_000})
    assert len(unpack_report(body, SLOT, "a", Raw(), 6).refused["a"]) == 500


def updates(**changes):
    good = {
        "arrays": {"values": np.ones((1, LENGTH), np.float32)}, "weights": np.ones(1), "tail": {"loss": np.ones(1)},
    }  # fmt: skip
    return {"updates": {**good, **changes}, "refused": None}


@pytest.mark.parametrize(
    "tree",
    [
        [],
        "updates",
        {"updates": None},
        {"updates": {}},
        {"other": 1},
        {**updates(), "more": 1},
        updates(arrays={}),
        updates(arrays=[1]),
        updates(arrays={"values": 3}),
        updates(arrays={"values": [[1.0] * LENGTH]}),
        updates(arrays={"values": np.ones((1, LENGTH + 1), np.float32)}),
        updates(arrays={"values": np.ones((2, LENGTH), np.float32)}),
        updates(arrays={"values": np.ones(LENGTH, np.float32)}),
        updates(weights=np.ones(2)),
        updates(weights=1.0),
        updates(weights=None),
        updates(tail={"loss": np.ones(3)}),
        updates(tail={"loss": 1.0}),
        updates(tail=None),
    ],
    ids=range(19),
)
def test_a_report_of_another_shape_is_a_protocol_error(tree):
    with pytest.raises(ProtocolError):
        unpack_report(pack(tree), SLOT, "a", Raw(), LENGTH)


@pytest.mark.parametrize(
    ("codec", "arrays"),
    [
        ("levels", {"levels": np.zeros((1, 3), np.uint8), "step": np.ones(1, np.float32)}),  # too few bytes
        ("levels", {"levels": np.zeros((1, 4), np.int16), "step": np.ones(1, np.float32)}),
        ("levels", {"levels": np.zeros((1, 4), np.uint8), "step": np.ones(2, np.float32)}),
        ("levels", {"levels": np.zeros((1, 4), np.uint8)}),
        ("levels", {"levels": np.zeros((1, 4), np.uint8), "step": "one"}),
        ("sparse", {"positions": np.array([[0, 2, 9]], np.uint32), "values": np.ones((1, 3), np.float32)}),
        ("sparse", {"positions": np.array([[0, 2, 2]], np.uint32), "values": np.ones((1, 3), np.float32)}),
        ("sparse", {"positions": np.array([[2, 0, 1]], np.uint32), "values": np.ones((1, 3), np.float32)}),
        ("sparse", {"positions": np.array([[0, 1]], np.uint32), "values": np.ones((1, 2), np.float32)}),
        ("sparse", {"positions": np.array([[0, 1, 2]], np.int64), "values": np.ones((1, 3), np.float32)}),
        ("sparse", {"positions": np.array([[0, 1, 2]], np.uint32), "values": np.ones((1, 4), np.float32)}),
        ("sums", {"places": np.array([6], np.uint32), "nonzero": np.ones(1), "length": 6}),
        ("sums", {"places": np.array([-1]), "nonzero": np.ones(1), "length": 6}),
        ("sums", {"places": np.array([2, 2], np.uint32), "nonzero": np.ones(2), "length": 6}),
        ("sums", {"places": np.array([math.nan]), "nonzero": np.ones(1), "length": 6}),
        ("sums", {"places": np.array([1], np.uint32), "nonzero": np.ones(2), "length": 6}),
        ("sums", {"places": np.array([1], np.uint32), "nonzero": np.ones(1), "length": 7}),
        ("sums", {"places": np.array([1], np.uint32), "nonzero": np.ones(1), "length": math.inf}),
        ("sums", {"places": np.array([1], np.uint32), "nonzero": np.ones(1), "length": 10**40}),
        ("sums", {"places": np.array([1], np.uint32), "nonzero": np.ones(1)}),
    ],
)
def test_packed_values_that_the_codec_did_not_make_are_a_protocol_error(codec, arrays):
    with pytest.raises(ProtocolError, match="report of a: expected one row of updates"):
        unpack_report(pack(updates(arrays=arrays)), SLOT, "a", CODECS[codec], LENGTH)


def test_a_sum_of_unknown_length_has_a_limit():
    body = pack(updates(arrays={"places": np.zeros(0, np.uint32), "nonzero": np.zeros(0), "length": 2**40}))
    with pytest.raises(ProtocolError, match="a sum of"):
        unpack_report(body, SLOT, "a", Nonzeros(), None)


@every_codec
@given(data=st.data())
def test_a_damaged_report_gives_a_protocol_error_or_a_row_of_the_right_shape(codec, data):
    body = bytearray(pack_report(own_report(codec), codec))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        with np.errstate(all="ignore"):
            back = unpack_report(bytes(body), SLOT, "a", codec, LENGTH)
    except ProtocolError:
        return
    if isinstance(back.payload, Updates):
        assert back.payload.values.shape == (1, LENGTH)
        assert back.payload.weights.shape == (1,)


# ------------------------------------------------------------------------------------------------- sums and plans


@pytest.mark.parametrize("row", [[0.0] * 8, [0, 0, 3.5, 0, 0, 0, 0, -1e-300], [1.0] * 8, []], ids=repr)
def test_sums_come_back_bit_for_bit_and_sparse_ones_are_short(row):
    values = np.array([row])
    packed = Nonzeros().pack(Updates(("a",), values, np.ones(1)))
    back, side = Nonzeros().unpack(packed, len(row))
    assert back.tobytes() == values.tobytes()
    assert side == {}
    if len(row) and np.count_nonzero(row) < 3:
        assert "values" not in packed


def test_a_histogram_travels_in_few_bytes():
    row = np.zeros((1, 4096))
    row[0, [5, 999]] = 1, 3
    body = pack_report(Report(SLOT, ("a",), Updates(("a",), row, np.ones(1))), Nonzeros())
    assert len(body) < 1000
    assert unpack_report(body, SLOT, "a", Nonzeros(), 4096).payload.values.tolist() == row.tolist()


def test_a_client_is_sent_its_own_mail_and_variant_only():
    plan = Plan(
        SLOT, True, {"params": np.ones(3)}, (None, 2), Key.of(0), {"a": 4, "b": 9}, {"a": "for a", "b": "for b"}
    )
    small, vectors = plan_parts(plan, "a")
    assert (small["variant"], small["mail"]) == (4, "for a")
    assert "b" not in json.dumps({k: v for k, v in small.items() if k != "key"}).replace("broadcast", "")
    assert unpack(pack(small))["key"] == Key.of(0).material
    assert list(vectors) == ["params"]


def test_what_is_measured_is_what_the_codec_saves():
    transforms = (Quantize(bits=8),)
    block = support.block(np.random.default_rng(0).normal(size=(1, 4000)))
    small, plan = (lambda sent: (sent[0], sent[2]))(support.encoded(transforms, block))
    sizes = [
        len(pack_report(Report(plan.slot, ("c0",), one), c))
        for one, c in ((small, chain.codec(transforms)), (block, Raw()))
    ]
    assert sizes[0] < sizes[1] / 3.5


@pytest.mark.parametrize("task", ["train", "evaluate", "prepare"])
@pytest.mark.parametrize("transform", [None, Quantize(bits=4), TopK(fraction=0.5)])
def test_a_client_that_refuses_sends_its_reason_and_no_row(task, transform):
    federation = support.linear(transforms=(transform,) if transform else ())
    slot, none = Slot(0, 0, "update", task), Updates((), np.zeros((0, 0), np.float32), np.zeros(0))
    body = pack_report(Report(slot, (), none, {"a": "no training examples"}), federation.codec(slot))
    report = unpack_report(body, slot, "a", federation.codec(slot), None)
    assert (report.clients, dict(report.refused)) == ((), {"a": "no training examples"})
