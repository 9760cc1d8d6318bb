"""Two processes by gloo, started as torchrun does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl.distributed import gathered_lists, gathered_unequal, join

SCRIPT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from medssl.distributed import gathered_lists, gathered_unequal, join, leave, rank

def threads_of_the_group():
    names = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
    return torch.tensor(sum("gloo" in name for name in names))

join()
join()  # a second time changes nothing
me = rank()
assert dist.get_world_size() == 2 and dist.get_rank() == me
rows = torch.arange(2.0 * (3 * me + 1)).reshape(-1, 2) + 100 * me  # one row, and four
into = torch.full((7, 2), -1.0)
found = {
    "rows": gathered_unequal(rows),
    "none": gathered_unequal(rows[: 4 * me]),
    "counts": gathered_unequal(torch.tensor([7] * me, dtype=torch.int64)),
    "into": gathered_unequal(rows, into=into),
    "room": into,
    "lists": torch.tensor(gathered_lists([me] * (me + 2))),
    "threads within": threads_of_the_group(),
}
network = DistributedDataParallel(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
del network
leave()
found["threads after"] = threads_of_the_group()
torch.save(found, f"{sys.argv[1]}.{me}.pt")
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes got, by its number."""
    folder = tmp_path_factory.mktemp("gathered")
    (folder / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, folder / "script.py", folder / "found"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"found.{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_of_unequal_numbers_come_in_the_order_of_the_processes(found, rank):
    second = torch.arange(8.0).reshape(4, 2) + 100
    expected = torch.cat([torch.tensor([[0.0, 1.0]]), second])
    assert found[rank]["rows"].equal(expected)
    assert found[rank]["none"].equal(second)  # nothing of the first
    assert found[rank]["counts"].tolist() == [7]
    assert found[rank]["into"].equal(expected)
    assert found[rank]["room"].equal(torch.cat([expected, torch.full((2, 2), -1.0)]))


@pytest.mark.parametrize("rank", [0, 1])
def test_lists_come_one_after_the_other(found, rank):
    assert found[rank]["lists"].tolist() == [0, 0, 1, 1, 1]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_a_group_outlives_it(found, rank):
    """One that does may abort the process when the interpreter ends."""
    assert found[rank]["threads within"] > 0
    assert found[rank]["threads after"] == 0


def test_one_process_gathers_its_own():
    join()
    assert not torch.distributed.is_initialized()
    rows, into = torch.arange(6.0).reshape(3, 2), torch.zeros(5, 2)
    assert gathered_unequal(rows) is rows
    assert gathered_unequal(rows, into=into).equal(rows)
    assert into[:3].equal(rows)
    assert gathered_lists(["a"]) == ["a"]
