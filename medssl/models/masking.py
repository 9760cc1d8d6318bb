"""Which patches of a picture are hidden."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 4  # patches of a block
_ASPECT = (0.3, 1 / 0.3)  # of a block, height / width
_TRIES = 10  # to place one more block


def block_mask(height: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Rectangles that hide `count` patches together, (height, width) bool.

    As in BEiT and DINOv2: blocks of at least 4 patches with an aspect of 0.3 to 3.3, drawn until
    none fits any more; what is then missing is made up by single patches, so that exactly `count`
    are hidden.
    """
    mask = torch.zeros(height, width, dtype=torch.bool)
    left = count
    while left >= _SMALLEST:
        for _ in range(_TRIES):
            draws = torch.rand(4, generator=generator).tolist()
            area = _SMALLEST + draws[0] * (left - _SMALLEST)
            low, high = (math.log(aspect) for aspect in _ASPECT)
            aspect = math.exp(low + draws[1] * (high - low))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (1 <= h < height and 1 <= w < width):
                continue
            top, start = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
            block = mask[top : top + h, start : start + w]
            fresh = int((~block).sum())
            if 0 < fresh <= left:
                block.fill_(True)
                left -= fresh
                break
        else:
            break
    if left:
        free = (~mask).flatten().nonzero()[:, 0]
        picked = free[torch.randperm(len(free), generator=generator)[:left]]
        mask.view(-1)[picked] = True
    return mask


def stratified_masks(
    rows: slice,
    total: int,
    size: Sequence[int],
    *,
    ratio: tuple[float, float],
    probability: float,
    seed: int,
) -> Tensor:
    """Masks of some rows of a batch, (rows, *size) bool, whoever asks for which of them.

    The share `probability` of all rows is hidden in part; how much is spread evenly: each of these
    rows has a range of `ratio` of its own and draws within it (DINOv2, its masks of a batch).

    rows: which, of `total`. seed: of the step.
    size: (h, w) in patches, or (d, h, w) of a volume, where a patch is hidden at all depths or at
        none (tubes, as VideoMAE's: https://arxiv.org/abs/2203.12602), because its neighbours across
        the slices give it away.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    masked = round(probability * total)
    place = torch.empty(total, dtype=torch.int64)
    place[order] = torch.arange(total)  # a row whose place is `masked` or beyond stays whole
    masks = torch.zeros(rows.stop - rows.start, *size, dtype=torch.bool)
    for mask, row in zip(masks, range(rows.start, rows.stop), strict=True):
        stratum = int(place[row])
        if stratum < masked:
            own = torch.Generator().manual_seed((seed + 7919 * (row + 1)) & (2**63 - 1))
            share = (stratum + torch.rand(1, generator=own).item()) / masked
            hidden = ratio[0] + share * (ratio[1] - ratio[0])
            height, width = size[-2:]
            count = max(1, int(hidden * height * width))
            mask.copy_(block_mask(height, width, count, own))
    return masks
