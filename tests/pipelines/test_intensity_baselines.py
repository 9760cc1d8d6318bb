import numpy as np
import pytest
import torch

from medssl.data.image import Image
from medssl.data.modality import Modality
from pipelines.intensity_baselines import MeanNormal, brightest


def volume(values):
    return Image(
        pixels=torch.from_numpy(values.astype(np.float32))[None],
        axes="DHW",
        modality=Modality.CT,
        affine=torch.eye(4, dtype=torch.float64),
        frame="patient",
        spacing=(1.0, 1.0, 1.0),
    )


def test_the_brightest_value_is_the_score():
    values = np.zeros((2, 3, 4))
    values[1, 2, 3] = 7
    assert brightest(volume(values)) == 7


def test_departures_are_z_scores_against_the_normal_images():
    rng = np.random.default_rng(0)
    normals = rng.normal(40, 10, (6, 3, 5, 5))
    case = rng.normal(40, 10, (3, 5, 5))
    baseline = MeanNormal(quantile=1.0)
    for values in normals:
        baseline.add(volume(values))
    expected = np.abs((case - normals.mean(0)) / normals.std(0)).max()
    assert baseline.score(volume(case)) == pytest.approx(expected, rel=1e-3)


def test_a_quantile_is_less_than_the_largest_departure():
    rng = np.random.default_rng(1)
    scores = {}
    for quantile in (0.5, 1.0):
        baseline = MeanNormal(quantile=quantile)
        for _ in range(4):
            baseline.add(volume(rng.normal(0, 1, (2, 4, 4))))
        case = np.zeros((2, 4, 4))
        case[0, 0, 0] = 100
        scores[quantile] = baseline.score(volume(case))
    assert scores[0.5] < 5 < scores[1.0]
