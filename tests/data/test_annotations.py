from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as Pillow

from medssl.data.annotations import join_table
from medssl.data.duplicates import find_duplicates
from medssl.data.manifest import build_manifest, load_sample, read_manifest
from medssl.data.privacy import salted


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "sub/b.png", "masks/m.png"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(np.full((4, 5), len(name), np.uint8)).save(file)
    (tmp_path / "set" / "r.txt").write_text("No focal lesion.", encoding="utf-8")
    return tmp_path / "set"


def joined(root, text):
    (root / "t.csv").write_text(text)
    manifest = build_manifest(root)
    found, count = join_table(manifest, "t.csv", root)
    return found, count, {item.path.rpartition("/")[2]: item for item in found.images}


def test_every_column_is_joined_and_nothing_else_changes(pictures):
    header = "path,label,split,category,defect,group,modality,note"
    found, count, by_name = joined(
        pictures, f"{header}\na.png,anomalous,test,lung,nodule,Miller,XR,x\nsub/b.png,0,,,,,,\n"
    )
    assert count == 2
    a, b = by_name["a.png"], by_name["b.png"]
    assert (a.label, a.split, a.category, a.defect) == (1, "test", "lung", "nodule")
    assert (a.group, a.modality) == (salted("Miller"), "XR")
    assert (b.label, b.split, b.modality) == (0, None, "PICTURE")
    assert by_name["m.png"].label is None
    assert "Miller" not in repr(found)


def test_masks_and_reports_belong_to_their_image_and_are_read_with_it(pictures, tmp_path):
    found, _, by_name = joined(pictures, "path,mask,report\na.png,masks/m.png,r.txt\n")
    sample = load_sample(found, by_name["a.png"])
    assert sample.report == "No focal lesion."
    assert sample.mask is not None
    assert sample.mask.pixels.unique().tolist() == [1.0]
    found.write(tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet").items == found.items


def test_a_given_modality_is_recorded(pictures):
    found, _, by_name = joined(pictures, "path,modality\na.png,US\n")
    image = load_sample(found, by_name["a.png"]).images["image"]
    assert (image.modality.value, image.provenance["modality"]) == ("US", "given")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,note\na.png,x\n", "none of the columns"),
        ("path,label\nz.png,1\n", "none of the 3 images"),
        ("path,label\na.png,maybe\n", "label must be one of"),
        ("path,modality\na.png,Xray\n", "modality must be one of"),
        ("path,mask\na.png,gone.png\n", "is not where the table says"),
        ("path,label\na.png,1\na.png,0\n", "two values of label"),
        ("file,label\na.png,1\n", "needs a column 'path'"),
    ],
)
def test_a_table_that_does_not_fit_says_why(pictures, text, says):
    with pytest.raises(ValueError, match=says):
        joined(pictures, text)


def test_duplicates_are_told_by_pixels_across_splits_and_groups(pictures):
    items = build_manifest(pictures).images
    same = [replace(items[0], pixel_sha256="x", split="train", group="p1"),
            replace(items[1], pixel_sha256="x", split="test", group="p1"),
            replace(items[2], pixel_sha256="y")]  # fmt: skip
    (found,) = find_duplicates(same)
    assert (found.across_splits, found.across_groups) == (True, False)
    assert found.items == (items[0].item, items[1].item)
    other = [replace(same[0], split="test"), replace(same[1], group="p2")]
    (found,) = find_duplicates(other)
    assert (found.across_splits, found.across_groups) == (False, True)
    assert find_duplicates([replace(item, pixel_sha256=None) for item in items]) == []
