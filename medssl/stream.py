"""Which sample comes when in a training, and its views; the same for any number of workers."""

import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medssl.data.sample import Sample
from medssl.stopping import leave_stopping_to_the_loop

Views = Callable[[Sample, torch.Generator], dict[str, Tensor]]
Unit = Literal["item", "study", "patient"]
Batch = tuple[tuple[str, ...], dict[str, Tensor]]
"""Item ids for messages; views by name, each (B, ...), with "item", "group", "study" (B,) int64."""


class Stream:
    """An endless order of samples, the same for a seed wherever one starts to read it.

    one_per: what a batch holds at most one of. With "item" every item comes once per epoch and
        nothing is left out; with "study" or "patient" an epoch draws one item of each, and the
        rest that does not fill a batch waits for the next epoch.
    batch_size: samples that are compared with each other.
    """

    def __init__(
        self, samples: Sequence[Sample], *, batch_size: int, one_per: Unit, seed: int
    ) -> None:
        self.units = _units(samples, one_per)
        self.seed = seed
        self.per_epoch = len(self.units)
        if one_per != "item":
            self.per_epoch -= len(self.units) % batch_size
            if self.per_epoch == 0:
                raise ValueError(
                    f"a batch of {batch_size} must not hold a {one_per} twice, and there are only "
                    f"{len(self.units)}; lower the batch size to at most that"
                )
        self._epoch, self._order = -1, list[int]()

    def at(self, position: int) -> tuple[int, int]:
        """The epoch of the sample at `position` and its index among the samples."""
        epoch, offset = divmod(position, self.per_epoch)
        if epoch != self._epoch:
            generator = generator_for(self.seed, epoch, "order")
            units = [self.units[i] for i in torch.randperm(len(self.units), generator=generator)]
            draws = torch.rand(len(units), generator=generator).tolist()
            self._order = [
                unit[int(draw * len(unit))] for unit, draw in zip(units, draws, strict=True)
            ]
            self._epoch = epoch
        return epoch, self._order[offset]


def batches(
    samples: Sequence[Sample],
    views: Views,
    stream: Stream,
    *,
    start: int,
    stop: int,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    share: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """The views of the samples at positions `start` to `stop` of the stream, batch by batch.

    Close it when no more are asked for: its worker processes end then.

    share: (which, of how many) equal and contiguous parts of each batch to give.
    """
    order = [stream.at(position) for position in range(start, stop)]
    which, size = share[0], batch_size // share[1]
    firsts = range(which * size, len(order), batch_size)
    loader: DataLoader[Any] = DataLoader(
        _ViewsOf(samples, views, stream.seed),
        batch_sampler=[order[first : first + size] for first in firsts],
        num_workers=workers,
        collate_fn=_side_by_side,
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_the_loop,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else the loader draws from the training's random numbers
    )
    found = iter(loader)
    try:
        yield from found
    finally:
        if workers:  # they ignore signals: left to the collector, they may outlast the interpreter
            cast(Any, found)._shutdown_workers()


def workers_for(workers: int | None) -> int:
    """The number of loader processes; None leaves one core to the network, and takes at most 8."""
    if workers is None:
        return min(8, (os.cpu_count() or 1) - 1)
    return workers


def generator_for(seed: int, epoch: int, index: int | str) -> torch.Generator:
    """A random generator that depends on these three alone.

    index: of a sample, not its id: ids are salted, and a training must not depend on the key.
    """
    return torch.Generator().manual_seed(number_for(f"{seed}/{epoch}/{index}"))


def number_for(text: str) -> int:
    """A seed of 63 bits that stands for `text` on every machine."""
    return _number(text) & (2**63 - 1)


class _ViewsOf(Dataset[tuple[Sample, dict[str, Tensor]]]):
    """The views of a sample, addressed by (epoch, index); the sample comes without its pixels."""

    def __init__(self, samples: Sequence[Sample], views: Views, seed: int) -> None:
        self.samples, self.views, self.seed = samples, views, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[Sample, dict[str, Tensor]]:
        epoch, index = at
        sample = self.samples[index]
        views = self.views(sample, generator_for(self.seed, epoch, index))
        return replace(sample, images={}, points=None, point_labels=None, mask=None), views


def _side_by_side(rows: Sequence[tuple[Sample, dict[str, Tensor]]]) -> Batch:
    samples = [sample for sample, _ in rows]
    batch = {name: torch.stack([views[name] for _, views in rows]) for name in rows[0][1]}
    batch["item"] = torch.tensor([_number(s.item) for s in samples])
    batch["group"] = torch.tensor([_number(s.group or s.item) for s in samples])
    batch["study"] = torch.tensor([_number(s.study or s.item) for s in samples])
    return tuple(sample.item for sample in samples), batch


def _number(text: str) -> int:
    """A 64-bit signed number that stands for `text` on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def _units(samples: Sequence[Sample], one_per: Unit) -> list[list[int]]:
    """Indices of the samples that belong together, one list per item, study or patient."""
    if one_per == "item":
        return [[index] for index in range(len(samples))]
    units: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        name = sample.study if one_per == "study" else sample.group
        units.setdefault(name or f"item {sample.item}", []).append(index)
    return list(units.values())
