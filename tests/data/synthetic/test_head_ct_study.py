import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from medssl.data.synthetic.head_ct import head_ct
from medssl.data.synthetic.head_ct_study import _syntax, write_head_ct_study


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("study") / "phantom"
    write_head_ct_study(root, train=range(15, 19), test_normal=[40, 41], test_lesion=[1002, 1003])
    return root


def test_cases_lie_where_mvtec_ad_has_them(root):
    folders = {file.parent.relative_to(root).as_posix() for file in root.rglob("*.dcm")}
    assert folders == {
        *(f"train/good/case_{seed:05d}" for seed in range(15, 19)),
        "test/good/case_00040",
        "test/good/case_00041",
        "test/lesion/case_01002",
        "test/lesion/case_01003",
    }
    masks = {file.relative_to(root).as_posix() for file in root.rglob("*.nii.gz")}
    assert masks == {f"ground_truth/lesion/case_0100{n}_mask.nii.gz" for n in (2, 3)}


def test_masks_are_exact_and_lie_on_their_series_grid(root):
    phantom = head_ct(1002, lesion=True)
    nifti = nibabel.load(root / "ground_truth/lesion/case_01002_mask.nii.gz")
    voxels = np.asarray(nifti.dataobj)  # (i, j, k) = (w, h, d)
    assert np.array_equal(voxels.T, phantom.mask.pixels[0].numpy())
    assert 0 < voxels.sum() < voxels.size / 10
    index = np.argwhere(voxels)[0]
    first = pydicom.dcmread(next((root / "test/lesion/case_01002").iterdir()))
    w, h, d = (int(value) for value in index)
    ours = phantom.image.affine.numpy() @ (d, h, w, 1)
    assert np.allclose(nifti.affine @ (*index, 1), ours, atol=1e-3)
    assert (first.Rows, first.Columns) == voxels.shape[1::-1]


def test_the_series_of_a_seed_holds_the_phantom_of_that_seed(root):
    for place, seed, lesion in (("train/good", 16, False), ("test/lesion", 1003, True)):
        hu = head_ct(seed, lesion=lesion).image.pixels[0].numpy()
        for file in (root / place / f"case_{seed:05d}").iterdir():
            dataset = pydicom.dcmread(file)
            values = dataset.pixel_array + float(dataset.RescaleIntercept)
            assert np.array_equal(values, hu[dataset.InstanceNumber - 1])


def test_one_series_in_three_is_compressed(root):
    chosen = [_syntax(seed) for seed in range(10_000, 10_200)]
    assert chosen.count("uncompressed") / 200 == pytest.approx(2 / 3, abs=0.01)
    assert chosen.count("jpeg_ls") > chosen.count("jpeg_2000") > 0
    written = {
        pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID
        for file in root.rglob("*.dcm")
    }
    assert written == {ExplicitVRLittleEndian, JPEGLSLossless, JPEG2000Lossless}


def test_no_two_cases_share_a_patient(root):
    patients = {
        (file.parent.name, pydicom.dcmread(file, stop_before_pixels=True).PatientID)
        for file in root.rglob("*.dcm")
    }
    assert len(patients) == len({patient for _, patient in patients}) == 8


def test_each_case_is_told_once(tmp_path):
    told = []
    write_head_ct_study(
        tmp_path, train=[1], test_normal=[2], test_lesion=[3], written=lambda: told.append(1)
    )
    assert len(told) == 3


def test_a_head_on_both_sides_of_the_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="may be used once"):
        write_head_ct_study(tmp_path, train=[1, 2], test_normal=[3], test_lesion=[2])
    assert not list(tmp_path.iterdir())
