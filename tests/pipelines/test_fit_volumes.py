"""Detectors of whole volumes through the jobs, from fit to the map on the scan's own grid."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from anomaly.base import Detector
from anomaly.features.patchcore import PatchCore
from anomaly.reconstruction.autoencoder import Autoencoder
from anomaly.reconstruction.memmc_mae import MemMCMAE
from medssl.data.preprocess import Preprocessing
from medssl.models.conv_autoencoder import AutoencoderShape
from medssl.models.vit3d import ViT3DEncoder
from medssl.training import TrainingPlan
from pipelines.fit import fit
from pipelines.score import read_rows, score

PLAN = TrainingPlan(total_samples=16, batch_size=4)
PREPARE = Preprocessing(size=(8, 16, 16), intensity="percentile", channels=1)
AFFINE = np.array([[0, 0, 4.0, -7], [-1.5, 0, 0, 9], [0, 2.0, 0, 3], [0, 0, 0, 1]])


def volumes(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        shape = (20, 24, 9 + i % 3)  # as many slices as a scan has
        values = rng.normal(100, 10, shape).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / f"scan{i}.nii.gz")
    return folder


def patches() -> Detector:
    encoder = ViT3DEncoder(
        (8, 16, 16), patch_size=(4, 8, 8), embedding_dim=16, depth=2, num_heads=2
    )
    return PatchCore(encoder, layers=["blocks.0"], coreset_ratio=1.0, sigma=1.0)


def narrow() -> Detector:
    shape = AutoencoderShape(channels=(8, 8), latent_dim=4, size=(8, 16, 16), dims=3)
    return Autoencoder(network=shape, plan=PLAN)


def masked() -> Detector:
    small = {"embedding_dim": 24, "depth": 2, "num_heads": 2, "decoder_dim": 12}
    return MemMCMAE(patch_size=(2, 4, 4), num_levels=2, num_memory=4, plan=PLAN, **small)


@pytest.mark.parametrize("make", [patches, narrow, masked], ids=lambda make: make.__name__)
def test_a_detector_of_whole_volumes_maps_onto_the_scan(make, tmp_path):
    torch.manual_seed(0)
    scans, new = volumes(tmp_path / "scans", 8), volumes(tmp_path / "new", 2)
    model, out = tmp_path / "model", tmp_path / "out"
    fit(scans, make(), model, preprocessing=PREPARE, calibration="none")
    shape = json.loads((model / "selftest.json").read_text())["shape"]
    assert shape == [1, 1, 8, 16, 16]

    assert score(new, str(model), out)["ok"] == 2
    for row, name in zip(read_rows(out), ("scan0", "scan1"), strict=True):
        scan = nibabel.load(new / f"{name}.nii.gz")
        values = nibabel.load(out / row["map_path"])
        assert values.shape == scan.shape
        np.testing.assert_allclose(values.affine, scan.affine, atol=1e-5)
        assert np.isfinite(values.get_fdata()).all()
