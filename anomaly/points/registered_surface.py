"""What lies off the normal surface, and what is missing from it, once a cloud is laid on it.

The idea of comparing a registered cloud with normal ones point by point is that of Reg3D-AD (Liu et
al., Real3D-AD, NeurIPS 2023, https://arxiv.org/abs/2309.13226); the two measures are our own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import bumpy_clouds
from anomaly.points.clouds import clouds_of, normal_clouds, top_mean, valid_points, with_nan
from medssl.data.sample import Batch, Sample
from medssl.models.points import estimate_normals, nearest_points, point_spacing
from medssl.models.registration import evenly, register

_NEAR = 4  # planes that a distance is the mean of
_SHARING = 64  # points of the surface that share a normal spread
_AROUND = 24  # points of the surface over which what is missing is averaged
_COVER = 3  # points of an item that cover a place of the surface
_HEARD = 6  # points of an item that answer for a place that nothing covers
_FLOOR = 1e-3  # of the point spacing: no spread is smaller


class RegisteredSurface(Detector):
    """Distance to the surface of registered normal clouds, in units of its normal spread.

    For rigid things of one shape. Every cloud is laid on the first normal one by rigid
    registration, from any pose; together they are the normal surface. A point's score is the larger
    of two, each divided by what left-out normal clouds show at that place: how far its
    neighbourhood lies off the surface (a bulge, a dent, a scratch), and how much farther than usual
    the surface beside it is from any point (a hole). An item's score is the mean of its largest
    points. Neither pose nor position change a score, where the shape fits the surface one way only.

    num_plane: points of the normal surface that make up one of its planes.
    num_smooth: neighbours over which a signed distance is averaged: sensor noise falls with its
        root, and so does a defect with less points.
    top: share of the points whose mean is the item's score.
    coverage: weight of what is missing; 0 where clouds show different sides of the thing, so that
        missing points are no defect.
    max_reference: points of the normal surface, an even choice of all.
    """

    axes = "points"

    def __init__(
        self,
        *,
        num_plane: int = 24,
        num_smooth: int = 12,
        top: float = 0.005,
        coverage: float = 1.0,
        max_reference: int = 50_000,
    ) -> None:
        super().__init__()
        if num_plane < 3:
            raise ValueError(f"num_plane must be at least 3, which span a plane, got {num_plane}")
        if num_smooth < 1:
            raise ValueError(f"num_smooth must be at least 1, the point itself, got {num_smooth}")
        if not 0 < top <= 1:
            raise ValueError(f"top is a share in (0, 1], got {top}")
        if coverage < 0:
            raise ValueError(f"coverage is a weight of at least 0, got {coverage}")
        self.num_plane = num_plane
        self.num_smooth = num_smooth
        self.top = top
        self.coverage = coverage
        self.max_reference = max_reference
        self.register_buffer("surface_", torch.empty(0))  # (M, 3), all normal clouds
        self.register_buffer("planes_", torch.empty(0))  # (M, 3), centres of the local planes
        self.register_buffer("normals_", torch.empty(0))  # (M, 3), theirs
        self.register_buffer("around_", torch.empty(0))  # (M, a) int32, neighbouring rows
        self.register_buffer("num_first_", torch.empty(0))  # (1,) int64, rows of the first cloud
        self.register_buffer("spacing_", torch.empty(0))  # (1,) of the points of one cloud
        self.register_buffer("spread_", torch.empty(0))  # (M,) of normal distances
        self.register_buffer("cover_", torch.empty(0))  # (M,) usual distance to an item's points
        self.register_buffer("cover_spread_", torch.empty(0))  # (M,)
        self.surface_: Tensor
        self.planes_: Tensor
        self.normals_: Tensor
        self.around_: Tensor
        self.num_first_: Tensor
        self.spacing_: Tensor
        self.spread_: Tensor
        self.cover_: Tensor
        self.cover_spread_: Tensor

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Lay all normal clouds on the first, and leave each out once to see what is normal.

        Raises ValueError where there are fewer than two clouds.
        """
        if len(normal) < 2:
            raise ValueError(
                f"a normal surface and its spread need at least 2 normal clouds, got {len(normal)}"
            )
        share = self.max_reference // len(normal)
        if share < self.num_plane:
            raise ValueError(
                f"max_reference ({self.max_reference}) leaves {share} points for each of "
                f"{len(normal)} normal clouds, less than a plane takes (num_plane, "
                f"{self.num_plane}); raise it or give fewer clouds"
            )
        device = self.surface_.device
        clouds = [
            evenly(valid_points(one), share).double().to(device) for one in normal_clouds(normal)
        ]
        middle = clouds[0].mean(0)
        first = Surface.of((clouds[0] - middle).float(), self.num_plane)
        laid = [first.points]
        for cloud in clouds[1:]:
            pose = register(cloud - middle, first.points, first.normals)
            laid.append(pose(cloud - middle).float())
        whole = Surface.of(torch.cat(laid), self.num_plane)
        self.surface_, self.planes_, self.normals_ = whole.points, whole.planes, whole.normals
        self.num_first_ = torch.tensor([len(first.points)], device=first.points.device)
        self.spacing_ = _spacing(first.points)[None]
        self.around_ = _neighbors(whole.points, _AROUND)[1].int()
        self._learn_spread(laid)
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and one value per point; an item without a valid point scores NaN.

        Raises ValueError for an item of one or two valid points: nothing decides where they lie.
        """
        self.check_fitted()
        scores, maps = [], []
        for cloud in clouds_of(batch):
            points = valid_points(cloud).to(self.surface_.device)
            values = self._values(points) if len(points) else points[:, 0]
            scores.append(top_mean(values, self.top))
            maps.append(with_nan(values, cloud.looked_at.to(values.device)))
        return AnomalyMap(score=torch.stack(scores), maps={"points": maps})

    def _values(self, points: Tensor) -> Tensor:
        """(P,) of points as they came."""
        first = int(self.num_first_)
        pose = register(points, self.surface_[:first], self.normals_[:first])
        laid = pose(points.double()).float()
        off, near = self._off(laid, Surface(self.surface_, self.planes_, self.normals_))
        values = off / self.spread_[near]
        if self.coverage == 0:
            return values
        missing = (_cover(self.surface_, laid) - self.cover_) / self.cover_spread_
        missing = missing[self.around_.long()].mean(1).clamp_min(0)
        heard = nearest_points(self.surface_[None], laid[None], min(_HEARD, len(laid)))[1][0]
        told = torch.zeros_like(values).scatter_reduce(
            0, heard.flatten(), missing.repeat_interleave(heard.shape[1]), "amax"
        )
        return torch.maximum(values, self.coverage * told)

    def _off(self, points: Tensor, surface: "Surface") -> tuple[Tensor, Tensor]:
        """How far each point's neighbourhood lies off a surface (P,), and its nearest row (P,)."""
        count = min(_NEAR, len(surface.points))
        near, rows = (x[0] for x in nearest_points(points[None], surface.points[None], count))
        normal = surface.normals[rows]  # (P, n, 3)
        signed = ((points[:, None] - surface.planes[rows]) * normal).sum(2)
        signed = (signed * (normal * normal[:, :1]).sum(2).sign()).mean(1)
        around = _neighbors(points, self.num_smooth)[1]
        alike = (normal[:, 0][around] * normal[:, :1]).sum(2).sign()
        beside = (near[:, 0] - 2 * self.spacing_).clamp_min(0)  # past the edge of a plane
        return torch.hypot((signed[around] * alike).mean(1), beside), rows[:, 0]

    def _learn_spread(self, laid: list[Tensor]) -> None:
        """From each normal cloud against the surface of the others."""
        sizes = [len(cloud) for cloud in laid]
        covers = self.surface_.new_empty(len(laid), len(self.surface_))
        off = []
        for i, cloud in enumerate(laid):
            others = torch.cat([*laid[:i], *laid[i + 1 :]])
            off.append(self._off(cloud, Surface.of(others, self.num_plane))[0])
            covers[i] = _cover(self.surface_, cloud)
            covers[i, sum(sizes[:i]) : sum(sizes[: i + 1])] = torch.nan  # its own points
        around = _neighbors(self.surface_, _SHARING)[1]

        def shared(values: Tensor) -> Tensor:
            return values[around].mean(1)

        floor = _FLOOR * self.spacing_
        self.spread_ = shared(torch.cat(off).square()).sqrt().clamp_min(float(floor))
        self.cover_ = shared(covers.nanmean(0))
        scatter = (covers - self.cover_).square().nanmean(0)
        self.cover_spread_ = shared(scatter).sqrt().clamp_min(_FLOOR)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Seven bumpy balls."""
        return cls(num_plane=8, num_smooth=4, top=0.02), bumpy_clouds(7, 200)


@dataclass(frozen=True, eq=False)
class Surface:
    """points (M, 3), and the centre and unit normal (M, 3) of the plane around each."""

    points: Tensor
    planes: Tensor
    normals: Tensor

    @classmethod
    def of(cls, points: Tensor, num_plane: int) -> Self:
        """With planes of so many points each."""
        around = _neighbors(points, num_plane)[1]
        normals = estimate_normals(points[None], count=min(num_plane, len(points)))[0]
        return cls(points, points[around].mean(1), normals)


def _neighbors(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distance and index (M, n) of the nearest of points (M, 3), each point its own first."""
    distance, index = nearest_points(points[None], points[None], min(count, len(points)))
    return distance[0], index[0]


def _spacing(points: Tensor) -> Tensor:
    """Of points (M, 3); more than nothing where most have a copy but for rounding."""
    extent = (points - points.mean(0)).norm(dim=1).amax()
    return point_spacing(points).clamp_min((1e-6 * extent).clamp_min(1e-30))


def _cover(surface: Tensor, points: Tensor) -> Tensor:
    """(M,) how far the points are from each place of the surface, in units of their usual distance
    there, so that a cloud with fewer points is not a cloud with holes."""
    count = min(_COVER, len(points))
    far = nearest_points(surface[None], points[None], count)[0][0].mean(1)
    return far / far.median().clamp_min(1e-30)
