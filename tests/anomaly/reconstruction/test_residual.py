"""From errors to maps and scores: padding, invalid pixels, the share that counts, the limits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures
from anomaly.reconstruction.residual import ReconstructionDetector, intensity_limits
from medssl.data.sample import collate
from medssl.training import Trainable, TrainingPlan

PLAN = TrainingPlan(total_samples=1, batch_size=1)


class Nothing(Trainable):
    """Learns nothing."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))


class FromMean(ReconstructionDetector):
    """How far a pixel lies from the mean of all it is shown of its image."""

    def __init__(self, *, size=None, sigma=0.0, top=1.0):
        super().__init__(dims=2, size=size, sigma=sigma, top=top, plan=PLAN, selection=None, seed=0)
        self.trainable = self.new_trainable()
        self.samples_seen_ = torch.ones(1)
        self.shown = []

    def new_trainable(self):
        return Nothing()

    def residual(self, images, valid):
        self.shown.append(images)
        return (images - images.mean((1, 2, 3), keepdim=True)).abs().mean(1)


def picture(pixels, valid=None):
    """A sample of these pixels (H, W)."""
    base = smooth_pictures(1)[0]
    valid = torch.ones(pixels.shape, dtype=torch.bool) if valid is None else valid
    return base.with_image(replace(base.images["image"], pixels=pixels[None], valid=valid))


def noise(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def test_an_image_is_shown_without_the_padding_of_its_batch():
    small, large = picture(noise(6, 9)), picture(noise(8, 5))
    detector = FromMean()
    together = detector.predict(collate([small, large, small]))
    assert [tuple(one.shape) for one in detector.shown] == [(2, 1, 6, 9), (1, 1, 8, 5)]
    for row, sample in enumerate([small, large, small]):
        alone = detector.predict(collate([sample]))
        assert alone.score[0].equal(together.score[row])
        size = sample.images["image"].spatial_shape
        assert alone.maps["image"][0].equal(together.maps["image"][row, : size[0], : size[1]])
    assert together.maps["image"][0, 6:].isnan().all()
    assert together.maps["image"][1, :, 5:].isnan().all()


def test_invalid_pixels_are_shown_as_the_low_end_whatever_they_hold():
    valid = torch.ones(6, 9, dtype=torch.bool)
    valid[:2] = False
    pixels = noise(6, 9)
    detector = FromMean()
    clean = detector.predict(collate([picture(pixels, valid)]))
    pixels[:2] = torch.nan
    found = detector.predict(collate([picture(pixels, valid)]))
    assert (detector.shown[1][0, 0, :2] == pixels[2:].min()).all()
    assert found.score.equal(clean.score)
    assert found.maps["image"][0].isnan().equal(~valid)


def test_the_score_is_the_mean_of_the_valid_pixels():
    valid = noise(6, 9) > 0
    detector = FromMean()
    found = detector.predict(collate([picture(noise(6, 9), valid)]))
    shown = detector.shown[0][0, 0].double().numpy()
    errors = np.abs(shown - shown.mean())
    assert float(found.score) == pytest.approx(errors[valid.numpy()].mean(), rel=1e-6)


def test_top_is_the_mean_of_the_largest_share():
    detector = FromMean(top=0.25)
    found = detector.predict(collate([picture(noise(4, 10))]))
    values = np.sort(found.maps["image"].double().numpy().ravel())
    assert float(found.score) == pytest.approx(values[-10:].mean(), rel=1e-6)


def test_an_item_without_a_valid_pixel_scores_nan():
    empty = picture(noise(6, 9), torch.zeros(6, 9, dtype=torch.bool))
    for top in (1.0, 0.1):
        found = FromMean(top=top).predict(collate([empty, picture(noise(6, 9))]))
        assert found.score.isnan().tolist() == [True, False]


def test_a_smoothed_map_spreads_an_error_and_keeps_its_sum():
    pixels = torch.zeros(41, 41)
    pixels[20, 20] = 1.0
    sharp, smooth = (
        FromMean(sigma=sigma).predict(collate([picture(pixels)])) for sigma in (0.0, 2.0)
    )
    assert smooth.maps["image"].max() < 0.1 < sharp.maps["image"].max()
    torch.testing.assert_close(sharp.score, smooth.score, rtol=0.05, atol=0)


def test_the_noise_of_the_selftest_is_brought_to_the_size_of_the_network():
    detector = FromMean(size=(12, 8))
    assert detector.selftest(noise(2, 1, 5, 5)).shape == (2,)
    assert detector.shown[0].shape == (2, 1, 12, 8)


@pytest.mark.parametrize("given", [{"top": 0.0}, {"top": 1.5}, {"sigma": -1.0}])
def test_settings_that_mean_nothing_are_refused(given):
    with pytest.raises(ValueError, match="must"):
        FromMean(**given)


def test_the_limits_are_numpys_percentiles_of_the_valid_pixels():
    samples = smooth_pictures(5)
    valid = [sample.images["image"].valid for sample in samples]
    assert not valid[0].all()
    pixels = [sample.images["image"].pixels[:, v] for sample, v in zip(samples, valid, strict=True)]
    expected = np.percentile(torch.cat(pixels, dim=1).double().numpy(), [0.5, 99.5])
    np.testing.assert_allclose(intensity_limits(samples), expected, rtol=1e-5)


def test_no_more_than_64_normals_are_read_for_the_limits():
    class Counting(NormalData):
        read: list[int] = []  # noqa: RUF012

        def __getitem__(self, index):
            self.read.append(index)
            return self.samples[index]

    many = Counting([picture(noise(4, 4) + i) for i in range(150)])
    low, high = intensity_limits(many)
    assert many.read == list(range(0, 150, 3))
    assert low < 0
    assert high > 140


def test_limits_that_are_none_are_refused():
    with pytest.raises(ValueError, match="span some intensities, got 3.0 to 3.0"):
        intensity_limits([picture(torch.full((4, 4), 3.0))])
    broken = noise(4, 4)
    broken[0, 0] = torch.nan
    with pytest.raises(ValueError, match="mark NaN pixels as not valid"):
        intensity_limits([picture(broken)])
    with pytest.raises(ValueError, match="none of the 1 normal items has a valid pixel"):
        intensity_limits([picture(noise(4, 4), torch.zeros(4, 4, dtype=torch.bool))])
