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
    """Of one process, of two, and of two that share the weights out, by method and parameter."""
    folder = tmp_path_factory.mktemp("gradients")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {
        "one": [SCRIPT, folder / "one.pt"],
        "two": [*two, SCRIPT, folder / "two.pt"],
        "sharded": [*two, SCRIPT, folder / "sharded.pt", "sharded"],
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands.values()
    ]
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in commands}


@pytest.mark.parametrize("way", ["two", "sharded"])
@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_two_processes_have_the_gradient_of_one_on_the_whole_batch(
    gradients, method: type[Objective], way: str
):
    alone, together = (gradients[name][method.__name__] for name in ("one", way))
    assert alone.keys() == together.keys()
    names = [name for name in alone if not name.endswith(" after")]
    largest = max(alone[name].abs().max() for name in names)
    assert largest > 0
    for name in names:
        difference = (together[name] - alone[name]).abs().max()
        assert difference <= 1e-5 * largest, name


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_shared_weights_come_back_whole_and_like_those_that_were_not_shared(
    gradients, method: type[Objective]
):
    each, shared = (gradients[name][method.__name__] for name in ("two", "sharded"))
    for name in (name for name in each if name.endswith(" after")):
        torch.testing.assert_close(shared[name], each[name], atol=1e-3, rtol=1e-3)
