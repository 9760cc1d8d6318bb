import dataclasses

import pytest
import torch

from medssl.data.image import Image, PointCloud, pixel_affine
from medssl.data.modality import Modality, from_dicom


def picture(**changes):
    values = {
        "pixels": torch.zeros(1, 4, 5),
        "axes": "HW",
        "modality": Modality.PICTURE,
        "affine": pixel_affine(),
        "frame": "pixel",
    }
    return Image(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels": torch.zeros(4, 5)}, r"got \(4, 5\); add the channel axis"),
        ({"axes": "WH"}, "axes must be one of HW, DHW, THW, TDHW"),
        ({"pixels": torch.zeros(1, 4, 5, dtype=torch.uint8)}, "must be float32"),
        ({"affine": torch.eye(4)}, r"\(4, 4\) float64"),
        ({"spacing": (1.0, 1.0, 1.0)}, "got 3 for 2 axes"),
        ({"valid": torch.ones(5, 4, dtype=torch.bool)}, r"spatial shape \(4, 5\)"),
        ({"times_s": (0.0,)}, "T axis"),
        ({"axes": "THW", "pixels": torch.zeros(1, 2, 4, 5)}, "T axis"),
    ],
)
def test_a_record_refuses_what_it_cannot_mean(changes, message):
    with pytest.raises(ValueError, match=message):
        picture(**changes)


def test_spatial_shape_leaves_out_channels_and_time():
    cine = picture(pixels=torch.zeros(3, 2, 4, 5), axes="THW", times_s=(0.0, 0.1))
    assert cine.spatial_shape == (4, 5)
    volume = picture(pixels=torch.zeros(1, 7, 4, 5), axes="DHW")
    assert volume.spatial_shape == (7, 4, 5)


def test_records_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        picture().axes = "DHW"


def test_a_cloud_needs_one_normal_per_point():
    with pytest.raises(ValueError, match=r"normals must be \(5, 3\), got \(4, 3\)"):
        PointCloud(points=torch.zeros(5, 3), unit="mm", normals=torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("code", "modality"), [("CT", Modality.CT), ("DX", Modality.XR), ("OCT", Modality.OTHER)]
)
def test_dicom_codes_become_modalities(code, modality):
    assert from_dicom(code) is modality
