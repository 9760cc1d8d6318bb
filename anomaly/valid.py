"""Only what is valid counts: images without the rest and their padding, and means over it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anomaly.base import AnomalyMap
from anomaly.maps import outside_is_nan
from medssl.data.sample import ImageBatch, Sample


@dataclass(frozen=True, slots=True)
class WholeImage:
    """The image of a sample as it is, for a training on images of one size."""

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "image" (C, *spatial), `filled`, and "valid" (*spatial) bool."""
        image = sample.images["image"]
        valid = image.valid
        if valid is None:
            valid = torch.ones(image.spatial_shape, dtype=torch.bool)
        return {"image": filled(image.pixels[None], valid[None])[0], "valid": valid}


def filled(pixels: Tensor, valid: Tensor) -> Tensor:
    """Pixels (B, C, *spatial) with their channel's lowest valid value where they are not valid.

    That is the low end of the intensities, which is what preprocessing leaves there and a
    pretraining saw. valid: (B, *spatial) bool. An image without a valid pixel is 0.
    """
    inside = valid[:, None]
    low = torch.where(inside, pixels, torch.inf).flatten(2).amin(2)  # (B, C)
    low = torch.where(low < torch.inf, low, 0.0)
    return torch.where(inside, pixels, low.reshape(*low.shape, *[1] * (valid.ndim - 1)))


def by_size(images: ImageBatch) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The images of each size together, without their padding.

    Gives their rows in the batch, pixels (b, C, *size), `filled`, and valid (b, *size).
    """
    for size in dict.fromkeys(images.sizes):
        rows = [i for i, own in enumerate(images.sizes) if own == size]
        valid = images.valid[rows][_inside(size)]
        yield rows, filled(images.pixels[rows][_inside(size)], valid), valid


def maps_by_size(images: ImageBatch, found: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Maps (B, *spatial) of images that are scored without their padding, NaN outside `valid`.

    found: pixels (b, C, *size), `filled`, and valid (b, *size) to maps (b, *size); called once per
        size.
    """
    maps = torch.full(images.valid.shape, torch.nan, device=images.pixels.device)
    for rows, pixels, valid in by_size(images):
        _lay(maps, rows, found(pixels, valid), valid)
    return maps


def scored_by_size(
    images: ImageBatch, found: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> AnomalyMap:
    """As `maps_by_size`, where the scores are not those of the maps.

    found: to scores (b,) and maps (b, *size).
    """
    maps = torch.full(images.valid.shape, torch.nan, device=images.pixels.device)
    score = maps.new_empty(len(maps))
    for rows, pixels, valid in by_size(images):
        score[rows], own = found(pixels, valid)
        _lay(maps, rows, own, valid)
    return AnomalyMap(score=score, maps={"image": maps})


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the values (B, *grid) at the positions that `valid`, bool, has: (B,), 0 at none."""
    total = torch.where(valid, values, 0.0).flatten(1).sum(1)
    return total / valid.flatten(1).sum(1).clamp(min=1)


def largest(maps: Tensor, share: float = 0.0) -> Tensor:
    """Mean of the largest values of each map (B, *spatial), NaN left out: (B,), NaN where all are.

    share: of the values that are not NaN, rounded down; at least the largest one counts.
    """
    known = (~maps.isnan()).flatten(1).sum(1, keepdim=True)  # (B, 1)
    counts = (share * known.double()).long().clamp(min=1)
    order = maps.flatten(1).nan_to_num(-torch.inf).topk(int(counts.max()), dim=1).values
    taken = torch.arange(order.shape[1], device=maps.device) < counts
    mean = torch.where(taken, order, 0.0).sum(1, keepdim=True) / counts
    return torch.where(known > 0, mean, torch.nan)[:, 0]


def _inside(size: tuple[int, ...]) -> Any:
    return (..., *(slice(side) for side in size))


def _lay(maps: Tensor, rows: list[int], own: Tensor, valid: Tensor) -> None:
    part = maps[_inside(tuple(valid.shape[1:]))]  # a view
    part[rows] = outside_is_nan(own, valid)
