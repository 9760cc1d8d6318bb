"""Figures of pictures that anyone can make again, as anomalib 2.7.0 and scikit-learn give them."""

import numpy as np
import pytest
import torch

from anomaly.aupimo import aupimo
from anomaly.metrics import PixelScores


def pictures() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Three pictures with two defects each and three without, of a fixed generator."""
    rng = np.random.default_rng(0)
    maps, masks = [], []
    for i in range(6):
        mask = np.zeros((320, 320), bool)
        if i < 3:
            mask[20 : 24 + 8 * i, 30:50] = True
            mask[200:203, 100 : 103 + 40 * i] = True
        strength = rng.random((320, 320)) ** 8 * 0.4
        scores = 0.6 * rng.random((320, 320)) + strength * (1 + mask * 0.5)
        scores = scores + 0.15 * mask * rng.random((320, 320))
        maps.append(torch.tensor(scores.astype(np.float32)))
        masks.append(torch.tensor(mask))
    return maps, masks


def test_figures_are_those_of_anomalib_and_scikit_learn():
    pixels = PixelScores(*pictures())
    # AUPRO of anomalib 2.7.0 for `pictures()`, roc_auc_score and average_precision_score
    expected = {0.3: 0.3271021842956543, 0.05: 0.08079319447278976, 0.01: 0.028823386877775192}
    for limit, value in expected.items():
        assert pixels.aupro(limit) == pytest.approx(value, abs=1e-7)
    assert pixels.auroc() == pytest.approx(0.6426231368275542, abs=1e-9)
    assert pixels.average_precision() == pytest.approx(0.019339795360841308, abs=1e-9)


def test_recalls_are_those_of_anomalib():
    maps, masks = pictures()
    # anomalib 2.7.0 for `pictures()`, 3 000 000 thresholds, at rates that 3 and 30 of the 307 200
    # normal pixels make: elsewhere it takes the nearest such rate and divides by the one asked for
    expected = [0.03370787, 0.01355014, 0.01386749]
    found = aupimo(maps, masks, fpr_bounds=(3 / 307200, 30 / 307200))
    assert found[:3].tolist() == pytest.approx(expected, abs=1e-7)
    assert found[3:].isnan().all()
