import csv
import math

import pytest

from hansa.training.history import Row, hours_to, read_history, read_rows, write_csv

FIELDS = {"round": 3, "loss": 1 / 3, "num_clients": 4, "bytes_up": 10, "bytes_down": 2**40, "seconds": 0.125}
PLAIN = Row(metrics={"f1": 0.1, "auc": 0.9}, **FIELDS)
TIMED = Row(metrics={"f1": 0.1, "auc": 0.9}, clock_s=7260.1, num_late=3, **FIELDS)
PRIVATE = Row(metrics={"f1": math.nan, "auc": 1e-300}, epsilon=4.0, delta=1e-6, **{**FIELDS, "loss": math.nan})


def same(one, two):
    flat = [{n: None if isinstance(v, float) and math.isnan(v) else v for n, v in row.items()} for row in (one, two)]
    return flat[0] == flat[1] and list(one) == list(two)


@pytest.mark.parametrize("row", [PLAIN, PRIVATE, TIMED], ids=["plain", "private", "timed"])
def test_a_row_survives_its_flat_mapping_and_csv_exactly(row, tmp_path):
    assert same(Row.of(dict(row)), row)
    write_csv([row, PLAIN], tmp_path / "history.csv")
    back = read_history(tmp_path / "history.csv")
    assert same(back[0], row)
    assert same(back[1], PLAIN)
    assert isinstance(back[0].bytes_down, int)


def test_columns_stand_in_reading_order_and_unknown_cells_are_empty(tmp_path):
    write_csv([PRIVATE], tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        names, cells = csv.reader(file)
    assert names == [
        "round", "loss", "f1", "auc", "num_clients", "num_late", "bytes_up", "bytes_down", "seconds", "clock_s",
        "epsilon", "delta",
    ]  # fmt: skip
    assert cells[:3] == ["3", "", ""]


def test_a_field_is_an_attribute_and_a_metric_an_entry():
    assert (PLAIN.round, PLAIN.metrics["auc"], PLAIN["auc"], PLAIN["seconds"], len(PLAIN)) == (3, 0.9, 0.9, 0.125, 12)
    with pytest.raises(KeyError):
        PLAIN["accuracy"]
    assert "auc=0.9" in repr(PLAIN)


def test_a_history_without_the_columns_of_the_clock_is_read(tmp_path):
    (tmp_path / "old.csv").write_text(
        "round,loss,num_clients,bytes_up,bytes_down,seconds,epsilon,delta\n0,0.5,4,1,2,0.1,,\n"
    )
    (row,) = read_history(tmp_path / "old.csv")
    assert (row.num_late, row.num_clients, math.isnan(row.clock_s)) == (0, 4, True)


def test_hours_to_a_target_are_those_of_the_first_round_that_reached_it():
    rows = [Row(metrics={"auc": auc}, clock_s=3600.0 * i, **FIELDS) for i, auc in enumerate((0.5, math.nan, 0.8, 0.7))]
    assert hours_to(rows, "auc", 0.7, lower_is_better=False) == 2
    assert hours_to(rows, "loss", 0.5, lower_is_better=True) == 0
    assert math.isnan(hours_to(rows, "auc", 0.9, lower_is_better=False))


def test_clients_rows_survive_csv(tmp_path):
    rows = [
        {"client": "007", "num_examples": 3, "num_test": 0, "loss": math.nan},
        {"client": 'a,"b"', "num_examples": 1, "num_test": 2},
    ]
    write_csv(rows, tmp_path / "clients.csv")
    back = read_rows(tmp_path / "clients.csv")
    assert back[0]["client"] == "007"
    assert back[0]["num_examples"] == 3
    assert math.isnan(back[0]["loss"])
    assert back[1]["client"] == 'a,"b"'
