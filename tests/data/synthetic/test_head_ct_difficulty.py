"""On the development seeds only: the test seeds are for the detector."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates
from sklearn.metrics import roc_auc_score

from medssl.data.synthetic.head_ct import (
    DEVELOPMENT_LESION_SEEDS,
    DEVELOPMENT_NORMAL_SEEDS,
    Phantom,
    head_ct,
)
from medssl.data.synthetic.head_lesions import KINDS

NUM_REFERENCE = 50  # normals for the mean; the next 60 are compared with the lesions
GRID = (14, 64, 64)


def on_common_grid(phantom: Phantom) -> np.ndarray:
    """The brain window on a grid fixed to the scanner, as a z-score across heads needs."""
    d, h, w = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in GRID), indexing="ij")
    world = np.stack([-3.4 * w, -3.6 * h - 9, 7.5 * d + 12.5, np.ones_like(d)], axis=-1)
    index = world @ np.linalg.inv(phantom.image.affine.numpy()).T
    pixels = phantom.image.pixels[0].numpy().clip(0, 80)
    return map_coordinates(pixels, np.moveaxis(index[..., :3], -1, 0), order=1, mode="nearest")


@pytest.fixture(scope="module")
def normals() -> list[Phantom]:
    return [head_ct(seed, lesion=False) for seed in DEVELOPMENT_NORMAL_SEEDS[:110]]


@pytest.fixture(scope="module")
def lesions() -> list[Phantom]:
    return [head_ct(seed, lesion=True) for seed in DEVELOPMENT_LESION_SEEDS]


@pytest.fixture(scope="module")
def on_grid(normals, lesions) -> list[np.ndarray]:
    return [np.stack([on_common_grid(p) for p in group]) for group in (normals, lesions)]


def auroc(normal: list[float], anomalous: list[float]) -> float:
    return roc_auc_score([0] * len(normal) + [1] * len(anomalous), [*normal, *anomalous])


def test_the_brightest_voxel_does_not_tell_a_lesion(normals, lesions):
    brightest = [[p.image.pixels.max().item() for p in group] for group in (normals, lesions)]
    assert auroc(*brightest) < 0.72


@pytest.mark.parametrize("sigma", [0, 1])
@pytest.mark.parametrize("quantile", [1.0, 0.999])
def test_distance_from_the_mean_normal_does_not_tell_a_lesion(on_grid, sigma, quantile):
    normal, anomalous = (gaussian_filter(volumes, (0, 0, sigma, sigma)) for volumes in on_grid)
    mean, std = normal[:NUM_REFERENCE].mean(0), normal[:NUM_REFERENCE].std(0).clip(1.0)
    scores = [
        np.quantile(np.abs(volumes - mean) / std, quantile, axis=(1, 2, 3))
        for volumes in (normal[NUM_REFERENCE:], anomalous)
    ]
    assert auroc(*scores) < 0.72


def contrast(phantom: Phantom) -> tuple[float, float, float]:
    """Change against the same scan without the lesion (HU, root mean square over the mask), that
    over the noise of one voxel, and the diameter of the ball of the mask's volume (mm)."""
    without = head_ct(phantom.seed, lesion=False).image.pixels
    mask = phantom.mask.pixels > 0
    change_hu = (phantom.image.pixels - without)[mask].square().mean().sqrt().item()
    volume_mm3 = mask.sum().item() * np.prod(phantom.image.spacing)
    return change_hu, change_hu / phantom.noise_hu, (volume_mm3 * 6 / np.pi) ** (1 / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stands_out_for_a_careful_eye(lesions, kind):
    rows = np.array([contrast(p) for p in lesions if [le.kind for le in p.lesions] == [kind]])
    change_hu, over_noise, diameter_mm = np.median(rows, axis=0)
    assert change_hu > 8
    assert over_noise > 2.5  # of one voxel; a mask has hundreds
    assert 20 < diameter_mm < 38
    assert rows[:, 1].min() > 1.5
