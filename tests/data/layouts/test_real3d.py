import csv
import logging
from collections import Counter

import numpy as np
import pytest
import torch

from medssl.data.image import PointCloud
from medssl.data.layouts.plain import find_images
from medssl.data.layouts.real3d import is_real3d, place_real3d, point_labels
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.readers.errors import CorruptFileError, InconsistentGeometryError
from medssl.data.readers.points import read_points

POINTS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 5, 6]], np.float32)


def pcd(path, points=POINTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in points)
    path.write_text(
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\n"
        f"WIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\n"
        f"DATA ascii\n{rows}\n"
    )
    return path


def labels(path, values, points=POINTS, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, np.column_stack([points, values]), delimiter=delimiter, fmt="%.3f")
    return path


def category(root, *names):
    for name in ("train/1_prototype", "test/2_good", *names):
        pcd(root / f"{name}.pcd")
    return root


def cloud(points=POINTS):
    return PointCloud(points=torch.from_numpy(points), unit="unknown")


def by_name(root):
    return {str(one.relative): one for one in place_real3d(root, find_images(root)).entries}


@pytest.mark.parametrize(
    ("folder", "name", "label", "defect"),
    [
        ("airplane", "482_bulge_cut", 1, "bulge"),  # Real3D-AD
        ("airplane", "12_good_cut", 0, None),
        ("airplane", "7_sink_copy", 1, "sink"),
        ("ashtray0", "ashtray0_concavity3", 1, "concavity"),  # Anomaly-ShapeNet
        ("ashtray0", "ashtray0_positive11", 0, None),
        ("flange", "flange_hole_03", 1, "hole"),
        ("flange", "flange_bent_rim_03", 1, "bent_rim"),
        ("good_pump", "good_pump_dent_1", 1, "dent"),
    ],
)
def test_the_name_of_a_test_cloud_says_what_is_wrong_with_it(tmp_path, folder, name, label, defect):
    one = by_name(category(tmp_path / folder, f"test/{name}"))[f"test/{name}.pcd"]
    assert (one.split, one.label, one.defect, one.category) == ("test", label, defect, folder)


def test_templates_are_normal_in_training_and_left_out_of_the_test(tmp_path):
    root = category(tmp_path / "duck", "test/duck_template", "train/duck_template0")
    listing = place_real3d(root, find_images(root))
    train = [one for one in listing.entries if one.split == "train"]
    assert [(one.label, one.defect) for one in train] == [(0, None), (0, None)]
    assert "test/duck_template.pcd" not in {str(one.relative) for one in listing.entries}
    assert listing.skipped == 1


@pytest.mark.parametrize("folder", ["gt", "GT"])
def test_labels_belong_to_the_test_cloud_of_their_name(tmp_path, folder, caplog):
    root = category(tmp_path / "duck", "test/1_bulge")
    labels(root / folder / "1_bulge.txt", [0, 0, 1, 0])
    labels(root / folder / "9_bulge.txt", [0, 0, 1, 0])
    with caplog.at_level(logging.WARNING):
        listing = place_real3d(root, find_images(root))
    (mask,) = (one for one in listing.entries if one.role == "mask")
    assert (mask.kind, mask.of, mask.label) == ("text", "test/1_bulge.pcd", None)
    assert mask.path == root / folder / "1_bulge.txt"
    assert "1 of 2 label files have no cloud" in caplog.text
    assert listing.skipped == 1


def test_a_folder_of_categories_is_one_and_half_a_category_none(tmp_path):
    category(tmp_path / "duck")
    category(tmp_path / "shell")
    assert is_real3d(tmp_path / "duck")
    assert is_real3d(tmp_path)
    assert {one.category for one in by_name(tmp_path).values()} == {"duck", "shell"}
    pcd(tmp_path / "scans/train/1.pcd")
    assert not is_real3d(tmp_path / "scans")
    assert not is_real3d(tmp_path / "duck/train/1_prototype.pcd")


