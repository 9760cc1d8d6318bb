"""Patches of pictures and volumes: what an encoder says of each, and those of all normal items."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import NormalData
from anomaly.maps import valid_patches
from anomaly.valid import by_size
from medssl.distributed import gathered, gathered_lists, gathered_unequal, join, processes, rank
from medssl.models.alignment import grid_offset
from medssl.models.encoder import Encoder

_MEMORY_SHARE = 0.25  # patches larger than this share of the memory go to the workdir
_COLUMNS = 64  # of the patches, put in order at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalPatches:
    """The valid patches of normal items, held once.

    patches: (N, E) float32, item after item, each row by row; where they are many, on the CPU or
        in a mapped file.
    owner: (N,) int64 on the CPU, the position in `items` of the item that each came from.
    items: the ids of all items, each once.
    size: pixels, one per axis, that all images have.
    """

    patches: Tensor
    owner: Tensor
    items: list[str]
    size: tuple[int, ...]


def patch_grid(
    encoder: Encoder,
    images: Tensor,
    layers: Sequence[str],
    *,
    window: int = 1,
    mode: Literal["linear", "nearest"] = "linear",
) -> Tensor:
    """Features of each patch of (B, C, *spatial): (B, *grid, E), the grid being the first layer's.

    window, mode: as of `side_by_side`.
    """
    if images.ndim != 2 + len(encoder.axes):
        raise ValueError(
            f"the encoder takes images of axes {encoder.axes}, got {tuple(images.shape)}"
        )
    if images.shape[1] != encoder.in_channels:
        raise ValueError(
            f"the encoder takes {encoder.in_channels} channels, got {images.shape[1]}; "
            "set channels in the preprocessing"
        )
    return side_by_side(encoder.feature_maps(images, layers), window=window, mode=mode)


def side_by_side(
    maps: Sequence[Tensor], *, window: int = 1, mode: Literal["linear", "nearest"] = "linear"
) -> Tensor:
    """Feature maps (B, E, *grid) of several layers on the grid of the first: (B, *grid, E of all).

    window: units whose mean a feature is, along each axis; odd. Zeros surround the feature maps.
    mode: how the maps of the other layers are brought to the grid of the first.
    """
    means = [_means(each, window) if window > 1 else each for each in maps]
    grid = means[0].shape[2:]
    how = {2: "bilinear", 3: "trilinear"}[len(grid)] if mode == "linear" else mode
    others = [F.interpolate(each, grid, mode=how) for each in means[1:]]
    return torch.cat([means[0], *others], dim=1).movedim(1, -1)


def _means(features: Tensor, window: int) -> Tensor:
    """Means over `window` units along each axis of (B, E, *grid), zeros around it."""
    if features.ndim == 4:
        return F.avg_pool2d(features, window, stride=1, padding=window // 2)
    padded = F.pad(features, [window // 2] * 6)  # torch's own padding refuses a thin grid
    return F.avg_pool3d(padded, window, stride=1)


def collect(
    normal: NormalData,
    describe: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    workdir: Path | None = None,
    max_patches: int | None = None,
    seed: int = 0,
) -> NormalPatches:
    """The patches of all normal items; every process gets all, and has described its share.

    describe: images (B, C, *spatial) on `device`, `filled` where they are not valid, to features
        (B, *grid, E).
    max_patches: keep an even random sample of at most so many; the same for any number of
        processes.
    Raises ValueError for images of two sizes, and where no item has a valid pixel.
    """
    share, first = own_share(normal)
    reading = _Reading(len(share), first, max_patches=max_patches, seed=seed)
    for batch in share.batches():
        for _, pixels, valid in by_size(batch.images["image"].to(device)):
            grid = describe(pixels)
            cells = valid_patches(valid, grid.shape[1:-1])
            found = grid[cells]  # (n, E)
            check_finite(found, batch.items)
            reading.add(found, cells, tuple(valid.shape[1:]), workdir)  # refuses a second size
        reading.items += batch.items
    return reading.together(workdir)


def own_share(normal: NormalData) -> tuple[NormalData, int]:
    """Whole batches of the normal items for this process, and the row of the first item.

    Processes take them one after the other in the order of their numbers; one process takes all.
    """
    count = processes()
    if count == 1:
        return normal, 0
    join()
    batches = ceil(len(normal) / normal.batch_size)
    if batches < count:
        raise ValueError(
            f"{len(normal)} normal items are {batches} batches of {normal.batch_size}, too few for "
            f"{count} processes; start fewer or lower the batch size"
        )
    start, end = (batches * (rank() + i) // count * normal.batch_size for i in (0, 1))
    return normal.picked(range(start, min(end, len(normal)))), start


class _Reading:
    """Patches of this process as they come, and a sample of them where they would be too many.

    A patch's place is the row of its item times the patches of an item, plus its own in the grid.
    Each gets a random key of its place, and those with the smallest keys stay: a reservoir
    (Efraimidis & Spirakis 2006) that does not depend on who has read what.
    """

    def __init__(self, count: int, first: int, *, max_patches: int | None, seed: int) -> None:
        self.count, self.row, self.max_patches, self.seed = count, first, max_patches, seed
        self.items: list[str] = []
        self.size: tuple[int, ...] | None = None
        self.filled = 0

    def add(
        self, found: Tensor, valid: Tensor, size: tuple[int, ...], workdir: Path | None
    ) -> None:
        """Features (n, E) of the valid ones of the patches (B, *grid); size: in pixels."""
        self.per_item = valid[0].numel()
        if self.size is None:
            self.size = size
            most = self.count * self.per_item
            self.room = most if self.max_patches is None else min(most, self.max_patches)
            self.rows = room(self.room, found.shape[1], found.device, workdir)
            self.places = torch.empty(self.room, dtype=torch.int64)
            self.keys = torch.empty(self.room, dtype=torch.float64)
        if size != self.size:
            raise ValueError(
                f"normal images must have one size, got {self.size} and {size}; set size in the "
                "preprocessing"
            )
        inside = valid.flatten(1).cpu()
        items = torch.arange(self.row, self.row + len(valid))[:, None]
        places = (items * self.per_item + torch.arange(self.per_item))[inside]
        keys = self._keys(len(valid))[inside]
        self.row += len(valid)
        self._keep(found, places, keys)

    def _keep(self, found: Tensor, places: Tensor, keys: Tensor) -> None:
        free = min(self.room - self.filled, len(found))
        end = self.filled + free
        self._put(slice(self.filled, end), slice(free), found, places, keys)
        self.filled = end
        if free == len(found):
            return
        every = torch.cat([self.keys[:end], keys[free:]])
        stays = torch.zeros(len(every), dtype=torch.bool)
        stays[every.argsort(stable=True)[:end]] = True
        leaving = (~stays[:end]).nonzero()[:, 0]
        entering = stays[end:].nonzero()[:, 0] + free
        self._put(leaving, entering, found, places, keys)

    def _put(
        self,
        to: slice | Tensor,
        source: slice | Tensor,
        found: Tensor,
        places: Tensor,
        keys: Tensor,
    ) -> None:
        self.rows[to] = found[source].to(self.rows.device)
        self.places[to], self.keys[to] = places[source], keys[source]

    def _keys(self, count: int) -> Tensor:
        """(count, patches of an item) float64 for the items that come next."""
        if self.max_patches is None:
            return torch.zeros(count, self.per_item, dtype=torch.float64)
        rows = range(self.row, self.row + count)
        keys = [np.random.default_rng((self.seed, row)).random(self.per_item) for row in rows]
        return torch.from_numpy(np.stack(keys))

    def together(self, workdir: Path | None) -> NormalPatches:
        """What all processes have read, in the order of the items."""
        assert self.size is not None
        sizes = gathered(torch.tensor([self.size]))
        if (sizes != sizes[0]).any():
            raise ValueError(
                f"normal images must have one size, got {sizes.unique(dim=0).tolist()}; set size "
                "in the preprocessing"
            )
        order = self._order()
        if not order.equal(torch.arange(len(order))):
            for columns in self.rows.split(_COLUMNS, dim=1):  # the patches are held once
                columns[: len(order)] = columns[order]
        rows, places = self.rows[: len(order)], gathered_unequal(self.places[order])
        if processes() > 1:
            rows = gathered_unequal(
                rows, into=room(len(places), rows.shape[1], rows.device, workdir)
            )
        ids = gathered_lists(self.items)
        if len(places) == 0:
            raise ValueError(f"none of the {len(ids)} normal items has a valid pixel")
        position = {item: i for i, item in enumerate(dict.fromkeys(ids))}
        of_row = torch.tensor([position[item] for item in ids])
        owner = of_row[places // self.per_item]
        return NormalPatches(patches=rows, owner=owner, items=list(position), size=self.size)

    def _order(self) -> Tensor:
        """Rows of this process that stay among those of all, by place."""
        keys, places = self.keys[: self.filled], self.places[: self.filled]
        order = places.argsort()
        everybodys = gathered_unequal(keys)
        if self.max_patches is None or len(everybodys) <= self.max_patches:
            return order
        last = everybodys.sort().values[self.max_patches - 1]
        return order[keys[order] <= last]


@torch.inference_mode(False)
@torch.enable_grad()
def patch_offset(encoder: Encoder, layer: str, size: Sequence[int]) -> Tensor:
    """How far the units of a layer look beside the middle of their cell: (2,) or (3,) pixels.

    Of pictures as of `grid_offset`; of volumes the same, from one volume of generated noise.
    """
    if len(size) == 2:
        return grid_offset(encoder, layer, (size[0], size[1]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, encoder.in_channels, *size, generator=generator)
    noise = noise.to(next(encoder.parameters()).device).requires_grad_()
    (features,) = encoder.feature_maps(noise, [layer])  # (1, E, d, h, w)
    signs = torch.randint(0, 2, features.shape[:2], generator=generator).to(features) * 2 - 1
    grid = features.shape[2:]
    offsets = []
    for unit in product(*(range((n - 1) // 2, n // 2 + 1) for n in grid)):  # those in the middle
        place: Any = (..., *unit)
        answer = (signs * features[place]).sum()
        (gradient,) = torch.autograd.grad(answer, noise, retain_graph=True)
        weight = gradient.square()[0].sum(0)  # (D, H, W)
        cell = [(u + 0.5) * n / g - 0.5 for u, n, g in zip(unit, size, grid, strict=True)]
        offsets.append(_centre(weight) - torch.tensor(cell, device=weight.device))
    return torch.stack(offsets).mean(0)


def _centre(weight: Tensor) -> Tensor:
    """Centre of mass (3,) of weights (D, H, W), in voxels; the middle where there is no mass."""
    middle = (torch.tensor(weight.shape, device=weight.device) - 1) / 2
    places = [torch.arange(n, device=weight.device, dtype=weight.dtype) for n in weight.shape]
    along = [weight.sum([a for a in range(3) if a != axis]) for axis in range(3)]
    centre = torch.stack([row @ place for row, place in zip(along, places, strict=True)])
    return torch.where(weight.sum() > 0, centre / weight.sum(), middle)


def room(count: int, width: int, device: torch.device, workdir: Path | None) -> Tensor:
    """An empty (count, width) float32 tensor, memory-mapped where it is large for the memory."""
    size = 4 * count * width
    if device.type == "cuda" and size < _MEMORY_SHARE * torch.cuda.mem_get_info(device)[1]:
        return torch.empty(count, width, device=device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if workdir is None or size < _MEMORY_SHARE * memory:
        return torch.empty(count, width)
    with tempfile.NamedTemporaryFile(dir=workdir, prefix="patches.") as file:
        return torch.from_file(file.name, shared=True, size=count * width).reshape(count, width)


def check_finite(features: Tensor, items: Sequence[str]) -> None:
    """Raises ValueError, naming the items, where a feature is NaN or infinite."""
    if not features.isfinite().all():
        raise ValueError(
            f"the features of items {', '.join(items)} are not all finite; mark NaN pixels as not "
            "valid, or choose another encoder"
        )
