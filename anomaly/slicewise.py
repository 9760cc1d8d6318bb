"""Any 2D detector over the slices of a volume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.maps import smooth
from anomaly.pieces import Pieces, PiecewiseDetector
from medssl.data.image import Image
from medssl.data.sample import Batch, ImageBatch, Sample

_SLICES_AT_ONCE = 16  # bounds the memory of scoring, whatever the depth of a volume


class Slicewise(PiecewiseDetector):
    """Fits a 2D detector on every slice along D, and puts its maps back side by side.

    Which way D runs is decided by `Preprocessing.plane`. A slice without a valid pixel (a gap, or
    padding) is neither fitted nor scored; a constant one, such as air, is normal and is.
    The item that gets a verdict is the volume, never a slice.

    detector: takes images with axes HW.
    aggregation: "max" makes the largest slice score that of the volume; "top_mean" the mean of
        its `num_top` largest.
    across: sigma, in slices, of a Gaussian on the maps from slice to slice. A lesion spans slices
        and noise does not; then the largest smoothed value of a slice is its score. 0 leaves the
        maps and scores of the slices as the 2D detector gave them.
    relative: share, 0 to 1, of the mean of a volume's map that is taken off its map and scores.
        Noise and sharpness differ from scan to scan and raise or lower all of a map alike; where
        a finding may fill most of a volume, leave it at 0.
    """

    axes = "DHW"

    def __init__(
        self,
        detector: Detector,
        *,
        aggregation: Literal["max", "top_mean"] = "max",
        num_top: int = 3,
        across: float = 0.0,
        relative: float = 0.0,
    ) -> None:
        super().__init__(detector)
        if aggregation not in ("max", "top_mean") or num_top < 1:
            raise ValueError(
                "aggregation must be 'max' or 'top_mean' of at least one slice, got "
                f"{aggregation!r} with num_top {num_top}"
            )
        if not 0 <= relative <= 1:
            raise ValueError(f"relative must lie in [0, 1], got {relative}")
        self.aggregation = aggregation
        self.num_top = num_top
        self.across = across
        self.relative = relative

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Fit the detector on the slices of all volumes; see `Pieces` for how often one is read."""
        slices = Pieces(normal, _depths, _cut)
        if len(slices) == 0:
            raise ValueError(f"none of the {len(normal)} normal volumes has a valid pixel")
        part = NormalData(slices, batch_size=_SLICES_AT_ONCE, workers=normal.workers)
        self.notes = self.detector.fit(part, workdir=workdir).notes
        return self

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """Two slices: a thin slab tells as much as a volume."""
        channels, depth, height, width = image
        return (1, channels, min(2, depth), height, width)

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of volumes, on the CPU; a volume without a valid pixel scores NaN."""
        self.check_fitted()
        images = batch.images["image"]
        scores = torch.full(images.valid.shape[:2], torch.nan)  # (B, D)
        maps = torch.full(images.valid.shape, torch.nan)  # (B, D, H, W)
        for i in range(len(batch)):
            inside = images.valid[i].flatten(1).any(1).nonzero()[:, 0].tolist()
            for start in range(0, len(inside), _SLICES_AT_ONCE):
                depths = inside[start : start + _SLICES_AT_ONCE]
                found = self.detector.predict(_slice_batch(batch, i, depths))
                scores[i, depths] = found.score.cpu()
                pixels = found.maps["image"]
                assert isinstance(pixels, Tensor)
                maps[i, depths, : pixels.shape[1], : pixels.shape[2]] = pixels.cpu()
        if self.across > 0:
            maps = smooth(maps, (self.across, 0.0, 0.0))
            scores = maps.flatten(2).nan_to_num(-torch.inf).amax(2)
            scores = scores.masked_fill(scores == -torch.inf, torch.nan)
        level = self.relative * maps.flatten(1).nanmean(1)  # (B,)
        return AnomalyMap(
            score=self._aggregate(scores) - level,
            maps={"image": maps - level[:, None, None, None]},
        )

    def _aggregate(self, scores: Tensor) -> Tensor:
        """Slice scores (B, D), NaN where there is none, to volume scores (B,)."""
        largest = scores.nan_to_num(-torch.inf).sort(1, descending=True).values
        largest = largest[:, : 1 if self.aggregation == "max" else self.num_top]
        known = largest > -torch.inf
        return largest.where(known, 0).sum(1) / known.sum(1)  # 0 / 0 is NaN

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """PatchCore over eight small volumes, one with a slice that is not valid."""
        from anomaly.features.patchcore import PatchCore

        detector, pictures = PatchCore.example()
        samples = []
        for i, sample in enumerate(pictures):
            planes = [pictures[(i + shift) % len(pictures)].images["image"] for shift in range(3)]
            valid = torch.stack([image.valid for image in planes if image.valid is not None])
            valid[0] &= i > 0
            volume = replace(
                sample.images["image"],
                pixels=torch.stack([image.pixels for image in planes], dim=1),
                axes="DHW",
                valid=valid,
            )
            samples.append(sample.with_image(volume))
        return cls(detector, aggregation="top_mean", num_top=2), samples


def _depths(volume: Image) -> list[int]:
    """The slices of a volume with a valid pixel."""
    if volume.axes != "DHW":
        raise ValueError(f"slices need volumes of axes DHW, got {volume.axes}")
    if volume.valid is None:
        return list(range(volume.pixels.shape[1]))
    return volume.valid.flatten(1).any(1).nonzero()[:, 0].tolist()


def _cut(sample: Sample, depth: int) -> Sample:
    return replace(sample.with_image(_slice(sample.images["image"], depth)), mask=None)


def _slice(volume: Image, depth: int) -> Image:
    """One slice (C, H, W) with the affine that leads its pixels (0, h, w) home."""
    return replace(
        volume,
        pixels=volume.pixels[:, depth],
        axes="HW",
        affine=_at_depth(volume.affine, depth),
        spacing=None if volume.spacing is None else volume.spacing[1:],
        valid=None if volume.valid is None else volume.valid[depth],
    )


def _at_depth(affine: Tensor, depth: int) -> Tensor:
    shift = torch.eye(4, dtype=affine.dtype)
    shift[0, 3] = depth
    return affine @ shift


def _slice_batch(batch: Batch, item: int, depths: list[int]) -> Batch:
    """Slices of one volume of the batch as a batch of pictures."""
    images, count = batch.images["image"], len(depths)
    if images.axes != "DHW":
        raise ValueError(f"slices need volumes of axes DHW, got {images.axes}")
    height, width = images.sizes[item][1:]
    spacing = images.spacings[item]
    slices = ImageBatch(
        pixels=images.pixels[item, :, depths, :height, :width].transpose(0, 1),
        axes="HW",
        valid=images.valid[item, depths, :height, :width],
        affines=torch.stack([_at_depth(images.affines[item], depth) for depth in depths]),
        spacings=(None if spacing is None else spacing[1:],) * count,
        sizes=((height, width),) * count,
        frames=(images.frames[item],) * count,
        modalities=(images.modalities[item],) * count,
    )
    return Batch(
        items=(batch.items[item],) * count,
        images={"image": slices},
        points=(None,) * count,
        reports=(None,) * count,
        labels=batch.labels[[item] * count],
        masks=None,
        groups=(batch.groups[item],) * count,
        studies=(batch.studies[item],) * count,
    )
