import numpy as np
import pytest
import torch

from anomaly.metrics import PixelScores
from anomaly.streaming import CountedPixels, StreamingPixelScores
from medssl.metrics import OneClassError

NOISE = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_cauchy(shape),
    "lognormal": lambda rng, shape: np.exp(3 * rng.normal(size=shape)),
    "five levels": lambda rng, shape: rng.integers(0, 5, shape).astype(float),
    "half tied": lambda rng, shape: np.maximum(rng.normal(size=shape), 0),
    "far from zero": lambda rng, shape: 1e6 + rng.random(shape),
    "256 levels": lambda rng, shape: (rng.random(shape) * 255).round(),
    "crowded at 1": lambda rng, shape: 1 - 1e-3 * rng.random(shape) ** 8,
}


def random_case(seed: int, kind: str) -> tuple[list, list]:
    """Two to four maps with lesions of one pixel to half the picture, weak or strong."""
    rng = np.random.default_rng([seed, *map(ord, kind)])
    shape = [(60, 70), (12, 20, 16), (150, 140)][rng.integers(3)]
    maps, masks = [], []
    for i in range(rng.integers(2, 5)):
        scores = NOISE[kind](rng, shape)
        unit = np.std(np.clip(scores, *np.quantile(scores, [0.1, 0.9])))
        mask = np.zeros(shape, bool)
        for _ in range(rng.integers(1, 4) if i else 0):
            size = rng.choice([1, 2, 6, min(shape) // 2])
            start = [rng.integers(n - size) for n in shape]
            mask[tuple(slice(s, s + size) for s in start)] = True
        scores = scores + mask * unit * rng.choice([0, 0.5, 1, 3, 6])
        if rng.random() < 0.4:  # normal pixels above all others
            scores[~mask] += 10 * unit * (rng.random((~mask).sum()) < 0.001)
        if rng.random() < 0.3:
            scores[:3] = np.nan
        maps.append(torch.tensor(scores, dtype=torch.float32))
        masks.append(torch.tensor(mask) if mask.any() else None)
    return maps, masks


@pytest.mark.parametrize("kind", NOISE)
def test_counting_in_bins_agrees_with_sorting_every_pixel(kind):
    for seed in range(8):
        maps, masks = random_case(seed, kind)
        exact, binned = PixelScores(maps, masks), StreamingPixelScores(maps, masks)
        assert binned.auroc() == pytest.approx(exact.auroc(), abs=1e-3)
        assert binned.average_precision() == pytest.approx(exact.average_precision(), abs=1e-3)
        for limit in (0.3, 0.05, 0.01, 0.001):
            assert binned.aupro(limit) == pytest.approx(exact.aupro(limit), abs=1e-3)
        found = float(binned.curves.best_pooled_dice()[0])
        assert found == pytest.approx(exact.best_pooled_dice(), abs=1e-3)


def test_the_level_is_close_to_the_exact_one_and_exceeded_by_no_more():
    maps, masks = random_case(1, "normal")
    exact, binned = PixelScores(maps, masks), StreamingPixelScores(maps, masks)
    assert exact.level(0.01) <= binned.level(0.01) <= exact.level(0.0095)


def test_intervals_are_those_of_the_exact_form():
    maps, masks = random_case(3, "normal")
    groups = [None] * len(maps)
    exact = PixelScores(maps, masks).intervals(groups, repeats=100)
    binned = StreamingPixelScores(maps, masks).intervals(groups, repeats=100)
    assert binned.keys() == exact.keys()
    for name, interval in binned.items():
        assert interval.value == pytest.approx(exact[name].value, abs=1e-3)
        assert (interval.low, interval.high) == pytest.approx((exact[name].low, exact[name].high))


class Counting:
    """Values that count how often they are asked for, and how many are alive at once."""

    def __init__(self, values):
        self.values, self.passes = values, 0

    def __iter__(self):
        self.passes += 1
        yield from self.values


def test_maps_are_read_at_most_three_times():
    maps, masks = random_case(0, "five levels")
    counting = Counting(maps)
    StreamingPixelScores(counting, masks)
    assert counting.passes == 3


def test_a_detector_compared_with_itself_does_not_differ_in_any_draw():
    counted = CountedPixels(PixelScores(*random_case(3, "normal")).items)
    found = counted.differences(counted, [None] * counted.num_items, repeats=20, seed=0)
    for difference in found.values():
        assert difference.a == difference.b
        assert (difference.difference.low, difference.difference.high) == (0, 0)
        assert difference.a_larger == 0.5


def test_a_worse_map_of_the_same_items_is_behind_in_the_same_draws():
    maps, masks = random_case(3, "normal")
    worse = [scores.round() for scores in maps]
    a, b = (PixelScores(one, masks) for one in (maps, worse))
    groups = [None] * len(maps)
    found = a.counted().differences(b.counted(), groups, repeats=50, seed=0)["pixel_auroc"]
    assert found.a == pytest.approx(a.auroc(), abs=1e-4)
    assert found.b == pytest.approx(b.auroc(), abs=1e-4)
    assert found.difference.value == pytest.approx(found.a - found.b)


def test_without_anomalous_pixels_there_is_nothing_to_count():
    with pytest.raises(OneClassError, match="0 anomalous and 12 normal"):
        StreamingPixelScores([torch.rand(3, 4)], [None])
