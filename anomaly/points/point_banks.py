"""PatchCore on the points of free clouds (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265),
as in the baselines of Real3D-AD (Liu et al., NeurIPS 2023, https://arxiv.org/abs/2309.13226)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import bumpy_clouds
from anomaly.memory import greedy_coreset, nearest
from anomaly.points.clouds import clouds_of, normal_clouds, top_mean, valid_points, with_nan
from anomaly.points.descriptors import Color, LocalShape, PointDescriptor, RegisteredPlace
from medssl.data.image import PointCloud
from medssl.data.sample import Batch, Sample
from medssl.models.points import nearest_points


class PointBanks(Detector):
    """Distance of each point to the nearest normal one, in a bank for each of its descriptors.

    The distances of a bank are divided by the root mean square of those of normal points to the
    other normal clouds' rows, so that 1 is normal in any unit; a point's value is the root mean
    square over the banks, averaged over its neighbors, and an item's score the mean of its largest
    ones. An item without color is scored by the other banks, and `AnomalyMap.missing` says so.
    With `LocalShape` alone neither pose nor position change a score.

    descriptors: what describes the points.
    coreset_ratio: share of the normal points that each bank keeps.
    num_smooth: points, itself the first, over which a point's value is averaged.
    top: share of the points whose mean is the item's score.
    seed: of the first picks of the coresets.
    Differs from the papers: as Reg3D-AD has a bank of its own for the places, so has every
    descriptor, none is put beside another in one row; the score is not weighed by the neighborhood
    (eq. 7 of PatchCore), and is a mean instead of the largest value.
    """

    axes = "points"

    def __init__(
        self,
        *,
        descriptors: Sequence[PointDescriptor],
        coreset_ratio: float = 0.1,
        num_smooth: int = 12,
        top: float = 0.005,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not descriptors:
            raise ValueError("descriptors must hold at least one")
        for name, share in (("coreset_ratio", coreset_ratio), ("top", top)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} is a share in (0, 1], got {share}")
        if num_smooth < 1:
            raise ValueError(f"num_smooth must be at least 1, the point itself, got {num_smooth}")
        self.members = nn.ModuleList(descriptors)
        self.coreset_ratio, self.num_smooth = coreset_ratio, num_smooth
        self.top, self.seed = top, seed
        self.unbounded = any(one.unbounded for one in descriptors)
        self.banks = nn.ModuleList(_Bank() for _ in descriptors)

    @property
    def descriptors(self) -> list[PointDescriptor]:
        """As they were given."""
        return [one for one in self.members if isinstance(one, PointDescriptor)]

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Keep a coreset of the normal points of each descriptor.

        Raises ValueError for fewer than two clouds, and where one misses what is to be described.
        """
        clouds = [cloud.to(self._device) for cloud in normal_clouds(normal)]
        if len(clouds) < 2:
            raise ValueError("a distance that is normal needs at least 2 normal clouds, got 1")
        for descriptor, bank in self._pairs():
            lacking = sum(not descriptor.has(cloud) for cloud in clouds)
            if lacking:
                raise ValueError(
                    f"{lacking} of {len(clouds)} normal clouds have no {descriptor.modality}; "
                    f"leave {type(descriptor).__name__} out"
                )
            descriptor.fit(clouds)
            bank.keep([descriptor(cloud) for cloud in clouds], self.coreset_ratio, self.seed)
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and one value per point; an item without a valid point scores NaN.

        Raises ValueError for an item with nothing of what the banks describe.
        """
        self.check_fitted()
        scores, maps, missing = [], [], []
        for cloud in clouds_of(batch):
            here = cloud.to(self._device)
            values = self._values(here)
            scores.append(top_mean(values, self.top))
            maps.append(with_nan(values, here.looked_at))
            lacking = [one.modality for one in self.descriptors if not one.has(cloud)]
            missing.append(tuple(dict.fromkeys(lacking)))
        return AnomalyMap(
            score=torch.stack(scores),
            maps={"points": maps},
            missing=tuple(missing) if any(missing) else (),
        )

    @property
    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _pairs(self) -> Iterator[tuple[PointDescriptor, "_Bank"]]:
        for descriptor, bank in zip(self.descriptors, self.banks, strict=True):
            assert isinstance(bank, _Bank)
            yield descriptor, bank

    def _values(self, cloud: PointCloud) -> Tensor:
        """(V,) of the valid points."""
        points = valid_points(cloud)
        if len(points) == 0:
            return points[:, 0]
        found = [bank(one(cloud)) for one, bank in self._pairs() if one.has(cloud)]
        if not found:
            raise ValueError("an item has no color, and no bank describes anything else")
        values = torch.stack(found).square().mean(0).sqrt()
        count = min(self.num_smooth, len(points))
        return values[nearest_points(points[None], points[None], count)[1][0]].mean(1)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Local shape of seven bumpy balls."""
        return cls(descriptors=[LocalShape()], top=0.02), bumpy_clouds(7, 200)

    @classmethod
    def example_cloud(cls) -> tuple[Self, list[Sample]]:
        """Local shape, registered place and color of seven bumpy balls."""
        descriptors = [LocalShape(), RegisteredPlace(), Color()]
        return cls(descriptors=descriptors, top=0.02), bumpy_clouds(7, 200)


class _Bank(nn.Module):
    """Rows of normal points, and how far another cloud's normal points usually are from them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows_", torch.empty(0))  # (M, E)
        self.register_buffer("scale_", torch.empty(0))  # (1,)
        self.rows_: Tensor
        self.scale_: Tensor

    def keep(self, clouds: Sequence[Tensor], ratio: float, seed: int) -> None:
        """A coreset of the rows (V, E) of at least two clouds."""
        rows = torch.cat(list(clouds))
        owner = torch.arange(len(clouds)).repeat_interleave(torch.tensor([len(c) for c in clouds]))
        picks = greedy_coreset(rows, max(1, int(ratio * len(rows))), seed=seed)
        self.rows_ = rows[picks]
        owner = owner.to(rows.device)[picks]
        squares = [
            nearest(cloud, self.rows_[owner != i])[0].square()
            for i, cloud in enumerate(clouds)
            if (owner != i).any()
        ]
        extent = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
        smallest = (1e-6 * extent).clamp_min(1e-30)
        self.scale_ = torch.maximum(torch.cat(squares).mean().sqrt(), smallest)[None]

    def forward(self, rows: Tensor) -> Tensor:
        """(V,) distance of rows (V, E) to the nearest, in units of what is normal."""
        return nearest(rows, self.rows_)[0][:, 0] / self.scale_
