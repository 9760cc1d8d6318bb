"""Rigid registration of two clouds of one thing: many starts, then ICP.

Point-to-plane ICP is that of Chen and Medioni, "Object modelling by registration of multiple range
images", Image and Vision Computing 1992, trimmed as by Chetverikov et al., ICPR 2002; the starts
are the super-Fibonacci rotations of Alexa, CVPR 2022.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.models.neighbors import search

_STARTS = 300  # rotations tried, each with the four ways round of the principal axes
_REFINED = 24  # of them, the best
_SETTLED = 4  # of these, the best after the first turns
_COARSE = 150  # points that judge a start
_FINE = 600  # points that refine one
_JUDGES = 400  # points of each side that judge how well a pose fits both ways
_FIRST_TURNS = (12.0, 8.0)  # degrees, one after the other
_TURNS = (8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5)
_FINAL = 4000  # points of the last iterations
_DAMPING = 1e-6  # of a round thing's free rotation
_PSI = 1.533751168755204288118041  # the root of x^4 = x + 4
_FLIPS = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).diag_embed()


@dataclass(frozen=True, eq=False)
class Rigid:
    """points @ rotation.T + translation.

    rotation: (3, 3), translation: (3,), both float64.
    residual: root mean square distance to the target's planes of the points that were kept.
    """

    rotation: Tensor
    translation: Tensor
    residual: float

    def __call__(self, points: Tensor) -> Tensor:
        """Points (P, 3) in the target's place, in their own dtype."""
        return (points.double() @ self.rotation.mT + self.translation).to(points.dtype)


@torch.no_grad()
def register(points: Tensor, target: Tensor, normals: Tensor, *, kept: float = 0.8) -> Rigid:
    """Where a cloud lies on another, from any pose: the best of many starts.

    points: (P, 3). target: (Q, 3) with unit normals (Q, 3) of either sign.
    kept: share of the points, the nearest ones, that decide; the others may be anomalous.
    The starts are counted from the cloud's own principal axes, so that the same points in another
    pose end in the same place. No gradient. All are finite; a point with a zero normal does not
    pull. Raises ValueError for fewer than three points on either side.
    """
    if min(len(points), len(target)) < 3:
        raise ValueError(
            f"registration needs at least 3 points on both sides, got {len(points)} and "
            f"{len(target)}"
        )
    source, target, normals = points.double(), target.double(), normals.double()
    middle, home = middle_of(source), middle_of(target)
    axes = _principal_axes(source - middle)
    source, aim = (source - middle) @ axes, target - home
    there = _Places(aim)
    rotations = (even_rotations(_STARTS).to(source)[:, None] @ _FLIPS.to(source)).flatten(0, 1)
    coarse = evenly(source, _COARSE) @ rotations.mT  # (S, c, 3)
    misfit = _kept_mean(_Places(evenly(aim, _FINAL)).nearest(coarse)[0], kept)
    rotations = rotations[misfit.topk(_REFINED, largest=False).indices]
    rotations, shifts, _ = _icp(
        evenly(source, _FINE),
        there,
        normals,
        rotations,
        rotations.new_zeros(_REFINED, 3),
        kept=kept,
        steps=15,
    )
    rotations, shifts = _settled(_Places(source), there, rotations, shifts)
    rotations, shifts, residuals = _icp(
        evenly(source, _FINAL), there, normals, rotations, shifts, kept=kept, steps=40
    )
    rotation = rotations[0] @ axes.mT
    return Rigid(rotation, shifts[0] + home - rotation @ middle, float(residuals[0]))


def middle_of(points: Tensor) -> Tensor:
    """The geometric median (3,) of points (P, 3), by Weiszfeld's iteration: a few far points do not
    move it, and it turns and moves with the cloud."""
    middle = points.mean(0)
    for _ in range(20):
        far = (points - middle).norm(dim=1)
        weights = 1 / far.clamp_min(1e-6 * far.mean().clamp_min(1e-30))
        middle = (weights[:, None] * points).sum(0) / weights.sum()
    return middle


def evenly(points: Tensor, count: int) -> Tensor:
    """At most `count` of the points, by even steps through their order."""
    step = max(1, math.ceil(len(points) / count))
    return points[::step]


def even_rotations(count: int) -> Tensor:
    """(count, 3, 3) float64 rotations that cover all poses evenly."""
    place = torch.arange(count, dtype=torch.float64) + 0.5
    inner, outer = (place / count).sqrt(), (1 - place / count).sqrt()
    alpha, beta = 2 * math.pi * place / math.sqrt(2), 2 * math.pi * place / _PSI
    w, x, y, z = inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


