"""Pictures taken for xyz or depth, against the arrays they were written from."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.readers.organized import as_organized
from medssl.data.readers.picture import read_picture
from medssl.data.readers.points_stored import EmptyCloudError

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(7, 5, 3)).astype(np.float32)
DEPTH = RNG.uniform(1, 2, (7, 5)).astype(np.float32)


def picture(path: Path, array: np.ndarray) -> Image:
    """array: (H, W) or (H, W, C)."""
    options = {"photometric": "minisblack", "planarconfig": "contig"} if array.ndim == 3 else {}
    tifffile.imwrite(path / "a.tiff", array, metadata=None, **options)
    return read_picture(path / "a.tiff", hashes=True)


def missing(image: Image) -> list[list[int]]:
    return [] if image.valid is None else (~image.valid).nonzero().tolist()


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_three_float_channels_are_xyz_of_the_sensor(tmp_path, kind):
    xyz = XYZ.astype(kind)
    xyz[1, 2], xyz[3, 4], xyz[5, 0, 1], xyz[6, 1, :2] = 0, np.nan, np.inf, 0
    source = picture(tmp_path, xyz)
    image = as_organized(source, unit="m")
    np.testing.assert_array_equal(image.pixels, xyz.transpose(2, 0, 1).astype(np.float32))
    assert missing(image) == [[1, 2], [3, 4], [5, 0]]
    assert (image.axes, image.frame, image.modality) == ("HW", "sensor", Modality.DEPTH)
    assert (image.channels, image.units, image.value_range) == (("x", "y", "z"), "m", None)
    assert torch.equal(image.affine, pixel_affine())
    assert image.provenance == source.provenance
    assert image.provenance["pixel_sha256"]


@pytest.mark.parametrize("unit", [None, "m", "mm"])
def test_nothing_missing_needs_no_mask_and_an_odd_extent_is_told(tmp_path, unit):
    image = as_organized(picture(tmp_path, XYZ / 10), unit=unit)  # about half a unit wide
    assert image.valid is None
    assert image.units == (unit or "unknown")
    assert image.provenance.get("extent_suspicious", False) == (unit == "mm")


def test_one_float_channel_is_depth(tmp_path):
    depth = DEPTH.copy()
    depth[1, 2], depth[3, 4], depth[0, 0] = 0, np.nan, np.inf
    image = as_organized(picture(tmp_path, depth), unit="m")
    np.testing.assert_array_equal(image.pixels[0], depth)
    assert missing(image) == [[0, 0], [1, 2], [3, 4]]
    assert (image.frame, image.modality, image.units) == ("pixel", Modality.DEPTH, "m")
    assert (image.channels, image.value_range) == (("depth",), None)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_one_16_bit_channel_is_depth(tmp_path, kind):
    depth = (DEPTH * 10_000).astype(kind)
    depth[4, 4] = 0
    image = as_organized(picture(tmp_path, depth), unit="mm")
    np.testing.assert_array_equal(image.pixels[0], depth.astype(np.float32))
    assert missing(image) == [[4, 4]]
    assert image.value_range is None


@pytest.mark.parametrize(
    "array",
    [
        (XYZ * 50).astype(np.uint8),
        (XYZ * 5000).astype(np.uint16),
        (DEPTH * 50).astype(np.uint8),
        DEPTH.astype(np.int32),
        np.concatenate([XYZ, XYZ], 2),
    ],
    ids=["rgb", "rgb16", "grey", "int32", "six"],
)
def test_other_pictures_are_refused(tmp_path, array):
    with pytest.raises(ValueError, match="expected"):
        as_organized(picture(tmp_path, array), unit=None)


@pytest.mark.parametrize(("axes", "frame"), [("DHW", "pixel"), ("HW", "patient")])
def test_volumes_and_other_frames_are_refused(axes, frame):
    image = Image(pixels=torch.ones(1, *[4] * len(axes)), axes=axes, modality=Modality.UNKNOWN,
                  affine=pixel_affine(), frame=frame)  # fmt: skip
    with pytest.raises(ValueError, match=f"axes {axes} in the {frame} frame"):
        as_organized(image, unit=None)


@pytest.mark.parametrize("array", [XYZ * 0, XYZ * np.nan, DEPTH * 0])
def test_nothing_measured_is_an_empty_cloud(tmp_path, array):
    with pytest.raises(EmptyCloudError):
        as_organized(picture(tmp_path, array), unit=None)
