from pathlib import PurePosixPath

import numpy as np
import pytest
from PIL import Image as Pillow

from medssl.data.layouts.plain import find_images


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(path)
    return path


def names(listing):
    return [str(entry.relative) for entry in listing.entries]


def test_every_image_below_is_found_in_the_order_of_its_path(tmp_path):
    for name in ("b.png", "a/z.jpg", "a/y/x.tif", "c.png"):
        picture(tmp_path / name)
    listing = find_images(tmp_path)
    assert names(listing) == ["a/y/x.tif", "a/z.jpg", "b.png", "c.png"]
    assert listing.skipped == 0
    assert {entry.kind for entry in listing.entries} == {"picture"}
    assert all(entry.path == tmp_path / entry.relative for entry in listing.entries)


def test_content_decides_and_not_the_suffix(tmp_path):
    picture(tmp_path / "a.png").rename(tmp_path / "a")
    picture(tmp_path / "b.png").rename(tmp_path / "b.dcm")
    assert [entry.kind for entry in find_images(tmp_path).entries] == ["picture", "picture"]


def test_other_files_are_counted_and_hidden_ones_are_not(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / ".thumbnails" / "a.png")
    picture(tmp_path / ".b.png")
    for name in ("labels.csv", "notes.txt", "README.md", "LICENSE", "meta.json", "empty"):
        (tmp_path / name).write_text("" if name == "empty" else "words")
    listing = find_images(tmp_path)
    assert names(listing) == ["a.png"]
    assert listing.skipped == 6


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "picture"), ("a.JPG", "picture"), ("a.nii.gz", "nifti"), ("a.dcm", "dicom")],
)
def test_a_file_that_claims_to_be_an_image_is_not_lost(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"damaged")
    (entry,) = find_images(tmp_path).entries
    assert (entry.kind, entry.series) == (kind, None)


def test_a_link_to_nothing_is_not_lost(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert names(find_images(tmp_path)) == ["a.png"]


def test_a_linked_folder_is_followed_once(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(root)
    assert names(find_images(root)) == ["data/a.png"]


def test_a_file_is_a_listing_of_one(tmp_path):
    picture(tmp_path / "a.png")
    listing = find_images(picture(tmp_path / "b.png"))
    assert names(listing) == ["b.png"]
    assert listing.entries[0].key == "b.png"


def test_a_text_file_alone_gives_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    listing = find_images(tmp_path / "a.txt")
    assert (listing.entries, listing.skipped) == ((), 1)


def test_the_key_does_not_depend_on_where_the_folder_lies(tmp_path):
    for root in ("here", "there/and/back"):
        picture(tmp_path / root / "x" / "a.png")
    here, there = (find_images(tmp_path / root) for root in ("here", "there/and/back"))
    assert here.entries[0].key == there.entries[0].key == "x/a.png"
    assert here.entries[0].relative == PurePosixPath("x/a.png")
