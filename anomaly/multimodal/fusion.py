"""Scores of several modalities on one scale, that of held-out normal items, and their sum.

M3DM (Wang et al., CVPR 2023, https://arxiv.org/abs/2303.00601) and LSFA (Tu et al., ECCV 2024,
https://arxiv.org/abs/2401.03145) fit a one-class SVM to the modalities' scores instead.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from anomaly.base import AnomalyMap, NormalData
from medssl.data.split import split_by_group

_MIN_SCORES = 8  # fewer have no usable standard deviation


@dataclass(frozen=True, kw_only=True, eq=False)
class ModalityScores:
    """What one modality says of a batch, larger is more anomalous; NaN where it says nothing.

    maps: (B, H, W). score: (B,), NaN for an item in which the modality is missing.
    """

    maps: Tensor
    score: Tensor


class ScoreFusion(nn.Module):
    """The sum of what the modalities say, each less its own mean and over its own spread.

    Means and standard deviations are those of normal items held out of what was fitted, one pair
    for a modality's map and one for its score; where a modality has fewer than eight held-out items
    the spreads of the maps serve for both, as that of so few scores may be anything. A modality
    that says nothing of a pixel or of an item adds nothing, as if it had said what it says of
    normal ones on average.

    modalities: their names. share: of the normal items, whole groups, that are held out.
    """

    def __init__(self, modalities: Sequence[str], *, share: float = 0.25) -> None:
        super().__init__()
        self.modalities, self.share = list(modalities), share
        for name in ("map_mean_", "map_spread_", "score_mean_", "score_spread_"):
            self.register_buffer(name, torch.empty(0))  # (modalities,), in their order
        self.map_mean_: Tensor
        self.map_spread_: Tensor
        self.score_mean_: Tensor
        self.score_spread_: Tensor

    def split(self, normal: NormalData, *, seed: int) -> tuple[NormalData, NormalData]:
        """The items to fit on, and those held out for the scales; whole groups, else items.

        Raises ValueError where there is only one group.
        """
        samples = (normal[i] for i in range(len(normal)))
        known = [_Place(i, sample.item, sample.group) for i, sample in enumerate(samples)]
        training, held_out = split_by_group(known, self.share, seed)
        if not training or not held_out:
            raise ValueError(
                "the scales of the modalities are learnt on normal items of a part of their own: "
                f"at least two parts or groups are needed, got {len(normal)} items of one"
            )
        return (
            normal.picked([place.index for place in training]),
            normal.picked([place.index for place in held_out]),
        )

    def fit(self, found: Iterable[Mapping[str, ModalityScores]]) -> Self:
        """Learn the scales from batches of held-out normal items.

        Raises ValueError where one of the modalities says nothing of any.
        """
        sums = {name: _Sums() for name in self.modalities}
        scores: dict[str, list[Tensor]] = {name: [] for name in self.modalities}
        for batch in found:
            for name in self.modalities:
                sums[name].add(batch[name].maps)
                scores[name].append(batch[name].score)
        known = {name: torch.cat(scores[name]) for name in self.modalities}
        few = min(int((~values.isnan()).sum()) for values in known.values()) < _MIN_SCORES
        scales = [_scale(name, sums[name], known[name], few=few) for name in self.modalities]
        learnt = torch.stack(scales, dim=1)  # (4, modalities)
        self.map_mean_, self.map_spread_, self.score_mean_, self.score_spread_ = learnt
        return self

    def standardized(self, found: Mapping[str, ModalityScores]) -> dict[str, ModalityScores]:
        """The modalities' scores in units of their own normal spread, 0 at their normal mean."""
        scaled = {}
        for i, name in enumerate(self.modalities):
            own = found[name]
            scaled[name] = ModalityScores(
                maps=(own.maps - self.map_mean_[i]) / self.map_spread_[i],
                score=(own.score - self.score_mean_[i]) / self.score_spread_[i],
            )
        return scaled

    def forward(self, found: Mapping[str, ModalityScores]) -> AnomalyMap:
        """The sum over the modalities that are there; NaN where none is."""
        scaled = list(self.standardized(found).values())
        silent = {name: found[name].score.isnan() for name in self.modalities}
        return AnomalyMap(
            score=_sum([one.score for one in scaled]),
            maps={"image": _sum([one.maps for one in scaled])},
            missing=missing(silent),
        )


def missing(silent: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """As `AnomalyMap.missing`. silent: of each modality, the items (B,) in which it is missing."""
    rows = zip(*(values.tolist() for values in silent.values()), strict=True)
    named = tuple(tuple(name for name, out in zip(silent, row, strict=True) if out) for row in rows)
    return named if any(named) else ()


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Over those that are not NaN; NaN where all are."""
    stacked = torch.stack(list(parts))
    return torch.where(stacked.isnan().all(0), torch.nan, stacked.nansum(0))


@dataclass(frozen=True)
class _Place:
    """What `split_by_group` looks at."""

    index: int
    item: str
    group: str | None


class _Sums:
    """Number, sum and sum of squares of the values of maps, NaN left out, in float64."""

    def __init__(self) -> None:
        self.number, self.total, self.squares = 0, 0.0, 0.0

    def add(self, maps: Tensor) -> None:
        values = maps[~maps.isnan()].double()
        self.number += len(values)
        self.total += float(values.sum())
        self.squares += float(values.square().sum())


def _scale(name: str, sums: _Sums, scores: Tensor, *, few: bool) -> Tensor:
    """Mean and spread of a modality's map and of its scores (B,): (4,) float32.

    few: the spread of the map serves for the scores too.
    """
    known = scores[~scores.isnan()].double()
    if sums.number < 2 or len(known) == 0:
        raise ValueError(
            f"no held-out normal item has {name}; give more normal items that have it, or fit "
            "without this modality"
        )
    mean = sums.total / sums.number
    spread = max(sums.squares / sums.number - mean**2, 0.0) ** 0.5
    score_mean = float(known.mean())
    score_spread = spread if few else float(known.std())
    floors = [1e-6 * abs(value) + 1e-12 for value in (mean, score_mean)]  # where all are equal
    scale = [mean, max(spread, floors[0]), score_mean, max(score_spread, floors[1])]
    return torch.tensor(scale, device=scores.device)
