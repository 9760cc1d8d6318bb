import numpy as np
import pytest
import torch

from anomaly.froc import FROC, RATES, Findings, find
from medssl.metrics import OneClassError

NONE = -np.inf


def test_findings_by_hand():
    scores = torch.tensor(
        [
            [9.0, 1, 0, 0, 0, 7],
            [0, 6, 0, 0, 0, 0],
            [0, 0, 0, 5, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [4, 0, 0, 0, 0, 8],
        ]
    )
    mask = torch.zeros(5, 6)
    mask[1, 1] = 1  # touched by the finding of 9 and 6, and itself at 6
    mask[2, 3:5] = 1
    mask[4, 3] = 1  # nothing there
    found = find(scores, mask, threshold=3.0)
    assert sorted(found.lesion.tolist()) == [NONE, 5, 6]
    assert sorted(found.false.tolist()) == [4, 7, 8]
    assert find(scores, None, threshold=6.5).false.tolist() == [9, 7, 8]


def test_what_touches_by_a_corner_is_one_finding_in_a_volume():
    scores = torch.zeros(3, 3, 3)
    scores[0, 0, 0] = scores[1, 1, 1] = 2.0
    scores[2, 2, 2] = 3.0
    assert find(scores, None, threshold=1.0).false.tolist() == [3]
    scores[1, 1, 1] = 0.0
    assert sorted(find(scores, None, threshold=1.0).false.tolist()) == [2, 3]


def test_a_value_at_the_threshold_and_nan_are_not_above():
    scores = torch.tensor([[1.0, 0, torch.nan, 0, 2]])
    assert find(scores, None, threshold=1.0).false.tolist() == [2]


def test_findings_smaller_than_a_volume_in_mm_are_left_out():
    scores = torch.zeros(4, 5, 6)
    scores[0, 0, 0:2] = 5.0  # two voxels of 2 x 0.5 x 1.5 mm are 3 mm3
    scores[3, 4, 5] = 9.0
    spacing = (2.0, 0.5, 1.5)
    assert find(scores, None, threshold=1, spacing=spacing, min_volume_mm3=3).false.tolist() == [5]
    assert find(scores, None, threshold=1, spacing=spacing, min_volume_mm3=3.1).false.size == 0
    lesion = find(scores, scores == 9, threshold=1, spacing=spacing, min_volume_mm3=3).lesion
    assert lesion.tolist() == [NONE]
    with pytest.raises(ValueError, match="spacing"):
        find(scores, None, threshold=1, min_volume_mm3=3)


def findings(lesion: list[float], false: list[float]) -> Findings:
    return Findings(np.array(lesion, np.float32), np.array(false, np.float32))


def test_the_curve_by_hand():
    froc = FROC([findings([9, 3, NONE], [8, 3]), findings([5], [4]), findings([], [7, 2, 1])])
    false, recall = froc.curve()
    #          9   8     7     5     4    3   2     1
    assert false.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert recall.tolist() == [0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75]
    assert froc.recalls() == [0.25, 0.25, 0.25, 0.5, 0.75, 0.75, 0.75]  # at 1/8 to 8
    assert froc.mean_recall() == pytest.approx((3 * 0.25 + 0.5 + 3 * 0.75) / 7)
    assert froc.last() == (0.75, 2.0)


def by_labeling_each_threshold_anew(maps, masks, threshold, rate):
    """Recall as `find` defines it, from the map alone: the lesion's own largest value counts."""
    from scipy.ndimage import label

    best, false = [], []
    for scores, mask in zip(maps, masks, strict=True):
        parts, count = label(scores > threshold, np.ones((3,) * scores.ndim))
        marked, num = label(mask, np.ones((3,) * scores.ndim))
        best += [scores[marked == one].max() for one in range(1, num + 1)]
        false += [
            scores[parts == one].max()
            for one in range(1, count + 1)
            if not mask[parts == one].any()
        ]
    best, false = np.array(best), np.array(false)
    allowed = [
        (best[best > threshold] >= t).sum() / len(best)
        for t in np.unique([*best, *false])
        if (false >= t).sum() <= rate * len(maps)
    ]
    return max(allowed, default=0.0)


@pytest.mark.parametrize("levels", [None, 3])
def test_recalls_are_those_of_every_threshold(levels):
    rng = np.random.default_rng(0)
    maps, masks = [], []
    for i in range(6):
        scores = rng.normal(size=(40, 40))
        mask = np.zeros((40, 40), bool)
        for _ in range(3 * (i % 2)):
            row, column = rng.integers(36, size=2)
            mask[row : row + 2, column : column + 3] = True
        scores = scores + 1.3 * mask
        maps.append(scores if levels is None else (scores * levels).round() / levels)
        masks.append(mask)
    froc = FROC(
        [
            find(torch.tensor(scores), torch.tensor(mask), threshold=1.8)
            for scores, mask in zip(maps, masks, strict=True)
        ]
    )
    expected = [by_labeling_each_threshold_anew(maps, masks, 1.8, rate) for rate in RATES]
    assert expected[0] < expected[-1]
    assert froc.recalls() == pytest.approx(expected)


def test_more_false_findings_than_any_rate_allows_change_nothing():
    few = [findings([9, 3], [8.0, *range(-30, -10)]), findings([], [])]
    many = [findings([9, 3], [8.0, *np.linspace(-30, 2, 5000)]), findings([], [])]
    assert FROC(few).recalls()[:3] == FROC(many).recalls()[:3] == [0.5, 0.5, 1.0]
    assert FROC(many).last() == (1.0, 5001 / 2)


def test_a_draw_weighs_items_as_if_they_were_there_as_often():
    items = [findings([9, 3], [8, 3]), findings([5], [4, 7]), findings([], [6, 2])]
    froc, drawn = FROC(items), FROC([items[0], items[0], items[2]])
    weights = np.array([2.0, 0, 1])
    assert froc._recalls(weights, RATES).tolist() == drawn.recalls()
    assert froc._last(weights[None])[0].tolist() == pytest.approx(drawn.last())


def test_intervals_hold_their_values_and_skip_draws_without_a_lesion():
    items = [findings([9, 3], [8, 3]), *(findings([i], [4, 7]) for i in range(9))]
    items += [findings([], [6, 2, 1])] * 10
    froc = FROC(items)
    groups = [f"patient{i // 2}" for i in range(20)]
    mean = froc.interval(groups, repeats=100, seed=0)
    recall, false = froc.intervals_of_last(groups, repeats=100, seed=0)
    assert (recall.value, false.value) == froc.last()
    assert mean.value == froc.mean_recall()
    for one in (mean, false):
        assert one.low < one.value < one.high
    rare = FROC([findings([9], [1]), *[findings([], [2])] * 3])
    assert rare.interval([None] * 4, repeats=50, seed=0).low >= 0


def test_without_a_lesion_there_is_no_curve():
    with pytest.raises(OneClassError, match="lesion"):
        FROC([findings([], [1.0])])


def test_a_draw_without_the_item_of_most_false_findings_looks_at_the_lower_ones_of_the_others():
    rng = np.random.default_rng(0)
    others = [findings(rng.normal(1, 1, 2), rng.normal(size=3)) for _ in range(4)]
    others.append(findings([2.5, -0.4], [150, -0.5]))  # one is beyond the first rate already
    noisy = findings([], 100 + rng.random(400))  # more than all that are looked at first
    froc, alone = FROC([noisy, *others]), FROC(others)
    assert alone.recalls()[0] < alone.recalls()[-1] == 1
    assert froc._recalls(np.array([0.0, 1, 1, 1, 1, 1]), RATES).tolist() == alone.recalls()
    assert froc.recalls() == [0.0] * 7
    assert froc.recalls([60, 67, 69]) == [0.0, alone.recalls([0.4])[0], 1.0]


def test_infinite_scores_are_tied_like_any_others():
    froc = FROC([findings([np.inf, 1], [np.inf])])
    assert [side.tolist() for side in froc.curve()] == [[1, 1], [0.5, 1]]
    assert froc.recalls([0.5, 1]) == [0, 1]


def test_a_mask_or_spacing_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="on its map's grid"):
        find(torch.rand(3, 4), torch.ones(3, 1), threshold=0.5)
    with pytest.raises(ValueError, match="one per axis"):
        find(torch.rand(3, 4), None, threshold=0.5, spacing=(2.0, 1.0, 1.0), min_volume_mm3=1)
