"""Choosing among checkpoints and hyperparameters without labels.

Made-up defects on held-out normals stand in for the anomalies that nobody has labelled. How far
such a ranking follows that of real anomalies differs from set to set (Fung et al., "Model
selection of zero-shot anomaly detectors in the absence of labels", 2023,
https://arxiv.org/abs/2310.10461), so it is reported beside what it was chosen from.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.metrics import PixelScores
from anomaly.streaming import StreamingPixelScores
from anomaly.synthetic import Defects, has_valid_pixel
from medssl.data.sample import Batch, Sample, collate
from medssl.data.split import split_by_group
from medssl.metrics import auroc

_SORTED = 1 << 26  # pixels of all maps together; of more, the AUROC is counted in bins
_KEPT_BYTES = 4 * _SORTED  # of the maps, and of the masks; those past them lie on disk


@dataclass(frozen=True, kw_only=True)
class PseudoScore:
    """How well a detector tells made-up defects from the normals they were made on.

    image_auroc: of the items' scores. pixel_auroc: of the maps, against the defects' masks.
    num_skipped: normals that tell nothing, as they have no valid pixel or no defect changes them.
    """

    image_auroc: float
    pixel_auroc: float
    num_skipped: int = 0

    @property
    def value(self) -> float:
        """What is compared, larger is better: the mean of the two."""
        return (self.image_auroc + self.pixel_auroc) / 2


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How to choose without labels.

    share: of the normals, whole patients or parts, held out of training to choose with.
    checkpoints: how many, evenly spaced over a training, its end included.
    per_normal: made-up defects on each held-out normal.
    defects: which, and how large.
    """

    share: float = 0.2
    checkpoints: int = 5
    per_normal: int = 2
    defects: Defects = field(default_factory=Defects)

    def __post_init__(self) -> None:
        for name in ("checkpoints", "per_normal"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def split(self, normal: NormalData, *, seed: int) -> tuple[NormalData, NormalData]:
        """The normals to train on, and those to choose with; no patient or part is on both sides.

        Raises ValueError where there is only one patient or part, and where an item has no image.
        """
        known = [_place(i, normal[i]) for i in range(len(normal))]
        training, held_out = split_by_group(known, self.share, seed)
        if not training or not held_out:
            raise ValueError(
                "choosing without labels takes normals of at least two patients or parts, got "
                f"{len(normal)} of one; fit without a selection"
            )
        return (
            normal.picked([place.index for place in training]),
            normal.picked([place.index for place in held_out]),
        )

    @torch.no_grad()
    def judge(self, detector: Detector, held_out: NormalData, *, seed: int) -> PseudoScore:
        """Score every held-out normal and its copies with a defect; equal seeds, equal defects.

        One item's maps are held at a time, and the others in a temporary file where they are
        large. Up to some 67 million pixels the pixels' AUROC is exact, beyond at most 0.001 off.
        An item without a valid pixel, or one that no defect changes, is left out and counted.
        Raises ValueError where there is no other.
        """
        rows = [i for i in range(len(held_out)) if has_valid_pixel(held_out[i])]
        with _temporary() as maps, _temporary() as masks:
            found = _Scored(_InFile(maps), _InFile(masks))
            for samples in self._with_copies(held_out, rows, seed):
                found.add(detector, samples)
            num_judged = found.anomalous.count(False)
            if num_judged == 0:
                raise ValueError(
                    f"judging takes normals that a defect changes: of {len(held_out)} held out, "
                    f"{len(rows)} have a valid pixel, and {', '.join(self.defects.kinds)} changed "
                    "none of them; give other normals, or name more kinds"
                )
            return PseudoScore(
                image_auroc=found.image_auroc(),
                pixel_auroc=found.pixel_auroc(),
                num_skipped=len(held_out) - num_judged,
            )

    def _with_copies(
        self, held_out: NormalData, rows: list[int], seed: int
    ) -> Iterator[list[Sample]]:
        """Each item of these rows, and its copies with a defect; without the items that have none.

        Donors are those rows.
        """
        for i in rows:
            generator = torch.Generator().manual_seed(1_000_003 * seed + i)
            item, donors = replace(held_out[i], mask=None), held_out.picked(rows).samples
            made = [self.defects.with_any(item, donors, generator) for _ in range(self.per_normal)]
            copies = [one for one in made if one is not item]
            if copies:
                yield [item, *copies]


class _Scored:
    """What a detector says of items, and the truth: scores in memory, maps and masks in files."""

    def __init__(self, maps: "_InFile", masks: "_InFile") -> None:
        self.maps, self.masks, self.num_pixels = maps, masks, 0
        self.scores: list[Tensor] = []  # of () each
        self.anomalous: list[bool] = []

    def add(self, detector: Detector, samples: list[Sample]) -> None:
        """Predict samples of one size; those with a mask are anomalous."""
        found = detector.predict(collate(samples).to(_device_of(detector)))
        for sample, score, one in zip(samples, found.score, found.maps["image"], strict=True):
            self.scores.append(score.cpu())
            self.anomalous.append(sample.mask is not None)
            self.maps.append(one.cpu())
            self.masks.append(None if sample.mask is None else sample.mask.pixels[0] > 0.5)
            self.num_pixels += one.numel()

    def image_auroc(self) -> float:
        """Of the scores."""
        return auroc(torch.stack(self.scores), torch.tensor(self.anomalous))

    def pixel_auroc(self) -> float:
        """Of the maps, exact within the limit."""
        form = PixelScores if self.num_pixels <= _SORTED else StreamingPixelScores
        return form(cast(Iterable[Tensor], self.maps), self.masks).auroc()


class _InFile:
    """Tensors, or None, one after the other in a file; one is read at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.there: list[bool] = []

    def append(self, value: Tensor | None) -> None:
        """Write one after the last."""
        self.there.append(value is not None)
        if value is not None:
            np.save(self.file, value.numpy())

    def __iter__(self) -> Iterator[Tensor | None]:
        self.file.seek(0)
        for there in self.there:
            yield torch.from_numpy(np.load(self.file)) if there else None


def _temporary() -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(_KEPT_BYTES, prefix="medssl.judge.")


class Chosen(Detector):
    """The best of several detectors, told apart by made-up defects on held-out normals.

    candidates: detectors that take the same images, such as one with other hyperparameters. Each
        is fitted on the same share of the normals; what the others learnt is forgotten.
    selection: its `checkpoints` mean nothing here.
    seed: of the split and of the defects.
    """

    def __init__(
        self, candidates: list[Detector], *, selection: Selection | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        kinds = {candidate.axes for candidate in candidates}
        if len(candidates) < 2 or len(kinds) != 1:
            raise ValueError(
                f"a choice takes at least two detectors for images of the same axes, got "
                f"{len(candidates)} for {sorted(kinds)}"
            )
        self.members = nn.ModuleList(candidates)
        self.selection = Selection() if selection is None else selection
        self.seed = seed
        self.axes = candidates[0].axes
        self.unbounded = all(candidate.unbounded for candidate in candidates)
        self.register_buffer("chosen_", torch.empty(0, dtype=torch.int64))
        self.chosen_: Tensor  # (1,) position among the candidates

    @property
    def candidates(self) -> list[Detector]:
        """The detectors it was built with."""
        return [cast(Detector, member) for member in self.members]

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Fit every candidate, judge it, and keep one, of equals the first.

        `notes` says how each did.
        """
        training, held_out = self.selection.split(normal, seed=self.seed)
        found: list[PseudoScore] = []
        best = 0
        for place, candidate in enumerate(self.candidates):
            folder = None if workdir is None else workdir / f"candidate{place}"
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            candidate.fit(training, workdir=folder)
            found.append(self.selection.judge(candidate, held_out, seed=self.seed))
            worse = place
            if found[place].value > found[best].value:
                best, worse = place, best
            if worse != best:
                self.candidates[worse].forget()
        self.chosen_ = torch.tensor([best])
        self.notes = {
            "chosen": best,
            "candidates": [asdict(score) for score in found],
            "num_train": len(training),
            "num_select": len(held_out),
        }
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        """What the chosen detector says."""
        self.check_fitted()
        return self.candidates[int(self.chosen_)].predict(batch)

    def selftest_shape(self, image: Sequence[int]) -> tuple[int, ...]:
        """That of the chosen detector."""
        self.check_fitted()
        return self.candidates[int(self.chosen_)].selftest_shape(image)

    def check_fitted(self) -> None:
        """Raises RuntimeError before `fit`; the candidates that were not chosen do not count."""
        if self.chosen_.numel() == 0:
            raise RuntimeError("Chosen is not fitted (chosen_ is empty); call fit(normal) first")

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """PatchCore with two layers, or one."""
        from anomaly.features.patchcore import PatchCore

        one, samples = PatchCore.example()
        other, _ = PatchCore.example()
        other.layers = ["layer1"]
        return cls([one, other]), samples


@dataclass(frozen=True)
class _Place:
    """What `split_by_group` looks at; slices and tiles have the item id of their image."""

    index: int
    item: str
    group: str | None


def _place(index: int, sample: Sample) -> _Place:
    if "image" not in sample.images:
        raise ValueError(
            f"choosing without labels takes pictures or volumes, got item {sample.item} without "
            "an image; fit without a selection"
        )
    return _Place(index, sample.item, sample.group)


def _device_of(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
