"""Operators on batches of point clouds, in plain PyTorch and SciPy.

Farthest-point sampling, ball query and interpolation are those of PointNet++ (Qi et al., NeurIPS
2017, https://arxiv.org/abs/1706.02413); normals are the axis of least spread of a neighbourhood
(Hoppe et al., SIGGRAPH 1992, https://doi.org/10.1145/133994.134011).

Coordinates are of any unit, which radii and distances share. `valid` is False on points that must
count for nothing, which may be NaN; a point that counts must be finite. Distances are compared in
float64, so that coordinates far from the origin lose no more than they lost when they were stored.
"""

import torch
from torch import Tensor

from medssl.models.neighbors import checked, in_threads, one_thread, search

_BLOCK = 2**12  # neighbourhoods decomposed at a time


@torch.no_grad()
def farthest_point_sampling(points: Tensor, count: int, *, valid: Tensor | None = None) -> Tensor:
    """Pick points one by one, each the farthest from those picked before. No gradient.

    points: (B, P, 3). Starts at the point farthest from the centroid; ties go to the lowest index,
    and no point is picked twice, duplicates last. Returns (B, count) int64.
    Raises a ValueError where an item has fewer valid points than `count`.
    Differs from the paper: it leaves the first point open.
    """
    valid = checked(points, valid)
    _check_count(count)
    fewest = int(valid.sum(1).min()) if len(valid) else count
    if fewest < count:
        raise ValueError(f"an item has {fewest} valid points, fewer than count ({count})")
    from_center = _from_centroid(points, valid).square().sum(-1)  # (B, P)
    # The rounding of a centroid must not decide between the corners of a box.
    farthest = from_center >= from_center.amax(1, keepdim=True) * (1 - 1e-12)
    last = (farthest & valid).byte().argmax(1, keepdim=True)  # (B, 1)
    # As stored, since differences of what a centroid was taken from are no longer exact.
    cloud = points.double().masked_fill(~valid[..., None], 0).permute(2, 0, 1).contiguous()
    gap = torch.where(valid, torch.inf, -torch.inf).double()  # squared, to the nearest pick
    offset, apart = torch.empty_like(cloud), torch.empty_like(gap)
    picks = [last]
    with one_thread():
        for _ in range(count - 1):
            torch.sub(cloud, cloud.gather(2, last.expand(3, -1, 1)), out=offset)
            torch.sum(offset.square_(), 0, out=apart)
            torch.minimum(gap, apart, out=gap).scatter_(1, last, -1)  # below a duplicate's 0
            last = gap.argmax(1, keepdim=True)
            picks.append(last)
    return torch.cat(picks, 1)


