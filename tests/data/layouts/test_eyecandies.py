import numpy as np
import pytest
from PIL import Image as Pillow

from medssl.data.layouts.eyecandies import (
    is_eyecandies,
    is_eyecandies_depth,
    place_eyecandies,
    read_eyecandies_depth,
)
from medssl.data.layouts.plain import find_images
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError


def candy(folder, number, *, depth=None, metadata=None, mask=False):
    """One sample as the set's page lists its items; depth (H, W) uint16."""
    folder.mkdir(parents=True, exist_ok=True)
    depth = np.full((4, 6), 65535, np.uint16) if depth is None else depth
    for what in (*(f"image_{light}" for light in range(6)), "normals"):
        Pillow.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / f"{number}_{what}.png")
    for what in ("mask", "dents_mask") if mask else ():
        Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(folder / f"{number}_{what}.png")
    Pillow.fromarray(depth).save(folder / f"{number}_depth.png")
    (folder / f"{number}_info_depth.yaml").write_text("normalization:\n  min: 2.0\n  max: 4.0\n")
    (folder / f"{number}_pose.txt").write_text("1 0 0 0\n")
    if metadata is not None:
        (folder / f"{number}_metadata.yaml").write_text(metadata)


@pytest.fixture
def gummy(tmp_path):
    root = tmp_path / "GummyBear"
    candy(root / "train/data", "000", metadata="anomalous: 0\n", mask=True)
    candy(root / "val/data", "000")
    candy(root / "test_public/data", "00", metadata="anomalous: 0\nbumps: 0\n", mask=True)
    candy(root / "test_public/data", "01", metadata="anomalous: 1\ndents: 1\nbumps: 0\n", mask=True)
    candy(root / "test_private/data", "000")
    return root


def by_name(root):
    return {str(one.relative): one for one in place_eyecandies(root, find_images(root)).entries}


def test_labels_come_from_the_metadata_and_private_tests_have_none(gummy):
    said = {
        name.removesuffix("_image_5.png"): (one.split, one.label, one.defect, one.category)
        for name, one in by_name(gummy).items()
        if one.role == "image"
    }
    assert said == {
        "train/data/000": ("train", 0, None, "GummyBear"),
        "val/data/000": ("train", 0, None, "GummyBear"),
        "test_public/data/00": ("test", 0, None, "GummyBear"),
        "test_public/data/01": ("test", 1, "dents", "GummyBear"),
        "test_private/data/000": ("test", None, None, "GummyBear"),
    }


def test_depth_and_mask_belong_to_the_picture_of_global_light(gummy):
    entries = by_name(gummy)
    depth = entries["test_public/data/01_depth.png"]
    assert (depth.role, depth.of) == ("xyz", "test_public/data/01_image_5.png")
    assert (depth.modality, depth.unit) == ("DEPTH", "m")
    mask = entries["test_public/data/01_mask.png"]
    assert (mask.role, mask.of, mask.label) == ("mask", "test_public/data/01_image_5.png", None)
    assert not any("image_4" in name or "dents" in name or "normals" in name for name in entries)


def test_without_its_picture_depth_is_the_image(gummy):
    (gummy / "test_public/data/01_image_5.png").unlink()
    entries = by_name(gummy)
    depth = entries["test_public/data/01_depth.png"]
    assert (depth.role, depth.label, depth.modality, depth.unit) == ("image", 1, "DEPTH", "m")
    assert entries["test_public/data/01_mask.png"].of == depth.key


def test_a_folder_of_categories_is_one_and_others_are_none(gummy, tmp_path):
    assert is_eyecandies(gummy)
    assert is_eyecandies(tmp_path)
    assert not is_eyecandies(gummy / "train")
    assert {one.category for one in by_name(tmp_path).values()} == {"GummyBear"}


def test_depth_unprojects_as_the_pinhole_camera_of_the_set_does(tmp_path):
    """The camera matrix of the set's page, applied to the points, gives pixels and depth back."""
    stored = np.random.default_rng(0).integers(0, 65536, (4, 6)).astype(np.uint16)
    stored[0, :2] = 0, 65535
    candy(tmp_path, "007", depth=stored)
    image = read_eyecandies_depth(tmp_path / "007_depth.png")
    assert (image.units, image.frame, image.valid) == ("m", "sensor", None)
    assert image.pixels[2, 0, :2].tolist() == [2.0, 4.0]  # the ends of the scale

    camera = np.array([[711.11, 0, 6 / 2], [0, 711.11, 4 / 2], [0, 0, 1]])
    points = image.pixels.double().flatten(1).numpy()
    column, row, distance = camera @ points
    rows, columns = np.indices((4, 6)).reshape(2, -1)
    np.testing.assert_allclose(column / distance, columns, atol=1e-4)
    np.testing.assert_allclose(row / distance, rows, atol=1e-4)
    np.testing.assert_allclose(distance, 2 + 2 * stored.ravel().astype(float) / 65535, rtol=1e-6)


def test_its_hash_is_over_the_stored_depth(tmp_path):
    candy(tmp_path, "000", depth=np.full((4, 6), 7, np.uint16))
    candy(tmp_path, "001", depth=np.full((4, 6), 8, np.uint16))
    hashes = [
        read_eyecandies_depth(tmp_path / f"{n}_depth.png", hashes=True).provenance["pixel_sha256"]
        for n in ("000", "001", "000")
    ]
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_broken_scale_and_an_8_bit_picture_are_refused(tmp_path):
    candy(tmp_path, "000")
    (tmp_path / "000_info_depth.yaml").write_text("normalization: {min: 1}\n")
    with pytest.raises(CorruptFileError, match="normalization") as error:
        read_eyecandies_depth(tmp_path / "000_depth.png")
    assert str(tmp_path) not in str(error.value)
    (tmp_path / "000_info_depth.yaml").write_text("words")
    with pytest.raises(CorruptFileError, match=r"info_depth\.yaml .* no table"):
        read_eyecandies_depth(tmp_path / "000_depth.png")
    Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "000_depth.png")
    with pytest.raises(UnsupportedFormatError, match="16 bits"):
        read_eyecandies_depth(tmp_path / "000_depth.png")


def test_depth_without_its_scale_is_any_picture(tmp_path):
    candy(tmp_path, "000")
    assert is_eyecandies_depth(tmp_path / "000_depth.png")
    assert not is_eyecandies_depth(tmp_path / "000_image_5.png")
    (tmp_path / "000_info_depth.yaml").unlink()
    assert not is_eyecandies_depth(tmp_path / "000_depth.png")
