"""What inspect and manifest say of folders of xyz and of clouds."""

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from medssl.data.manifest import build_manifest, read_manifest
from pipelines.inspect import inspect
from pipelines.manifest import manifest


def pcd(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 2\nHEIGHT 1\n"
        "POINTS 2\nDATA ascii\n1 2 3\n4 5 6\n"
    )


@pytest.fixture
def bagel(tmp_path):
    root = tmp_path / "bagel"
    for place in ("train/good", "test/hole"):
        for folder in ("rgb", "xyz", "gt"):
            (root / place / folder).mkdir(parents=True)
        black = np.zeros((4, 6, 3), np.uint8)
        Pillow.fromarray(black).save(root / place / "rgb/0.png")
        stored = np.ones((4, 6, 3), np.float32)
        tifffile.imwrite(root / place / "xyz/0.tiff", stored, photometric="rgb")
    Pillow.fromarray(black[..., 0]).save(root / "test/hole/gt/0.png")
    (root / "notes.txt").write_text("words")
    return root


@pytest.fixture
def duck(tmp_path):
    root = tmp_path / "duck"
    for name in ("train/1_prototype", "test/2_good", "test/3_bulge"):
        pcd(root / f"{name}.pcd")
    (root / "gt").mkdir()
    (root / "gt/3_bulge.txt").write_text("1 2 3 0\n4 5 6 1\n")
    return root


def test_inspect_tells_pictures_xyz_and_masks_apart(bagel):
    result = inspect(bagel)
    rows = {row["path"]: row for row in result["images"]}
    said = {path: (row["role"], row["modality"], row["unit"]) for path, row in rows.items()}
    assert said == {
        "train/good/rgb/0.png": ("image", "PICTURE", None),
        "train/good/xyz/0.tiff": ("xyz", "DEPTH", "m"),
        "test/hole/rgb/0.png": ("image", "PICTURE", None),
        "test/hole/xyz/0.tiff": ("xyz", "DEPTH", "m"),
        "test/hole/gt/0.png": ("mask", "PICTURE", None),
    }
    assert rows["test/hole/xyz/0.tiff"]["shape"] == [4, 6]
    assert (result["others"], result["failed"]) == (1, 0)


def test_inspect_knows_label_files_and_says_that_a_unit_is_not_known(duck):
    result = inspect(duck)
    assert [row["shape"] for row in result["images"]] == [[2]] * 3
    assert {row["notes"][0] for row in result["images"]} == {
        "free points; their unit is not in the file"
    }
    assert (result["others"], result["failed"]) == (0, 0)


def test_inspect_tells_what_the_layout_leaves_out(bagel):
    (bagel / "test/hole/normals").mkdir()
    Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(bagel / "test/hole/normals/0.png")
    rows = {row["path"]: row for row in inspect(bagel)["images"]}
    assert {path for path, row in rows.items() if row["role"] is None} == {
        "test/hole/normals/0.png"
    }
    assert "no place" in rows["test/hole/normals/0.png"]["notes"][0]
    kept = {item.item for item in build_manifest(bagel).items}
    assert {row["item"] for row in rows.values() if row["role"] is not None} == kept


def test_a_note_of_many_images_is_said_once(tmp_path, capsys):
    for number in range(6):
        pcd(tmp_path / f"{number}.pcd")
    inspect(tmp_path)
    assert capsys.readouterr().out.count("their unit is not in the file") == 1
    (tmp_path / "5.pcd").unlink()
    inspect(tmp_path)
    said = capsys.readouterr().out
    assert all(f"{number}.pcd: free points; their unit" in said for number in range(5))


def test_inspect_goes_on_where_the_layout_contradicts_itself(bagel, capsys):
    Pillow.fromarray(np.zeros((4, 6), np.uint8)).save(bagel / "test/hole/rgb/0.jpg")
    assert len(inspect(bagel)["images"]) == 6
    assert "the folder's layout: two files" in capsys.readouterr().out


def test_the_manifest_job_hashes_pictures_xyz_alone_and_clouds(bagel, duck, tmp_path):
    (bagel / "test/hole/rgb/0.png").unlink()
    for root, num_images, with_xyz in ((bagel, 2, 1), (duck, 3, 0)):
        result = manifest(root, tmp_path / f"{root.name}.parquet", hash=True, workers=1)
        assert (result["images"], result["with_xyz"], result["failed"]) == (num_images, with_xyz, 0)
        items = read_manifest(tmp_path / f"{root.name}.parquet").images
        assert all(len(item.pixel_sha256 or "") == 64 for item in items)


def test_a_hash_is_of_the_stored_pixels_whatever_a_table_says_of_them(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    Pillow.fromarray(np.full((4, 6), 7, np.uint16)).save(root / "a.png")
    (root / "table.csv").write_text("path,modality\na.png,DEPTH\n")
    manifest(root, tmp_path / "one.parquet", hash=True, workers=1)
    manifest(root, tmp_path / "two.parquet", hash=True, table="table.csv", workers=1)
    one, two = (read_manifest(tmp_path / f"{name}.parquet").images[0] for name in ("one", "two"))
    assert (one.modality, two.modality) == ("PICTURE", "DEPTH")
    assert one.pixel_sha256 == two.pixel_sha256 is not None


def test_the_manifest_job_takes_the_unit_that_no_file_says(duck, tmp_path):
    manifest(duck, tmp_path / "items.parquet", unit="mm", workers=1)
    items = read_manifest(tmp_path / "items.parquet").images
    assert {item.unit for item in items} == {"mm"}
