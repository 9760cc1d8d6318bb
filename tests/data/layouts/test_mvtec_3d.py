import logging
from collections import Counter

import numpy as np
import tifffile
from PIL import Image as Pillow

from medssl.data.layouts.mvtec_3d import is_mvtec_3d, place_mvtec_3d
from medssl.data.layouts.mvtec_ad import is_mvtec_ad
from medssl.data.layouts.placed import placed
from medssl.data.layouts.plain import find_images

PLACES = ("train/good", "validation/good", "test/good", "test/hole")


def files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tiff":
            tifffile.imwrite(path, np.ones((4, 6, 3), np.float32), photometric="rgb")
        else:
            Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(path)
    return root


def category(root):
    for place in PLACES:
        files(root, f"{place}/rgb/000.png", f"{place}/xyz/000.tiff")
    return files(root, "test/hole/gt/000.png")


def by_name(root):
    return {str(one.relative): one for one in place_mvtec_3d(root, find_images(root)).entries}


def test_folders_say_split_label_and_defect_and_validation_is_no_test(tmp_path):
    entries = by_name(category(tmp_path / "bagel"))
    said = {
        place: (one.split, one.label, one.defect, one.category)
        for place in PLACES
        for one in [entries[f"{place}/rgb/000.png"]]
    }
    assert said == {
        "train/good": ("train", 0, None, "bagel"),
        "validation/good": ("train", 0, None, "bagel"),
        "test/good": ("test", 0, None, "bagel"),
        "test/hole": ("test", 1, "hole", "bagel"),
    }


def test_xyz_and_mask_belong_to_the_picture_of_their_name_and_kind(tmp_path):
    entries = by_name(category(tmp_path / "bagel"))
    for place in PLACES:
        xyz = entries[f"{place}/xyz/000.tiff"]
        assert (xyz.role, xyz.of, xyz.modality) == ("xyz", f"{place}/rgb/000.png", "DEPTH")
    mask = entries["test/hole/gt/000.png"]
    assert (mask.role, mask.of, mask.label) == ("mask", "test/hole/rgb/000.png", None)


def test_without_its_picture_xyz_is_the_image_and_bears_the_mask(tmp_path):
    root = category(tmp_path / "bagel")
    (root / "test/hole/rgb/000.png").unlink()
    entries = by_name(root)
    xyz = entries["test/hole/xyz/000.tiff"]
    assert (xyz.role, xyz.label, xyz.defect, xyz.modality) == ("image", 1, "hole", "DEPTH")
    assert entries["test/hole/gt/000.png"].of == "test/hole/xyz/000.tiff"


def test_the_categories_of_the_set_are_in_meters_and_no_others(tmp_path):
    for name in ("bagel", "gear"):
        category(tmp_path / name)
    files(tmp_path / "bagel", "test/hole/xyz/001.tiff")
    units = Counter((one.category, one.role, one.unit) for one in by_name(tmp_path).values())
    assert units == {
        ("bagel", "image", None): 4,
        ("bagel", "image", "m"): 1,
        ("bagel", "xyz", "m"): 4,
        ("bagel", "mask", None): 1,
        ("gear", "image", None): 4,
        ("gear", "xyz", None): 4,
        ("gear", "mask", None): 1,
    }


def test_what_has_no_place_is_counted(tmp_path, caplog):
    root = category(tmp_path / "bagel")
    files(root, "test/hole/normals/000.png", "test/hole/gt/007.png", "cover.png")
    with caplog.at_level(logging.WARNING):
        listing = place_mvtec_3d(root, find_images(root))
    assert listing.skipped == 3
    assert len(listing.entries) == 9
    assert "1 of 2 masks have no image" in caplog.text


def test_it_is_told_from_mvtec_ad_which_has_the_same_folders_above(tmp_path):
    root = category(tmp_path / "bagel")
    assert is_mvtec_ad(root)
    assert placed(root, find_images(root)).entries[0].category == "bagel"
    assert {one.role for one in placed(root, find_images(root)).entries} == {"image", "mask", "xyz"}
    flat = files(tmp_path / "nut", "train/good/0.png", "test/good/0.png")
    assert not is_mvtec_3d(flat)
    assert not is_mvtec_3d(flat / "train/good/0.png")
