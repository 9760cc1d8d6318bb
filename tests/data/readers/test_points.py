"""Points of any format: missing ones, precision, units, damage, and real scans against pypcd4."""

import csv
import hashlib
import struct
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pypcd4
import pytest
import trimesh

from medssl.data.image import Image, PointCloud
from medssl.data.readers.errors import ReadError, UnsupportedFormatError
from medssl.data.readers.points import points_header, read_points
from medssl.data.readers.points_stored import MAX_BYTES, EmptyCloudError

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(40, 3)).astype(np.float32)


def write_ply(path: Path, xyz: np.ndarray, extra: str = "", rest: np.ndarray | None = None) -> Path:
    """Little-endian; xyz (P, 3) float32 or float64; rest (P, F) floats named in `extra`."""
    kind = {4: "float", 8: "double"}[xyz.dtype.itemsize]
    names = "".join(f"property {kind} {name}\n" for name in ["x", "y", "z", *extra.split()])
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(xyz)}\n{names}end_header\n"
    columns = xyz if rest is None else np.hstack([xyz, rest.astype(xyz.dtype)])
    path.write_bytes(header.encode() + columns.tobytes())
    return path


def cloud_of(path: Path, **options) -> PointCloud:
    cloud = read_points(path, **options)
    assert isinstance(cloud, PointCloud)
    return cloud


def test_missing_points_are_left_out_with_their_colors_and_normals(tmp_path):
    xyz, gone = XYZ.copy(), [0, 5, 17, 30]
    xyz[0], xyz[5, 1], xyz[17, 2], xyz[30] = 0, np.nan, -np.inf, np.nan
    xyz[8], xyz[9, :2] = -0.0, 0  # the first is missing, the second on the z axis
    gone.append(8)
    rest = np.hstack([XYZ[::-1], RNG.random((40, 3))])
    path = write_ply(tmp_path / "a.ply", xyz, "nx ny nz red green blue", rest)
    cloud = cloud_of(path)
    for found, written in (
        (cloud.points, xyz), (cloud.normals, rest[:, :3]), (cloud.colors, rest[:, 3:])
    ):  # fmt: skip
        np.testing.assert_array_equal(found, np.delete(written, gone, 0).astype(np.float32))
    assert cloud.provenance["missing"] == 5
    assert points_header(path).num_points == 40


def test_equal_points_are_kept_and_counted(tmp_path):
    xyz = XYZ[[0, 1, 2, 1, 1, 3, 0]]
    xyz[5] = xyz[0][[1, 0, 2]]  # the same numbers in another order are another point
    cloud = cloud_of(write_ply(tmp_path / "a.ply", xyz))
    np.testing.assert_array_equal(cloud.points, xyz)
    assert cloud.provenance["duplicates"] == 3


@pytest.mark.parametrize("xyz", [np.zeros((3, 3)), np.full((3, 3), np.nan)])
def test_a_cloud_without_a_measured_point_is_empty(tmp_path, xyz):
    with pytest.raises(EmptyCloudError, match="none of the 3"):
        read_points(write_ply(tmp_path / "a.ply", xyz))


def test_doubles_that_float32_would_bend_are_refused(tmp_path):
    near = XYZ.astype(np.float64) / 3  # a scene of about 1 m
    cloud = cloud_of(write_ply(tmp_path / "a.ply", near))
    np.testing.assert_array_equal(cloud.points, near.astype(np.float32))
    far = near + [512_700.0, 5_403_547.0, 295.0]
    with pytest.raises(UnsupportedFormatError, match="subtract an offset"):
        read_points(write_ply(tmp_path / "a.ply", far))
    far[0] += 10_000  # what is lost no longer matters
    cloud_of(write_ply(tmp_path / "a.ply", far))
    cloud_of(write_ply(tmp_path / "a.ply", far[:1]))  # one point has no distances
    for beyond in (near * 1e39, abs(near) * 1e39 + 1e39):
        with pytest.raises(UnsupportedFormatError):
            read_points(write_ply(tmp_path / "a.ply", beyond))


def test_a_missing_point_does_not_count_for_the_precision(tmp_path):
    near = XYZ.astype(np.float64)
    near[3] = 1e300, np.nan, 0
    assert cloud_of(write_ply(tmp_path / "a.ply", near)).provenance["missing"] == 1


@pytest.mark.parametrize(
    ("extent", "unit", "suspicious"),
    [(0.2, "m", False), (0.2, "mm", True), (200, "mm", False), (2000, "m", True),
     (0.0002, "m", True), (2_000_000, "mm", True), (0.0002, None, False)],
)  # fmt: skip
def test_an_implausible_extent_is_told_where_a_unit_is_declared(tmp_path, extent, unit, suspicious):
    xyz = np.array([[1, 1, 1], [1 + extent, 1, 1]], np.float64)
    cloud = cloud_of(write_ply(tmp_path / "a.ply", xyz.astype(np.float32)), unit=unit)
    assert cloud.unit == (unit or "unknown")
    assert cloud.provenance.get("extent_suspicious", False) == suspicious


