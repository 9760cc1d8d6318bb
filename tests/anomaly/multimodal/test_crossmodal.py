from dataclasses import replace

import pytest
import torch
from rgbd_scenes import Heights, MeanColor, color_image, noise, scene, without, xyz_image
from torch import nn

from anomaly.base import NormalData
from anomaly.multimodal.crossmodal import CrossmodalMapping, Mappings
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from anomaly.selection import Selection
from medssl.data.sample import Sample, collate
from medssl.training import TrainingPlan

PLAN = TrainingPlan(total_samples=1200, batch_size=4, learning_rate=3e-3, weight_decay=(0.0, 0.0))


class Slope(nn.Module):
    """Describes a point by whether it is high or low, each told eight times."""

    embedding_dim = 16

    def __init__(self) -> None:
        super().__init__()

    def describe(self, points: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
        high = (points[:, 2] > 100).float()
        return torch.stack([high, 1 - high], dim=1).repeat(1, 8)


def of(descriptor: nn.Module | None = None, **arguments: object) -> CrossmodalMapping:
    return CrossmodalMapping(
        color=ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)),
        geometry=GeometryFeatures(grid=(8, 6), descriptor=descriptor),
        **({"sigma": 0.0, "plan": PLAN} | arguments),
    )


def two_sided(seed: int, swapped: tuple[int, int] | None = None) -> Sample:
    """Blocks of 3 x 3 cells, high and red or low and green; in a swapped cell high is green.

    Either alone is normal everywhere.
    """
    high = (noise(3, 2, seed=seed) > 0).repeat_interleave(12, 0).repeat_interleave(12, 1)[:32]
    red = high.clone()
    if swapped is not None:
        block = tuple(slice(12 * (i // 3), 12 * (i // 3) + 12) for i in swapped)
        red[block] = ~red[block]
    color = torch.stack([red.float(), (~red).float(), torch.full((32, 24), 0.1)])
    images = {"image": color_image(color), "xyz": xyz_image(torch.where(high, 102.0, 98.0))}
    return Sample(item=f"two{seed}", images=images, label=0)


@pytest.fixture(scope="module")
def detector() -> CrossmodalMapping:
    return of(Slope()).fit(NormalData([two_sided(i) for i in range(12)]))


def linear(to_color: torch.Tensor, to_geometry: torch.Tensor) -> Mappings:
    """Mappings that are given matrices."""
    made = Mappings(len(to_color), len(to_geometry))
    for name, matrix in (("to_color", to_color), ("to_geometry", to_geometry)):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
        layer.weight.data = matrix
        setattr(made, name, nn.Sequential(layer))
    return made


def test_the_loss_is_one_minus_the_cosine_both_ways():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    mappings = linear(to_color=turn, to_geometry=torch.eye(2))
    same = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    views = {
        "color": 5 * same[None, None],  # length must not matter
        "geometry": same[None, None],
        "valid": torch.ones(1, 1, 2, dtype=torch.bool),
    }
    found = mappings.loss(views)
    assert found["color"].item() == pytest.approx(1)  # a right angle
    assert found["geometry"].item() == pytest.approx(0, abs=1e-6)
    assert found["loss"].item() == pytest.approx(1)


def test_cells_that_are_not_valid_do_not_train():
    mappings = linear(torch.eye(2), torch.eye(2))
    views = {
        "color": torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]),
        "geometry": torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]),
        "valid": torch.tensor([[[True, False]]]),
    }
    assert mappings.loss(views)["loss"].item() == pytest.approx(0, abs=1e-6)
    views["valid"] = torch.tensor([[[True, True]]])
    assert mappings.loss(views)["loss"].item() == pytest.approx(1)  # the mean of 0 and 2
    views["valid"] = torch.tensor([[[False, False]]])
    assert mappings.loss(views)["loss"].item() == 0


def test_distances_are_those_of_vectors_of_length_one():
    mappings = linear(to_color=torch.eye(2), to_geometry=-torch.eye(2))
    color, geometry = torch.tensor([[0.0, 7.0]]), torch.tensor([[2.0, 0.0]])
    found = mappings.distances(color, geometry)
    torch.testing.assert_close(found[0], torch.tensor([2**0.5]))
    torch.testing.assert_close(found[1], torch.tensor([2**0.5]))
    torch.testing.assert_close(mappings.distances(color, color)[1], torch.tensor([2.0]))


