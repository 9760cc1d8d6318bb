"""Linear segmentation against closed forms and scikit-learn; overlaps counted by hand."""

import pytest
import torch

from medssl.metrics import OneClassError
from medssl.probes.segmentation import LinearSegmentation, dice_and_iou


def blocks(count: int, seed: int, grid: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (S, 5, *grid) of noise whose channel 3 is high where the mask, 4 times as fine, is 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, *grid, generator=generator) < 0.3
    maps = torch.randn(count, 5, *grid, generator=generator)
    maps[:, 3] = coarse * 2.0 + 10
    masks = coarse.long()
    for axis in range(1, masks.ndim):
        masks = masks.repeat_interleave(4, dim=axis)
    return maps, masks


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 5)], ids=["pictures", "volumes"])
def test_a_mask_that_is_a_channel_is_found(grid):
    maps, masks = blocks(12, 0, grid)
    unseen, expected = blocks(8, 1, grid)
    fitted = LinearSegmentation().fit(maps, masks)
    places = (slice(None), *(slice(1, None, 4),) * len(grid))  # where upsampling hardly smooths
    scores = fitted.scores(unseen, expected.shape[1:])
    assert scores.shape == (8, 2, *expected.shape[1:])
    assert torch.equal(scores.argmax(1)[places], expected[places])
    at_places = fitted.scores(unseen, grid).argmax(1)
    found = dice_and_iou(at_places, expected[places], classes=2, groups=[None] * 8)
    assert found["dice_1"].value == 1


def test_pure_places_give_the_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    generator = torch.Generator().manual_seed(0)
    maps = 3 * torch.randn(6, 4, 5, 5, generator=generator) - 2
    noise = torch.randn(6, 5, 5, generator=generator)
    classes = (maps[:, 0] > -2).long() + (maps[:, 1] + 3 * noise > 0)
    masks = classes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    rows = maps.movedim(1, -1).flatten(0, 2)
    scaler = StandardScaler().fit(rows)
    reference = LogisticRegression(C=1 / (0.02 * len(rows)), tol=1e-8, max_iter=1000)
    reference.fit(scaler.transform(rows), classes.flatten())
    expected = torch.from_numpy(reference.predict_proba(scaler.transform(rows))).float()
    scores = LinearSegmentation(penalty=0.02).fit(maps, masks).scores(maps, (5, 5))
    found = scores.softmax(1).movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_without_information_the_scores_are_the_shares_of_the_valid_pixels():
    """A lesion in a quarter of one of four places; a void hides another, and a row of a third."""
    masks = torch.zeros(1, 8, 8, dtype=torch.int64)
    masks[0, 1:3, 0:2] = 1  # 4 pixels
    masks[0, 4:, 4:] = 1  # all in the void
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[0, 4:, 4:] = False
    valid[0, 7] = False  # 4 pixels of the lower left place
    fitted = LinearSegmentation().fit(torch.ones(1, 3, 2, 2), masks, valid=valid)
    share = fitted.scores(torch.ones(1, 3, 2, 2), (2, 2)).softmax(1)[0, 1]
    torch.testing.assert_close(share, torch.full((2, 2), 4 / 44), atol=1e-4, rtol=0)


def test_a_void_over_half_of_every_place_changes_nothing():
    maps, masks = blocks(4, 0, (4, 6))
    valid = (torch.arange(masks.shape[2]) % 2 == 0).expand_as(masks)
    whole, half = (LinearSegmentation(penalty=0.1).fit(maps, masks, valid=v) for v in (None, valid))
    torch.testing.assert_close(half.weight_, whole.weight_, atol=1e-4, rtol=1e-4)


def test_scores_lie_at_the_pixels_of_their_places():
    """Two places side by side: constant to the middle of each, linear in between."""
    fitted = LinearSegmentation()
    fitted.weight_, fitted.bias_ = torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 1.0])
    scores = fitted.scores(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))
    torch.testing.assert_close(scores[0, 1, 0], torch.tensor([1.0, 1.5, 2.5, 3.0]))
    assert not scores[0, 0].any()


def test_dice_and_iou_are_as_counted_by_hand():
    masks = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]])
    predicted = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[1, 0, 0], [1, 1, 1]]])
    found = dice_and_iou(predicted, masks, classes=2, groups=["a", "b"])
    assert found["dice_1"].value == pytest.approx(2 * 2 / (6 + 3))  # both 2, said 6, true 3
    assert found["iou_1"].value == pytest.approx(2 / 7)
    assert found["dice_0"].value == pytest.approx(2 * 5 / (6 + 9))
    assert found["iou_0"].value == pytest.approx(5 / 10)
    valid = torch.ones_like(masks, dtype=torch.bool)
    valid[1, 1] = False
    found = dice_and_iou(predicted, masks, classes=2, groups=["a", "b"], valid=valid)
    assert found["dice_1"].value == pytest.approx(2 * 2 / (3 + 3))


def test_intervals_are_of_patients():
    """Draws of two patients: twice the one, twice the other, or both, and nothing else."""
    masks = torch.zeros(12, 1, 4, dtype=torch.int64)
    predicted = torch.tensor([[[0, 0, 0, 0]], [[0, 0, 1, 1]]]).repeat_interleave(6, 0)
    groups = ["a"] * 6 + ["b"] * 6
    found = dice_and_iou(predicted, masks, classes=1, groups=groups)["iou_0"]
    assert (found.value, found.low, found.high) == (0.75, 0.5, 1.0)


def test_a_class_of_no_valid_pixel_has_no_overlap():
    masks = torch.zeros(2, 3, 3, dtype=torch.int64)
    with pytest.raises(OneClassError, match="no valid pixel is of the class"):
        dice_and_iou(masks, masks, classes=2, groups=[None, None])


def test_what_cannot_be_fitted_or_compared_is_refused():
    maps, masks = blocks(2, 0, (4, 4))
    with pytest.raises(ValueError, match=r"one mask .* got \(1, 16, 16\) and \(2, 5, 4, 4\)"):
        LinearSegmentation().fit(maps, masks[:1])
    with pytest.raises(ValueError, match="at least two classes are needed .* got 1 in 32 places"):
        LinearSegmentation().fit(maps, 0 * masks)
    with pytest.raises(ValueError, match="got 2 in 0 places"):
        LinearSegmentation().fit(maps, masks, valid=masks < 0)
    with pytest.raises(ValueError, match="some maps hold NaN"):
        LinearSegmentation().fit(maps * torch.nan, masks)
    with pytest.raises(ValueError, match="penalty must be positive, got 0"):
        LinearSegmentation(penalty=0)
    with pytest.raises(RuntimeError, match="call fit"):
        LinearSegmentation().scores(maps, (16, 16))
    with pytest.raises(ValueError, match="need one shape"):
        dice_and_iou(masks[:1], masks, classes=2, groups=[None, None])


def test_bilinear_edges_cost_little():
    """Dice of the upsampled scores on a disk that its feature follows at the places."""
    axis = torch.arange(64) - 31.5
    masks = (axis[:, None].square() + axis.square() < 400).long()[None]
    maps = torch.nn.functional.avg_pool2d(masks[:, None].float(), 4)
    predicted = LinearSegmentation().fit(maps, masks).scores(maps, (64, 64)).argmax(1)
    found = dice_and_iou(predicted, masks, classes=2, groups=[None], repeats=2)
    assert found["dice_1"].value > 0.97
