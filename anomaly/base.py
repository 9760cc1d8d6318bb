"""The contract of every detector: fit on normal data, then scores and maps."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from medssl.data.image import Frame, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Batch, ImageBatch, Sample, collate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnomalyMap:
    """What a detector says of a batch; larger is more anomalous, raw, never normalized or clamped.

    score: (B,) float32.
    maps: keyed as the batch's images, each (B, *spatial axes) on the batch's padded grid; for a
        free cloud a list with one value per point. NaN outside `valid`; NaN counts nowhere.
    """

    score: Tensor
    maps: Mapping[str, Tensor | list[Tensor]]


class NormalData:
    """Normal items that a detector is fitted on: sized, re-iterable, addressable.

    samples: indexable and sized; an item is read when it is asked for, and may be read again.
    batch_size: items per batch.
    """

    def __init__(self, samples: Sequence[Sample], *, batch_size: int = 8) -> None:
        if len(samples) == 0:
            raise ValueError("no normal item to fit on")
        self.samples = samples
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

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
    """Axes of the images it takes."""

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Learn what is normal; fitting again forgets the first fit.

        workdir: where large intermediate arrays may be memory-mapped; None keeps them in memory.
        """
        raise NotImplementedError

    def predict(self, batch: Batch) -> AnomalyMap:
        """Score a preprocessed batch. Raises RuntimeError before `fit`."""
        raise NotImplementedError

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
    """A batch around bare pixels (B, C, *axes) in the pixel frame."""
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
