"""Rows get their q-values, and three files say the same."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from pipelines.tables import COLUMNS, with_q_values, write_tables


def row(p_value: float | None, **more: object) -> dict:
    plain = dict.fromkeys(name for name in COLUMNS if name != "q_value")
    return plain | {"p_value": p_value, "score": 1.0} | more


def test_q_values_stand_after_p_values_and_leave_out_items_without_one():
    rows = with_q_values([row(0.04), row(None), row(0.01), row(0.9)])
    assert [one["q_value"] for one in rows] == pytest.approx([0.06, None, 0.03, 0.9])
    assert all(list(one) == COLUMNS for one in rows)
    assert with_q_values(rows) == rows


def test_boxes_and_class_scores_are_json_text_where_a_table_has_no_lists(tmp_path):
    rows = with_q_values([row(0.5, boxes=[[0, 1, 2, 3]], class_scores={"a": 0.5}), row(None)])
    rows[1]["class_scores"] = None
    write_tables(tmp_path, rows)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    first, second = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert (first["boxes"], first["class_scores"]) == ([[0, 1, 2, 3]], '{"a": 0.5}')
    assert (second["boxes"], second["class_scores"], second["q_value"]) == (None, None, None)
    with (tmp_path / "scores.csv").open() as stream:
        told = list(csv.DictReader(stream))
    assert (told[0]["boxes"], told[0]["class_scores"]) == ("[[0, 1, 2, 3]]", '{"a": 0.5}')
    assert (told[1]["boxes"], told[1]["p_value"]) == ("", "")


def test_boxes_of_clouds_keep_their_coordinates(tmp_path):
    rows = with_q_values([row(0.5, boxes=[[0.25, 1.5, 2.0, 3.0, 4.5, 5.125]]), row(0.2, boxes=[])])
    write_tables(tmp_path, rows)
    first, second = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert first["boxes"] == [[0.25, 1.5, 2.0, 3.0, 4.5, 5.125]]
    assert second["boxes"] == []
