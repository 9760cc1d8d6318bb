"""A PatchCore bank per modality: color and organized points, each on its own.

PatchCore is by Roth et al. (CVPR 2022, https://arxiv.org/abs/2106.08265). A bank per modality and
one score of both is the frame of M3DM (Wang et al., CVPR 2023, https://arxiv.org/abs/2303.00601)
and LSFA (Tu et al., ECCV 2024, https://arxiv.org/abs/2401.03145), here without their learning.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import relief_pictures
from anomaly.memory import RepeatedSearch
from anomaly.multimodal.bank import bank_of, check_share, scores_from
from anomaly.multimodal.fusion import ModalityScores, ScoreFusion
from anomaly.multimodal.modalities import (
    ColorFeatures,
    ModalityName,
    example_features,
    noise_shape,
    rgbd_noise,
    same_grid,
)
from anomaly.multimodal.relief import Geometry
from medssl.data.sample import Batch, Sample


class DoublePatchCore(Detector):
    """Distance of each cell to the nearest normal one, in color and in geometry, added up.

    Where a modality is missing, of a pixel or of a whole item, the other alone counts, and
    `AnomalyMap.missing` says so. A quarter of the normal items, whole groups, is held out of the
    banks to bring the modalities to one scale; see `ScoreFusion`.

    color, geometry: what describes the cells, on one grid; None leaves a modality out, and the
        other is a PatchCore of its own. Without color scores are bounded, as FPFH is.
    coreset_ratio: share of its own normal cells that each bank keeps.
    sigma: of the Gaussian on each modality's map, in pixels.
    top: share of the valid cells, those with the largest distances, whose mean is a modality's
        score; at least one cell counts. It varies less with the coreset than the largest alone.
    seed: of the held-out items, and of the first pick of each coreset.
    Differs from the papers: features are not adapted; the score of a modality is the mean of its
    largest distances, not one weighed by its neighborhood; FPFH or a relief takes the place of
    Point-MAE unless `geometry` has a descriptor. Each modality is standardized by its own normal
    scores and they are added; the papers fit a one-class SVM to weighted scores. Their code
    standardizes a modality's features by the statistics of the other, and keeps 1 % of the color
    cells, as it takes the size of that bank from the reduced bank of the points.
    """

    def __init__(
        self,
        *,
        color: ColorFeatures | None,
        geometry: Geometry | None,
        coreset_ratio: float = 0.1,
        sigma: float = 4.0,
        top: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_share(coreset_ratio=coreset_ratio, top=top)
        same_grid(color, geometry)
        self.color, self.geometry = color, geometry
        self.coreset_ratio, self.sigma, self.top, self.seed = coreset_ratio, sigma, top, seed
        self.unbounded = color is not None
        self.fusion = ScoreFusion(self.modalities)
        self._searches = {name: RepeatedSearch() for name in self.modalities}
        for name in self.modalities:
            self.register_buffer(f"{name}_bank_", torch.empty(0))  # (M, E)

    @property
    def modalities(self) -> list[ModalityName]:
        """Those that it is fitted on."""
        return [name for name, _ in self._parts()]

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Fill the banks with three quarters of the items, learn the scales on the rest.

        Raises ValueError for items of one group only, and where a modality is in none.
        """
        training, held_out = self.fusion.split(normal, seed=self.seed)
        for _, features in self._parts():
            features.fit(training)
        for name, cells in self._cells(training).items():
            bank = bank_of(cells, self.coreset_ratio, seed=self.seed)
            self.register_buffer(f"{name}_bank_", bank)
        self.fusion.fit(self._found(batch) for batch in held_out.batches())
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item in which neither modality has a valid pixel scores NaN."""
        self.check_fitted()
        return self.fusion(self._found(batch))

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """The channels of a picture and a relief."""
        return noise_shape(self.color, image)

    def selftest(self, noise: Tensor) -> Tensor:
        """As of `Detector`, with points at the distance that was normal."""
        return self.predict(
            rgbd_noise(noise, None if self.geometry is None else self.geometry.spacing)
        ).score

    def _parts(self) -> list[tuple[ModalityName, ColorFeatures | Geometry]]:
        parts: list[tuple[ModalityName, ColorFeatures | Geometry]] = []
        if self.color is not None:
            parts.append(("color", self.color))
        if self.geometry is not None:
            parts.append(("geometry", self.geometry))
        return parts

    def _cells(self, normal: NormalData) -> dict[ModalityName, Tensor]:
        """The valid cells (N, E) of each modality in normal items."""
        rows: dict[ModalityName, list[Tensor]] = {name: [] for name in self.modalities}
        for batch in normal.batches():
            for name, features in self._parts():
                grid = features(batch)
                rows[name].append(grid.features[grid.valid])
        cells = {name: torch.cat(found) for name, found in rows.items()}
        for name, found in cells.items():
            if len(found) == 0:
                raise ValueError(
                    f"none of the {len(normal)} normal items has {name}; leave it out of the "
                    "detector, or give items that have it"
                )
        return cells

    def _found(self, batch: Batch) -> dict[str, ModalityScores]:
        """What each modality says, on its own scale."""
        found: dict[str, ModalityScores] = {}
        for name, features in self._parts():
            grid = features(batch)
            found[name] = scores_from(
                self.get_buffer(f"{name}_bank_"),
                self._searches[name],
                grid.features,
                grid.valid,
                batch,
                name,
                sigma=self.sigma,
                top=self.top,
            )
        return found

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and FPFH of a few hundred points of smooth reliefs."""
        color, geometry = example_features()
        return cls(color=color, geometry=geometry, coreset_ratio=0.2), relief_pictures()
