"""Parts are whole or absent, and work with another header is not continued."""

import math
import multiprocessing
import os

import pytest

from pipelines.journal import Journal, alone, read_header, write_whole

HEADER = {"manifest": "ab12", "model": "cd34", "batch_size": 8}


def test_rows_come_back_bit_for_bit(tmp_path):
    rows = [{"item": "a", "score": math.pi / 7, "p": 0.1 + 0.2, "boxes": [[0, 1]], "error": None}]
    Journal(tmp_path / "journal", HEADER).write(3, rows)
    again = Journal(tmp_path / "journal", HEADER)
    assert again.read(3) == rows
    assert [part for part in range(5) if again.has(part)] == [3]


def test_a_crash_while_writing_leaves_no_part(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal", HEADER)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        journal.write(0, [{"item": "a"}])
    assert not Journal(tmp_path / "journal", HEADER).has(0)


def test_another_model_is_named_and_refused(tmp_path):
    Journal(tmp_path / "journal", HEADER)
    with pytest.raises(ValueError, match=r"model cd34 \(now ef56\); choose another --out"):
        Journal(tmp_path / "journal", HEADER | {"model": "ef56"})
    assert read_header(tmp_path / "journal") == HEADER


def test_a_value_that_json_cannot_hold_is_refused(tmp_path):
    journal = Journal(tmp_path / "journal", HEADER)
    with pytest.raises(ValueError, match="JSON"):
        journal.write(0, [{"score": math.nan}])
    assert not journal.has(0)


def test_a_second_process_is_kept_out_and_let_in_afterwards(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with alone(tmp_path / "out"):
            assert "another process" in pool.apply(enter, [tmp_path / "out"])
        assert pool.apply(enter, [tmp_path / "out"]) == "in"


def enter(folder: os.PathLike) -> str:
    """In the other process: "in", or why not."""
    try:
        with alone(folder):
            return "in"
    except ValueError as error:
        return str(error)


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "table.csv"
    write_whole(file, "old")
    write_whole(file, b"new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
