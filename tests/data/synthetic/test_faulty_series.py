"""The faults are really there, as pydicom alone sees them."""

import numpy as np
import pydicom
import pytest
from pydicom.errors import InvalidDicomError

from medssl.data.readers.any import sniff
from medssl.data.synthetic.faulty_series import FAULTS, SPACING, true_hu, write_series
from medssl.data.synthetic.sample_files import sample_files


def read(folder):
    """Datasets by position along z."""
    found = [pydicom.dcmread(file, force=True) for file in folder.iterdir()]
    return sorted(found, key=lambda dataset: float(dataset.ImagePositionPatient[2]))


def hu(dataset):
    return dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)


@pytest.mark.parametrize(
    "fault", ["clean", "signed_pixels", "rescale_per_slice", "monochrome1", "big_endian"]
)
def test_the_voxels_are_the_true_ones(tmp_path, fault):
    write_series(tmp_path, fault)
    volume = np.stack([hu(dataset) for dataset in read(tmp_path)])
    np.testing.assert_allclose(volume, true_hu(), atol=1e-3)


def test_positions_say_what_is_missing_uneven_and_tilted(tmp_path):
    def positions(fault):
        write_series(tmp_path / fault, fault)
        return np.array([d.ImagePositionPatient for d in read(tmp_path / fault)], dtype=float)

    assert np.diff(positions("clean")[:, 2]).tolist() == [SPACING[0]] * 7
    assert np.diff(positions("one_slice_missing")[:, 2]).tolist() == [2, 2, 4, 2, 2, 2]
    assert np.diff(positions("uneven_spacing")[:, 2]).tolist() == [2, 2, 2.5, 1.5, 2, 2, 2]
    assert np.diff(positions("one_slice_copied")[:, 2]).min() == 0
    shift = np.diff(positions("gantry_tilt")[:, 1])
    np.testing.assert_allclose(shift, 2 * np.tan(np.pi / 12), atol=1e-6)


def test_two_series_and_a_scout_share_a_folder(tmp_path):
    write_series(tmp_path / "two", "two_series")
    assert len({d.SeriesInstanceUID for d in read(tmp_path / "two")}) == 2
    write_series(tmp_path / "scout", "localizer_of_the_same_series")
    kinds = [d.ImageType[2] for d in read(tmp_path / "scout")]
    assert (kinds.count("LOCALIZER"), len(kinds)) == (1, 9)
    assert len({d.SeriesInstanceUID for d in read(tmp_path / "scout")}) == 1


def test_files_are_cut_and_foreign_where_they_should_be(tmp_path):
    write_series(tmp_path / "cut", "one_truncated_file")
    short = [d for d in read(tmp_path / "cut") if len(d.PixelData) < 240]
    assert len(short) == 1
    write_series(tmp_path / "other", "other_files")
    with pytest.raises(InvalidDicomError):
        pydicom.dcmread(tmp_path / "other" / "DICOMDIR")


def test_an_enhanced_object_has_its_frames_from_the_top(tmp_path):
    write_series(tmp_path, "enhanced_multi_frame")
    (file,) = tmp_path.iterdir()
    dataset = pydicom.dcmread(file)
    groups = dataset.PerFrameFunctionalGroupsSequence
    z = [float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups]
    assert z == sorted(z, reverse=True)
    np.testing.assert_array_equal(dataset.pixel_array[::-1] - 1024.0, true_hu())


def test_equal_arguments_give_equal_files(tmp_path):
    for folder in ("a", "b"):
        write_series(tmp_path / folder, "one_slice_taken_again")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_unknown_fault_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="gantry_tilt"):
        write_series(tmp_path, "broken")
    assert len(FAULTS) > 20


def test_there_is_a_sample_of_every_kind(tmp_path):
    kinds = set()
    for name, content in sample_files().items():
        (tmp_path / name).write_bytes(content)
        kinds.add(sniff(tmp_path / name))
    assert kinds == {"dicom", "nifti", "picture", "points"}
