import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import roc_auc_score

from anomaly.metrics import PixelScores, aupro, pixel_auroc
from medssl.metrics import OneClassError


def by_thresholds(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """AUPRO by its definition: every distinct score as a threshold, every lesion on its own."""
    lesions = []
    for scores, mask in zip(maps, masks, strict=True):
        parts, count = label(mask, structure=np.ones((3,) * mask.ndim))
        lesions += [scores[parts == part] for part in range(1, count + 1)]
    lesions = [np.where(np.isnan(values), -np.inf, values) for values in lesions]  # missed
    normal = np.concatenate([s[m == 0] for s, m in zip(maps, masks, strict=True)])
    normal = normal[~np.isnan(normal)]
    every = np.unique(np.concatenate([normal, *lesions]))[::-1]
    every = every[np.isfinite(every)]
    fpr = np.array([0.0, *((normal >= t).mean() for t in every)])
    pro = np.array([0.0, *(np.mean([(v >= t).mean() for v in lesions]) for t in every)])
    x = np.append(fpr[fpr < limit], limit)
    y = np.append(pro[fpr < limit], np.interp(limit, fpr, pro))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def scene(
    shape: tuple[int, ...], *, levels: int | None = None, items: int = 4, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Noise maps, raised where the mask has a few boxes; the last item is normal."""
    generator = torch.Generator().manual_seed(seed)
    maps, masks = [], []
    for i in range(items):
        mask = torch.zeros(shape, dtype=torch.bool)
        for _ in range(0 if i == items - 1 else 3):
            start = [int(torch.randint(n - 4, (1,), generator=generator)) for n in shape]
            mask[tuple(slice(s, s + 2 + s % 3) for s in start)] = True
        scores = torch.randn(shape, generator=generator) + 1.0 * mask
        maps.append(scores if levels is None else (scores * levels).round() / levels)
        masks.append(mask)
    return maps, masks


@pytest.mark.parametrize("shape", [(19, 23), (7, 11, 9)])
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_that_of_every_threshold_and_lesion(shape, levels, limit):
    maps, masks = scene(shape, levels=levels)
    maps[0][:3] = torch.nan
    expected = by_thresholds([m.numpy() for m in maps], [m.numpy() for m in masks], limit)
    assert aupro(maps, masks, limit) == pytest.approx(expected, abs=1e-9)


def test_aupro_by_hand():
    # Two lesions: one pixel above every normal one, and two of which one is below every normal one.
    maps = [torch.tensor([[9.0, 4, 3, 2, 1, 0, 8, -1]])]
    masks = [torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1]])]
    assert aupro(maps, masks, 0.3) == pytest.approx((1 + 1 / 2) / 2)
    # The second lesion's pixel between the first and the second of five normal pixels: its part of
    # the curve begins at 0.2 of the way, and a third of the 0.3 is left.
    maps[0][0, 6] = 3.5
    assert aupro(maps, masks, 0.3) == pytest.approx((1 + 1 / 2 * (0.3 - 0.2) / 0.3) / 2)
    # Tied with the second normal pixel, it rises along 0.2 to 0.4 and is cut halfway.
    maps[0][0, 6] = 3.0
    assert aupro(maps, masks, 0.3) == pytest.approx((1 + 1 / 2 * (0.1 * 0.5 / 2) / 0.3) / 2)


def test_lesions_that_touch_at_a_corner_are_one():
    maps = [torch.tensor([[9.0, 0, 5], [0, -5, -5], [5, 5, 5]])]
    touching = [torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]])]
    assert aupro(maps, touching) == pytest.approx(1 / 3)
    apart = [torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0]])]
    assert aupro(maps, apart) == pytest.approx(1 / 2)


@pytest.mark.parametrize("levels", [None, 3])
def test_pixel_auroc_is_that_of_scikit_learn(levels):
    maps, masks = scene((40, 50), levels=levels)
    maps[1][4:19] = torch.nan
    assert masks[1][4:19].any()
    scores, labels = torch.stack(maps), torch.stack(masks)
    counted = labels | ~scores.isnan()  # an anomalous pixel without a score is missed
    expected = roc_auc_score(labels[counted], scores.nan_to_num(-1e9)[counted])
    assert pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-12)


def test_normal_items_count_with_and_without_an_empty_mask():
    maps, masks = scene((19, 23))
    with_none = [*masks[:-1], None]
    assert aupro(maps, with_none) == aupro(maps, masks)
    assert aupro(maps[:-1], masks[:-1]) != aupro(maps, masks)


def test_any_increasing_change_of_the_scores_leaves_the_figures():
    maps, masks = scene((19, 23))
    changed = [(3 * scores).exp() - 1000 for scores in maps]
    assert aupro(changed, masks) == pytest.approx(aupro(maps, masks), abs=2e-3)


def test_pictures_of_different_sizes_are_pooled():
    first, second = scene((19, 23)), scene((31, 8), seed=1)
    maps, masks = first[0] + second[0], first[1] + second[1]
    expected = by_thresholds([m.numpy() for m in maps], [m.numpy() for m in masks], 0.3)
    assert aupro(maps, masks) == pytest.approx(expected, abs=1e-9)


def test_draws_from_bins_agree_with_the_exact_figures_of_the_drawn_items(monkeypatch):
    maps, masks = scene((60, 70), items=6)
    seen: list[torch.Tensor] = []

    def spy(value, draw, **_):
        counts = torch.tensor([2, 0, 1, 1, 0, 2])
        seen.append(torch.tensor(draw(counts)))
        return value

    monkeypatch.setattr("anomaly.metrics.interval", spy)
    PixelScores(maps, masks).intervals([None] * 6)

    drawn = [0, 0, 2, 3, 5, 5]
    exact = PixelScores([maps[i] for i in drawn], [masks[i] for i in drawn])
    assert float(seen[0]) == pytest.approx(exact.auroc(), abs=1e-3)
    assert float(seen[1]) == pytest.approx(exact.aupro(), abs=1e-3)


def test_intervals_hold_the_exact_value_and_widen_when_groups_do():
    maps, masks = scene((30, 30), items=12)
    pixels = PixelScores(maps, masks)
    alone = pixels.intervals([None] * 12, repeats=200)["aupro"]
    paired = pixels.intervals([f"part{i // 4}" for i in range(12)], repeats=200)["aupro"]
    assert alone.value == paired.value == pixels.aupro()
    assert alone.low < alone.value < alone.high
    assert pixels.intervals([None] * 12, repeats=200)["aupro"] == alone


def test_figures_without_an_anomalous_pixel_are_refused():
    maps, _ = scene((19, 23))
    with pytest.raises(OneClassError, match="0 anomalous"):
        aupro(maps, [None] * len(maps))


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="on its map's grid"):
        pixel_auroc([torch.rand(4, 5)], [torch.ones(5, 4)])
    with pytest.raises(ValueError, match="fpr_limit"):
        aupro(*scene((19, 23)), fpr_limit=0.0)
