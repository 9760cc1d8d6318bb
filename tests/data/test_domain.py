import json
from dataclasses import replace

import pytest
import torch

from medssl.data.domain import check_domain, check_sample, domain_of, learn_domain
from medssl.data.image import Image, PointCloud, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample


def ct(size=(20, 40, 30), spacing=(5.0, 0.5, 0.7), modality=Modality.CT):
    """An axial volume: d runs to the head, h to the back, w to the left."""
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1
    return Image(
        pixels=torch.zeros(1, *size),
        axes="DHW",
        modality=modality,
        affine=affine,
        frame="patient",
        spacing=spacing,
    )


def picture(height=100, width=80, channels=3):
    return Image(
        pixels=torch.zeros(channels, height, width),
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
    )


def turned(image):
    """The same volume stored with left-right first: axes (w, d, h)."""
    order = [2, 0, 1]
    return replace(
        image,
        pixels=image.pixels.permute(0, *(1 + axis for axis in order)),
        affine=image.affine[:, [*order, 3]],
        spacing=tuple(image.spacing[axis] for axis in order),
    )


def test_the_domain_is_the_range_of_what_was_seen():
    domain = learn_domain([ct(), ct(size=(30, 36, 30), spacing=(2.5, 0.6, 0.7))])
    assert domain == {
        "modality": ["CT"],
        "axes": "DHW",
        "channels": [1],
        "spacing_mm": {"min": [2.5, 0.5, 0.7], "max": [5.0, 0.6, 0.7]},
        "size": {"min": [20, 36, 30], "max": [30, 40, 30]},
    }


def test_a_domain_survives_being_written():
    domain = json.loads(json.dumps(learn_domain([ct()])))
    assert check_domain(ct(), domain) is None


def test_an_image_that_was_seen_lies_inside():
    images = [ct(), ct(size=(9, 9, 9), spacing=(1.0, 1.0, 1.0))]
    domain = learn_domain(images)
    assert [check_domain(image, domain) for image in images] == [None, None]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (ct(modality=Modality.MR), "modality MR, but the model was fitted on CT"),
        (ct(spacing=(10.1, 0.5, 0.7)), "spacing 10.1 x 0.5 x 0.7 mm"),
        (ct(spacing=(5.0, 0.5, 0.34)), "spacing 5 x 0.5 x 0.34 mm"),
        (ct(size=(41, 40, 30)), "size 41 x 40 x 30 pixels"),
        (ct(size=(20, 19, 30)), "size 20 x 19 x 30 pixels"),
        (replace(ct(), spacing=None), "spacing unknown"),
        (replace(ct(), pixels=torch.zeros(2, 20, 40, 30)), "number of channels 2"),
    ],
)
def test_another_kind_of_image_is_refused_with_the_reason(image, reason):
    refusal = check_domain(image, learn_domain([ct()]))
    assert refusal is not None
    assert refusal.startswith(reason)
    assert "the model was fitted on" in refusal


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_spacing_up_to_a_factor_of_two_lies_inside(factor):
    image = ct(spacing=(5.0 * factor, 0.5 * factor, 0.7 * factor))
    assert check_domain(image, learn_domain([ct()])) is None


def test_the_plane_of_acquisition_does_not_matter():
    assert check_domain(turned(ct()), learn_domain([ct()])) is None
    assert learn_domain([turned(ct())]) == learn_domain([ct()])


def test_pictures_have_a_size_and_no_spacing():
    domain = learn_domain([picture(), picture(channels=1)])
    assert domain["spacing_mm"] is None
    assert domain["channels"] == [1, 3]
    assert check_domain(picture(200, 160), domain) is None
    assert "size 201 x 80" in str(check_domain(picture(201, 80), domain))
    assert check_domain(ct(), domain) == "modality CT, but the model was fitted on PICTURE"


