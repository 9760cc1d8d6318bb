"""Moving images between grids; the affine is the only record of where a pixel is.

Every function returns a new image whose affine maps the new indices to the same places, so that the
way home from any chain of steps is `resample(result, to=source)`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.image import Image

_LETTERS = ("RL", "AP", "SI")  # patient axis -> the letter where its coordinate grows, and shrinks
_BLOCK = 1 << 22  # target voxels at a time
_TOLERANCE = 1e-3  # voxels; a source border rounded to float32 is still the border


def resize(image: Image, size: Sequence[int]) -> Image:
    """The image resized to (H, W), or a volume to (D, H, W), linearly with antialiasing.

    Pixel edges stay where they are (half-pixel centres); where two sizes are given, D stays.
    Invalid and non-finite pixels do not leak: a result is the weighted mean of the valid pixels
    under it, and is NaN and invalid where these weigh less than half.
    """
    before = tuple(image.pixels.shape[-len(size) :])
    if before == tuple(size):
        return image
    if min(size) < 1 or len(size) not in (2, len(image.spatial_shape)):
        raise ValueError(
            f"size must be (H, W) of at least (1, 1), or of each axis of {image.axes!r}, got "
            f"{tuple(size)}"
        )
    scale = [old / new for old, new in zip(before, size, strict=True)]
    step = torch.eye(4, dtype=torch.float64)
    for axis, factor in enumerate(scale, start=3 - len(size)):
        step[axis, axis], step[axis, 3] = factor, 0.5 * factor - 0.5
    pixels, valid = _over_valid(image, lambda values: _interpolate(values, size))
    spacing = image.spacing
    if spacing is not None:
        rest = len(spacing) - len(size)
        wider = zip(spacing[rest:], scale, strict=True)
        spacing = (*spacing[:rest], *(old * factor for old, factor in wider))
    return replace(image, pixels=pixels, valid=valid, affine=image.affine @ step, spacing=spacing)


def crop(image: Image, start: Sequence[int], size: Sequence[int]) -> Image:
    """The part of `size` that begins at index `start`, both one per spatial axis."""
    shape = image.spatial_shape
    _one_per_axis(image, start=start, size=size)
    for begin, length, end in zip(start, size, shape, strict=True):
        if begin < 0 or length < 1 or begin + length > end:
            raise ValueError(
                f"a crop of {tuple(size)} at {tuple(start)} does not fit into {shape}; pad first"
            )
    part = tuple(slice(b, b + n) for b, n in zip(start, size, strict=True))
    whole = (slice(None),) * (image.pixels.ndim - len(part))
    return replace(
        image,
        pixels=image.pixels[whole + part],
        valid=None if image.valid is None else image.valid[part],
        affine=_shifted(image.affine, start),
    )


def pad(image: Image, before: Sequence[int], after: Sequence[int]) -> Image:
    """The image with NaN pixels, `valid` False, added at both ends of each spatial axis."""
    _one_per_axis(image, before=before, after=after)
    if min(*before, *after) < 0:
        raise ValueError(f"padding cannot be negative: got {tuple(before)} and {tuple(after)}")
    amounts = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    valid = torch.ones(image.spatial_shape, dtype=torch.bool)
    valid = valid if image.valid is None else image.valid
    return replace(
        image,
        pixels=F.pad(image.pixels, amounts, value=math.nan),
        valid=F.pad(valid, amounts, value=False),
        affine=_shifted(image.affine, [-n for n in before]),
    )


def orientation(affine: Tensor) -> str:
    """Where the index of each array axis (d, h, w) grows to, e.g. "SPL"; the closest axes."""
    axes = _closest_axes(affine)
    return "".join(_LETTERS[p][int(affine[p, a] < 0)] for a, p in enumerate(axes))


def reorient(image: Image, code: str) -> Image:
    """A volume with its array axes permuted and flipped so that `orientation` is `code`.

    No voxel changes its value or its place. Raises ValueError for 2D images, frames other than
    "patient" and codes that do not name three different axes.
    """
    wanted = [next((p for p, pair in enumerate(_LETTERS) if c in pair), -1) for c in code]
    if sorted(wanted) != [0, 1, 2]:
        raise ValueError(f"code must name one of R/L, A/P and S/I per axis, got {code!r}")
    if len(image.spatial_shape) != 3 or image.frame != "patient":
        raise ValueError(
            f"only a volume in the patient frame can be turned, got axes {image.axes!r} "
            f"in frame {image.frame!r}"
        )
    have = _closest_axes(image.affine)
    order = [have.index(p) for p in wanted]  # new axis -> old axis
    flip = [a for a in range(3) if orientation(image.affine)[order[a]] != code[a]]
    step = torch.zeros(4, 4, dtype=torch.float64)
    step[3, 3] = 1
    for new, old in enumerate(order):
        step[old, new] = -1 if new in flip else 1
        step[old, 3] = image.spatial_shape[old] - 1 if new in flip else 0

    def turn(values: Tensor) -> Tensor:
        lead = values.ndim - 3
        values = values.permute(*range(lead), *(lead + a for a in order))
        return values.flip([lead + a for a in flip]).contiguous()

    return replace(
        image,
        pixels=turn(image.pixels),
        valid=None if image.valid is None else turn(image.valid),
        affine=image.affine @ step,
        spacing=None if image.spacing is None else tuple(image.spacing[a] for a in order),
    )


def corners(image: Image) -> Tensor:
    """Coordinates of the centres of the corner voxels: (8, 3) of a volume, (4, 3) of a picture."""
    ends = [(0, length - 1) for length in image.spatial_shape]
    index = torch.tensor([[0] * (3 - len(end)) + list(end) + [1] for end in product(*ends)])
    return (index.double() @ image.affine.T)[:, :3]


def resample(
    image: Image,
    to: Image,
    *,
    mode: Literal["linear", "nearest"] = "linear",
    outside: float = math.nan,
) -> Image:
    """The image on the grid of `to`, by (tri)linear interpolation or the nearest voxel.

    Positions are computed in float64. Up to half a voxel beyond the outermost voxel centres the
    border value holds; farther away the result is `outside` and invalid. Invalid and NaN voxels do
    not leak, as in `resize`. No antialiasing: to shrink an image, `resize` it first.
    Raises ValueError where the two lie in different frames or an affine is singular.
    """
    if image.frame != to.frame:
        raise ValueError(
            f"an image in frame {image.frame!r} has no place in frame {to.frame!r}; "
            "resample between images of one frame"
        )
    shape = (1,) * (3 - len(to.spatial_shape)) + to.spatial_shape
    source = (1,) * (3 - len(image.spatial_shape)) + image.spatial_shape
    step = _solve(image.affine, to.affine)  # target index -> source index

    def gather(values: Tensor) -> Tensor:
        lead = values.shape[: values.ndim - len(image.spatial_shape)]
        moved = _gather(values.reshape(-1, *source), step, shape, nearest=mode == "nearest")
        return moved.reshape(*lead, *to.spatial_shape)

    pixels, valid = _over_valid(image, gather)
    inside = _inside(step, source, shape).reshape(to.spatial_shape)
    if not inside.all():
        pixels = pixels.masked_fill(~inside, outside)
        valid = inside if valid is None else valid & inside
    axes = to.axes.removeprefix("T")
    return replace(
        image,
        pixels=pixels,
        valid=valid,
        axes="T" + axes if "T" in image.axes else axes,
        affine=to.affine,
        spacing=to.spacing,
    )


def _over_valid(image: Image, move: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pixels and valid moved to a new grid by the linear map `move`, over valid pixels only."""
    usable = image.pixels.isfinite().all(0)
    if "T" in image.axes:
        usable = usable.all(0)
    if image.valid is not None:
        usable = usable & image.valid
    if usable.all():
        return move(image.pixels), None
    share = move(usable.float()[None])[0]
    valid = share >= 0.5 - 1e-6
    pixels = move(torch.where(usable, image.pixels, 0.0)).div_(share)
    return pixels.masked_fill_(~valid, math.nan), valid


