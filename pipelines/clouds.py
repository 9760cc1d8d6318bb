"""Items with geometry: what a detector says of the points of a free cloud, and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medssl.data.clusters import cloud_clusters
from medssl.data.geometry_steps import Geometry
from medssl.data.image import PointCloud
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample
from medssl.data.writers.points import write_ply, write_points_csv
from medssl.models.points import point_spacing

_LINKED = 3.0  # spacings of the points that may lie between two of one region


@dataclass(frozen=True, eq=False)
class PointMap:
    """One raw value per point; larger is more anomalous.

    cloud: as it was read, so that everything is in the user's own unit.
    values: (P,) float32, NaN on points that are not looked at.
    """

    cloud: PointCloud
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.shape != self.cloud.points.shape[:1]:
            raise ValueError(
                f"one value per point: got {tuple(self.values.shape)} for "
                f"{len(self.cloud.points)} points"
            )

    def write(self, path: Path) -> None:
        """As PLY, and beside it as CSV; `path` ends in ".ply"."""
        write_points_csv(self.cloud, self.values, path.with_suffix(".csv"))
        write_ply(self.cloud, self.values, path)


def read_values(path: Path) -> Tensor:
    """The values (P,) float32 of a map that `PointMap.write` wrote to `path`."""
    table = path.with_suffix(".csv")
    found = np.loadtxt(table, delimiter=",", skiprows=1, usecols=3, dtype=np.float32, ndmin=1)
    return torch.from_numpy(found)


def regions_of_points(found: PointMap, threshold: float) -> tuple[tuple[float, ...], ...]:
    """Boxes (x0, y0, z0, x1, y1, z1) of the regions above `threshold`, in the unit of the cloud.

    Points above it belong together where less than three times the median distance of neighboring
    points lies between them.
    A box ends at its outermost points; the region of most points is the first.
    """
    points = found.cloud.points[found.values > threshold]  # NaN is never above
    if len(points) == 0:
        return ()
    spacing = point_spacing(found.cloud.points[~found.values.isnan()].double())
    labels = cloud_clusters(points, _LINKED * float(spacing))
    regions = [points[labels == label] for label in range(int(labels.max()) + 1)]
    return tuple((*one.amin(0).tolist(), *one.amax(0).tolist()) for one in regions)


def in_own_unit(sample: Sample, preprocessing: Preprocessing) -> Sample:
    """The sample with xyz and points in the unit that the preprocessing converts to.

    Raises ValueError where it converts and the unit is not known.
    """
    if preprocessing.geometry is None or preprocessing.geometry.unit is None:
        return sample
    plain = Geometry(unit=preprocessing.geometry.unit)
    if sample.points is not None:
        return replace(sample, points=plain.of_cloud(sample.points))
    images = {
        role: plain.of_image(image, None) if image.channels == ("x", "y", "z") else image
        for role, image in sample.images.items()
    }
    return replace(sample, images=images)


def reason_of_missing(missing: Sequence[str]) -> str:
    """Why an item without these modalities has no verdict."""
    return (
        f"{' and '.join(missing)} missing: what the rest scores cannot be held against a threshold "
        "of all together"
    )
