"""Free clouds as detectors take and answer them."""

import torch
from torch import Tensor

from anomaly.base import NormalData
from medssl.data.image import PointCloud
from medssl.data.sample import Batch


def clouds_of(batch: Batch) -> list[PointCloud]:
    """The cloud of each item. Raises ValueError where an item has none."""
    clouds = [cloud for cloud in batch.points if cloud is not None]
    if len(clouds) < len(batch):
        raise ValueError(
            "expected free point clouds (PLY, PCD or XYZ), got items without one; a detector of "
            "pictures or of xyz images takes those"
        )
    return clouds


def normal_clouds(normal: NormalData) -> list[PointCloud]:
    """Those of normal data. Raises ValueError as `clouds_of`, and where one has no valid point."""
    found = [cloud for batch in normal.batches() for cloud in clouds_of(batch)]
    empty = sum(not cloud.looked_at.any() for cloud in found)
    if empty:
        raise ValueError(
            f"{empty} of {len(found)} normal clouds have no valid point; leave them out"
        )
    return found


def valid_points(cloud: PointCloud) -> Tensor:
    """(V, 3) those that are looked at. Raises ValueError where one of them is not finite."""
    points = cloud.points[cloud.looked_at]
    if not points.isfinite().all():
        count = int((~points.isfinite()).any(1).sum())
        raise ValueError(
            f"{count} of {len(points)} points are NaN or infinite; mark them as not valid"
        )
    return points


def with_nan(values: Tensor, valid: Tensor) -> Tensor:
    """(P,) float32 from one value per valid point (V,), NaN elsewhere."""
    whole = torch.full(valid.shape, torch.nan, device=values.device)
    whole[valid] = values.float()
    return whole


def top_mean(values: Tensor, share: float) -> Tensor:
    """The mean of the largest share of values (V,), at least one; NaN where there is none."""
    if len(values) == 0:
        return torch.tensor(torch.nan, device=values.device)
    return values.topk(max(1, round(share * len(values)))).values.mean().float()
