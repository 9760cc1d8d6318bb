"""Features of groups of points do not depend on the order, the place or the unit of a cloud."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from anomaly.base import NormalData
from anomaly.examples import relief_pictures
from anomaly.multimodal.modalities import GeometryFeatures
from medssl.data.geometry_steps import Geometry
from medssl.data.preprocess import Preprocessing
from medssl.data.synthetic.point_part import point_part
from medssl.models.folder import load_encoder, save_model, selftest_noise
from medssl.models.point_transformer import PointTransformer, cut, unit_sphere

TINY = {"num_groups": 12, "group_size": 8, "width": 24, "depth": 3, "num_heads": 2}


def encoder(**changes) -> PointTransformer:
    """With weights large enough that every part of the network has a say."""
    torch.manual_seed(0)
    network = PointTransformer(**{**TINY, "layers": (0, 2), "describe_groups": 20, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return network.eval()


def clouds(*seeds: int, count: int = 150) -> Tensor:
    """Gears in mm, (B, P, 3)."""
    made = [point_part("gear", seed, count=count).points for seed in seeds]
    return torch.stack([cloud.points for cloud in made if cloud is not None])


def test_the_order_of_the_points_changes_no_group():
    points = clouds(0, 1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    features, centers = encoder().groups(points)
    shuffled, same = encoder().groups(points[:, order])
    assert torch.equal(same, centers)
    torch.testing.assert_close(shuffled, features, atol=1e-4, rtol=0)
    normals = torch.zeros_like(points[0])
    described = encoder().describe(points[0], normals)
    again = encoder().describe(points[0, order], normals)
    torch.testing.assert_close(again, described[order], atol=1e-4, rtol=0)


@pytest.mark.parametrize("factor", [0.001, 25.4])
def test_neither_unit_nor_place_changes_the_features(factor: float):
    points = clouds(0).double()
    moved = factor * (points + torch.tensor([70.0, -300.0, 1000.0]))
    features, centers = encoder().groups(points)
    again, there = encoder().groups(moved)
    torch.testing.assert_close(again, features, atol=1e-4, rtol=0)
    torch.testing.assert_close(there / factor - there.new_tensor([70, -300, 1000]), centers)
    described = [encoder().describe(cloud[0], cloud[0]) for cloud in (points, moved)]
    torch.testing.assert_close(described[1], described[0], atol=1e-4, rtol=0)


def test_one_axis_stretched_alone_does_change_the_features():
    points = clouds(0)
    stretched = points * torch.tensor([1.0, 1.0, 1.5])
    assert (encoder()(stretched) - encoder()(points)).abs().max() > 0.01


def test_a_cloud_fills_the_unit_sphere_around_its_centroid():
    cloud = unit_sphere(clouds(0, 1) + 500)
    assert cloud.dtype == torch.float32
    torch.testing.assert_close(cloud.mean(1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(cloud.norm(dim=-1).amax(1), torch.ones(2))


def test_a_group_holds_the_nearest_points_relative_to_its_center():
    cloud = unit_sphere(clouds(0, 1))
    patches, centers, index = cut(cloud, 12, 8)
    for item in range(2):
        assert torch.equal(cloud[item, index[item]], centers[item])
        apart = torch.cdist(centers[item].double(), cloud[item].double())
        nearest = apart.topk(8, largest=False).indices
        wanted = cloud[item][nearest] - centers[item][:, None]  # both ascending in distance
        torch.testing.assert_close(patches[item], wanted)
    assert len(index[0].unique()) == 12


def test_features_are_the_normalized_tokens_of_the_layers_side_by_side():
    network, points = encoder(layers=(2, 0)), clouds(0, 1)
    deep, shallow = network.feature_maps(points, ["blocks.2", "blocks.0"])  # (B, width, G)
    assert deep.shape == (2, 24, 12)
    wanted = torch.cat([network.network.norm(each.mT) for each in (deep, shallow)], dim=-1)
    features, _ = network.groups(points)
    torch.testing.assert_close(features, wanted)
    torch.testing.assert_close(network(points), wanted.mean(1))
    embedding, grid = network.embed_with_map(points)
    torch.testing.assert_close(grid.mT, features)
    torch.testing.assert_close(embedding, network(points))
    torch.testing.assert_close(
        network.tokens(*network.grouped(points)), network.network.norm(deep.mT)
    )


def test_a_point_is_described_by_the_three_nearest_centers_weighted_by_the_squared_distance():
    network = encoder(describe_groups=12, describe_size=8)
    points = clouds(0)
    features, centers = network.groups(points)
    apart = torch.cdist(points[0].double(), centers[0].double())  # (P, G)
    distance, nearest = apart.topk(3, largest=False)
    weight = 1 / distance.square()
    weight[distance[:, 0] == 0] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    weight /= weight.sum(1, keepdim=True)
    wanted = (weight[..., None] * features[0, nearest].double()).sum(1)
    described = network.describe(points[0], torch.zeros_like(points[0]))
    assert described.shape == (150, network.embedding_dim) == (150, 48)
    torch.testing.assert_close(described.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "points",
    [
        clouds(0)[0, :5],  # fewer than groups, and than a group holds
        clouds(0)[0, :1],
        clouds(0)[0, :1].expand(30, 3),
        clouds(0)[0, :15].repeat(4, 1),
        torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]) + 1e5,
    ],
    ids=["few", "one", "one place", "duplicates", "line far away"],
)
def test_every_point_is_described_also_in_a_degenerate_cloud(points: Tensor):
    described = encoder().describe(points, torch.zeros_like(points))
    assert described.shape == (len(points), 48)
    assert described.isfinite().all()


def test_duplicates_are_described_alike():
    points = clouds(0)[0, :15].repeat(4, 1)
    described = encoder().describe(points, points)
    torch.testing.assert_close(described[:15], described[-15:])


def test_a_token_tells_a_large_patch_from_a_small_one_and_where_it_lies():
    network = encoder()
    patches, centers = network.grouped(clouds(0))
    tokens = network.tokens(patches, centers)
    assert (network.tokens(patches / 2, centers) - tokens).abs().max() > 0.05
    assert (network.tokens(patches, centers.flip(1)) - tokens).abs().max() > 0.05


def test_the_order_of_the_points_in_a_patch_is_nothing_and_their_places_are_all():
    network = encoder().network.patch_embed
    patches, _ = encoder().grouped(clouds(0))
    torch.testing.assert_close(network(patches.flip(2)), network(patches))
    assert (network(patches.flip(3)) - network(patches)).abs().max() > 0.05


def test_a_cloud_does_not_depend_on_the_rest_of_the_batch_even_in_training():
    network = encoder(drop_path=0.0).train()
    together = network(clouds(0, 1, 2))
    torch.testing.assert_close(network(clouds(1))[0], together[1], atol=1e-5, rtol=1e-5)


def test_a_saved_encoder_describes_as_before_and_knows_its_preprocessing(tmp_path: Path):
    network, points = encoder(), clouds(0)[0]
    prepared = Preprocessing(geometry=Geometry(plane_distance=2.0))
    save_model(
        tmp_path / "encoder",
        network,
        kind="encoder",
        preprocessing=prepared,
        domain={},
        card="",
        noise=selftest_noise(network.selftest_shape(())),
    )
    loaded = load_encoder(tmp_path / "encoder")
    assert isinstance(loaded, PointTransformer)
    assert loaded.preprocessing == prepared
    assert torch.equal(loaded.describe(points, points), network.describe(points, points))


def test_it_takes_the_place_of_fpfh_beside_a_picture():
    samples = relief_pictures(2)
    network = encoder()
    geometry = GeometryFeatures(grid=(8, 6), max_points=300, descriptor=network)
    normal = NormalData(samples)
    found = geometry.fit(normal)(next(iter(normal.batches())))
    assert found.features.shape == (2, 8, 6, 48)
    assert found.features[found.valid].std(0).min() > 1e-3
    assert not network.training


def test_what_cannot_be_asked_for_is_refused():
    with pytest.raises(ValueError, match=r"layers must number .* of 3 blocks from 0, got \[3\]"):
        encoder(layers=(3,))
    with pytest.raises(ValueError, match="at least 1, got 0 of 8"):
        encoder(num_groups=0)
    with pytest.raises(ValueError, match=r"at least one point, got \(1, 0, 3\)"):
        encoder().describe(torch.empty(0, 3), torch.empty(0, 3))
    points = clouds(0)
    points[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="must be finite; leave out"):
        encoder().groups(points)
