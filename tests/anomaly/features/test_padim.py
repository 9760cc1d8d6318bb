import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from anomaly.base import NormalData, noise_batch
from anomaly.features import padim
from anomaly.features.padim import PaDiM
from medssl.data.sample import Batch
from medssl.models.encoder import Encoder


class Channels(Encoder):
    """A network whose first layer is its images, and whose second their means over two pixels
    along each axis."""

    def __init__(self, channels: int, axes: str) -> None:
        super().__init__()
        self.in_channels = self.embedding_dim = channels
        self.axes = axes
        convolution, pool = {"HW": (nn.Conv2d, nn.AvgPool2d), "DHW": (nn.Conv3d, nn.AvgPool3d)}[
            axes
        ]
        self.network = nn.Sequential(convolution(channels, channels, 1, bias=False), pool(2))
        with torch.no_grad():
            self.network[0].weight.zero_()
            for channel in range(channels):
                self.network[0].weight[channel, channel] = 1

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def normals(pixels: Tensor, batch_size: int = 3, valid: Tensor | None = None) -> NormalData:
    """Images (S, C, *spatial) as normal data, each pixel valid unless told."""
    axes = "HW" if pixels.ndim == 4 else "DHW"
    batches = []
    for start in range(0, len(pixels), batch_size):
        batches.append(noise_batch(pixels[start : start + batch_size], axes))
        if valid is not None:
            batches[-1].images["image"].valid.copy_(valid[start : start + batch_size])
    normal = NormalData([object()] * len(pixels))
    normal.batches = lambda **_: iter(batches)
    return normal


def of(channels: int, axes: str = "HW", **arguments: object) -> PaDiM:
    defaults = {"layers": ["0"], "num_features": channels, "sigma": 0.0}
    return PaDiM(Channels(channels, axes), **(defaults | arguments))


def expected_map(pixels: Tensor, test: Tensor) -> np.ndarray:
    """scipy's Mahalanobis distance place by place, (*spatial)."""
    samples = pixels.double().flatten(2).numpy()  # (S, C, P)
    asked = test.double().flatten(1).numpy()
    found = []
    for place in range(samples.shape[2]):
        covariance = np.cov(samples[:, :, place].T) + 0.01 * np.eye(samples.shape[1])
        mean = samples[:, :, place].mean(0)
        found.append(mahalanobis(asked[:, place], mean, np.linalg.inv(covariance)))
    return np.reshape(found, test.shape[1:])


@pytest.mark.parametrize(("spatial", "axes"), [((4, 6), "HW"), ((2, 4, 3), "DHW")])
@pytest.mark.parametrize("entries", [1, 1 << 24])
def test_the_map_is_scipys_mahalanobis_distance_at_every_place(spatial, axes, entries, monkeypatch):
    monkeypatch.setattr(padim, "_ENTRIES", entries)
    pixels = 100 + noise(10, 3, *spatial)  # far from zero: sums of squares would cancel
    pixels[:, 1] += 2 * pixels[:, 0]
    test = pixels[:1] + 3 * noise(1, 3, *spatial).flip(1)
    detector = of(3, axes).fit(normals(pixels))
    found = detector.predict(noise_batch(test, axes))
    expected = expected_map(pixels, test[0])
    np.testing.assert_allclose(found.maps["image"][0].numpy(), expected, rtol=1e-3)
    np.testing.assert_allclose(found.score.numpy(), expected.max(), rtol=1e-3)


def test_the_batches_that_normals_come_in_change_nothing():
    pixels = 100 + noise(12, 2, 4, 4)
    one, four = of(2).fit(normals(pixels, 12)), of(2).fit(normals(pixels, 3))
    torch.testing.assert_close(one.mean_, four.mean_)
    torch.testing.assert_close(one.whitening_, four.whitening_)


