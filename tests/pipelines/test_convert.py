"""What `medssl convert` writes, as nibabel reads it."""

import json

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from medssl.data.image import Image
from medssl.data.manifest import build_manifest
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.synthetic.dicom_series import write_dicom_series
from pipelines.convert import convert


@pytest.fixture
def scan() -> Image:
    return Image(
        pixels=torch.arange(5 * 8 * 6.0).reshape(1, 5, 8, 6),
        axes="DHW",
        modality=Modality.CT,
        affine=torch.tensor(
            [[0, 0, -0.8, 3], [0, -0.5, 0, 4], [2.0, 0, 0, 5], [0, 0, 0, 1]], dtype=torch.float64
        ),
        frame="patient",
        spacing=(2.0, 0.5, 0.8),
    )


def test_a_series_becomes_the_nifti_that_the_reader_sees(scan, tmp_path):
    write_dicom_series(scan, tmp_path / "in", name="secretname")
    result = convert(tmp_path / "in", tmp_path / "out")
    (row,) = result["images"]
    nifti = nibabel.load(row["file"])
    np.testing.assert_array_equal(nifti.get_fdata(), scan.pixels[0].numpy().T)
    np.testing.assert_allclose(nifti.affine, scan.affine[:, [2, 1, 0, 3]].numpy(), atol=1e-5)
    again = read_image(row["file"])
    assert torch.equal(again.pixels, scan.pixels)
    told = json.loads((tmp_path / "out" / f"{row['item']}.json").read_text())
    assert told["modality"] == "CT"
    assert told["spacing_mm"] == pytest.approx([2.0, 0.5, 0.8])
    assert told["provenance"]["pixel_sha256"]
    written = "".join(file.name + file.read_text("latin1") for file in (tmp_path / "out").iterdir())
    assert "secretname" not in written


def test_a_gap_fails_by_name_and_is_filled_when_asked(scan, tmp_path):
    write_dicom_series(scan, tmp_path / "in", name="s")
    image = read_image(tmp_path / "in")
    middle = [
        file
        for file in (tmp_path / "in").iterdir()
        if read_image(file).affine[2, 3] == image.affine[2, 3] + 4
    ]
    middle[0].unlink()
    result = convert(tmp_path / "in", tmp_path / "out")
    assert result["failed"] == 1
    assert result["images"][0]["error"].startswith("MissingSlicesError")
    result = convert(tmp_path / "in", tmp_path / "out", on_gap="insert_nan")
    (row,) = result["images"]
    volume = nibabel.load(row["file"]).get_fdata()
    assert np.isnan(volume[:, :, 2]).all()
    assert np.isfinite(volume[:, :, [0, 1, 3, 4]]).all()
    valid = nibabel.load(tmp_path / "out" / f"{row['item']}_valid.nii.gz").get_fdata()
    assert valid[0, 0].tolist() == [1, 1, 0, 1, 1]
    assert row["provenance"]["slices_missing"] == [2]
    assert row["provenance"]["on_gap"] == "insert_nan"


def test_pictures_and_scans_of_one_folder_are_each_written(scan, tmp_path):
    write_dicom_series(scan, tmp_path / "in" / "a", name="s")
    colors = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    Pillow.fromarray(colors).save(tmp_path / "in" / "p.png")
    result = convert(tmp_path / "in", tmp_path / "out", voi_window="brain")
    by_item = {item.item: item.kind for item in build_manifest(tmp_path / "in").images}
    files = {by_item[row["item"]]: nibabel.load(row["file"]) for row in result["images"]}
    assert files["picture"].shape == (5, 4, 1, 1, 3)
    np.testing.assert_array_equal(
        files["picture"].get_fdata()[:, :, 0, 0], colors.transpose(1, 0, 2)
    )
    window = files["dicom"].get_fdata()  # 0 at 0 HU, 1 at 80 HU
    np.testing.assert_allclose(
        window, (scan.pixels[0].numpy().T / 80).clip(0, 1), rtol=0, atol=1e-6
    )
