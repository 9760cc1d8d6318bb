"""Checkpoints: whole or not at all, and never for another training."""

import pickle
from pathlib import Path

import pytest
import torch

from medssl import checkpoint
from medssl.checkpoint import CheckpointError, read_checkpoint, write_checkpoint


def test_the_state_comes_back(tmp_path: Path):
    write_checkpoint(tmp_path, {"weights": torch.arange(3.0), "step": 7}, {"seed": 1})
    state = read_checkpoint(tmp_path, {"seed": 1})
    assert state is not None
    assert state["step"] == 7
    assert torch.equal(state["weights"], torch.arange(3.0))


def test_no_checkpoint_is_none(tmp_path: Path):
    assert read_checkpoint(tmp_path, {}) is None


def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch):
    write_checkpoint(tmp_path, {"step": 1}, {})

    def crash(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, {"step": 2}, {})
    state = read_checkpoint(tmp_path, {})
    assert state is not None
    assert state["step"] == 1


def test_the_new_checkpoint_takes_its_name_in_one_step(tmp_path: Path, monkeypatch):
    write_checkpoint(tmp_path, {"step": 1}, {})

    def crash(source, target):
        raise OSError("power cut")

    monkeypatch.setattr(checkpoint.os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        write_checkpoint(tmp_path, {"step": 2}, {})
    state = read_checkpoint(tmp_path, {})
    assert state is not None
    assert state["step"] == 1


def test_another_training_is_named_by_what_differs(tmp_path: Path):
    write_checkpoint(tmp_path, {}, {"seed": 1, "batch_size": 8})
    with pytest.raises(CheckpointError, match="batch_size was 8 and is 16; resume with the same"):
        read_checkpoint(tmp_path, {"seed": 1, "batch_size": 16})


def test_a_checkpoint_is_never_unpickled(tmp_path: Path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Hostile()}, tmp_path / "checkpoint.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path, {})
    assert not (tmp_path / "ran").exists()