def test_the_coarser_layer_is_repeated_and_the_features_are_a_choice_of_the_seed():
    pixels = noise(6, 3, 4, 4)
    detector = of(3, layers=["0", "1"], num_features=4, seed=2).fit(normals(pixels))
    pooled = nn.functional.avg_pool2d(pixels, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    every = torch.cat([pixels, pooled], 1).mean(0).flatten(1).mT  # (P, 6)
    channels = detector.channels_
    assert len(set(channels.tolist())) == 4
    torch.testing.assert_close(detector.mean_, every[:, channels])
    chosen = {
        tuple(
            of(3, layers=["0", "1"], num_features=4, seed=seed)
            .fit(normals(pixels))
            .channels_.tolist()
        )
        for seed in range(5)
    }
    assert len(chosen) > 1


def test_pixels_that_are_not_valid_are_not_learnt_and_a_place_never_valid_is_nan():
    pixels, valid = noise(6, 2, 4, 4), torch.ones(6, 4, 4, dtype=torch.bool)
    valid[:, 0, 0] = False
    valid[:2, 1, 1] = False
    pixels[~valid[:, None].expand_as(pixels)] = torch.nan
    detector = of(2).fit(normals(pixels, valid=valid))
    test = noise(1, 2, 4, 4) + 1
    test[0, :, 0, 0] = 1e6
    found = detector.predict(noise_batch(test, "HW"))
    maps = found.maps["image"][0]
    assert maps.isnan().nonzero().tolist() == [[0, 0]]
    assert found.score == maps.nan_to_num(0).max()
    expected = expected_map(pixels[2:], test[0])  # of the four that are valid in the middle
    np.testing.assert_allclose(maps[1, 1].item(), expected[1, 1], rtol=1e-3)


def test_a_place_seen_once_has_the_covariance_of_the_regularization():
    pixels = noise(1, 2, 4, 4)
    detector = of(2, regularization=0.04).fit(normals(pixels))
    found = detector.predict(noise_batch(pixels + 1, "HW")).maps["image"]
    torch.testing.assert_close(found, torch.full((1, 4, 4), 2**0.5 / 0.2))


def test_images_of_another_size_are_refused_by_item():
    detector = of(2).fit(normals(noise(4, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 6\) of item noise0"):
        detector.predict(noise_batch(noise(1, 2, 4, 6), "HW"))
    normal = normals(noise(4, 2, 4, 4))
    normal.batches = lambda **_: iter(
        [noise_batch(noise(1, 2, 4, 4), "HW"), noise_batch(noise(1, 2, 4, 6), "HW")]
    )
    with pytest.raises(ValueError, match="all have one size"):
        of(2).fit(normal)


def test_padding_at_the_end_changes_nothing():
    from dataclasses import replace

    detector = of(2).fit(normals(noise(6, 2, 4, 4)))
    whole = noise_batch(noise(1, 2, 4, 4), "HW")
    images = noise_batch(nn.functional.pad(noise(1, 2, 4, 4), (0, 3, 0, 2)), "HW").images["image"]
    images.valid[:, 4:] = images.valid[:, :, 4:] = False
    padded: Batch = replace(whole, images={"image": replace(images, sizes=((4, 4),))})
    found = detector.predict(padded)
    assert found.score.equal(detector.predict(whole).score)
    assert found.maps["image"].isnan().equal(~images.valid)


def test_more_features_than_channels_are_refused():
    with pytest.raises(ValueError, match="at most the 2 channels"):
        of(2, num_features=3).fit(normals(noise(4, 2, 4, 4)))


def test_normals_without_a_valid_pixel_cannot_be_fitted():
    pixels = noise(2, 2, 4, 4)
    with pytest.raises(ValueError, match="none of the 2 normal items"):
        of(2).fit(normals(pixels, valid=torch.zeros(2, 4, 4, dtype=torch.bool)))


@pytest.mark.parametrize(
    "arguments", [{"layers": []}, {"num_features": 0}, {"regularization": 0.0}]
)
def test_arguments_that_mean_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        of(2, **arguments)


def test_an_anomaly_raises_the_map_where_it_is():
    detector, samples = PaDiM.example()
    detector.fit(NormalData(samples[:6]))
    batch = next(NormalData(samples[6:]).batches())
    before = detector.predict(batch).score
    batch.images["image"].pixels[:, :, 28:36, 28:36] += 8.0
    found = detector.predict(batch)
    assert (found.score > before).all()
    for values in found.maps["image"]:
        row, column = divmod(int(values.nan_to_num(-1).argmax()), values.shape[1])
        assert abs(row - 31.5) < 10
        assert abs(column - 31.5) < 10
