"""Which places of two feature maps show the same, by where they lie and by what they hold."""

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_positions(place: Tensor, size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Where the cells of a feature map look, in the picture or volume that its crop was cut from.

    place: (..., n, n + 1), n of 2 or 3, from (row, column, 1) in the crop to the picture, or with a
        slice before the row: `medssl.data.views.place`.
    size: n pixels of the crop. grid: n cells of the map, which divide the crop evenly.
    Returns (..., P, n), row by row.
    """
    centres = [
        (torch.arange(count, device=place.device) + 0.5) * side / count - 0.5
        for side, count in zip(size, grid, strict=True)
    ]
    cells = torch.cartesian_prod(*centres).to(place)  # (P, n)
    return cells @ place[..., :-1].mT + place[..., None, :, -1]


def by_location(cosine: Tensor, first: Tensor, second: Tensor, count: int) -> Tensor:
    """Mean cosine of places with the nearest place of the other map, over the `count` closest.

    cosine: (..., P, Q) between the features of two maps. first: (..., P, n), second: (..., Q, n)
    positions in one frame. Ties go to the first place. Returns (...), from -1 to 1.
    """
    near, partner = torch.cdist(first, second).min(-1)  # (..., P)
    found = cosine.gather(-1, partner[..., None].expand(*cosine.shape[:-1], 1))[..., 0]
    closest = near.topk(min(count, near.shape[-1]), dim=-1, largest=False).indices
    return found.gather(-1, closest.expand(*found.shape[:-1], -1)).mean(-1)


def by_feature(cosine: Tensor, count: int) -> Tensor:
    """Mean cosine of places with the most similar place of the other map, over the `count` best.

    cosine: (..., P, Q). Returns (...), from -1 to 1; for features of unit length the most similar
    is the nearest by Euclidean distance.
    """
    return cosine.amax(-1).topk(min(count, cosine.shape[-2]), dim=-1).values.mean(-1)