def _interpolate(values: Tensor, size: Sequence[int]) -> Tensor:
    flat = values.reshape(-1, 1, *values.shape[-2:])
    small = F.interpolate(flat, size=tuple(size[-2:]), mode="bilinear", antialias=True)
    small = small.reshape(*values.shape[:-2], *size[-2:])
    if len(size) == 2 or small.shape[-3] == size[0]:
        return small
    area = size[1] * size[2]
    deep = small.reshape(-1, 1, small.shape[-3], area)  # the second axis stays as it is
    deep = F.interpolate(deep, size=(size[0], area), mode="bilinear", antialias=True)
    return deep.reshape(*values.shape[:-3], *size)


def _gather(values: Tensor, step: Tensor, shape: tuple[int, ...], *, nearest: bool) -> Tensor:
    """values: (C, d, h, w). Returns (C, *shape), in blocks of target slices."""
    moved = torch.empty(len(values), *shape)
    order = _axis_order(step, values.shape[1:], shape)
    for first, last in _blocks(shape):
        block = (last - first, *shape[1:])
        here = step.clone()
        here[:, 3] += first * step[:, 0]
        if order is not None:
            moved[:, first:last] = _along_axes(values, here, block, order, nearest)
        else:
            moved[:, first:last] = _anywhere(values, here, block, nearest)
    return moved


def _axis_order(
    step: Tensor, source: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...] | None:
    """The target axis that each source axis runs along; None where the grids are oblique."""
    weight = step[:3, :3].abs() * (torch.tensor(shape) - 1)  # voxels covered over the whole axis
    for order in permutations(range(3)):
        rest = weight.clone()
        rest[range(3), list(order)] = 0
        if rest.sum(1).max() < 1e-6:
            return order
    return None


