"""Maps read from disk as often as asked for, and what metrics make of them."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture

import pipelines.map_metrics as module
from anomaly.calibration import Calibration
from pipelines.map_metrics import Draws, ScoredMaps, map_metrics, map_thresholds


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places in the order in which maps are read; map i is 4 x 5 pixels of i."""
    found: list[int] = []

    def read(manifest, item, row, folder):
        found.append(item)
        return torch.full((4, 5), float(item)), None

    monkeypatch.setattr(module, "_read", read)
    return found


def scored_maps(count: int) -> ScoredMaps:
    return ScoredMaps(SimpleNamespace(), [(place, {}) for place in range(count)], None)


def test_maps_within_the_budget_are_read_once(reads):
    maps = scored_maps(4)
    for _ in range(3):
        assert [int(values[0, 0]) for values, _ in maps] == [0, 1, 2, 3]
    assert reads == [0, 1, 2, 3]


def test_maps_past_the_budget_are_read_once_in_each_pass(reads, monkeypatch):
    monkeypatch.setattr(module, "KEPT_PIXELS", 50)
    maps = scored_maps(4)
    for _ in range(2):
        pairs = zip(maps.maps, maps.masks, strict=True)
        assert [int(values[0, 0]) for values, _ in pairs] == [0, 1, 2, 3]
    assert reads == [0, 1, 2, 3, 2, 3]


def test_aupimo_is_the_mean_of_the_marked_images_where_normal_pixels_suffice(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(250, 250, dtype=torch.bool)
    mask[20:40, 20:40] = True
    maps = [torch.rand(250, 250, generator=generator) for _ in range(6)]
    maps[4][mask] = 2.0  # above every normal pixel
    maps[5][mask] = 0.5
    monkeypatch.setattr(
        module, "_read", lambda manifest, i, row, folder: (maps[i], mask if i > 3 else None)
    )
    draws = Draws([f"part{i}" for i in range(6)], 40, 0)
    skipped: dict[str, str] = {}
    found = map_metrics(scored_maps(6), [None] * 6, draws, skipped)
    assert found["aupimo"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert set(skipped) == {"dice", "lesion_recall"}


def test_map_thresholds_are_those_of_each_items_site():
    values = [float(i) for i in range(40)]
    sites = ["a"] * 20 + ["b"] * 20
    calibration = Calibration.from_scores(
        values, values, rate=0.1, method="path", sites=sites, by="scanner"
    )
    rows = [{"site": "a"}, {"site": "b"}, {"site": "c"}]
    found = map_thresholds(calibration, rows)
    assert found == [18.0, 38.0, None]
    assert map_thresholds(None, rows) == [None] * 3


def test_findings_smaller_than_asked_for_count_nowhere(tmp_path, monkeypatch):
    """Voxels of 0.5 x 1 x 2 mm: 27 of them on the lesion are 27 mm3, one elsewhere is 1 mm3."""
    values, mask = torch.zeros(8, 8, 8), torch.zeros(8, 8, 8, dtype=torch.bool)
    values[1:4, 1:4, 1:4] = 2.0
    values[6, 6, 6] = 3.0
    mask[2:5, 2:5, 2:5] = True
    affine = np.diag([0.5, 1.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(values.numpy(), affine), tmp_path / "map.nii.gz")
    monkeypatch.setattr(module, "_read", lambda *_: (values, mask))
    chosen = [(SimpleNamespace(item="head"), {"map_path": "map.nii.gz"})]
    expected = {0.0: (1, 1), 1.5: (1, 0), 26.5: (1, 0), 27.5: (0, 0)}
    for smallest, (lesions, false) in expected.items():
        maps = ScoredMaps(SimpleNamespace(), chosen, tmp_path, min_finding=smallest)
        found = maps.findings(0, 1.0)
        assert (found.lesion > -np.inf).sum() == lesions
        assert len(found.false) == false
        skipped: dict[str, str] = {}
        told = map_metrics(maps, [1.0], Draws(["head"], 10, 0), skipped)
        assert told["lesion_recall"]["value"] == lesions
        assert told["false_findings"]["value"] == false


def test_pixels_without_a_distance_have_no_size_in_mm(tmp_path, monkeypatch):
    Picture.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "map.png")
    monkeypatch.setattr(module, "_read", lambda *_: (torch.ones(4, 5), None))
    chosen = [(SimpleNamespace(item="part7"), {"map_path": "map.png"})]
    maps = ScoredMaps(SimpleNamespace(), chosen, tmp_path, min_finding=2.0)
    with pytest.raises(ValueError, match="part7 has no distance between its pixels; leave it out"):
        maps.findings(0, 0.5)
