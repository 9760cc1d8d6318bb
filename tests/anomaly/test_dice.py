import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from anomaly.dice import dice, dice_intervals, overlap
from medssl.metrics import OneClassError


def cases() -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(12, 14, generator=generator) for _ in range(8)]
    masks: list[torch.Tensor | None] = [None] * 3
    for i, scores in enumerate(maps[3:]):
        mask = torch.zeros(12, 14)
        mask[2 : 5 + i, 3:8] = 1
        scores += 2 * mask
        masks.append(mask)
    return maps, masks


def test_dice_is_f1_of_each_case_and_of_all_pixels():
    maps, masks = cases()
    overlaps = [overlap(m, k, threshold=1.0) for m, k in zip(maps, masks, strict=True)]
    above = [(scores > 1).flatten() for scores in maps]
    truth = [(torch.zeros(168) if mask is None else mask).flatten() for mask in masks]
    mean, pooled = dice(overlaps)
    each = [f1_score(k, m) for k, m in zip(truth[3:], above[3:], strict=True)]
    assert mean == pytest.approx(np.mean(each))  # of those with a lesion
    assert pooled == pytest.approx(f1_score(torch.cat(truth), torch.cat(above)))


def test_nothing_above_the_threshold_is_a_dice_of_zero():
    mask = torch.tensor([[1, 0]])
    assert dice([overlap(torch.tensor([[0.0, 0]]), mask, threshold=1.0)]) == (0.0, 0.0)
    nan = torch.tensor([[torch.nan, 2]])
    assert overlap(nan, mask, threshold=1.0).above == 1


def test_false_pixels_of_normal_items_lower_the_pooled_figure_alone():
    lesion = overlap(torch.tensor([[2.0, 2, 0]]), torch.tensor([[1, 1, 0]]), threshold=1.0)
    normal = overlap(torch.tensor([[2.0, 2, 0]]), torch.tensor([[0, 0, 0]]), threshold=1.0)
    assert dice([lesion]) == (1.0, 1.0)
    assert dice([lesion, normal]) == (1.0, 2 * 2 / (4 + 2))


def test_intervals_hold_the_figures_and_draw_groups_whole():
    maps, masks = cases()
    overlaps = [overlap(m, k, threshold=1.0) for m, k in zip(maps, masks, strict=True)]
    found = dice_intervals(overlaps, [None] * 8, repeats=200, seed=0)
    assert (found["dice"].value, found["dice_pooled"].value) == dice(overlaps)
    for one in found.values():
        assert one.low < one.value < one.high
    whole = dice_intervals(overlaps, ["patient"] * 8, repeats=20, seed=0)["dice"]
    assert (whole.low, whole.high) == pytest.approx((whole.value, whole.value))


def test_without_a_marked_pixel_there_is_no_dice():
    with pytest.raises(OneClassError, match="marked"):
        dice([overlap(torch.rand(3, 4), None, threshold=0.5)])
    with pytest.raises(OneClassError, match="marked"):
        dice([])


def test_a_mask_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="on its map's grid"):
        overlap(torch.rand(3, 4), torch.ones(3, 1), threshold=0.5)
