"""Which encoder is ahead over many tests: z-scores and ranks, with intervals.

As in Battle of the Backbones (Goldblum et al., NeurIPS 2023, https://arxiv.org/abs/2310.19909).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.metrics import Interval

_TAILS = (0.025, 0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Of one encoder.

    z: mean over the tests of its standard deviations above the mean of all encoders; larger is
        better.
    rank: mean over the tests of its place; 1 is the best, equals share the mean of their places.
    """

    name: str
    z: Interval
    rank: Interval


def standings(values: Tensor, names: Sequence[str]) -> list[Standing]:
    """The encoders from the best on.

    values: (1 + R, T, N), larger is better, of N encoders in T tests: as measured, and in R draws
        of the test items, the same for all encoders. NaN where a draw cannot be measured; it counts
        nowhere. Intervals are central 95 % of the draws: they tell how sure the order is for these
        tests, not for others.
    """
    if values.ndim != 3 or values.shape[2] != len(names) or len(names) < 2 or len(values) < 2:
        raise ValueError(
            "values are (1 + draws, tests, encoders) of at least two encoders and one draw, got "
            f"{tuple(values.shape)} for {len(names)} names"
        )
    values = values.double()
    spread = values.std(2, correction=0, keepdim=True)
    z = (values - values.mean(2, keepdim=True)) / spread.clamp(min=1e-12)  # 0 where all are equal
    ahead = (values[..., None, :] > values[..., :, None]).sum(-1)
    equal = (values[..., None, :] == values[..., :, None]).sum(-1)
    rank = (ahead + (equal + 1) / 2).where(~values.isnan(), torch.nan)
    by_z, by_rank = z.nanmean(1), rank.nanmean(1)  # (1 + R, N)
    found = [
        Standing(name=name, z=_interval(by_z[:, place]), rank=_interval(by_rank[:, place]))
        for place, name in enumerate(names)
    ]
    return sorted(found, key=lambda standing: -standing.z.value)


def _interval(values: Tensor) -> Interval:
    draws = values[1:]
    tails = torch.quantile(draws[~draws.isnan()], torch.tensor(_TAILS, dtype=draws.dtype))
    return Interval(values[0].item(), *tails.tolist())
