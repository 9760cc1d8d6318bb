"""Weights shared out among processes: whole on disk, and gone on from by any number of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medssl.models.vit import ViTEncoder
from medssl.sharded import _blocks

SCRIPT = Path(__file__).with_name("sharded_training.py")


def run(folder: Path, final: Path, *words: str, processes: int) -> tuple[int, str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    found = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), SCRIPT, folder, final, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stderr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Undisturbed on two processes that share; stopped and gone on with, by two and by one."""
    folder = tmp_path_factory.mktemp("sharded")
    assert run(folder / "a", folder / "whole.pt", "sharded", processes=2)[0] == 0
    assert run(folder / "b", folder / "none.pt", "sharded", "stop", processes=2)[0] != 0
    assert not (folder / "none.pt").exists()
    shutil.copytree(folder / "b", folder / "c")
    assert run(folder / "b", folder / "resumed.pt", "sharded", processes=2)[0] == 0
    assert run(folder / "c", folder / "alone.pt", processes=1)[0] == 0
    names = ("whole", "resumed", "alone")
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names}


def test_a_resumed_sharded_training_ends_in_the_undisturbed_weights(weights):
    for name, tensor in weights["whole"].items():
        assert torch.equal(weights["resumed"][name], tensor), name


def test_one_process_goes_on_from_what_two_have_shared(weights):
    for name, tensor in weights["whole"].items():
        torch.testing.assert_close(weights["alone"][name], tensor, atol=1e-3, rtol=1e-3, msg=name)


def test_the_blocks_of_a_transformer_are_shared_one_by_one():
    network = ViTEncoder("test_vit", image_size=48)
    blocks = list(_blocks(network))
    assert blocks == list(network.network.blocks)
    assert list(_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == []
