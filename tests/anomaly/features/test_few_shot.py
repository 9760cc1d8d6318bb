import math

import numpy as np
import pytest
import torch
from scipy.ndimage import rotate
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features.few_shot import FewShotNearest, rotated
from medssl.data.sample import collate
from medssl.models.encoder import Encoder


class Cells(Encoder):
    """A network whose tokens are the pixels of cells of two along each axis."""

    def __init__(self, axes: str = "HW") -> None:
        super().__init__()
        self.in_channels, self.embedding_dim = 1, 2 ** len(axes)
        self.axes = axes
        kind = nn.Conv2d if axes == "HW" else nn.Conv3d
        convolution = kind(1, self.embedding_dim, 2, stride=2, bias=False)
        with torch.no_grad():
            convolution.weight.copy_(torch.eye(self.embedding_dim).view_as(convolution.weight))
        self.network = nn.Sequential(convolution)

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(detector: FewShotNearest, pixels: Tensor) -> FewShotNearest:
    """Fitted on images (S, 1, *spatial)."""
    normal = NormalData([object()] * len(pixels))
    normal.batches = lambda **_: iter([noise_batch(pixels, detector.axes)])
    return detector.fit(normal)


def of_cells(axes: str = "HW", **arguments: object) -> FewShotNearest:
    defaults = {"layers": ["0"], "rotations": 1, "sigma": 0.0}
    return FewShotNearest(Cells(axes), **(defaults | arguments))


def cells(pixels: Tensor) -> np.ndarray:
    """(1, *spatial) to the pixels of its cells, (N, 2 ** axes), row by row."""
    for axis in range(1, pixels.ndim):
        pixels = pixels.unfold(axis, 2, 2)
    return pixels.reshape(-1, 2 ** (pixels.ndim // 2)).double().numpy()


@pytest.mark.parametrize(("spatial", "axes"), [((40, 20), "HW"), ((8, 10, 6), "DHW")])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.13])
def test_the_score_is_the_mean_of_the_largest_cosine_distances_of_scipy(spatial, axes, share):
    normal, test = noise(1, 1, *spatial), noise(1, 1, *spatial, seed=1)
    found = fitted(of_cells(axes, top_share=share), normal).predict(noise_batch(test, axes))
    distance = np.sort(cdist(cells(test[0]), cells(normal[0]), "cosine").min(1))
    expected = distance[-max(1, int(share * len(distance))) :].mean()
    np.testing.assert_allclose(found.score.numpy(), [expected], atol=1e-5)


def test_the_map_has_the_distance_of_each_token_at_its_place():
    normal, test = noise(1, 1, 8, 8), noise(1, 1, 8, 8, seed=1)
    found = fitted(of_cells(), normal).predict(noise_batch(test, "HW")).maps["image"]
    distance = cdist(cells(test[0]), cells(normal[0]), "cosine").min(1).reshape(4, 4)
    # the corners of a picture lie beyond the outermost cells' middles
    np.testing.assert_allclose(
        found[0, [0, 0, 7, 7], [0, 7, 0, 7]], distance[[0, 0, 3, 3], [0, 3, 0, 3]], atol=1e-5
    )


def test_one_normal_image_scores_itself_zero_whatever_its_contrast():
    pixels = noise(1, 1, 8, 8)
    detector = fitted(of_cells(), pixels)
    assert detector.predict(noise_batch(5 * pixels, "HW")).score == pytest.approx(0, abs=1e-6)


def test_four_rotations_know_a_normal_image_in_four_positions():
    pixels = noise(1, 1, 8, 8)
    upright, turned = fitted(of_cells(), pixels), fitted(of_cells(rotations=4), pixels)
    assert len(turned.bank_) == 4 * len(upright.bank_)
    for times in (1, 2, 3):
        batch = noise_batch(pixels.rot90(times, (2, 3)), "HW")
        assert turned.predict(batch).score == pytest.approx(0, abs=1e-5)
        assert upright.predict(batch).score > 0.05


def test_of_a_rotated_copy_no_patch_at_its_cut_corners_is_learnt():
    pixels = torch.ones(1, 1, 32, 32) + 0.1 * noise(1, 1, 32, 32)
    bank = fitted(of_cells(rotations=8), pixels).bank_
    assert 4 * 256 < len(bank) < 8 * 256
    assert (bank > 0.2).all()  # a zero from outside would lie below


@pytest.mark.parametrize("angle", [30, 45, 200])
def test_rotation_is_scipys_about_the_middle(angle):
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(56.0), indexing="ij")
    image = torch.sin(rows / 5) + torch.cos(columns / 7)
    found = rotated(image[None, None], math.radians(angle))[0, 0].numpy()
    expected = rotate(image.double().numpy(), angle, reshape=False, order=1)
    np.testing.assert_allclose(found[14:26, 22:34], expected[14:26, 22:34], atol=1e-4)


def test_a_volume_is_rotated_slice_by_slice():
    volume = noise(2, 1, 3, 8, 6)
    found = rotated(volume, 0.4)
    for depth in range(3):
        torch.testing.assert_close(found[:, :, depth], rotated(volume[:, :, depth], 0.4))


def test_patches_that_are_not_valid_are_neither_learnt_nor_scored():
    pixels = noise(1, 1, 8, 8)
    pixels[..., 4:] = torch.nan
    batch = noise_batch(pixels, "HW")
    batch.images["image"].valid[..., 4:] = False
    normal = NormalData([object()])
    normal.batches = lambda **_: iter([batch])
    detector = of_cells().fit(normal)
    found = detector.predict(batch)
    assert len(detector.bank_) == 8
    assert found.score == pytest.approx(0, abs=1e-6)
    assert found.maps["image"].isnan().equal(~batch.images["image"].valid)
    batch.images["image"].valid[:] = False
    assert detector.predict(batch).score.isnan().all()
    with pytest.raises(ValueError, match="none of the 1 normal items"):
        of_cells().fit(normal)


def test_a_picture_is_learnt_and_scored_the_same_beside_a_larger_one():
    samples = smooth_pictures(4)
    smaller, larger = samples[1], smooth_pictures(2, (80, 72))[1]
    detector = of_cells(rotations=3)
    apart, together = (
        detector.fit(NormalData([larger, smaller], batch_size=size)).bank_ for size in (1, 2)
    )
    assert together.equal(apart)
    detector.fit(NormalData(samples[2:]))
    alone, beside = (detector.predict(collate(s)) for s in ([smaller], [larger, smaller]))
    torch.testing.assert_close(beside.score[1:], alone.score)
    torch.testing.assert_close(beside.maps["image"][1:, :64, :48], alone.maps["image"])


@pytest.mark.parametrize(
    "arguments", [{"layers": []}, {"rotations": 0}, {"top_share": 0.0}, {"top_share": 1.1}]
)
def test_arguments_that_mean_nothing_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        of_cells(**arguments)
