"""The contract of every detector: fit on normal data, then scores and maps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from medssl.data.image import Frame, PointCloud, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Batch, ImageBatch, Sample, collate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnomalyMap:
    """What a detector says of a batch; larger is more anomalous, raw, never normalized or clamped.

    score: (B,) float32.
    maps: "image": (B, *spatial axes) on the batch's padded grid; or, of free clouds, "points": one
        (P,) float32 tensor per item. NaN outside `valid`; NaN counts nowhere.
    missing: of each item, which of the modalities that the detector was fitted on were not there,
        such as ("color",); empty where none was missing from any.
    """

    score: Tensor
    maps: Mapping[str, Tensor | list[Tensor]]
    missing: tuple[tuple[str, ...], ...] = ()


class NormalData:
    """Normal items that a detector is fitted on: sized, re-iterable, addressable.

    samples: indexable and sized; an item is read when it is asked for, and may be read again.
    batch_size: items per batch.
    workers: processes that make the views of a training; 0 makes them in this one.
    """

    def __init__(
        self, samples: Sequence[Sample], *, batch_size: int = 8, workers: int | None = 0
    ) -> None:
        if len(samples) == 0:
            raise ValueError("no normal item to fit on")
        self.samples = samples
        self.batch_size = batch_size
        self.workers = workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def picked(self, rows: Sequence[int]) -> "NormalData":
        """Some of the items, in the order of `rows`."""
        part = cast(Sequence[Sample], Subset(cast(Any, self.samples), list(rows)))
        return NormalData(part, batch_size=self.batch_size, workers=self.workers)

    def batches(self, *, shuffle: bool = False, seed: int = 0) -> Iterator[Batch]:
        """All items once, in order or shuffled by `seed`."""
        order = list(range(len(self)))
        if shuffle:
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            yield collate([self[i] for i in order[start : start + self.batch_size]])


class Detector(nn.Module):
    """Fitted on normal data only; learnt state lives in buffers whose names end in `_`.

    Hyperparameters are keyword arguments of `__init__`, kept as attributes of the same name, so
    that `medssl.models.folder.save_model` can save every detector alike.
    """

    axes: str = "HW"
    """Axes of the images it takes; "points" of a detector on free clouds."""

    unbounded: bool = True
    """Whether its raw score grows with the strength of an anomaly without a limit; that of a cosine
    or of a structural error does not."""

    notes: Mapping[str, Any] = MappingProxyType({})
    """What `fit` tells of a choice it made, in plain values; empty where it made none."""

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Learn what is normal; fitting again forgets the first fit.

        workdir: where large intermediate arrays may be memory-mapped; None keeps them in memory.
        """
        raise NotImplementedError

    def predict(self, batch: Batch) -> AnomalyMap:
        """Score a preprocessed batch. Raises RuntimeError before `fit`."""
        raise NotImplementedError

    def forget(self) -> None:
        """Be as before any fit, and so every detector inside: learnt buffers and `notes` are empty.

        A detector that keeps more of a fit overrides this.
        """
        for module in list(self.modules()):
            if isinstance(module, Detector) and module is not self:
                module.forget()
        self.notes = {}
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name.endswith("_"):
                    module.register_buffer(name, buffer.new_empty(0))

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """Of the noise of the self-test, for images (C, *axes) or points (P, 3) as it was fitted
        on."""
        return (2 if self.axes == "HW" else 1, *image)

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: the raw scores (B,) of a noise batch."""
        return self.predict(noise_batch(noise, self.axes)).score

    def check_fitted(self) -> None:
        """Raises RuntimeError where a learnt buffer is empty."""
        for name, buffer in self.named_buffers():
            if name.endswith("_") and buffer.numel() == 0:
                raise RuntimeError(
                    f"{type(self).__name__} is not fitted ({name} is empty); call fit(normal) first"
                )

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A tiny unfitted detector and normal samples for it, for the contract tests."""
        raise NotImplementedError


def noise_batch(noise: Tensor, axes: str) -> Batch:
    """A batch around bare pixels (B, C, *axes) in the pixel frame, or bare points (B, P, 3)."""
    if axes == "points":
        clouds = [PointCloud(points=points, unit="unknown") for points in noise]
        return collate([Sample(item=f"noise{i}", points=one) for i, one in enumerate(clouds)])
    count, spatial = len(noise), tuple(noise.shape[2:])
    images = ImageBatch(
        pixels=noise,
        axes=axes,
        valid=torch.ones(count, *spatial, dtype=torch.bool, device=noise.device),
        affines=pixel_affine().expand(count, 4, 4),
        spacings=(None,) * count,
        sizes=(spatial,) * count,
        frames=cast(tuple[Frame, ...], ("pixel",) * count),
        modalities=(Modality.UNKNOWN,) * count,
    )
    return Batch(
        items=tuple(f"noise{i}" for i in range(count)),
        images={"image": images},
        points=(None,) * count,
        reports=(None,) * count,
        labels=torch.full((count,), -1),
        masks=None,
        groups=(None,) * count,
        studies=(None,) * count,
    )
