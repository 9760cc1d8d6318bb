"""Pictures with xyz, xyz alone and free clouds, from the folder to the sample."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as Pillow

from medssl.data.manifest import (
    build_manifest,
    load_sample,
    read_item,
    read_manifest,
    with_unit,
)
from medssl.data.readers.errors import InconsistentGeometryError, UnsupportedFormatError

XYZ = np.arange(4 * 6 * 3, dtype=np.float32).reshape(4, 6, 3)  # (0, 0) is 0, 1, 2
XYZ[2, 3] = 0  # not measured


def picture(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.zeros((4, 6, 3), np.uint8) if pixels is None else pixels).save(path)
    return path


def xyz(path, stored=XYZ):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"photometric": "rgb"} if stored.ndim == 3 else {}
    tifffile.imwrite(path, stored, **options)
    return path


def pcd(path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(" ".join(map(str, row)) for row in points)
    path.write_text(
        "VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {len(points)}\nHEIGHT 1\nPOINTS {len(points)}\nDATA ascii\n{rows}\n"
    )
    return path


@pytest.fixture
def bagel(tmp_path):
    """A normal with both, a defect with both, one of xyz alone and one of a picture alone."""
    root = tmp_path / "bagel"
    for place in ("train/good", "test/hole"):
        picture(root / place / "rgb/000.png")
        xyz(root / place / "xyz/000.tiff")
    xyz(root / "test/hole/xyz/001.tiff")
    picture(root / "test/hole/rgb/002.png")
    marked = np.zeros((4, 6), np.uint8)
    marked[1, 5] = 255
    for number in range(3):
        picture(root / f"test/hole/gt/00{number}.png", marked)
    return root


@pytest.fixture
def duck(tmp_path):
    root = tmp_path / "duck"
    points = [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    for name in ("train/1_prototype", "test/2_good", "test/3_bulge"):
        pcd(root / f"{name}.pcd", points)
    (root / "gt").mkdir()
    rows = [f"{x} {y} {z} {label}" for (x, y, z), label in zip(points, (0, 1, 0), strict=True)]
    (root / "gt/3_bulge.txt").write_text("\n".join(rows))
    return root


def item_at(manifest, end):
    return next(item for item in manifest.items if item.path.endswith(end))


def sample_at(root, end):
    manifest = build_manifest(root)
    return load_sample(manifest, item_at(manifest, end))


def test_a_picture_comes_with_its_xyz_and_the_mask_on_its_grid(bagel):
    sample = sample_at(bagel, "test/hole/rgb/000.png")
    assert list(sample.images) == ["image", "xyz"]
    assert sample.images["image"].modality == "PICTURE"
    geometry = sample.images["xyz"]
    assert (geometry.frame, geometry.units) == ("sensor", "m")
    assert torch.equal(geometry.pixels, torch.from_numpy(XYZ).permute(2, 0, 1))
    assert geometry.valid is not None
    assert (~geometry.valid).nonzero().tolist() == [[2, 3]]
    assert sample.mask is not None
    assert sample.mask.pixels.nonzero().tolist() == [[0, 1, 5]]
    assert sample.label == 1


def test_without_its_picture_xyz_is_the_image_with_the_mask(bagel):
    sample = sample_at(bagel, "test/hole/xyz/001.tiff")
    assert list(sample.images) == ["image"]
    image = sample.images["image"]
    assert (image.modality, image.channels, image.units) == ("DEPTH", ("x", "y", "z"), "m")
    assert sample.mask is not None
    assert sample.mask.frame == image.frame == "sensor"
    assert sample.mask.pixels.nonzero().tolist() == [[0, 1, 5]]


def test_without_its_xyz_a_picture_is_a_picture(bagel):
    sample = sample_at(bagel, "test/hole/rgb/002.png")
    assert list(sample.images) == ["image"]
    assert sample.images["image"].modality == "PICTURE"


def test_an_image_is_counted_once_and_its_xyz_follows_it(bagel):
    manifest = build_manifest(bagel)
    assert len(manifest.images) == 4
    train = manifest.where(split="train")
    assert [item.role for item in train.items] == ["image", "xyz"]
    (image,) = train.images
    assert train.xyz_of(image) == train.items[1]
    assert manifest.xyz_of(item_at(manifest, "rgb/002.png")) is None
    assert load_sample(train, image).images["xyz"].units == "m"


def test_xyz_of_another_size_and_a_lone_channel_are_errors_of_the_item(bagel):
    manifest = build_manifest(bagel)
    item = item_at(manifest, "train/good/rgb/000.png")
    xyz(bagel / "train/good/xyz/000.tiff", XYZ[:3])
    with pytest.raises(InconsistentGeometryError, match=rf"{item.item}: .*\(3, 6\).*\(4, 6\)"):
        load_sample(manifest, item)
    xyz(bagel / "train/good/xyz/000.tiff", XYZ[..., 1])
    with pytest.raises(UnsupportedFormatError, match=rf"{item.item}: .*an image of 1 channels"):
        load_sample(manifest, item)


def test_free_points_beside_a_picture_are_refused(tmp_path):
    picture(tmp_path / "rgb/0.png")
    pcd(tmp_path / "xyz/0.pcd", [[1, 2, 3]])
    with pytest.raises(UnsupportedFormatError, match="must be organized.*free points"):
        sample_at(tmp_path, "0.png")


def test_a_cloud_comes_with_the_labels_of_its_points(duck):
    sample = sample_at(duck, "3_bulge.pcd")
    assert not sample.images
    assert sample.points is not None
    assert sample.points.points.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    assert sample.point_labels is not None
    assert sample.point_labels.tolist() == [False, True, False]
    assert sample.mask is None
    normal = sample_at(duck, "2_good.pcd")
    assert (normal.label, normal.point_labels) == (0, None)


def test_labels_that_do_not_fit_name_their_item(duck):
    (duck / "gt/3_bulge.txt").write_text("1 0 0 0\n")
    manifest = build_manifest(duck)
    item = item_at(manifest, "3_bulge.pcd")
    with pytest.raises(InconsistentGeometryError, match=f"item {item.item}: 1 point labels for 3"):
        load_sample(manifest, item)


def test_a_picture_is_no_mask_of_free_points(tmp_path):
    root = tmp_path / "part"
    pcd(root / "train/good/0.pcd", [[1, 2, 3]])
    pcd(root / "test/hole/0.pcd", [[1, 2, 3]])
    picture(root / "ground_truth/hole/0_mask.png")
    with pytest.raises(UnsupportedFormatError, match="give it a label for each point"):
        sample_at(root, "test/hole/0.pcd")


def test_the_user_says_the_unit_of_points_and_xyz_and_of_nothing_else(bagel, duck):
    for root in (bagel, duck):
        manifest = with_unit(build_manifest(root), "mm")
        geometry = {item.unit for item in manifest.items if item.path.endswith((".tiff", ".pcd"))}
        others = {item.unit for item in manifest.items if item.path.endswith((".png", ".txt"))}
        assert (geometry, others) == ({"mm"}, {None})
    manifest = with_unit(build_manifest(duck), "mm")
    points = load_sample(manifest, manifest.images[0]).points
    assert points is not None
    assert points.unit == "mm"
    unsaid = build_manifest(duck)
    points = load_sample(unsaid, unsaid.images[0]).points
    assert points is not None
    assert points.unit == "unknown"


def test_a_manifest_keeps_roles_and_units(bagel, tmp_path):
    manifest = build_manifest(bagel)
    manifest.write(tmp_path / "items.parquet")
    assert read_manifest(tmp_path / "items.parquet") == manifest


def test_a_table_from_before_units_is_read_and_keeps_its_digest(duck, tmp_path):
    from pyarrow import parquet

    manifest = build_manifest(duck)
    manifest.write(tmp_path / "new.parquet")
    table = parquet.read_table(tmp_path / "new.parquet")
    parquet.write_table(table.drop_columns(["unit"]), tmp_path / "old.parquet")
    assert read_manifest(tmp_path / "old.parquet") == manifest
    assert with_unit(manifest, "m").digest != manifest.digest
    unsaid = ("path", "file_sha256", "pixel_sha256", "unit")
    rows = [
        json.dumps({name: value for name, value in asdict(item).items() if name not in unsaid})
        for item in manifest.items
    ]
    before = hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]
    assert manifest.digest == before
    parquet.write_table(table.drop_columns(["split"]), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="expected a manifest"):
        read_manifest(tmp_path / "none.parquet")


def test_the_hash_is_of_the_picture_or_else_of_the_geometry(bagel, duck):
    manifest = build_manifest(bagel)
    hashed = {
        end: read_item(item_at(manifest, end), hashes=True).provenance["pixel_sha256"]
        for end in ("good/rgb/000.png", "hole/rgb/002.png", "hole/xyz/001.tiff", "xyz/000.tiff")
    }
    assert hashed["good/rgb/000.png"] == hashed["hole/rgb/002.png"]  # the same black picture
    assert hashed["hole/xyz/001.tiff"] == hashed["xyz/000.tiff"] != hashed["good/rgb/000.png"]
    clouds = build_manifest(duck)
    assert len(read_item(clouds.images[0], hashes=True).provenance["pixel_sha256"]) == 64


def test_eyecandies_depth_becomes_xyz_in_meters_beside_its_picture(tmp_path):
    folder = tmp_path / "Lollipop/train/data"
    picture(folder / "000_image_5.png")
    picture(folder / "000_depth.png", np.full((4, 6), 65535, np.uint16))
    (folder / "000_info_depth.yaml").write_text("normalization: {min: 1.0, max: 3.0}\n")
    sample = sample_at(tmp_path, "000_image_5.png")
    assert list(sample.images) == ["image", "xyz"]
    assert sample.images["xyz"].units == "m"
    assert (sample.images["xyz"].pixels[2] == 3).all()
    assert with_unit(build_manifest(tmp_path), "mm").items == build_manifest(tmp_path).items
    assert sample.images["xyz"].pixels[:, 2, 3].tolist() == [0, 0, 3]  # the principal point
