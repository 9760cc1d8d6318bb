import math

import numpy as np
import pytest
import torch

from anomaly.aupimo import aupimo
from medssl.metrics import OneClassError

BOUNDS = (1 / 400, 1 / 20)


def by_thresholds(normal: list, scores: np.ndarray, mask: np.ndarray) -> float:
    """The definition: recall over the log of the rate, at every score, trapezoids between."""
    every = np.unique(np.concatenate([*(n.ravel() for n in normal), scores.ravel()]))[::-1]
    fpr = np.array([np.mean([(n >= t).mean() for n in normal]) for t in every])
    tpr = np.array([(scores[mask] >= t).mean() for t in every])
    low, high = map(math.log, BOUNDS)
    x = np.log(np.maximum(fpr, BOUNDS[0]))  # a rise that begins below starts at the lower bound
    end = np.interp(high, x, tpr)
    inside = x < high
    x, y = np.append(x[inside], high), np.append(tpr[inside], end)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / (high - low))


@pytest.mark.parametrize("levels", [None, 4])
def test_recalls_are_those_of_every_threshold(levels):
    rng = np.random.default_rng(1)
    maps = [rng.normal(size=shape) for shape in ((20, 20), (30, 25), (20, 20), (18, 40))]
    if levels is not None:
        maps = [(scores * levels).round() / levels for scores in maps]
    masks = [None, np.zeros((30, 25), bool), np.zeros((20, 20), bool), np.zeros((18, 40), bool)]
    masks[2][3:9, 4:7] = masks[3][2:5, 10:30] = True
    maps[2][masks[2]] += 3
    maps[3][masks[3]] += 2
    maps = [scores.astype(np.float32) for scores in maps]
    found = aupimo(
        [torch.tensor(m) for m in maps],
        [None if m is None else torch.tensor(m) for m in masks],
        fpr_bounds=BOUNDS,
    )
    for place in (2, 3):
        expected = by_thresholds(maps[:2], maps[place], masks[place])
        assert 0.05 < expected < 0.95
        assert found[place].item() == pytest.approx(expected, abs=1e-9)


def test_normal_pixels_of_anomalous_images_do_not_count():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(20, 20, generator=generator) for _ in range(2)]
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[5:9, 5:9] = True
    maps[1][mask] += 2
    before = aupimo(maps, [None, mask], fpr_bounds=BOUNDS)[1].item()
    maps[1][~mask] = 100.0
    assert aupimo(maps, [None, mask], fpr_bounds=BOUNDS)[1].item() == before


def test_every_normal_image_weighs_the_same():
    """A rate of 1/2 is all of one picture and none of the other, however large they are."""
    small, large = torch.full((2, 2), 5.0), torch.zeros(20, 20)
    lesion, mask = torch.full((2, 2), 4.0), torch.ones(2, 2)
    bounds = (0.25, 0.5)
    assert aupimo([small, large, lesion], [None, None, mask], fpr_bounds=bounds)[2] == 0
    bounds = (0.25, 1.0)  # found from 1/2 on, the upper half of the log scale
    found = aupimo([small, large, lesion], [None, None, mask], fpr_bounds=bounds)[2]
    assert found.item() == pytest.approx(0.5)


def test_pixels_without_a_score_are_missed_or_left_out():
    maps = [torch.arange(400.0).reshape(20, 20), torch.full((2, 2), 1e3)]
    maps[0][0] = torch.nan
    maps[1][0] = torch.nan
    assert aupimo(maps, [None, torch.ones(2, 2)], fpr_bounds=(0.01, 0.1))[1] == 0.5


def test_only_the_highest_normal_pixels_are_kept_and_nothing_changes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(100, 100, generator=generator) for _ in range(8)]
    masks = [None] * 7 + [torch.eye(100)]
    maps[7] += 2 * torch.eye(100)
    expected = aupimo(maps, masks, fpr_bounds=(1e-3, 1e-2))[7]
    monkeypatch.setattr("anomaly.aupimo._MOST_KEPT", 2000)
    assert 0 < aupimo(maps, masks, fpr_bounds=(1e-3, 1e-2))[7] == pytest.approx(expected.item())


def test_ties_at_the_place_from_which_pixels_are_dropped_count_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(100, 100, generator=generator).round() for _ in range(8)]
    masks = [None] * 7 + [torch.eye(100)]
    maps[7] += 2 * torch.eye(100)
    for high in (0.03, 0.2):
        expected = aupimo(maps, masks, fpr_bounds=(1e-3, high))[7].item()
        for kept in (15_000, 20_000, 30_000):  # 0.2 to 0.4 of 70 000: all tied at 1 or at 0
            with monkeypatch.context() as limited:
                limited.setattr("anomaly.aupimo._MOST_KEPT", kept)
                found = aupimo(maps, masks, fpr_bounds=(1e-3, high))[7].item()
            assert found == pytest.approx(expected, abs=1e-12)


def test_too_few_normal_pixels_for_the_lower_rate_are_refused():
    mask = torch.ones(20, 20)
    with pytest.raises(OneClassError, match="takes 100000 pixels"):
        aupimo([torch.rand(20, 20)] * 2, [None, mask])
    with pytest.raises(OneClassError, match="needs a normal image"):
        aupimo([torch.rand(20, 20)], [mask])
    with pytest.raises(OneClassError, match="anomalous pixels"):
        aupimo([torch.rand(20, 20)], [None], fpr_bounds=BOUNDS)
    with pytest.raises(ValueError, match="lower < upper"):
        aupimo([torch.rand(20, 20)], [None], fpr_bounds=(0.1, 0.01))


def test_an_upper_rate_beyond_the_highest_pixels_is_refused(monkeypatch):
    monkeypatch.setattr("anomaly.aupimo._MOST_KEPT", 100)
    maps = [torch.rand(20, 20) for _ in range(3)]
    with pytest.raises(ValueError, match="100 highest .* lower upper bound than 0.2"):
        aupimo(maps, [None, None, torch.eye(20)], fpr_bounds=(0.01, 0.2))


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="on its map's grid"):
        aupimo([torch.rand(20, 20)] * 2, [None, torch.ones(20, 1)], fpr_bounds=BOUNDS)