@pytest.mark.parametrize("delimiter", [",", " "])
def test_label_rows_follow_the_points(tmp_path, delimiter):
    file = labels(tmp_path / "a.txt", [0, 1, 1, 0], delimiter=delimiter)
    assert point_labels(file, cloud()).tolist() == [False, True, True, False]


def test_rows_in_another_order_find_their_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * 50
    said = np.random.default_rng(1).integers(0, 2, 200)
    order = np.random.default_rng(2).permutation(200)
    file = labels(tmp_path / "a.txt", said[order], points[order])
    assert point_labels(file, cloud(points)).tolist() == said.astype(bool).tolist()


def test_rows_of_missing_points_are_left_out(tmp_path):
    stored = np.concatenate([[[0, 0, 0]], POINTS[:2], [[np.nan, 1, 1]], POINTS[2:]])
    file = labels(tmp_path / "a.txt", [1, 0, 1, 1, 0, 1], stored)
    read = read_points(pcd(tmp_path / "a.pcd", stored))
    assert isinstance(read, PointCloud)
    assert point_labels(file, read).tolist() == [False, True, False, True]


def test_a_point_that_the_text_rounds_to_zero_keeps_its_row(tmp_path):
    points = np.array([[1e-5, 0, 0], [9, 0, 0], [0, 9, 0]], np.float32)
    assert point_labels(labels(tmp_path / "a.txt", [1, 0, 0], points), cloud(points))[0]


def test_labels_of_another_cloud_are_refused(tmp_path):
    with pytest.raises(InconsistentGeometryError, match="3 point labels for 4 points"):
        point_labels(labels(tmp_path / "a.txt", [0, 0, 1], POINTS[:3]), cloud())
    moved = labels(tmp_path / "b.txt", [0, 0, 1, 1], POINTS + [0, 0, 1])
    with pytest.raises(InconsistentGeometryError, match="from the nearest one with a label"):
        point_labels(moved, cloud())


def test_anything_but_zero_and_one_is_refused(tmp_path):
    with pytest.raises(CorruptFileError, match="0 or 1"):
        point_labels(labels(tmp_path / "a.txt", [0, 0.5, 1, 1]), cloud())
    (tmp_path / "b.txt").write_text("1,2,3\n" * 4)
    with pytest.raises(CorruptFileError, match="numbers"):
        point_labels(tmp_path / "b.txt", cloud())


def test_the_real_folder_is_what_its_table_says(real_data):
    root = real_data / "pointcloud-anomaly-synth"
    manifest = build_manifest(root)
    table = list(csv.DictReader((root / "test.csv").open()))
    train = manifest.where(split="train").images
    assert Counter(item.category for item in train) == dict.fromkeys(
        ("milk", "cat", "horse", "flange"), 6
    )
    assert {(item.label, item.defect) for item in train} == {(0, None)}
    said = {row["path"]: row["kind"] for row in table}
    test = manifest.where(split="test").images
    found = {item.path.removeprefix(f"{root}/"): item.defect or "good" for item in test}
    assert found == said
    assert {manifest.mask_of(item) is not None for item in test if item.label == 1} == {True}


def test_the_real_labels_are_counted_as_the_table_counts_them(real_data):
    root = real_data / "pointcloud-anomaly-synth"
    manifest = build_manifest(root / "flange")
    item = next(one for one in manifest.images if one.path.endswith("flange_hole_03.pcd"))
    sample = load_sample(manifest, item)
    with (root / "test.csv").open() as stream:
        row = next(r for r in csv.DictReader(stream) if r["path"].endswith("flange_hole_03.pcd"))
    assert sample.points is not None
    assert sample.point_labels is not None
    assert len(sample.points.points) == int(row["points"])
    assert int(sample.point_labels.sum()) == int(row["anomalous_points"])
    lines = (root / "flange/gt/flange_hole_03.txt").read_text().splitlines()
    assert sample.point_labels.tolist() == [line.endswith(",1") for line in lines]
