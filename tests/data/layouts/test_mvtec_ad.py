import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image as Pillow

from medssl.data.layouts.mvtec_ad import is_mvtec_ad, place_mvtec_ad
from medssl.data.layouts.plain import find_images

CATEGORY = (
    "train/good/0.png",
    "train/good/1.png",
    "test/good/0.png",
    "test/crack/0.png",
    "test/crack/1.png",
    "ground_truth/crack/0_mask.png",
)


def pictures(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(path)
    return root


def placed(root):
    return place_mvtec_ad(root, find_images(root))


def by_name(listing):
    return {str(entry.relative): entry for entry in listing.entries}


def test_folders_say_split_label_and_defect(tmp_path):
    listing = placed(pictures(tmp_path / "nut", CATEGORY))
    said = {
        name: (entry.split, entry.label, entry.defect, entry.category)
        for name, entry in by_name(listing).items()
        if entry.role == "image"
    }
    assert said == {
        "train/good/0.png": ("train", 0, None, "nut"),
        "train/good/1.png": ("train", 0, None, "nut"),
        "test/good/0.png": ("test", 0, None, "nut"),
        "test/crack/0.png": ("test", 1, "crack", "nut"),
        "test/crack/1.png": ("test", 1, "crack", "nut"),
    }
    assert listing.skipped == 0


def test_a_mask_belongs_to_the_image_of_its_name_and_kind(tmp_path):
    root = pictures(
        tmp_path / "nut", [*CATEGORY, "test/dent/0.png", "ground_truth/dent/0_mask.png"]
    )
    entries = by_name(placed(root))
    crack, dent = (entries[f"ground_truth/{kind}/0_mask.png"] for kind in ("crack", "dent"))
    assert (crack.role, crack.of, crack.label) == ("mask", "test/crack/0.png", None)
    assert (dent.role, dent.of) == ("mask", "test/dent/0.png")


def test_a_folder_of_categories_names_each(tmp_path):
    for category in ("nut", "bolt"):
        pictures(tmp_path / category, CATEGORY)
    pictures(tmp_path, ["cover.png"])
    (tmp_path / "labels.csv").write_text("path\n")
    assert is_mvtec_ad(tmp_path)
    listing = placed(tmp_path)
    assert Counter(entry.category for entry in listing.entries) == {"nut": 6, "bolt": 6}
    assert listing.skipped == 2
    assert by_name(listing)["nut/ground_truth/crack/0_mask.png"].of == "nut/test/crack/0.png"


def test_extra_training_images_and_tests_without_masks_have_their_labels(tmp_path):
    names = ["train_extra/crack/a.png", "train_extra/good/b.png", "test_nomask/crack/0.png"]
    entries = by_name(placed(pictures(tmp_path / "nut", [*CATEGORY, *names])))
    said = [(entries[name].split, entries[name].label) for name in names]
    assert said == [("train", 1), ("train", 0), ("test", 1)]
    assert entries["ground_truth/crack/0_mask.png"].of == "test/crack/0.png"


def test_a_mask_without_an_image_is_counted_and_reported(tmp_path, caplog):
    root = pictures(tmp_path / "nut", [*CATEGORY, "ground_truth/crack/7_mask.png"])
    with caplog.at_level(logging.WARNING):
        listing = placed(root)
    assert listing.skipped == 1
    assert "1 of 2 masks have no image" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_a_mask_of_two_images_is_not_guessed(tmp_path):
    root = pictures(tmp_path / "nut", [*CATEGORY, "test/crack/0.jpg"])
    with pytest.raises(ValueError, match="kind 'crack' fits 2 images"):
        placed(root)


def test_names_with_dots_keep_them(tmp_path):
    names = ["test/crack/a.b.png", "test/crack/a.png", "ground_truth/crack/a.b_mask.png"]
    entries = by_name(placed(pictures(tmp_path / "nut", ["train/good/0.png", *names])))
    assert entries["ground_truth/crack/a.b_mask.png"].of == "test/crack/a.b.png"


@pytest.mark.parametrize("kept", ["train/good/0.png", "test/good/0.png"])
def test_half_a_category_is_still_one(tmp_path, kept):
    assert is_mvtec_ad(pictures(tmp_path / "nut", [kept]))


def test_any_other_folder_is_none(tmp_path):
    assert not is_mvtec_ad(pictures(tmp_path / "a", ["scans/good/0.png"]))
    assert not is_mvtec_ad(tmp_path / "a" / "scans" / "good" / "0.png")
