"""FPFH (Rusu, Blodow and Beetz, ICRA 2009, https://doi.org/10.1109/ROBOT.2009.5152473).

A point is described by the angles between its normal and those around it, so that turning and
moving the cloud changes nothing.
"""

import math
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.models.neighbors import checked, in_threads, search

BINS = 11
_PAIRS = 2**14  # of one block, whose angles stay in the cache
_PARALLEL = 1e-5  # sine of the angle between line and normal, below which there is no frame


@torch.no_grad()
def fpfh(
    points: Tensor,
    normals: Tensor,
    *,
    radius: float,
    max_neighbors: int = 100,
    valid: Tensor | None = None,
) -> Tensor:
    """Fast point feature histograms, as open3d computes them. No gradient.

    points: (B, P, 3), in the unit of `radius`. normals: (B, P, 3), of any length; a zero normal
    makes all its angles 0. Neighbours are the `max_neighbors` nearest points closer than `radius`,
    the point itself counted, ties by lowest index; 1.6 kB per point at 100.
    Returns (B, P, 33) float: the histograms of theta, alpha and phi, 11 bins each, each adding up
    to 200, 100 from the point's own angles and 100 from its neighbours'; 100 where all neighbours
    are duplicates of the point, 0 where it has none, NaN where it is not valid.

    Differs from the paper, as open3d does: a neighbour's histogram weighs 1 / distance^2, not
    1 / distance; these weighted histograms are brought to a sum of 100 per angle instead of being
    divided by the number of neighbours; the pair's source is the point whose normal is closer to
    the line either way; pairs at distance 0 and pairs whose line is parallel to the source's normal
    count as angles 0. The latter holds for sines below 1e-5 instead of exactly 0, since turning the
    cloud would break it. Normals are brought to unit length, and arithmetic is float64 up to the
    histograms.
    """
    valid = checked(points, valid)
    if normals.shape != points.shape:
        raise ValueError(
            f"one normal per point: got points of shape {tuple(points.shape)} "
            f"and normals of shape {tuple(normals.shape)}"
        )
    if not normals[valid].isfinite().all():
        raise ValueError("normals of valid points must be finite; see estimate_normals")
    if not radius > 0 or max_neighbors < 2:
        raise ValueError(
            "radius must be positive and max_neighbors at least 2, the point itself among them, "
            f"got {radius} and {max_neighbors}"
        )
    described = points.new_full((*points.shape[:2], 3 * BINS), torch.nan)
    for item, kept in enumerate(valid):
        if kept.any():
            cloud = points[item, kept].double()
            unit = F.normalize(normals[item, kept].double(), dim=-1)
            described[item, kept] = _describe(cloud, unit, radius, max_neighbors).to(points)
    return described


def _describe(cloud: Tensor, normals: Tensor, radius: float, max_neighbors: int) -> Tensor:
    """cloud, normals: (n, 3) float64. Returns (n, 33) float32."""
    distance, index = search(cloud, cloud, max_neighbors, radius=radius)
    # The first is the point itself, or a duplicate, whose angles would be 0 as well.
    most = int((distance < torch.inf).sum(1).max())
    distance, index = distance[:, 1:most], index[:, 1:most]
    if most < 2:
        return torch.zeros(len(cloud), 3 * BINS, device=cloud.device)
    frames = torch.cat([cloud, normals], 1)  # (n, 6)
    rows = max(1, _PAIRS // most) if cloud.device.type == "cpu" else len(cloud)
    blocks = frames.split(rows), distance.split(rows), index.split(rows)
    simple = in_threads(_simple, repeat(frames), *blocks)
    return simple + _weighted(simple, distance, index)


def _simple(frames: Tensor, block: Tensor, distance: Tensor, index: Tensor) -> Tensor:
    """SPFH of a block of points: percent of their pairs in each bin.

    frames: (n, 6), position and unit normal; block: (r, 6) of them. Returns (r, 33).
    """
    within = distance < torch.inf  # (r, k)
    row, column = within.nonzero(as_tuple=True)  # one entry per pair
    angles = _angles(
        block.index_select(0, row).T.contiguous(),
        frames.index_select(0, index[row, column]).T.contiguous(),
        distance[row, column],
    )  # (3, pairs)
    bins = (angles * BINS).floor_().clamp_(0, BINS - 1).long()
    bins += torch.arange(3, device=bins.device)[:, None] * BINS + row * 3 * BINS
    counts = bins.flatten().bincount(minlength=len(index) * 3 * BINS).view(len(index), 3 * BINS)
    return counts.float() * (100 / within.sum(1, keepdim=True).clamp(min=1))


def _angles(one: Tensor, other: Tensor, distance: Tensor) -> Tensor:
    """theta, alpha and phi of pairs, each stretched from its range to [0, 1].

    one, other: (6, M), position and unit normal. distance: (M,). Returns (3, M). The Darboux frame
    of the pair, with n and m the normals of source and target and u the unit line from source to
    target, is n, v = u x n / |u x n|, n x v. So phi = n.u, alpha = v.m, which is a determinant, and
    theta = atan2((n x v).m, n.m), all from four products of u and the normals. Exchanging the two
    points leaves the determinant as it is.
    """
    line = (other[:3] - one[:3]) / distance.clamp(min=torch.finfo(distance.dtype).tiny)
    here, there = one[3:], other[3:]
    first, second = (here * line).sum(0), (there * line).sum(0)
    swapped = first.abs() < second.abs()
    phi = torch.where(swapped, -second, first).clamp_(-1, 1)
    target = torch.where(swapped, -first, second)  # u.m
    cosine = (here * there).sum(0)
    sine = (1 - phi.square()).sqrt_()  # |u x n|
    framed = (distance > 0) & (sine > _PARALLEL)
    alpha = (line * torch.linalg.cross(here, there, dim=0)).sum(0) / sine
    theta = torch.atan2((target - phi * cosine) / sine, cosine)
    spread = torch.stack([theta / (2 * math.pi), alpha / 2, phi / 2]) + 0.5
    return torch.where(framed, spread, 0.5)


def _weighted(simple: Tensor, distance: Tensor, index: Tensor) -> Tensor:
    """Mean of the neighbours' SPFH by 1 / distance^2, scaled to 100 per angle. Returns (n, 33)."""
    counted = (distance > 0) & (distance < torch.inf)
    nearest = distance.masked_fill(~counted, torch.inf).amin(1, keepdim=True)
    weight = torch.where(counted, nearest / distance, 0).square()  # at most 1, in any unit
    mean = F.embedding_bag(index, simple, per_sample_weights=weight.float(), mode="sum")
    mean = mean.view(-1, 3, BINS)
    total = mean.sum(-1, keepdim=True)
    return torch.where(total > 0, 100 * mean / total, 0).flatten(1)
