"""One fit: how often its normals are decoded, and what it must be the same in to go on."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from learned_level import LearnedLevel, Level
from torch import nn

import medssl.data.dataset
from anomaly.learning import StoppedError
from anomaly.slicewise import Slicewise
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.training import TrainingPlan
from pipelines.fitting import Fitting

PREPARE = Preprocessing(size=(8, 16, 16), intensity="percentile", channels=1)
PLAN = TrainingPlan(total_samples=64, batch_size=4, learning_rate=0.05)


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Five volumes of eight slices."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for i in range(5):
        values = rng.normal(100 + i, 10, (20, 24, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1, 3, 1])), folder / f"{i}.nii.gz")
    return folder


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The items that were decoded, in order."""
    found = []
    decode = medssl.data.dataset.load_sample

    def counting(manifest, item, **options):
        found.append(item.item)
        return decode(manifest, item, **options)

    monkeypatch.setattr(medssl.data.dataset, "load_sample", counting)
    return found


def fitting(folder: Path, detector, out: Path, *, keep_bytes: int = 2 << 30) -> Fitting:
    manifest = build_manifest(folder)
    work = Fitting(
        manifest, manifest.images, detector, PREPARE, out, batch_size=2, workers=0, seed=1
    )
    work.samples.keep_bytes = keep_bytes
    work.read()
    return work


def test_a_training_on_slices_decodes_no_volume_for_each_of_them(scans, tmp_path, decoded):
    one, other = (Slicewise(LearnedLevel(plan=PLAN)) for _ in range(2))
    work = fitting(scans, one, tmp_path / "kept")
    work.fit(work.items, "final")
    assert len(decoded) == 5  # memory holds them all
    decoded.clear()
    work = fitting(scans, other, tmp_path / "out", keep_bytes=0)
    work.fit(work.items, "final")
    assert len(decoded) == 10  # to know them, and to prepare them for 64 shuffled slices
    assert one.detector.trainable.level.equal(other.detector.trainable.level)


def test_memory_that_holds_some_volumes_leaves_the_others_to_the_disk(scans, tmp_path, decoded):
    work = fitting(scans, Slicewise(LearnedLevel(plan=PLAN)), tmp_path / "out", keep_bytes=20_000)
    work.fit(work.items, "final")
    kept = 20_000 // (4 * 8 * 16 * 16)  # of float32
    assert kept == 2
    assert len(decoded) == 5 + 5 - kept
    assert len(list((tmp_path / "out.work" / "prepared").glob("*.safetensors"))) == 5 - kept


class Beside(nn.Module):
    """A frozen network of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)


class WithEncoder(LearnedLevel):
    def __init__(self, encoder: Beside) -> None:
        super().__init__(plan=PLAN)
        self.encoder = encoder


@pytest.mark.parametrize("changed", [False, True])
def test_a_fit_goes_on_with_the_same_encoder_only(scans, tmp_path, monkeypatch, changed):
    monkeypatch.setattr(Level, "losses", 0)
    monkeypatch.setattr(Level, "stop_at", 3)
    work = fitting(scans, Slicewise(WithEncoder(Beside())), tmp_path / "out")
    with pytest.raises(StoppedError):
        work.fit(work.items, "final")
    encoder = Beside()
    encoder.weight.data += float(changed)
    work = fitting(scans, Slicewise(WithEncoder(encoder)), tmp_path / "out")
    if changed:
        with pytest.raises(ValueError, match="holds work with another encoder weights"):
            work.fit(work.items, "final")
    else:
        work.fit(work.items, "final")
        assert Level.losses == PLAN.steps