class _Places:
    """A cloud (Q, 3) float64, prepared for being searched again and again."""

    def __init__(self, points: Tensor) -> None:
        from scipy.spatial import cKDTree

        self.points = points
        self.tree = None if points.is_cuda else cKDTree(points.numpy())

    def nearest(self, queries: Tensor, *, within: float = math.inf) -> tuple[Tensor, Tensor]:
        """Distance and index (S, P) of the one nearest to each of queries (S, P, 3).

        Where none is closer than `within`, the distance is infinite and the index without meaning.
        """
        flat = queries.reshape(-1, 3)
        if self.tree is None:
            distance, index = (x[:, 0] for x in search(flat, self.points, 1, radius=within))
        else:
            found = self.tree.query(
                flat.numpy(), distance_upper_bound=within, workers=torch.get_num_threads()
            )
            distance, index = map(torch.from_numpy, found)
        return distance.reshape(queries.shape[:2]), index.reshape(queries.shape[:2])


def _settled(
    source: _Places, target: _Places, rotations: Tensor, shifts: Tensor
) -> tuple[Tensor, Tensor]:
    """The pose (1, 3, 3), (1, 3) that fits best both ways, of S and what lies around them.

    Distances to planes do not feel a disc turn about its axis; holes and edges decide that, by
    points of either cloud that have none of the other beside them.
    """
    spacing = search(evenly(target.points, _COARSE), target.points, 2)[0][:, 1].median()
    far = float(4 * spacing)

    def misfit(turns: Tensor, moves: Tensor) -> Tensor:
        ahead = evenly(source.points, _JUDGES) @ turns.mT + moves[:, None]
        back = (evenly(target.points, _JUDGES) - moves[:, None]) @ turns
        there, here = target.nearest(ahead, within=far)[0], source.nearest(back, within=far)[0]
        return there.clamp_max(far).mean(1) + here.clamp_max(far).mean(1)

    for degrees in _FIRST_TURNS:
        rotations, shifts = _turned(rotations, shifts, degrees, misfit)
    best = misfit(rotations, shifts).topk(_SETTLED, largest=False).indices
    rotations, shifts = rotations[best], shifts[best]
    for degrees in _TURNS:
        rotations, shifts = _turned(rotations, shifts, degrees, misfit)
    first = misfit(rotations, shifts).argmin()[None]
    return rotations[first], shifts[first]


def _turned(
    rotations: Tensor, shifts: Tensor, degrees: float, misfit: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Each of S poses, or that of the six turns about the target's axes that fits best."""
    still = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
    ways = torch.cat([still, -still]) * math.radians(degrees)
    turns = torch.cat([still[None], torch.matrix_exp(_cross_matrices(ways))])  # (7, 3, 3)
    tried = turns @ rotations[:, None]  # (S, 7, 3, 3)
    moved = (turns @ shifts[:, None, :, None])[..., 0]
    best = misfit(tried.flatten(0, 1), moved.flatten(0, 1)).reshape(tried.shape[:2]).argmin(1)
    rows = torch.arange(len(best), device=best.device)
    return tried[rows, best], moved[rows, best]


def _principal_axes(points: Tensor) -> Tensor:
    """(3, 3) a right-handed frame as columns; its signs are open, see `_FLIPS`."""
    axes = torch.linalg.eigh(points.mT @ points)[1]
    return axes * torch.linalg.det(axes).sign()


def _icp(
    source: Tensor,
    target: _Places,
    normals: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    *,
    kept: float,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Refine S poses of source (P, 3): rotations (S, 3, 3), shifts (S, 3), residuals (S,)."""
    count = max(3, round(kept * len(source)))
    extent = target.points.std().clamp_min(1e-30)
    for _ in range(steps):
        moved = source @ rotations.mT + shifts[:, None]  # (S, P, 3)
        distance, index = target.nearest(moved)
        rows = distance.topk(count, dim=1, largest=False).indices  # (S, k)
        points = moved.gather(1, rows[..., None].expand(-1, -1, 3))
        index = index.gather(1, rows)
        normal = normals[index]
        error = ((target.points[index] - points) * normal).sum(2)  # (S, k)
        residuals = error.square().mean(1).sqrt()
        motion = torch.cat([torch.linalg.cross(points / extent, normal), normal], 2)  # (S, k, 6)
        gram = motion.mT @ motion
        ridge = (_DAMPING * gram.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-30)
        gram = gram + ridge[:, None, None] * torch.eye(6, dtype=gram.dtype, device=gram.device)
        step = torch.linalg.solve(gram, (motion.mT @ error[..., None]))[..., 0]
        turn = torch.linalg.matrix_exp(_cross_matrices(step[:, :3] / extent))
        rotations = turn @ rotations
        shifts = (turn @ shifts[..., None])[..., 0] + step[:, 3:]
        if float(step.abs().max()) < 1e-9 * float(extent):
            break
    return rotations, shifts, residuals


def _kept_mean(distance: Tensor, kept: float) -> Tensor:
    """The mean (S,) of the smallest share of distances (S, P)."""
    count = max(1, round(kept * distance.shape[1]))
    return distance.topk(count, dim=1, largest=False).values.mean(1)


def _cross_matrices(axes: Tensor) -> Tensor:
    """(S, 3, 3) whose exponentials turn about axes (S, 3) by their length in radians."""
    x, y, z = axes.unbind(1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
