import math

import numpy as np
import pytest

from hansa.core.errors import InputError
from hansa.core.round import ServerState
from hansa.training.checkpoint import Checkpoint, replace_file
from hansa.training.history import Row
from hansa.wire import pack

ROW = Row(round=0, loss=math.nan, metrics={"z": 1.0, "a": 2.0}, num_clients=1, bytes_up=2, bytes_down=3, seconds=0.5)
POINT = Checkpoint(
    state=ServerState({"params": np.array([1, -0.0, 3], np.float32), "m": np.arange(3.0)}, (None, 3, {"norm": 0.5})),
    totals=(np.array([1 / 3, 2]),),
    next_round=1,
    history=(ROW,),
    traffic=(5, 7),
    scored_on="the server's own data",
    settings="abc",
    clients={"memory": {"b": {"a.control": np.ones(3, np.float32)}}, "refused": []},
)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    POINT.write(tmp_path / "point")
    back = Checkpoint.read(tmp_path / "point")
    assert back.state.algorithm["params"].tobytes() == POINT.state.algorithm["params"].tobytes()
    assert back.state.algorithm["params"].dtype == np.float32
    assert back.state.algorithm["m"].tolist() == [0, 1, 2]
    assert back.state.transforms == (None, 3, {"norm": 0.5})
    assert back.totals[0].tobytes() == POINT.totals[0].tobytes()
    assert (back.next_round, back.traffic, back.stopped, back.scored_on, back.settings) == (
        1, (5, 7), False, "the server's own data", "abc"
    )  # fmt: skip
    assert list(back.history[0]) == list(ROW)
    assert back.clients["memory"]["b"]["a.control"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "body", [b"", b"garbage", pack({"algorithm": {}}), pack([1, 2]), pack({"history": 3}), pack(None)], ids=range(6)
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(body, tmp_path):
    (tmp_path / "point").write_bytes(body)
    with pytest.raises(InputError, match="point: expected a checkpoint of hansa"):
        Checkpoint.read(tmp_path / "point")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    POINT.write(tmp_path / "point")
    body = (tmp_path / "point").read_bytes()
    (tmp_path / "point").write_bytes(body[: len(body) // 2])
    with pytest.raises(InputError):
        Checkpoint.read(tmp_path / "point")


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, [b"o", b"ne"])
    replace_file(path, [b"two"])
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    POINT.write(tmp_path / "point")
    before = (tmp_path / "point").read_bytes()
    broken = Checkpoint(state=ServerState({"params": object()}, ()), totals=(), next_round=2, history=())
    with pytest.raises(TypeError):
        broken.write(tmp_path / "point")
    assert (tmp_path / "point").read_bytes() == before