def _along_axes(
    values: Tensor, step: Tensor, shape: Sequence[int], order: tuple[int, ...], nearest: bool
) -> Tensor:
    """One axis after the other, for grids that differ by a shift, scale, flip and permutation."""
    for source_axis in sorted(range(3), key=lambda a: order[a]):  # the block's few slices first
        axis, length = order[source_axis], values.shape[1 + source_axis]
        index = torch.arange(shape[axis], dtype=torch.float64)
        index = (step[source_axis, axis] * index + step[source_axis, 3]).clamp(0, length - 1)
        lower = (index + 0.5 if nearest else index).add(1e-9).floor().long().clamp(max=length - 1)
        weight = (index - lower).clamp(min=0).float()
        low = values.index_select(1 + source_axis, lower)
        if nearest or weight.max() < 1e-7:
            values = low
            continue
        high = values.index_select(1 + source_axis, (lower + 1).clamp(max=length - 1))
        values = low.lerp_(high, weight.reshape([-1 if a == source_axis else 1 for a in range(3)]))
    return values.permute(0, *(1 + order.index(axis) for axis in range(3)))


def _anywhere(values: Tensor, step: Tensor, shape: Sequence[int], nearest: bool) -> Tensor:
    """Any affine map, from the part of the source that the block touches."""
    limits = torch.tensor(values.shape[1:], dtype=torch.float64) - 1
    if nearest:
        index = [
            row.add_(0.5 + 1e-9).floor_().clamp_(0, limit.item()).long()
            for row, limit in zip(_source_index(step, shape), limits, strict=True)
        ]
        return values[:, index[0], index[1], index[2]]
    reach = _reach(step, shape)
    first = torch.minimum(reach.amin(0).clamp(min=0).floor(), limits)
    last = torch.minimum(reach.amax(0).clamp(min=0).ceil(), limits)
    ranges = zip(first.long().tolist(), last.long().tolist(), strict=True)
    part = values[(slice(None), *(slice(a, b + 1) for a, b in ranges))]
    unit = step[:3] * 2 / (last - first).clamp(min=1)[:, None]  # the part's ends are -1 and 1
    unit[:, 3] -= 2 * first / (last - first).clamp(min=1) + 1
    grid = torch.stack(list(_source_index(unit.flip(0), shape)), dim=-1)  # (d, h, w, whd)
    moved = F.grid_sample(
        part.double()[None], grid[None], padding_mode="border", align_corners=True
    )
    return moved[0].float()


def _inside(step: Tensor, source: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(*shape) bool: target voxels at most half a voxel beyond the source's border voxels."""
    low = -0.5 - _TOLERANCE
    high = torch.tensor(source, dtype=torch.float64) - 0.5 + _TOLERANCE
    inside = torch.ones(shape, dtype=torch.bool)
    for first, last in _blocks(shape):
        here = step.clone()
        here[:, 3] += first * step[:, 0]
        block = (last - first, *shape[1:])
        reach = _reach(here, block)
        if (reach > low).all() and (reach < high).all():
            continue
        for row, end in zip(_source_index(here, block), high, strict=True):
            inside[first:last] &= (row > low) & (row < end)
    return inside


def _source_index(step: Tensor, shape: Sequence[int]) -> Iterator[Tensor]:
    """For each row of `step`: (*shape) float64, its value at every target voxel."""
    d, h, w = (torch.arange(n, dtype=torch.float64) for n in shape)
    for row in step[:3]:
        yield row[0] * d[:, None, None] + (row[1] * h[:, None] + (row[2] * w + row[3]))


def _reach(step: Tensor, shape: Sequence[int]) -> Tensor:
    """(8, 3) source index of the block's corners, between which every other voxel lies."""
    ends = torch.tensor(list(product(*((0, n - 1) for n in shape)))).double()
    return ends @ step[:3, :3].T + step[:3, 3]


def _blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    length = max(1, _BLOCK // (shape[1] * shape[2]))
    for first in range(0, shape[0], length):
        yield first, min(first + length, shape[0])


def _solve(source: Tensor, target: Tensor) -> Tensor:
    if torch.linalg.matrix_rank(source) < 4 or torch.linalg.matrix_rank(target) < 4:
        raise ValueError("an affine is singular: its axes do not span space; the header is broken")
    return torch.linalg.solve(source, target)


def _closest_axes(affine: Tensor) -> tuple[int, ...]:
    """Array axis -> patient axis, one to one, with the largest sum of direction cosines."""
    cosines = F.normalize(affine[:3, :3], dim=0).abs()
    return max(permutations(range(3)), key=lambda p: sum(cosines[p[a], a].item() for a in range(3)))


def _shifted(affine: Tensor, start: Sequence[int]) -> Tensor:
    step = torch.eye(4, dtype=torch.float64)
    step[3 - len(start) : 3, 3] = torch.tensor(list(start), dtype=torch.float64)
    return affine @ step


def _one_per_axis(image: Image, **amounts: Sequence[int]) -> None:
    for name, values in amounts.items():
        if len(values) != len(image.spatial_shape):
            raise ValueError(
                f"{name} needs one number per spatial axis {image.spatial_shape}, got {len(values)}"
            )
