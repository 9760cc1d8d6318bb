"""Archives and DICOMDIR give the series that the plain folder gives."""

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pydicom
import pytest
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid

from medssl.data.manifest import build_manifest, load_sample
from medssl.data.readers import archive
from medssl.data.readers.any import read_image, sniff
from medssl.data.readers.errors import CorruptFileError, UnsupportedFormatError


@pytest.fixture
def series(tmp_path, write_ct_series):
    expected = write_ct_series(tmp_path / "plain").astype(int) - 1024  # stored values to HU
    return expected, sorted((tmp_path / "plain").iterdir())


def zipped(files, target, names=None):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for number, file in enumerate(files):
            packed.write(file, names[number] if names else f"study/{file.name}")


def tarred(files, target, mode="w:gz"):
    with tarfile.open(target, mode) as packed:
        for file in files:
            packed.add(file, f"study/{file.name}")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_read_as_its_folder(series, tmp_path, kind):
    expected, files = series
    target = tmp_path / "in" / "archive"  # the content decides, not the suffix
    target.parent.mkdir()
    if kind == "zip":
        zipped(files, target)
    else:
        tarred(files, target, "w" if kind == "tar" else "w:gz")
    assert sniff(target) == "dicom"
    image = read_image(target, hashes=True)
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    plain = read_image(tmp_path / "plain", hashes=True)
    assert image.provenance == plain.provenance
    manifest = build_manifest(target.parent)
    sample = load_sample(manifest, manifest.images[0])
    np.testing.assert_array_equal(sample.images["image"].pixels[0].numpy(), expected)


def test_names_that_lead_out_of_the_archive_are_never_used(series, tmp_path):
    expected, files = series
    names = ["../../out", "/etc/out", "..\\out", "a/../../out2", "x", "y"][: len(files)]
    zipped(files, tmp_path / "evil.zip", names)
    before = set(tmp_path.rglob("*")) | set(tmp_path.parent.iterdir())
    image = read_image(tmp_path / "evil.zip")
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    assert set(tmp_path.rglob("*")) | set(tmp_path.parent.iterdir()) == before


def test_links_in_a_tar_are_not_followed(series, tmp_path):
    expected, files = series
    with tarfile.open(tmp_path / "links.tar", "w") as packed:
        for file in files:
            packed.add(file, file.name)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)
    np.testing.assert_array_equal(read_image(tmp_path / "links.tar").pixels[0].numpy(), expected)


def test_a_bomb_is_refused_before_it_fills_the_disk(series, tmp_path, monkeypatch):
    _, files = series
    monkeypatch.setattr(archive, "_FREE_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(files[0], "a")
        packed.writestr("zeros", bytes(50 << 20))
    with pytest.raises(CorruptFileError, match="unpacks to far more"):
        read_image(tmp_path / "bomb.zip")


def test_too_many_members_are_refused(series, tmp_path, monkeypatch):
    _, files = series
    monkeypatch.setattr(archive, "_MAX_MEMBERS", 3)
    zipped(files, tmp_path / "many.zip")
    with pytest.raises(CorruptFileError, match="over 3 files"):
        read_image(tmp_path / "many.zip")


def test_an_archive_that_is_cut_off_is_damaged(series, tmp_path):
    _, files = series
    tarred(files, tmp_path / "whole", "w")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match="archive is damaged"):
        read_image(tmp_path / "cut.tar")


def test_an_encrypted_zip_is_refused_by_name(series, tmp_path):
    _, files = series
    zipped(files, tmp_path / "a.zip")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for at in range(len(content) - 4):  # set the encryption bit of every directory entry
        if content[at : at + 4] == b"PK\x01\x02":
            content[at + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match="encrypted"):
        list(archive.members(tmp_path / "locked.zip"))


def test_a_gzipped_slice_is_read(series, tmp_path):
    expected, files = series
    for file in files:
        with gzip.open(tmp_path / f"{file.name}.gz", "wb") as packed:
            packed.write(file.read_bytes())
    folder = tmp_path / "gz"
    folder.mkdir()
    for file in tmp_path.glob("*.gz"):
        file.rename(folder / file.name)
    np.testing.assert_array_equal(read_image(folder).pixels[0].numpy(), expected)


@pytest.fixture
def medium(series, tmp_path):
    expected, files = series
    file_set = FileSet()
    for number, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.StudyDate, dataset.StudyTime = "A", "20200101", "120000"
        dataset.StudyID, dataset.SeriesNumber, dataset.InstanceNumber = "1", 1, number + 1
        dataset.file_meta.ImplementationClassUID = generate_uid()
        file_set.add(dataset)
    file_set.write(tmp_path / "medium")
    return expected, tmp_path / "medium"


def test_a_dicomdir_gives_what_it_lists(medium):
    expected, folder = medium
    image = read_image(folder / "DICOMDIR")
    np.testing.assert_array_equal(image.pixels[0].numpy(), expected)
    assert len(build_manifest(folder / "DICOMDIR").images) == 1
    np.testing.assert_array_equal(read_image(folder).pixels[0].numpy(), expected)


def test_a_dicomdir_that_lists_what_is_gone_says_how_much(medium):
    _, folder = medium
    one = next(file for file in folder.rglob("*") if file.is_file() and file.name != "DICOMDIR")
    one.unlink()
    with pytest.raises(CorruptFileError, match="1 of the 6 files"):
        read_image(folder / "DICOMDIR")


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_a_dicomdir_does_not_lead_out_of_its_folder(medium, tmp_path):
    _, folder = medium
    dataset = pydicom.dcmread(folder / "DICOMDIR")
    for record in dataset.DirectoryRecordSequence:
        if "ReferencedFileID" in record:
            record.ReferencedFileID = ["..", "plain", next((tmp_path / "plain").iterdir()).name]
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    (folder / "DICOMDIR").write_bytes(buffer.getvalue())
    with pytest.raises(CorruptFileError, match="6 of the 6 files"):
        read_image(folder / "DICOMDIR")
