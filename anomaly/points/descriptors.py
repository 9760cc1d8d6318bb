"""What describes the points of a free cloud: local shape, place, color."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from anomaly.points.clouds import valid_points
from medssl.data.image import PointCloud
from medssl.models.fpfh import fpfh
from medssl.models.points import estimate_normals, point_spacing
from medssl.models.registration import evenly, register

_SPACINGS = 5.0  # radius of a neighborhood, in spacings of the points
_NORMAL_POINTS = 30  # neighbors that a normal is estimated from
_MAX_TARGET = 20_000  # points that clouds are registered to


class PointDescriptor(nn.Module):
    """A row of numbers for each valid point of a cloud.

    modality: "geometry" or "color", as in `AnomalyMap.missing`.
    unbounded: whether two rows can be arbitrarily far apart.
    """

    modality: str = "geometry"
    unbounded: bool = True

    def __init__(self) -> None:  # without nn.Module's arguments, which `save_model` would ask for
        super().__init__()

    def fit(self, clouds: Sequence[PointCloud]) -> None:
        """Learn what it needs of normal clouds, each with a valid point."""

    def has(self, cloud: PointCloud) -> bool:
        """Whether it can describe a cloud."""
        return True

    def forward(self, cloud: PointCloud) -> Tensor:
        """(V, E) float32, one row per valid point. Raises ValueError where one is not finite."""
        raise NotImplementedError


class LocalShape(PointDescriptor):
    """FPFH, which neither the pose nor the position of a cloud changes.

    radius: of a neighborhood, in the unit of the points; None learns 5 times the median distance
        of neighboring points of the normal clouds.
    max_neighbors: of a point that are looked at, the nearest.
    """

    unbounded = False

    def __init__(self, *, radius: float | None = None, max_neighbors: int = 100) -> None:
        super().__init__()
        if radius is not None and radius <= 0:
            raise ValueError(f"radius must be positive, or null to be learnt, got {radius}")
        self.radius, self.max_neighbors = radius, max_neighbors
        self.register_buffer("radius_", torch.empty(0))  # (1,) in the unit of the points
        self.radius_: Tensor

    def fit(self, clouds: Sequence[PointCloud]) -> None:
        """Learn the radius, where none was given.

        Raises ValueError where no cloud has two places.
        """
        radius = _SPACINGS * _spacing(clouds) if self.radius is None else self.radius
        if radius == 0:
            raise ValueError("the normal clouds have no two points apart; give a radius")
        self.radius_ = torch.tensor([radius], device=clouds[0].points.device)

    def forward(self, cloud: PointCloud) -> Tensor:
        """(V, 33)."""
        points = valid_points(cloud)[None]
        normals = estimate_normals(points, count=_NORMAL_POINTS)
        radius = float(self.radius_)
        return fpfh(points, normals, radius=radius, max_neighbors=self.max_neighbors)[0]


class Place(PointDescriptor):
    """x, y, z as they came: right where every cloud lies as the others do."""

    def forward(self, cloud: PointCloud) -> Tensor:
        """(V, 3) in the unit of the points."""
        return valid_points(cloud)


class RegisteredPlace(PointDescriptor):
    """x, y, z after registration to the first normal cloud, from any pose.

    Raises ValueError for clouds of one or two valid points.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("target_", torch.empty(0))  # (Q, 3), around their mean
        self.register_buffer("normals_", torch.empty(0))  # (Q, 3)
        self.target_: Tensor
        self.normals_: Tensor

    def fit(self, clouds: Sequence[PointCloud]) -> None:
        """Keep an even choice of the first cloud."""
        points = evenly(valid_points(clouds[0]), _MAX_TARGET).double()
        self.target_ = (points - points.mean(0)).float()
        self.normals_ = estimate_normals(self.target_[None], count=_NORMAL_POINTS)[0]

    def forward(self, cloud: PointCloud) -> Tensor:
        """(V, 3) in the unit of the points."""
        points = valid_points(cloud)
        if len(points) == 0:
            return points
        return register(points, self.target_, self.normals_)(points.double()).float()


class Color(PointDescriptor):
    """The colors of the points."""

    modality = "color"
    unbounded = False

    def has(self, cloud: PointCloud) -> bool:
        """Whether the cloud has colors."""
        return cloud.colors is not None

    def forward(self, cloud: PointCloud) -> Tensor:
        """(V, 3) in 0..1."""
        if cloud.colors is None:
            raise ValueError("a cloud has no colors; describe it without them")
        colors = cloud.colors[cloud.looked_at]
        if not colors.isfinite().all():
            raise ValueError("colors are NaN or infinite; mark their points as not valid")
        return colors


def _spacing(clouds: Sequence[PointCloud]) -> float:
    """The median over the clouds of theirs; 0 where none has two places."""
    found = torch.stack([point_spacing(valid_points(cloud)) for cloud in clouds])
    return float(found[found > 0].median()) if found.any() else 0.0