def nearest_points(
    queries: Tensor, points: Tensor, count: int, *, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` points nearest to each query, nearest first, ties by lowest index.

    queries: (B, Q, 3), points: (B, P, 3). Returns distance and index, both (B, Q, count). Where an
    item has fewer valid points, the distance is infinite and the index repeats the nearest one.
    The distance is differentiable in queries and points; at distance 0 its gradient is 0.
    Raises a ValueError where an item has queries but no valid point.
    """
    _check_count(count)
    distances, indices = [], []
    for item, cloud, kept in _items(queries, points, valid):
        apart, index = _search(item, cloud[kept], count)
        index = kept[index]
        distance = torch.linalg.vector_norm(item[:, None] - cloud[index], dim=-1)
        distances.append(distance.masked_fill(apart == torch.inf, torch.inf))
        indices.append(index)
    return _stack(distances, queries, count), _stack(indices, queries, count).long()


def point_spacing(points: Tensor) -> Tensor:
    """The median distance () of points (P, 3) to their nearest other place.

    Points that are there twice, as where a grid was enlarged, count once. 0 of fewer than two
    places.
    """
    places = points.unique(dim=0)
    if len(places) < 2:
        return points.new_zeros(())
    return nearest_points(places[None], places[None], 2)[0][0, :, 1].median()


def ball_query(
    queries: Tensor, points: Tensor, radius: float, count: int, *, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest `count` points closer than `radius` to each query, ties by lowest index.

    queries: (B, Q, 3), points: (B, P, 3). Returns index and within, both (B, Q, count). `within` is
    True where a point was found; elsewhere the index repeats the nearest found, or is that of the
    first valid point where none was. No gradient.
    Raises a ValueError where an item has queries but no valid point.
    Differs from the paper: its code takes the first points found, in the order of the cloud.
    """
    _check_count(count)
    _check_radius(radius)
    indices, within = [], []
    for item, cloud, kept in _items(queries, points, valid):
        distance, index = _search(item, cloud[kept], count, radius)
        indices.append(kept[index])
        within.append(distance < torch.inf)
    return _stack(indices, queries, count).long(), _stack(within, queries, count).bool()


def interpolate(
    values: Tensor,
    points: Tensor,
    queries: Tensor,
    *,
    count: int = 3,
    valid: Tensor | None = None,
) -> Tensor:
    """Mean of the values at the `count` nearest points, weighted by 1 / distance^2 (eq. 2).

    values: (B, P, E), points: (B, P, 3), queries: (B, Q, 3). Returns (B, Q, E). A query that lies
    on a point gets its value, or the mean over the duplicates among the nearest. Differentiable in
    values, and in the coordinates where no query lies on a point.
    """
    if values.ndim != 3 or values.shape[:2] != points.shape[:2]:
        raise ValueError(
            f"values must be (B, P, E), a row for each of the {tuple(points.shape[:2])} points, "
            f"got {tuple(values.shape)}"
        )
    distance, index = nearest_points(queries, points, count, valid=valid)  # (B, Q, k)
    on = distance == 0
    ratio = distance[..., :1] / distance.masked_fill(on, 1)  # free of the unit, at most 1
    weight = torch.where(on.any(-1, keepdim=True), on.to(ratio), ratio.square())
    weight = (weight / weight.sum(-1, keepdim=True)).to(values)
    rows = [item[where] for item, where in zip(values, index, strict=True)]  # (Q, k, E) each
    near = torch.stack(rows) if rows else values.new_empty(*index.shape, values.shape[-1])
    return (weight[..., None] * near).sum(-2)


@torch.no_grad()
def estimate_normals(points: Tensor, *, count: int = 30, valid: Tensor | None = None) -> Tensor:
    """Unit normals: the direction of least spread of the `count` nearest points, itself included.

    points: (B, P, 3). Returns (B, P, 3), NaN on invalid points. They point away from the centroid
    of the cloud and so turn with it. Where that leaves the side open, as on a flat part, whose
    centroid lies in it (cosine below 0.1), they point to the side of the cloud's direction of least
    spread to which its longer tail lies; the side of an exactly symmetric flat cloud is arbitrary,
    but one. Zero where the neighbours span no plane beyond the rounding of the coordinates: fewer
    than three, duplicates, or on a line. No gradient.
    """
    valid = checked(points, valid)
    _check_count(count)
    normals = torch.full_like(points, torch.nan)
    centered = _from_centroid(points, valid)
    for item, kept in enumerate(valid):
        cloud = centered[item, kept]  # (n, 3) float64
        if not len(cloud):
            continue
        rounding = torch.finfo(points.dtype).eps * points[item, kept].abs().max().double()
        found = _least_spread(cloud, min(count, len(cloud)), 4 * rounding)
        normals[item, kept] = (found * _side(found, cloud)).to(points)
    return normals


def _least_spread(cloud: Tensor, count: int, smallest: Tensor) -> Tensor:
    """(n, 3) without sign, zero where the second spread is at most `smallest` (a length)."""

    def decompose(index: Tensor) -> Tensor:  # (b, k)
        near = cloud[index]
        near = near - near.mean(1, keepdim=True)
        variance, axes = torch.linalg.eigh(near.mT @ near / count)  # ascending
        return axes[:, :, 0] * (variance[:, 1:2] > smallest.square())

    return in_threads(decompose, search(cloud, cloud, count)[1].split(_BLOCK))


def _side(normals: Tensor, cloud: Tensor) -> Tensor:
    """+1 or -1 (n, 1) that turns normals outwards. cloud: (n, 3), its centroid at the origin."""
    outwards = (normals * torch.nn.functional.normalize(cloud, dim=-1)).sum(-1, keepdim=True)
    axis = torch.linalg.eigh(cloud.mT @ cloud).eigenvectors[:, 0]
    tail = (cloud @ axis).pow(3).sum()
    across = normals @ torch.where(tail < 0, -axis, axis)
    decisive = torch.where(outwards.abs() < 0.1, across[:, None], outwards)
    return torch.where(decisive < 0, -1.0, 1.0).to(normals)


def _from_centroid(points: Tensor, valid: Tensor) -> Tensor:
    """(B, P, 3) float64 minus the centroid of the valid points; the others are 0."""
    cloud = points.detach().double().masked_fill(~valid[..., None], 0)
    number = valid.sum(1).clamp(min=1)[:, None, None]
    return (cloud - cloud.sum(1, keepdim=True) / number) * valid[..., None]


def _items(
    queries: Tensor, points: Tensor, valid: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each item's queries (Q, 3), points (P, 3) and indices of the valid ones."""
    valid = checked(points, valid)
    if queries.ndim != 3 or queries.shape[-1] != 3 or len(queries) != len(points):
        raise ValueError(
            f"queries must be (B, Q, 3) with B = {len(points)}, got {tuple(queries.shape)}"
        )
    if not queries.isfinite().all():
        raise ValueError("queries must be finite; leave out those that are not")
    empty = (~valid.any(1)).nonzero()[:, 0].tolist()
    if empty and queries.shape[1]:
        raise ValueError(f"items {empty} have no valid point to search; leave them out")
    kept = [which.nonzero()[:, 0] for which in valid]
    return list(zip(queries, points, kept, strict=True))


def _search(
    queries: Tensor, cloud: Tensor, count: int, radius: float = float("inf")
) -> tuple[Tensor, Tensor]:
    if not len(queries):
        nothing = cloud.new_empty(0, count, dtype=torch.float64)
        return nothing, nothing.long()
    return search(queries, cloud, count, radius=radius)


def _stack(parts: list[Tensor], queries: Tensor, count: int) -> Tensor:
    return torch.stack(parts) if parts else queries.new_empty(*queries.shape[:2], count)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _check_radius(radius: float) -> None:
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
