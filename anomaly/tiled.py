"""Any 2D detector over the tiles of large pictures."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.pieces import Pieces, PiecewiseDetector
from medssl.data.geometry import crop
from medssl.data.image import Image
from medssl.data.sample import Batch, Sample, collate

_TILES_AT_ONCE = 8  # bounds the memory of scoring, whatever the size of a picture

Place = tuple[tuple[int, int], tuple[int, int]]  # first row and column; height and width


class Tiled(PiecewiseDetector):
    """Fits a 2D detector on overlapping tiles, and blends its maps of them into one.

    A picture is seen at its full resolution, a few tiles at a time, so that a small defect is not
    scaled away and memory does not grow with the picture. Tiles cover it evenly and overlap by at
    least what is asked for; a picture that is smaller than a tile is one tile along that axis.
    Weights of a map fall smoothly to its borders, where a network sees least around a pixel, so
    there are no seams. A tile without a valid pixel is neither fitted nor scored.
    The item that gets a verdict is the picture, never a tile.

    detector: takes images with axes HW; those that compare places in an image (PaDiM) compare
        places in a tile.
    tile: height and width of a tile in pixels.
    overlap: at least so many pixels are shared by neighbours along an axis.
    num_top: the score is the mean of so many largest scores of tiles; 1 is the largest.
    """

    axes = "HW"

    def __init__(
        self, detector: Detector, *, tile: list[int], overlap: int = 32, num_top: int = 1
    ) -> None:
        super().__init__(detector)
        if len(tile) != 2 or not 0 <= overlap < min(tile):
            raise ValueError(
                "tile is (H, W) in pixels and overlap is less than either, got tile "
                f"{tile} and overlap {overlap}"
            )
        if num_top < 1:
            raise ValueError(f"num_top must be at least 1, got {num_top}")
        self.tile = list(tile)
        self.overlap = overlap
        self.num_top = num_top

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Fit the detector on the tiles of all pictures; see `Pieces` for how often one is read."""
        tiles = Pieces(normal, self._valid_places, _tile)
        if len(tiles) == 0:
            raise ValueError(f"none of the {len(normal)} normal items has a valid pixel")
        part = NormalData(tiles, batch_size=normal.batch_size, workers=normal.workers)
        self.notes = self.detector.fit(part, workdir=workdir).notes
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of pictures, on the CPU; one without a valid pixel scores NaN."""
        self.check_fitted()
        maps = torch.full(batch.images["image"].valid.shape, torch.nan)  # (B, H, W)
        scores = []
        for i in range(len(batch)):
            sample = _sample(batch, i)
            height, width = sample.images["image"].spatial_shape
            maps[i, :height, :width], score = self._blended(sample)
            scores.append(score)
        return AnomalyMap(score=torch.stack(scores), maps={"image": maps})

    def places(self, size: Sequence[int]) -> list[Place]:
        """The tiles of a picture of `size` (H, W) pixels, row by row."""
        starts, sides = [], []
        for length, side in zip(size, self.tile, strict=True):
            side = min(side, length)
            count = max(1, ceil((length - self.overlap) / max(1, side - self.overlap)))
            starts.append([(length - side) * i // max(1, count - 1) for i in range(count)])
            sides.append(side)
        return [((row, column), (sides[0], sides[1])) for row, column in product(*starts)]

    def _valid_places(self, image: Image) -> list[Place]:
        """The tiles of a picture with a valid pixel."""
        if image.axes != "HW":
            raise ValueError(f"tiles need pictures of axes HW, got {image.axes}")
        return [place for place in self.places(image.spatial_shape) if _any_valid(image, place)]

    def _blended(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Map (H, W) and score () of one picture."""
        image = sample.images["image"]
        total, weight = torch.zeros(image.spatial_shape), torch.zeros(image.spatial_shape)
        places = self._valid_places(image)
        scores = [torch.empty(0)]
        for start in range(0, len(places), _TILES_AT_ONCE):
            some = places[start : start + _TILES_AT_ONCE]
            found = self.detector.predict(collate([_tile(sample, place) for place in some]))
            scores.append(found.score.cpu())
            tiles = found.maps["image"]
            assert isinstance(tiles, Tensor)
            for ((row, column), (height, width)), values in zip(some, tiles.cpu(), strict=True):
                here = slice(row, row + height), slice(column, column + width)
                share = torch.where(values.isnan(), 0, _hann(height)[:, None] * _hann(width))
                total[here] += share * values.nan_to_num(0.0)
                weight[here] += share
        return total / weight, self._aggregate(torch.cat(scores))  # 0 / 0 is NaN

    def _aggregate(self, scores: Tensor) -> Tensor:
        """Mean of the largest known scores of tiles (n,), NaN where there is none."""
        return scores[~scores.isnan()].sort(descending=True).values[: self.num_top].mean()

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """PatchCore over tiles of its example's pictures."""
        from anomaly.features.patchcore import PatchCore

        detector, samples = PatchCore.example()
        return cls(detector, tile=[32, 32], overlap=16, num_top=2), samples


def _tile(sample: Sample, place: Place) -> Sample:
    return replace(sample.with_image(crop(sample.images["image"], *place)), mask=None)


def _any_valid(image: Image, place: Place) -> bool:
    (row, column), (height, width) = place
    if image.valid is None:
        return True
    return bool(image.valid[row : row + height, column : column + width].any())


def _sample(batch: Batch, i: int) -> Sample:
    """One picture of a batch, without its padding, on the batch's device."""
    images = batch.images["image"]
    if images.axes != "HW":
        raise ValueError(f"tiles need pictures of axes HW, got {images.axes}")
    height, width = images.sizes[i]
    image = Image(
        pixels=images.pixels[i, :, :height, :width],
        axes="HW",
        modality=images.modalities[i],
        affine=images.affines[i],
        frame=images.frames[i],
        spacing=images.spacings[i],
        valid=images.valid[i, :height, :width],
    )
    return Sample(
        item=batch.items[i],
        images={"image": image},
        label=None if batch.labels[i] < 0 else int(batch.labels[i]),
        group=batch.groups[i],
        study=batch.studies[i],
    )


def _hann(length: int) -> Tensor:
    """Weights (length,) that are 1 in the middle and fall to almost 0 at both ends."""
    return torch.hann_window(length + 2, periodic=False)[1:-1]