def test_hashes_are_of_the_file_and_of_all_stored_points(tmp_path):
    xyz = XYZ.copy()
    xyz[3] = 0
    for stored in (xyz, xyz.astype(np.float64)):
        path = write_ply(tmp_path / "a.ply", stored)
        found = cloud_of(path, hashes=True).provenance
        content = b"3,40" + stored.T.copy().tobytes()
        assert found["pixel_sha256"] == hashlib.sha256(content).hexdigest()
        assert found["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "file_sha256" not in cloud_of(path).provenance


def test_the_content_decides_before_the_name(tmp_path):
    path = write_ply(tmp_path / "a.xyz", XYZ)
    assert cloud_of(path).provenance["format"] == points_header(path).format == "ply"


def test_other_files_are_refused_without_their_path(tmp_path):
    (tmp_path / "a.ply").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (tmp_path / "b.ply").write_bytes(b"")
    (tmp_path / "c.ply").mkdir()
    for name in ("a.ply", "b.ply", "c.ply", "gone.ply"):
        for function in (read_points, points_header):
            with pytest.raises(ReadError) as caught:
                function(tmp_path / name)
            assert str(tmp_path) not in str(caught.value)


def test_a_file_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "a.ply").open("wb") as stream:
        stream.write(b"ply\n")
        stream.truncate(MAX_BYTES + 1)
    for function in (read_points, points_header):
        with pytest.raises(UnsupportedFormatError, match="too large"):
            function(tmp_path / "a.ply")


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four bytes changed, more often in the header; sometimes cut or with a digit more."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        reach = len(found) if rng.random() < 0.4 else min(len(found), 250)
        found[rng.integers(reach)] = rng.choice([rng.integers(256), ord("9"), ord(" "), 255])
    if rng.random() < 0.2:
        at = rng.integers(len(found))
        found[at:at] = b"99999"
    return bytes(found[: rng.integers(len(found))] if rng.random() < 0.1 else found)


def seeds(folder: Path) -> list[Path]:
    mesh = trimesh.creation.icosphere(subdivisions=1)
    for encoding in ("ascii", "binary"):
        content = trimesh.exchange.ply.export_ply(mesh, encoding=encoding, vertex_normal=True)
        (folder / f"{encoding}.ply").write_bytes(content)
    header = (
        "ply\nformat binary_big_endian 1.0\nelement face 3\nproperty list uint uchar f\n"
        "element vertex 3\nproperty list int int n\nproperty float x\nproperty float y\n"
        "property list uchar short m\nproperty float z\nend_header\n"
    )
    body = struct.pack(">I2BI1BI0B", 2, 0, 1, 1, 2, 0) + b"".join(
        struct.pack(f">I{n}i2fB{2 - n}hf", n, *range(n), 1, n, 2 - n, *range(2 - n), 5)
        for n in range(3)
    )
    (folder / "lists.ply").write_bytes(header.encode() + body)
    cloud = pypcd4.PointCloud.from_xyz_points(XYZ)
    for name in ("ascii", "binary", "binary_compressed"):
        cloud.save(folder / f"{name}.pcd", encoding=pypcd4.Encoding(name))
    np.savetxt(folder / "a.xyz", np.hstack([XYZ, abs(XYZ)]))
    return sorted(folder.iterdir())


def test_damaged_files_are_read_or_refused_soon_and_in_little_memory(tmp_path):
    rng = np.random.default_rng(1)
    read = 0
    for path in seeds(tmp_path):
        content = path.read_bytes()
        read_points(path)
        for _ in range(100):
            path.write_bytes(damaged(content, rng))
            start = time.perf_counter()
            tracemalloc.start()
            try:
                found = read_points(path)
                read += 1
                assert isinstance(found, Image) or found.points.isfinite().all()
            except ReadError:
                pass
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 50e6
            assert time.perf_counter() - start < 5
            with suppress(ReadError):
                points_header(path)
    assert 100 < read < 700  # neither is everything refused


def test_real_scans_equal_pypcd4(real_data):
    """And the list that came with them, read by other means."""
    folder = real_data / "pointcloud-scans"
    with (folder / "files.csv").open() as stream:
        listed = list(csv.DictReader(stream))
    assert len(listed) == 12
    for row in listed:
        found = read_points(folder / row["path"])
        if row["data"] == "ascii":  # of which pypcd4 wants single blanks
            expected = np.loadtxt(folder / row["path"], np.float32, skiprows=11)
        else:
            expected = pypcd4.PointCloud.from_path(folder / row["path"]).numpy(("x", "y", "z"))
        header = points_header(folder / row["path"])
        assert (header.width, header.height) == (int(row["width"]), int(row["height"]))
        assert " ".join(header.fields) == row["fields"]
        if isinstance(found, Image):
            valid = found.valid
            assert valid is not None
            assert header.height > 1
            points = found.pixels.movedim(0, -1)[valid]
            flat = found.pixels.movedim(0, -1).reshape(-1, 3)
            np.testing.assert_array_equal(flat, expected)
        else:
            points = found.points
            np.testing.assert_array_equal(points, expected)
        assert len(points) == int(row["finite_points"])
        box = [float(row[name]) for name in ("xmin", "ymin", "zmin", "xmax", "ymax", "zmax")]
        np.testing.assert_allclose([*points.amin(0), *points.amax(0)], box, atol=1e-3)


def test_real_colors_equal_pypcd4(real_data):
    path = real_data / "pointcloud-scans/scans/tutorials/correspondence_grouping/milk.pcd"
    bits = pypcd4.PointCloud.from_path(path).pc_data["rgba"]
    expected = np.stack([bits >> 16 & 255, bits >> 8 & 255, bits & 255], 1)
    np.testing.assert_array_equal(cloud_of(path).colors, expected.astype(np.float32) / 255)


def test_made_anomalies_stand_where_their_labels_say(real_data):
    folder = real_data / "pointcloud-anomaly-synth"
    for path in sorted(folder.glob("*/gt/*_00.txt")):
        labeled = np.loadtxt(path, delimiter=",")
        cloud = cloud_of(path.parents[1] / "test" / f"{path.stem}.pcd", unit="mm")
        np.testing.assert_allclose(cloud.points, labeled[:, :3], atol=6e-4)  # three decimals
        assert "extent_suspicious" not in cloud.provenance
