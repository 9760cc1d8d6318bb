"""What `medssl inspect` tells about a mixed folder."""

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image as Pillow
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medssl.data.image import Image
from medssl.data.manifest import NoDataError, build_manifest
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import ReadError
from medssl.data.writers.nifti import write_nifti
from pipelines.inspect import inspect


def write_slices(folder, positions, series) -> None:
    folder.mkdir(parents=True)
    for number, z in enumerate(positions):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", series
        dataset.PatientID, dataset.PatientName = "secret-id", "Secret^Name"
        dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME2"
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 4, 6, 1
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation = 0
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [0, 0, z]
        dataset.PixelSpacing = [0.5, 0.8]
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = np.zeros((4, 6), np.uint16).tobytes()
        dataset["PixelData"].VR = "OW"
        pydicom.dcmwrite(folder / f"{number}.dcm", dataset, enforce_file_format=True)


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "keys" / "key"))
    root = tmp_path / "data"
    write_slices(root / "whole", [0, 2, 4], "1.2.3.1")
    write_slices(root / "gap", [0, 2, 4, 8], "1.2.3.2")
    Pillow.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "a.png")
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:20])
    affine = torch.diag(torch.tensor([3.0, 2, 1, 1], dtype=torch.float64))[:, [2, 1, 0, 3]]
    image = Image(
        pixels=torch.zeros(1, 2, 3, 4), axes="DHW", modality=Modality.UNKNOWN, affine=affine,
        frame="patient",
    )  # fmt: skip
    write_nifti(image, root / "v.nii.gz")
    (root / "notes.txt").write_text("no image")
    return root


def test_every_image_has_a_row_with_its_geometry_and_problems(mixed):
    result = inspect(mixed)
    rows = {row["path"]: row for row in result["images"]}
    assert set(rows) == {"whole", "gap", "a.png", "broken.png", "v.nii.gz"}
    assert rows["whole"]["shape"] == [3, 4, 6]
    assert rows["whole"]["spacing"] == [2.0, 0.5, 0.8]
    assert rows["whole"]["orientation"] == "SPL"
    assert rows["whole"]["modality"] == "CT"
    assert rows["whole"]["transfer_syntax"] == "Explicit VR Little Endian"
    assert rows["v.nii.gz"]["shape"] == [2, 3, 4]
    assert rows["v.nii.gz"]["spacing"] == [1.0, 2.0, 3.0]
    assert rows["v.nii.gz"]["orientation"] == "SAR"
    assert (rows["a.png"]["shape"], rows["a.png"]["channels"]) == ([4, 6], 3)
    assert rows["a.png"]["spacing"] is None
    wrong = {path: row["problems"][0]["error"] for path, row in rows.items() if row["problems"]}
    assert wrong == {"gap": "MissingSlicesError", "broken.png": "CorruptFileError"}
    assert (result["failed"], result["others"]) == (2, 1)


def test_what_inspect_says_is_what_reading_does(mixed):
    for row in inspect(mixed)["images"]:
        path = mixed / row["path"]
        if row["problems"]:
            with pytest.raises(ReadError) as error:
                read_image(path, series=row["series"])
            assert type(error.value).__name__ == row["problems"][0]["error"]
        else:
            image = read_image(path, series=row["series"])
            assert list(image.spatial_shape) == row["shape"]
            assert len(image.pixels) == row["channels"]


def test_items_have_the_names_the_manifest_gives_them(mixed):
    rows = {row["item"] for row in inspect(mixed)["images"]}
    assert rows == {item.item for item in build_manifest(mixed).images}


def test_nothing_shown_identifies_a_patient(mixed, capsys):
    result = inspect(mixed)
    shown = capsys.readouterr()
    for text in (repr(result), shown.out, shown.err):
        assert "ecret" not in text
        assert "1.2.3." not in text


def test_two_volumes_of_one_series_are_two_rows_with_ids_of_their_own(mixed):
    write_slices(mixed / "twice", [0, 2], "1.2.3.9")
    for number, file in enumerate(sorted((mixed / "twice").iterdir())):
        dataset = pydicom.dcmread(file)
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        dataset.ImagePositionPatient = [0, 2 * number, 0]
        dataset.SOPInstanceUID = generate_uid()
        dataset.save_as(mixed / "twice" / f"other{number}.dcm")
    rows = [row for row in inspect(mixed)["images"] if row["path"] == "twice"]
    assert sorted(row["orientation"] for row in rows) == ["PIL", "SPL"]
    assert all("one of 2 volumes here" in row["notes"][-1] for row in rows)
    for row in rows:  # each with an id that reads it alone
        assert list(read_image(mixed / "twice", series=row["series"]).spatial_shape) == row["shape"]


def test_a_folder_without_images_is_no_data(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(NoDataError):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "gone")
