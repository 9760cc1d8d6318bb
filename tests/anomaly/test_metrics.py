import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomaly.metrics import PixelScores, aupro, pixel_auroc, pixel_average_precision
from anomaly.streaming import StreamingPixelScores
from medssl.metrics import OneClassError, auroc


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


def test_draws_from_bins_agree_with_the_exact_figures_of_the_drawn_items():
    maps, masks = scene((60, 70), items=6)
    drawn = [0, 0, 2, 3, 5, 5]
    exact = PixelScores([maps[i] for i in drawn], [masks[i] for i in drawn])
    counted = PixelScores(maps, masks).counted()
    found = counted.curves(torch.tensor([[1, 1, 1, 1, 1, 1], [2, 0, 1, 1, 0, 2]])).all()
    assert found["pixel_auroc"][1] == pytest.approx(exact.auroc(), abs=1e-3)
    assert found["pixel_average_precision"][1] == pytest.approx(exact.average_precision(), abs=1e-3)
    for name, limit in (("aupro", 0.3), ("aupro_0.05", 0.05), ("aupro_0.01", 0.01)):
        assert found[name][1] == pytest.approx(exact.aupro(limit), abs=1e-3)
    assert found["dice_pooled_oracle"][1] == pytest.approx(exact.best_pooled_dice(), abs=1e-3)


@pytest.mark.parametrize("levels", [None, 3])
def test_pixel_average_precision_is_that_of_scikit_learn(levels):
    maps, masks = scene((40, 50), levels=levels)
    maps[3][4:19] = torch.nan
    scores, labels = torch.stack(maps), torch.stack(masks)
    known = ~scores.isnan()
    expected = average_precision_score(labels[known], scores[known])
    assert pixel_average_precision(maps, masks) == pytest.approx(expected, abs=1e-12)


def test_a_missed_pixel_has_no_precision_at_all():
    maps = [torch.tensor([[3.0, torch.nan, 2, 1]])]
    masks = [torch.tensor([[1, 1, 0, 0]])]
    assert pixel_average_precision(maps, masks) == pytest.approx(1 / 2)  # of (1 + 0) / 2


@pytest.mark.parametrize("levels", [None, 2])
def test_the_best_dice_is_that_of_every_threshold(levels):
    maps, masks = scene((19, 23), levels=levels)
    scores, marked = torch.stack(maps), torch.stack(masks)
    every = scores.unique()
    pooled = [2 * ((scores >= t) & marked).sum() / ((scores >= t).sum() + marked.sum())
              for t in every]  # fmt: skip
    found = PixelScores(maps, masks).intervals([None] * 4, repeats=10)
    assert found["dice_pooled_oracle"].value == pytest.approx(float(max(pooled)))
    above = scores[:3] >= every[:, None, None, None]  # the last item has no lesion
    both, sizes = (above & marked[:3]).sum((2, 3)), above.sum((2, 3)) + marked[:3].sum((1, 2))
    best = (2 * both / sizes).mean(1).max()
    assert found["dice_oracle"].value == pytest.approx(float(best), abs=1e-6)


def test_the_level_is_exceeded_by_the_share_asked_for():
    pixels = PixelScores([torch.arange(100.0)[None]], [torch.arange(100)[None] == 99])
    assert pixels.level(0.0) == 98
    assert pixels.level(0.1) == 89  # 9 of 99 normal pixels lie above, and 10 would be too many
    tied = PixelScores([torch.tensor([[1.0, 2, 2, 2, 3]])], [torch.tensor([[0, 0, 0, 0, 1]])])
    assert tied.level(0.5) == 2
    hundred = PixelScores([torch.arange(101.0)[None]], [torch.arange(101)[None] == 100])
    assert hundred.level(0.29) == 70  # 0.29 * 100 is rounded to less than 29


# What other code does to raw scores, beside what the figure really is.


def test_raw_scores_beyond_the_reach_of_a_sigmoid_keep_their_order():
    """A sigmoid in float32, which some AUROCs apply to scores outside [0, 1], is 1 from 17 on."""
    scores, labels = torch.arange(20.0, 60.0), torch.arange(40) >= 20
    saturated = scores.sigmoid()
    assert roc_auc_score(labels, saturated) == 0.5
    assert auroc(scores, labels.long()) == roc_auc_score(labels, scores) == 1.0
    assert pixel_auroc([scores[None]], [labels[None]]) == 1.0


def test_an_outlier_that_leaves_8_bits_one_level_for_the_rest_changes_nothing():
    maps, masks = scene((40, 50))
    maps[3][0, 0] = 5000.0
    scores, labels = torch.stack(maps), torch.stack(masks)
    low = scores.min()
    stored = ((scores - low) / (scores.max() - low) * 255).round()
    assert abs(roc_auc_score(labels.flatten(), stored.flatten()) - 0.5) < 0.01
    expected = roc_auc_score(labels.flatten(), scores.flatten())
    assert expected > 0.7
    assert pixel_auroc(maps, masks) == pytest.approx(expected, abs=1e-9)
    by_hand = by_thresholds([m.numpy() for m in maps], [m.numpy() for m in masks], 0.3)
    assert aupro(maps, masks) == pytest.approx(by_hand, abs=1e-9)
    assert abs(aupro(list(stored), masks) - by_hand) > 0.1


def test_a_best_f1_of_21_thresholds_falls_short_of_that_of_all():
    maps, masks = scene((40, 50))
    maps = [scores.exp() for scores in maps]  # most of the range is empty
    scores, labels = torch.stack(maps), torch.stack(masks)
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    coarse = max(
        float(2 * ((scaled >= t) & labels).sum() / ((scaled >= t).sum() + labels.sum()))
        for t in np.arange(0, 1.01, 0.05)
    )
    precision, recall, _ = precision_recall_curve(labels.flatten(), scores.flatten())
    exact = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert PixelScores(maps, masks).best_pooled_dice() == pytest.approx(exact)
    assert coarse < exact - 0.005


def test_an_aupro_of_100_thresholds_misses_the_part_of_the_curve_that_counts():
    maps, masks = scene((40, 50))
    maps = [(2 * scores).exp() for scores in maps]
    values, marked = [m.numpy() for m in maps], [m.numpy() for m in masks]
    exact = by_thresholds(values, marked, 0.3)
    thresholds = np.linspace(min(m.min() for m in values), max(m.max() for m in values), 100)
    place = [np.searchsorted(thresholds, m, "right") for m in values]  # as if these were all scores
    coarse = by_thresholds([p.astype(float) for p in place], marked, 0.3)
    assert aupro(maps, masks) == pytest.approx(exact, abs=1e-9)
    assert abs(coarse - exact) > 0.01


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


@pytest.mark.parametrize("form", [PixelScores, StreamingPixelScores])
@pytest.mark.parametrize("maps", [[], [torch.full((2, 3), torch.nan)]])
def test_figures_without_any_pixel_are_refused(form, maps):
    with pytest.raises(OneClassError, match="0 anomalous and 0 normal"):
        form(maps, [None] * len(maps))


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="on its map's grid"):
        pixel_auroc([torch.rand(4, 5)], [torch.ones(5, 4)])
    with pytest.raises(ValueError, match="fpr_limit"):
        aupro(*scene((19, 23)), fpr_limit=0.0)
