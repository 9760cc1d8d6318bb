import pickle
from collections import Counter
from dataclasses import replace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image as Pillow
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from medssl.data.manifest import NoDataError, build_manifest, load_sample, read_manifest
from medssl.data.privacy import key_fingerprint, salted
from medssl.data.readers.errors import CorruptFileError, InconsistentGeometryError, ReadError


def picture(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.zeros((4, 6), np.uint8) if pixels is None else pixels).save(path)
    return path


def slices(folder, *, patient="Miller", study="1.2.3", series="1.2.3.4", count=3, first=0):
    """An axial CT with voxels of 2 x 1 x 0.5 mm, slice k filled with k; returns its files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(first, first + count):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = f"{series}.{number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.Modality, dataset.PatientID = "CT", patient
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 4, 6, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.PixelRepresentation, dataset.RescaleSlope, dataset.RescaleIntercept = 1, 1, 0
        dataset.PixelSpacing, dataset.SliceThickness = [1, 0.5], 2
        dataset.ImagePositionPatient = [0, 0, 2 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelData = np.full((4, 6), number, np.int16).tobytes()
        files.append(folder / f"{series}-{number}.dcm")
        dataset.save_as(files[-1], enforce_file_format=True)
    return files


@pytest.fixture
def nut(tmp_path):
    """One category: two train, one good and two cracked test pictures, one of them with a mask."""
    root = tmp_path / "nut"
    for name in ("train/good/0.png", "train/good/1.png", "test/good/0.png", "test/crack/1.png"):
        picture(root / name)
    picture(root / "test/crack/0.png", np.arange(24, dtype=np.uint8).reshape(4, 6))
    marked = np.zeros((4, 6), np.uint8)
    marked[1, 2:5] = 255
    picture(root / "ground_truth/crack/0_mask.png", marked)
    return root


def item_at(manifest, end):
    return next(item for item in manifest.items if item.path.endswith(end))


@pytest.mark.parametrize(
    ("folder", "counts"),
    [
        (
            "industrial-cookies/cookie",
            {("train", None): 22, ("test", None): 23, ("test", "broken"): 32 + 8},
        ),
        (
            "industrial-ballscrew/ballscrew",
            {("train", None): 220, ("test", None): 100, ("test", "pitting"): 55},
        ),
        (
            "cxr-pneumonia/chest",
            {
                ("train", None): 220,
                ("train", "bacterial"): 120,
                ("train", "viral"): 120,
                ("test", None): 100,
                ("test", "bacterial"): 103,
                ("test", "viral"): 110,
            },
        ),
    ],
)
def test_real_folders_have_the_counts_of_their_readme(real_data, folder, counts):
    manifest = build_manifest(real_data / folder)
    assert Counter((item.split, item.defect) for item in manifest.images) == counts
    assert {item.label for item in manifest.images if item.defect is None} == {0}
    assert {item.label for item in manifest.images if item.defect is not None} == {1}


def test_every_real_mask_has_its_picture(real_data):
    for folder, count in (("industrial-cookies", 32), ("industrial-ballscrew", 55)):
        manifest = build_manifest(real_data / folder)
        pairs = [(item, manifest.mask_of(item)) for item in manifest.images]
        named = [(item.path, mask.path) for item, mask in pairs if mask is not None]
        assert len(named) == count
        for image, mask in named:
            name = mask.replace("ground_truth", "test").removesuffix("_mask.png")
            assert image.removesuffix(".jpg") == name


@pytest.mark.parametrize("folder", ["cxr-pneumonia", "cxr-pneumonia/chest"])
def test_real_pictures_get_their_patient_from_the_table(real_data, folder):
    manifest = build_manifest(real_data / folder, groups="labels.csv:patient_id")
    item = item_at(manifest, "chest/test/bacterial/person1_bacteria_2.jpg")
    assert item.group == salted("p1")
    train = {item.group for item in manifest.where(split="train").images}
    test = {item.group for item in manifest.where(split="test").images}
    assert not train & test


def test_every_name_is_its_own_and_says_nothing(nut):
    manifest = build_manifest(nut)
    names = [item.item for item in manifest.items]
    assert len(set(names)) == len(names) == 6
    assert all(len(name) == 12 and int(name, 16) >= 0 for name in names)


def test_names_and_digest_do_not_depend_on_where_the_folder_lies(nut, tmp_path):
    before = build_manifest(nut)
    nut.rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "deeper").rename(tmp_path / "nut")
    (tmp_path / "else").mkdir()
    moved = build_manifest((tmp_path / "nut").rename(tmp_path / "else" / "nut"))
    assert [item.item for item in moved.items] == [item.item for item in before.items]
    assert moved.digest == before.digest
    assert moved.items[0].path != before.items[0].path


def test_the_digest_sees_every_column_but_the_local_ones(nut):
    manifest = build_manifest(nut)

    def changed(**columns):
        items = (replace(manifest.items[0], **columns), *manifest.items[1:])
        return replace(manifest, items=items).digest

    assert changed(path="/x", file_sha256="1", pixel_sha256="2") == manifest.digest
    for column in ({"label": None}, {"split": None}, {"group": "g"}, {"defect": "d"}):
        assert changed(**column) != manifest.digest
    assert replace(manifest, items=manifest.items[::-1]).digest == manifest.digest
    assert replace(manifest, items=manifest.items[1:]).digest != manifest.digest


def test_a_manifest_is_read_as_it_was_written(nut, tmp_path):
    manifest = build_manifest(nut)
    manifest.write(tmp_path / "items.parquet")
    assert read_manifest(tmp_path / "items.parquet") == manifest
    assert build_manifest(tmp_path / "items.parquet") == manifest
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["items.parquet"]


def test_a_manifest_of_another_key_is_refused(nut, tmp_path):
    replace(build_manifest(nut), key="0123456789ab").write(tmp_path / "items.parquet")
    with pytest.raises(
        ValueError, match=f"0123456789ab and yours is {key_fingerprint()}.*KEY_FILE"
    ):
        read_manifest(tmp_path / "items.parquet")


def test_another_table_is_no_manifest(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="got the columns x"):
        read_manifest(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_text("words")
    with pytest.raises(ValueError, match="expected a manifest"):
        read_manifest(tmp_path / "y.parquet")


def test_masks_follow_their_images(nut):
    manifest = build_manifest(nut)
    test = manifest.where(split="test")
    assert Counter(item.role for item in test.items) == {"image": 3, "mask": 1}
    assert manifest.select("label == 0").items == manifest.where(label=0).items
    assert {item.role for item in manifest.where(label=0).items} == {"image"}
    cracked = manifest.select("defect == 'crack' and path != 'x'")
    assert [cracked.mask_of(item) is not None for item in cracked.images] == [True, False]


def test_an_unknown_column_names_the_known_ones(nut):
    manifest = build_manifest(nut)
    for choose in (lambda: manifest.where(lable=0), lambda: manifest.select("lable == 0")):
        with pytest.raises(ValueError, match="unknown column 'lable'.*label, category"):
            choose()


def test_a_mask_gets_the_group_of_its_image(nut, tmp_path):
    rows = ["path,part", *(f"{p.relative_to(nut)},part{p.stem}" for p in nut.glob("t*/*/*"))]
    (nut / "parts.csv").write_text("\n".join(rows))
    manifest = build_manifest(nut, groups="parts.csv:part")
    assert {item.group for item in manifest.images} == {salted("part0"), salted("part1")}
    mask = item_at(manifest, "0_mask.png")
    assert mask.group == salted("part0")
    assert manifest.skipped == 1


def test_a_series_is_one_item_with_its_salted_patient(tmp_path):
    slices(tmp_path / "a", patient="Miller", study="1.1", series="1.1.1")
    slices(tmp_path / "b", patient="Miller", study="1.2", series="1.2.1")
    slices(tmp_path / "c", patient="", study="1.3", series="1.3.1")
    manifest = build_manifest(tmp_path)
    assert [item.path for item in manifest.images] == [str(tmp_path / name) for name in "abc"]
    assert [item.group for item in manifest.images] == [
        salted("Miller"),
        salted("Miller"),
        salted("1.3"),  # no patient: a study is still not torn
    ]
    assert [item.study for item in manifest.images] == [salted(f"1.{n}") for n in (1, 2, 3)]
    assert {(item.kind, item.modality) for item in manifest.images} == {("dicom", "CT")}
    assert manifest.skipped == 0


def test_two_series_of_one_folder_are_two_items_that_can_be_read(tmp_path):
    slices(tmp_path, series="1.1.1", count=3)
    slices(tmp_path, series="1.1.2", count=2, first=5)
    manifest = build_manifest(tmp_path)
    read = [load_sample(manifest, item).images["image"] for item in manifest.images]
    assert sorted(image.spatial_shape for image in read) == [(2, 4, 6), (3, 4, 6)]
    assert len({item.item for item in manifest.images}) == 2


def test_a_damaged_slice_gives_an_item_of_its_own(tmp_path):
    files = slices(tmp_path)
    files[-1].write_bytes(b"damaged")
    manifest = build_manifest(tmp_path)
    broken = item_at(manifest, files[-1].name)
    with pytest.raises(ReadError, match=f"item {broken.item}: "):
        load_sample(manifest, broken)


def test_the_source_of_the_pixels_is_in_the_modality(tmp_path):
    picture(tmp_path / "a.png")
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4)), tmp_path / "b.nii")
    manifest = build_manifest(tmp_path)
    assert [item.modality for item in manifest.images] == ["PICTURE", "UNKNOWN"]


def test_an_empty_folder_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(NoDataError, match="no image found.*expected DICOM.*found 1 other files"):
        build_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no"):
        build_manifest(tmp_path / "none")


def test_one_file_is_a_manifest_of_one(tmp_path):
    picture(tmp_path / "other.png")
    (item,) = build_manifest(picture(tmp_path / "one.png")).items
    assert (item.path, item.split, item.label) == (str(tmp_path / "one.png"), None, None)


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "a.png")
    monkeypatch.chdir(tmp_path)
    assert build_manifest(type(tmp_path)("set")).items[0].path == str(tmp_path / "set" / "a.png")


def test_a_sample_has_the_pixels_the_label_and_the_mask_of_its_item(nut):
    manifest = build_manifest(nut)
    sample = load_sample(manifest, item_at(manifest, "test/crack/0.png"), hashes=True)
    assert torch.equal(sample.images["image"].pixels, torch.arange(24.0).reshape(1, 4, 6))
    assert sample.label == 1
    assert sample.mask is not None
    assert sample.mask.pixels.nonzero().tolist() == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert sample.mask.pixels.max() == 1
    assert len(sample.images["image"].provenance["pixel_sha256"]) == 64
    normal = load_sample(manifest, item_at(manifest, "test/good/0.png"))
    assert (normal.label, normal.mask) == (0, None)
    assert "pixel_sha256" not in normal.images["image"].provenance


def test_a_nifti_mask_keeps_its_own_grid_in_the_frame_of_the_series(tmp_path):
    root = tmp_path / "ct"
    slices(root / "train/good/a", series="1.1.1")
    slices(root / "test/bleed/b", series="1.1.2")
    marked = np.zeros((6, 4, 3), np.uint8)
    marked[4, 1, 2] = 7  # column 4, row 1, slice 2: at x 2, y 1, z 4 mm (LPS)
    (root / "ground_truth/bleed").mkdir(parents=True)
    affine = np.diag([-0.5, -1, 2, 1])
    nibabel.save(nibabel.Nifti1Image(marked, affine), root / "ground_truth/bleed/b_mask.nii.gz")
    manifest = build_manifest(root)

    sample = load_sample(manifest, item_at(manifest, "test/bleed/b"))

    assert sample.mask is not None
    (index,) = sample.mask.pixels[0].nonzero().double()
    place = sample.mask.affine @ torch.cat([index, torch.ones(1, dtype=torch.float64)])
    assert place.tolist() == pytest.approx([-2, -1, 4, 1])
    image = sample.images["image"]
    voxel = torch.linalg.solve(image.affine, place)[:3].round().long().tolist()
    assert voxel == [2, 1, 4]
    assert image.pixels[0][tuple(voxel)] == 2
    assert sample.mask.pixels.max() == 1


def test_a_png_mask_lies_on_the_grid_of_a_single_slice(tmp_path):
    root = tmp_path / "xr"
    slices(root / "train/good", series="1.1.1", count=1)
    (file,) = slices(root / "test/nodule", series="1.1.2", count=1)
    picture(root / "ground_truth/nodule" / f"{file.stem}_mask.png")
    manifest = build_manifest(root)
    sample = load_sample(manifest, item_at(manifest, file.name))
    assert sample.mask is not None
    assert sample.mask.frame == sample.images["image"].frame == "patient"
    assert torch.equal(sample.mask.affine, sample.images["image"].affine)


def test_a_mask_of_another_size_is_an_error_of_its_item(nut):
    picture(nut / "ground_truth/crack/0_mask.png", np.zeros((6, 4), np.uint8))
    manifest = build_manifest(nut)
    item = item_at(manifest, "test/crack/0.png")
    with pytest.raises(InconsistentGeometryError, match=rf"item {item.item}: .*\(6, 4\).*\(4, 6\)"):
        load_sample(manifest, item)


def test_a_mask_in_another_frame_is_an_error_of_its_item(nut):
    (nut / "ground_truth/crack/0_mask.png").unlink()
    volume = nibabel.Nifti1Image(np.zeros((6, 4, 1), np.uint8), np.eye(4))
    nibabel.save(volume, nut / "ground_truth/crack/0_mask.nii.gz")
    manifest = build_manifest(nut)
    with pytest.raises(InconsistentGeometryError, match="patient frame and the image in the pixel"):
        load_sample(manifest, item_at(manifest, "test/crack/0.png"))


def test_a_truncated_picture_names_its_item_and_no_path(nut):
    path = nut / "test/good/0.png"
    path.write_bytes(path.read_bytes()[:40])
    manifest = build_manifest(nut)
    item = item_at(manifest, "test/good/0.png")
    with pytest.raises(CorruptFileError, match=f"^item {item.item}: ") as error:
        load_sample(manifest, item)
    assert str(nut) not in str(error.value)


def test_a_file_that_went_away_names_its_item_and_no_path(nut):
    manifest = build_manifest(nut)
    item = item_at(manifest, "test/good/0.png")
    (nut / "test/good/0.png").unlink()
    with pytest.raises(ReadError, match=f"^item {item.item}: ") as error:
        load_sample(manifest, item)
    assert str(nut) not in str(error.value)


def test_a_manifest_travels_to_another_process(nut):
    manifest = build_manifest(nut)
    assert manifest.mask_of(item_at(manifest, "test/crack/0.png")) is not None
    assert pickle.loads(pickle.dumps(manifest)) == manifest
