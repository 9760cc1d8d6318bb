import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from medssl.data.layouts.placed import placed
from medssl.data.layouts.plain import find_images


def files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tiff":
            tifffile.imwrite(path, np.ones((4, 6, 3), np.float32), photometric="rgb")
        else:
            Pillow.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)
    return root


def told(root):
    entries = placed(root, find_images(root)).entries
    return [(str(one.relative), one.role, one.of, one.modality.value) for one in entries]


def test_xyz_belongs_to_the_picture_of_its_name_in_the_folder_beside(tmp_path):
    files(tmp_path, *(f"{line}/rgb/{n}.png" for line in "ab" for n in "12"))
    files(tmp_path, "a/xyz/2.tiff", "b/xyz/1.tiff")
    assert told(tmp_path) == [
        ("a/rgb/1.png", "image", None, "PICTURE"),
        ("a/rgb/2.png", "image", None, "PICTURE"),
        ("b/rgb/1.png", "image", None, "PICTURE"),
        ("b/rgb/2.png", "image", None, "PICTURE"),
        ("a/xyz/2.tiff", "xyz", "a/rgb/2.png", "DEPTH"),
        ("b/xyz/1.tiff", "xyz", "b/rgb/1.png", "DEPTH"),
    ]


def test_xyz_without_its_picture_is_an_image_of_its_own(tmp_path):
    files(tmp_path, "rgb/1.png", "xyz/1.tiff", "xyz/2.tiff")
    assert told(tmp_path) == [
        ("rgb/1.png", "image", None, "PICTURE"),
        ("xyz/2.tiff", "image", None, "DEPTH"),
        ("xyz/1.tiff", "xyz", "rgb/1.png", "DEPTH"),
    ]


def test_a_folder_named_xyz_alone_is_any_folder(tmp_path):
    files(tmp_path, "xyz/1.png", "other/rgb/1.png")
    assert {row[1:] for row in told(tmp_path)} == {("image", None, "PICTURE")}


def test_two_pictures_of_one_name_are_not_guessed_among(tmp_path):
    files(tmp_path, "rgb/1.png", "rgb/1.jpg", "xyz/1.tiff")
    with pytest.raises(ValueError, match="two files of a folder 'rgb' have one name") as error:
        placed(tmp_path, find_images(tmp_path))
    assert str(tmp_path) not in str(error.value)
