"""From a depth camera's or scanner's points to those of the part alone, on the record."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from medssl.data.clusters import cloud_clusters, grid_clusters
from medssl.data.geometry import resample, resize
from medssl.data.image import Image, PointCloud
from medssl.data.planes import Plane, find_plane

_METRES = {"m": 1.0, "mm": 1e-3}
_BORDER = 0.1  # of each side of an organized cloud, where the background is


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What happens to xyz images and free clouds; saved with each model as part of `Preprocessing`.

    Nothing is moved and no point is deleted: what is left out becomes invalid, so that maps come
    home one to one. What was found lies in `provenance["geometry"]`.

    unit: "m" or "mm": coordinates are brought to it where the source's unit is known, and a source
        of unknown unit is refused; None keeps every unit.
    plane_distance: points within this distance of the background plane are left out, in the unit
        after conversion; about three times the sensor's noise. The plane is the largest one found
        by RANSAC (Fischler and Bolles, CACM 1981) among the outer tenth of an organized grid, and
        among all points of a free cloud; a part that is itself one large plane would go with it.
        None keeps the background.
    cluster_distance: points farther apart than this belong to different clusters; clusters with
        less than `min_cluster` of the points left are left out. None keeps them.
    min_cluster: share of the points, in [0, 1).
    """

    unit: Literal["m", "mm"] | None = None
    plane_distance: float | None = None
    cluster_distance: float | None = None
    min_cluster: float = 0.02

    def __post_init__(self) -> None:
        for name in ("plane_distance", "cluster_distance"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is a positive distance, or null, got {value}")
        if not 0 <= self.min_cluster < 1:
            raise ValueError(f"min_cluster is a share in [0, 1), got {self.min_cluster}")

    def of_image(self, xyz: Image, size: tuple[int, int] | None) -> Image:
        """An organized cloud on a grid of `size`: nearest measurements, no mean across edges.

        Raises ValueError for anything but channels x, y, z, for an unknown unit where one is
        asked for, and where no point is left.
        """
        if xyz.channels != ("x", "y", "z"):
            raise ValueError(f"expected channels ('x', 'y', 'z'), got {xyz.channels}")
        factor, unit = self._conversion(xyz.units)
        if size is not None and xyz.spatial_shape != size:
            xyz = resample(xyz, to=_grid(xyz, size), mode="nearest")
        pixels = xyz.pixels * factor
        valid = pixels.isfinite().all(0)
        if xyz.valid is not None:
            valid &= xyz.valid
        told: dict[str, Any] = {"factor": factor}
        left = valid
        if self.plane_distance is not None:
            border = _border(valid)
            plane = find_plane(pixels[:, border].T, self.plane_distance)
            told["plane"] = _told(plane)
            left = _off_plane(pixels.flatten(1).T, left.flatten(), plane, self.plane_distance)
            left = left.reshape(valid.shape)
        if self.cluster_distance is not None:
            labels = grid_clusters(pixels, left, self.cluster_distance)
            left = left & _large(labels, self.min_cluster)
        _check_left(left)
        return replace(
            xyz,
            pixels=torch.where(valid, pixels, 0.0),
            valid=left,
            units=unit,
            provenance={**xyz.provenance, "geometry": told},
        )

    def of_cloud(self, cloud: PointCloud) -> PointCloud:
        """A free cloud. Raises ValueError as `of_image` does."""
        factor, unit = self._conversion(cloud.unit)
        points = cloud.points * factor
        left = cloud.looked_at & points.isfinite().all(1)
        told: dict[str, Any] = {"factor": factor}
        if self.plane_distance is not None:
            plane = find_plane(points[left], self.plane_distance)
            told["plane"] = _told(plane)
            left = _off_plane(points, left, plane, self.plane_distance)
        if self.cluster_distance is not None:
            labels = torch.full((len(points),), -1)
            labels[left] = cloud_clusters(points[left], self.cluster_distance)
            left = left & _large(labels, self.min_cluster)
        _check_left(left)
        provenance = {**cloud.provenance, "geometry": told}
        return replace(cloud, points=points, valid=left, unit=unit, provenance=provenance)

    def _conversion(self, unit: str) -> tuple[float, str]:
        """The factor to the wanted unit, and the unit of the result."""
        if self.unit is None or unit == self.unit:
            return 1.0, unit
        if unit not in _METRES:
            raise ValueError(
                f"the unit of the points is {unit!r} and cannot become {self.unit!r}; say what it "
                "is (the manifest's column unit), or leave geometry.unit out"
            )
        return _METRES[unit] / _METRES[self.unit], self.unit


def removed(before: Image, after: Image) -> Tensor:
    """(H, W) bool: background and clutter that `Geometry.of_image` left out.

    Pixels without a measurement go with the nearest measured one. Both images are on one grid.
    """
    from scipy import ndimage

    assert after.valid is not None
    measured = before.pixels.isfinite().all(0)
    if before.valid is not None:
        measured &= before.valid
    gone = measured & ~after.valid
    nearest = ndimage.distance_transform_edt(
        ~measured.numpy(), return_distances=False, return_indices=True
    )
    return gone[tuple(torch.from_numpy(nearest).long())]


def _grid(image: Image, size: tuple[int, int]) -> Image:
    """The grid of an image resized to `size`, without its pixels."""
    return resize(replace(image, pixels=image.pixels[:1] * 0, valid=None, channels=("x",)), size)


def _border(valid: Tensor) -> Tensor:
    """(H, W) bool: measured, in the outer tenth of the grid."""
    height, width = valid.shape
    rows, columns = (max(1, round(_BORDER * side)) for side in (height, width))
    border = torch.ones_like(valid)
    border[rows : height - rows, columns : width - columns] = False
    return border & valid


def _off_plane(points: Tensor, left: Tensor, plane: Plane | None, distance: float) -> Tensor:
    """(P,) bool: those of `left` that do not lie on the plane."""
    return left if plane is None else left & (plane.distance(points).abs() > distance)


def _large(labels: Tensor, share: float) -> Tensor:
    """Where a label (-1 none) is that of a cluster with at least `share` of all labelled ones."""
    known = labels >= 0
    counts = torch.bincount(labels[known], minlength=1)
    return known & (counts >= share * known.sum())[labels.clamp_min(0)]


def _told(plane: Plane | None) -> dict[str, Any] | None:
    if plane is None:
        return None
    return {"normal": plane.normal.tolist(), "offset": plane.offset, "share": plane.share}


def _check_left(left: Tensor) -> None:
    if not left.any():
        raise ValueError(
            "no point is left once background and clutter are gone; plane_distance or "
            "cluster_distance may be too large or too small for the unit of the points"
        )
