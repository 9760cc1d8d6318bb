"""Damaged files of every kind end in data or a typed error; the full run is in benchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "fuzz_readers.py"


def run(files: int, seed: int) -> dict:
    command = [sys.executable, SCRIPT, "--files", files, "--seed", seed, "--workers", 1]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_damaged_files_end_in_data_or_a_typed_error():
    result = run(400, seed=1_000_000)
    assert result["failures"] == []
    assert result["files"] == 400
    assert result["read"] > 30
    assert sum(result["refused"].values()) > 200


@pytest.mark.slow
def test_five_thousand_damaged_files_end_in_data_or_a_typed_error():
    assert run(5000, seed=0)["failures"] == []
