"""Two processes take the step that one takes on the whole batch, for every method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl.objectives.base import Objective
from tests.objectives.test_contract import methods

SCRIPT = Path(__file__).with_name("first_gradients.py")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of one process and of two, by method and parameter."""
    folder = tmp_path_factory.mktemp("gradients")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = {
        count: subprocess.Popen(
            [sys.executable, *(two if count == 2 else []), SCRIPT, folder / f"{count}.pt"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for count in (1, 2)
    }
    for process in started.values():
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return {count: torch.load(folder / f"{count}.pt", weights_only=True) for count in (1, 2)}


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_two_processes_have_the_gradient_of_one_on_the_whole_batch(
    gradients, method: type[Objective]
):
    alone, together = (gradients[count][method.__name__] for count in (1, 2))
    assert alone.keys() == together.keys()
    largest = max(gradient.abs().max() for gradient in alone.values())
    assert largest > 0
    for name, gradient in alone.items():
        difference = (together[name] - gradient).abs().max()
        assert difference <= 1e-5 * largest, name