def test_height_and_width_are_not_mixed_up():
    domain = learn_domain([picture(100, 10)])
    assert check_domain(picture(100, 10), domain) is None
    assert check_domain(picture(10, 100), domain) is not None


def test_a_volume_is_no_picture():
    domain = learn_domain([replace(ct(), modality=Modality.PICTURE)])
    assert check_domain(picture(channels=1), domain) == "axes HW, but the model was fitted on DHW"


@pytest.mark.parametrize("images", [[], [ct(), picture()]])
def test_a_domain_needs_images_of_one_kind(images):
    with pytest.raises(ValueError, match="one kind of axes"):
        learn_domain(images)


def cloud(scale=1.0, count=100, unit="mm"):
    points = torch.zeros(count, 3)
    points[0], points[1] = torch.tensor([scale, 0, 0]), torch.tensor([-scale, 0, 0])
    return Sample(item="a", points=PointCloud(points=points, unit=unit))


def xyz(height=100, width=80, units="mm"):
    return replace(
        picture(height, width), modality=Modality.DEPTH, channels=("x", "y", "z"), units=units
    )


def of(**images):
    return Sample(item="a", images=images)


def test_the_domain_of_clouds_is_their_unit_extent_and_number_of_points():
    domain = domain_of([cloud(), cloud(scale=2.0, count=300)])
    assert domain == {
        "axes": "points",
        "unit": ["mm"],
        "extent": {"min": [2.0], "max": [4.0]},
        "num_points": {"min": [100.0], "max": [300.0]},
    }


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (cloud(), None),
        (cloud(scale=0.5, count=200), None),
        (cloud(unit="m"), "unit m, but the model was fitted on mm"),
        (cloud(scale=2.1), "extent 4.2, but the model was fitted on 2 to 2"),
        (cloud(count=49), "number of points 49, but the model was fitted on 100 to 100"),
        (of(image=picture()), "an image with axes HW, but the model was fitted on free point"),
    ],
)
def test_clouds_beyond_the_domain_are_named_with_what_is_unlike(sample, reason):
    found = check_sample(sample, domain_of([cloud()]))
    assert found is None if reason is None else found.startswith(reason)


def test_a_turn_does_not_change_the_extent():
    turned_points = cloud().points.points[:, [2, 0, 1]] @ torch.linalg.qr(torch.randn(3, 3))[0]
    domain = domain_of([Sample(item="a", points=PointCloud(points=turned_points, unit="mm"))])
    assert domain["extent"]["min"] == pytest.approx([2.0], abs=1e-5)


def test_a_cloud_is_refused_by_a_model_of_pictures():
    found = check_sample(cloud(), domain_of([of(image=picture())]))
    assert found == "a free point cloud, but the model was fitted on images with axes HW"


def test_pictures_with_xyz_are_checked_in_both_roles_and_each_alone():
    domain = domain_of([of(image=picture(100, 80), xyz=xyz(100, 80))])
    assert domain["modality"] == ["PICTURE"]
    assert domain["xyz"]["units"] == ["mm"]
    assert check_sample(of(image=picture(), xyz=xyz()), domain) is None
    assert check_sample(of(image=picture()), domain) is None
    assert check_sample(of(image=xyz()), domain) is None
    assert "unit m," in str(check_sample(of(image=picture(), xyz=xyz(units="m")), domain))
    assert "unit m," in str(check_sample(of(image=xyz(units="m")), domain))
    assert "size 300 x 80" in str(check_sample(of(image=picture(300, 80), xyz=xyz()), domain))


def test_xyz_without_pictures_is_a_domain_of_its_own():
    domain = domain_of([of(image=xyz())])
    assert domain == learn_domain([xyz()])
    assert check_sample(of(image=xyz()), domain) is None
    assert "modality PICTURE" in str(check_sample(of(image=picture()), domain))


def test_clouds_and_pictures_have_no_common_domain():
    with pytest.raises(ValueError, match="of free clouds or of images, got both"):
        domain_of([cloud(), of(image=picture())])