def test_the_networks_see_features_of_mean_square_one():
    fitted = of(Heights(), plan=replace(PLAN, total_samples=4))
    samples = [scene(i) for i in range(3)]
    fitted.fit(NormalData(samples))
    batch = collate(samples)
    for features, scale in zip(
        (fitted.color, fitted.geometry), fitted.trainable.scales, strict=True
    ):
        found = features(batch)
        assert scale.item() == pytest.approx(found.features.square().mean().sqrt().item())


def test_the_map_is_the_product_of_both_distances_and_the_score_its_largest(detector):
    batch = collate([two_sided(50), two_sided(51, swapped=(4, 1))])
    color, geometry = detector.color(batch).features, detector.geometry(batch).features
    mappings, scales = detector.trainable, detector.trainable.scales
    product = torch.ones(2, 8, 6)
    for own, given in (
        (color, mappings.to_color(geometry / scales[1])),
        (geometry, mappings.to_geometry(color / scales[0])),
    ):
        cosine = torch.cosine_similarity(given, own, dim=3).detach()
        product *= (2 - 2 * cosine).clamp_min(0).sqrt()  # of two vectors of length 1
    found = detector.predict(batch)
    for corner in (0, -1):  # beyond the middle of one cell only
        torch.testing.assert_close(
            found.maps["image"][:, corner, corner],
            product[:, corner, corner],
            rtol=1e-2,
            atol=1e-3,
        )
    torch.testing.assert_close(found.score, found.maps["image"].flatten(1).amax(1))


@pytest.mark.parametrize("cell", [(1, 4), (4, 1), (7, 4)])
def test_color_that_does_not_belong_to_its_geometry_is_found(detector, cell):
    """Each of the two is normal by itself: no bank of a single modality could tell."""
    batch = collate([two_sided(50), two_sided(50, swapped=cell)])
    normal, found = detector.predict(batch).maps["image"]
    block = tuple(slice(12 * (i // 3) + 2, 12 * (i // 3) + 10) for i in cell)
    assert normal[block].mean() < 0.1
    assert found[block].mean() > 1


@pytest.mark.parametrize("gone", ["color", "geometry"])
def test_an_item_without_a_modality_is_refused_by_its_name(detector, gone):
    with pytest.raises(ValueError, match="needs both.* missing in two51. DoublePatchCore"):
        detector.predict(collate([without(two_sided(51), gone)]))


def test_normal_items_without_a_modality_are_refused():
    samples = [without(scene(i), "geometry") for i in range(4)]
    with pytest.raises(ValueError, match="none of the 4 normal items has organized points"):
        of().fit(NormalData(samples))


def test_where_one_modality_was_not_measured_the_map_is_nan(detector):
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:9, :10] = False
    item = two_sided(50)
    item = item.with_image(replace(item.images["xyz"], valid=valid), "xyz")
    found = detector.predict(collate([item]))
    assert found.maps["image"][0].isnan().equal(~valid)
    assert found.score.isfinite().all()


@pytest.mark.parametrize("rubbish", [torch.nan, 1e6])
def test_invalid_pixels_influence_no_score(detector, rubbish):
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:13, :9] = False
    item, spoilt = two_sided(50), two_sided(50)
    for role, image in item.images.items():
        item = item.with_image(replace(image, valid=valid), role)
        pixels = torch.where(valid, image.pixels, rubbish)
        spoilt = spoilt.with_image(replace(image, valid=valid, pixels=pixels), role)
    clean, found = (detector.predict(collate([one])) for one in (item, spoilt))
    assert found.score.equal(clean.score)


def test_an_item_is_described_once_however_long_the_training():
    descriptor = Heights()
    fitted = of(descriptor, plan=replace(PLAN, total_samples=80))
    fitted.fit(NormalData([scene(i) for i in range(4)]))
    assert len(descriptor.shown) == 4


def test_checkpoints_can_be_chosen_without_labels():
    fitted = of(plan=replace(PLAN, total_samples=40), selection=Selection(checkpoints=2))
    fitted.fit(NormalData([scene(i) for i in range(6)]))
    assert fitted.notes["num_select"] >= 1
    assert fitted.predict(collate([scene(50)])).score.isfinite().all()


def test_the_score_says_that_it_is_bounded():
    assert not CrossmodalMapping.unbounded
