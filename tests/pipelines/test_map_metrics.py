"""Maps read from disk as often as asked for, and what metrics make of them."""

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image as Picture
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

import pipelines.map_metrics as module
from anomaly.calibration import Calibration
from medssl.data.manifest import build_manifest
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
    nib.save(nib.Nifti1Image(values.numpy(), affine), tmp_path / "head.nii.gz")
    monkeypatch.setattr(module, "_read", lambda *_: (values, mask))
    manifest = build_manifest(tmp_path)
    chosen = [(manifest.images[0], {})]
    expected = {0.0: (1, 1), 1.5: (1, 0), 26.5: (1, 0), 27.5: (0, 0)}
    for smallest, (lesions, false) in expected.items():
        maps = ScoredMaps(manifest, chosen, tmp_path, min_finding=smallest)
        found = maps.findings(0, 1.0)
        assert (found.lesion > -np.inf).sum() == lesions
        assert len(found.false) == false
        skipped: dict[str, str] = {}
        told = map_metrics(maps, [1.0], Draws(["head"], 10, 0), skipped)
        assert told["lesion_recall"]["value"] == lesions
        assert told["false_findings"]["value"] == false


def test_pixels_without_a_distance_have_no_size_in_mm(tmp_path, monkeypatch):
    Picture.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "part.png")
    manifest = build_manifest(tmp_path)
    item = manifest.images[0]
    monkeypatch.setattr(module, "_read", lambda *_: (torch.ones(4, 5), None))
    maps = ScoredMaps(manifest, [(item, {})], tmp_path, min_finding=2.0)
    with pytest.raises(ValueError, match=f"{item.item} has no distance between its pixels; leave"):
        maps.findings(0, 0.5)


def test_a_flat_dicom_has_findings_in_square_mm(tmp_path, monkeypatch):
    """Pixels of 0.5 x 0.25 mm; 8 of them are 1 mm2."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dicom = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dicom.SOPClassUID, dicom.SOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3.4"
    dicom.StudyInstanceUID, dicom.SeriesInstanceUID, dicom.PatientID = "1.2", "1.2.3", "7"
    dicom.Modality, dicom.PhotometricInterpretation = "DX", "MONOCHROME2"
    dicom.Rows, dicom.Columns, dicom.SamplesPerPixel, dicom.PixelRepresentation = 6, 6, 1, 0
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit = 16, 16, 15
    dicom.PixelSpacing = [0.5, 0.25]
    dicom.PixelData = np.zeros((6, 6), np.uint16).tobytes()
    dicom["PixelData"].VR = "OW"
    pydicom.dcmwrite(tmp_path / "chest.dcm", dicom, enforce_file_format=True)
    manifest = build_manifest(tmp_path)
    values = torch.zeros(6, 6)
    values[1:3, 1:5] = 1.0
    monkeypatch.setattr(module, "_read", lambda *_: (values, None))
    for least, count in ((0.99, 1), (1.01, 0)):
        maps = ScoredMaps(manifest, [(manifest.images[0], {})], tmp_path, min_finding=least)
        assert len(maps.findings(0, 0.5).false) == count
