"""PointBanks against distances taken by brute force, and what each descriptor promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from anomaly.base import NormalData
from anomaly.examples import bumpy_clouds
from anomaly.points.descriptors import Color, LocalShape, Place, RegisteredPlace
from anomaly.points.point_banks import PointBanks
from medssl.data.image import PointCloud
from medssl.data.sample import Sample, collate
from medssl.data.synthetic.point_part import point_part
from medssl.metrics import auroc
from medssl.models.folder import build, describe
from medssl.models.registration import even_rotations


def cloud_of(points: Tensor, colors: Tensor | None = None, valid: Tensor | None = None) -> Sample:
    cloud = PointCloud(points=points, unit="mm", colors=colors, valid=valid)
    return Sample(item="one", points=cloud)


def moved(sample: Sample, turn: Tensor, shift: float = 0.0, factor: float = 1.0) -> Sample:
    cloud = sample.points
    assert cloud is not None
    points = (factor * cloud.points.double() @ turn.T + shift).float()
    return replace(sample, points=replace(cloud, points=points))


def scored(detector: PointBanks, *samples: Sample) -> tuple[Tensor, list[Tensor]]:
    found = detector.predict(collate(list(samples)))
    maps = found.maps["points"]
    assert isinstance(maps, list)
    return found.score, maps


def random_clouds(count: int, size: int = 30) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        cloud_of(
            10 * torch.randn(size, 3, generator=generator), torch.rand(size, 3, generator=generator)
        )
        for _ in range(count)
    ]


def brute(rows: list[Tensor], new: Tensor) -> Tensor:
    """The distance of new rows to all others, by the scale of the normal ones, in float64."""
    rows, new = [one.double() for one in rows], new.double()
    left_out = [
        torch.cdist(one, torch.cat(rows[:i] + rows[i + 1 :])).amin(1) for i, one in enumerate(rows)
    ]
    scale = torch.cat(left_out).square().mean().sqrt()
    return torch.cdist(new, torch.cat(rows)).amin(1) / scale


def test_values_are_those_of_brute_force_for_each_bank_and_together():
    *normal, new = random_clouds(4)
    detector = PointBanks(
        descriptors=[Place(), Color()], coreset_ratio=1.0, num_smooth=1, top=0.1
    ).fit(NormalData(normal))
    score, maps = scored(detector, new)

    clouds = [sample.points for sample in (*normal, new)]
    place = brute([one.points for one in clouds[:3]], clouds[3].points)
    color = brute([one.colors for one in clouds[:3]], clouds[3].colors)
    expected = ((place**2 + color**2) / 2).sqrt()
    torch.testing.assert_close(maps[0], expected.float(), rtol=1e-4, atol=1e-5)
    assert float(score[0]) == pytest.approx(float(expected.sort().values[-3:].mean()), rel=1e-4)


def test_a_value_is_the_mean_over_the_nearest_points():
    *normal, new = random_clouds(4)
    given = {"descriptors": [Place()], "coreset_ratio": 1.0}
    _, raw = scored(PointBanks(**given, num_smooth=1).fit(NormalData(normal)), new)
    _, smooth = scored(PointBanks(**given, num_smooth=4).fit(NormalData(normal)), new)
    points = new.points.points.double()
    around = torch.cdist(points, points).argsort(1)[:, :4]
    torch.testing.assert_close(smooth[0], raw[0][around].mean(1), rtol=1e-5, atol=1e-6)


def test_a_bank_keeps_its_share_of_the_points():
    detector = PointBanks(descriptors=[Place(), Color()], coreset_ratio=0.25)
    detector.fit(NormalData(random_clouds(3)))
    assert [len(bank.rows_) for bank in detector.banks] == [22, 22]


def test_pose_and_position_do_not_change_what_local_shape_scores():
    samples = bumpy_clouds(5, 400)
    detector = PointBanks(descriptors=[LocalShape()]).fit(NormalData(samples[:3]))
    turned = [moved(samples[3], turn, shift=100.0) for turn in even_rotations(5)]
    score, maps = scored(detector, samples[3], *turned)
    torch.testing.assert_close(score[1:], score[:1].expand(5), rtol=0.01, atol=0)
    for values in maps[1:]:
        assert (values - maps[0]).abs().mean() < 0.01 * maps[0].mean()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_unit_does_not_change_a_score_where_the_radius_is_learnt(factor):
    samples = bumpy_clouds(4, 300)
    still = torch.eye(3).double()
    here = [moved(sample, still, factor=factor) for sample in samples]
    scores = [
        scored(PointBanks(descriptors=[LocalShape(), Place()]).fit(NormalData(s[:3])), s[3])[0]
        for s in (samples, here)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=0.01, atol=0)


def test_only_registered_places_take_a_cloud_from_another_pose():
    normal = [point_part("bracket", seed, count=600) for seed in range(3)]
    new = point_part("bracket", 60, count=600)
    turned = moved(new, even_rotations(7)[3], shift=200.0)
    by_place = PointBanks(descriptors=[Place()]).fit(NormalData(normal))
    registered = PointBanks(descriptors=[RegisteredPlace()]).fit(NormalData(normal))
    score, _ = scored(by_place, new, turned)
    assert score[1] > 5 * score[0]
    score, _ = scored(registered, new, turned)
    assert float(score[1]) == pytest.approx(float(score[0]), rel=0.01)


def test_a_bulge_has_the_largest_values():
    normal = [point_part("bracket", seed, count=1000) for seed in range(3)]
    whole = point_part("bracket", 60, count=1000)
    assert whole.points is not None
    points = whole.points.points.clone()
    near = (points - points[11]).norm(dim=1).argsort()[:25]
    points[near] += torch.nn.functional.normalize(points[11] - points.mean(0), dim=0) * 8
    detector = PointBanks(descriptors=[LocalShape(), RegisteredPlace()]).fit(NormalData(normal))
    score, maps = scored(detector, cloud_of(points), whole)
    labels = torch.zeros(1000, dtype=torch.int64).index_fill(0, near, 1)
    assert auroc(maps[0], labels) > 0.9
    assert score[0] > 1.5 * score[1]


def test_a_strange_color_is_found_at_its_points():
    samples = bumpy_clouds(5, 300)
    painted = samples[4].points
    near = (painted.points - painted.points[0]).norm(dim=1).argsort()[:20]
    painted.colors[near] = torch.tensor([1.0, 0.0, 1.0])
    detector = PointBanks(descriptors=[Color()], num_smooth=1).fit(NormalData(samples[:4]))
    _, maps = scored(detector, samples[4])
    assert set(maps[0].topk(20).indices.tolist()) == set(near.tolist())


def test_an_item_without_color_is_scored_by_shape_and_said_to_miss_it():
    samples = bumpy_clouds(5, 200)
    bare = replace(samples[4], points=replace(samples[4].points, colors=None))
    both = PointBanks(descriptors=[LocalShape(), Color()]).fit(NormalData(samples[:4]))
    shape = PointBanks(descriptors=[LocalShape()]).fit(NormalData(samples[:4]))
    found = both.predict(collate([samples[4], bare]))
    assert found.missing == ((), ("color",))
    torch.testing.assert_close(found.score[1:], scored(shape, bare)[0])
    assert both.predict(collate([samples[4]])).missing == ()

    only_color = PointBanks(descriptors=[Color()]).fit(NormalData(samples[:4]))
    with pytest.raises(ValueError, match="no color, and no bank describes anything else"):
        only_color.predict(collate([bare]))
    with pytest.raises(ValueError, match="1 of 2 normal clouds have no color; leave Color out"):
        PointBanks(descriptors=[LocalShape(), Color()]).fit(NormalData([samples[0], bare]))


def test_empty_single_and_doubled_points_are_scored():
    samples = bumpy_clouds(4, 200)
    detector = PointBanks(descriptors=[LocalShape(), Place()]).fit(NormalData(samples[:3]))
    nothing = torch.zeros(4, dtype=torch.bool)
    score, maps = scored(
        detector,
        cloud_of(torch.empty(0, 3)),
        cloud_of(torch.randn(4, 3), valid=nothing),
        cloud_of(torch.full((1, 3), 200.0)),
        cloud_of(samples[3].points.points.repeat(2, 1)),
        cloud_of(torch.ones(20, 3)),
    )
    assert score.isnan().tolist() == [True, True, False, False, False]
    assert [len(values) for values in maps] == [0, 4, 1, 400, 20]
    assert score[2] > 5  # far outside


def test_points_and_colors_that_are_not_finite_are_refused_or_not_looked_at():
    samples = bumpy_clouds(4, 200)
    detector = PointBanks(descriptors=[LocalShape(), Color()]).fit(NormalData(samples[:3]))
    for name in ("points", "colors"):
        cloud = samples[3].points
        broken = getattr(cloud, name).clone()
        broken[5] = torch.nan
        broken = replace(cloud, **{name: broken})
        with pytest.raises(ValueError, match="NaN or infinite; mark .* as not valid"):
            detector.predict(collate([Sample(item="a", points=broken)]))
        masked = replace(broken, valid=torch.arange(200) != 5)
        _, maps = scored(detector, Sample(item="a", points=masked))
        assert maps[0].isnan().nonzero().flatten().tolist() == [5]


def test_every_descriptor_can_be_described_and_built_again():
    given = [LocalShape(radius=3.0, max_neighbors=50), Place(), RegisteredPlace(), Color()]
    again = build(describe(PointBanks(descriptors=given, top=0.1)))
    assert [type(one) for one in again.descriptors] == [type(one) for one in given]
    assert (again.descriptors[0].radius, again.descriptors[0].max_neighbors) == (3.0, 50)
    assert again.top == 0.1


def test_scores_are_unbounded_where_places_take_part():
    assert not PointBanks(descriptors=[LocalShape()]).unbounded
    assert not PointBanks(descriptors=[LocalShape(), Color()]).unbounded
    assert PointBanks(descriptors=[LocalShape(), Place()]).unbounded
    assert PointBanks(descriptors=[RegisteredPlace()]).unbounded


def test_the_learnt_radius_is_five_spacings():
    grid = torch.cartesian_prod(*[2.0 * torch.arange(5.0)] * 2, torch.zeros(1))
    shape = LocalShape()
    shape.fit([PointCloud(points=grid, unit="mm"), PointCloud(points=grid + 1, unit="mm")])
    assert shape.radius_.tolist() == [10.0]
    with pytest.raises(ValueError, match="no two points apart; give a radius"):
        shape.fit([PointCloud(points=torch.ones(5, 3), unit="mm")])


def test_fitting_needs_two_clouds():
    with pytest.raises(ValueError, match="at least 2 normal clouds, got 1"):
        PointBanks(descriptors=[Place()]).fit(NormalData(bumpy_clouds(1, 50)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"descriptors": []}, "at least one"),
        ({"descriptors": [Place()], "coreset_ratio": 0.0}, "coreset_ratio is a share"),
        ({"descriptors": [Place()], "top": 1.5}, "top is a share"),
        ({"descriptors": [Place()], "num_smooth": 0}, "num_smooth must be at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PointBanks(**arguments)
    with pytest.raises(ValueError, match="radius must be positive"):
        LocalShape(radius=0.0)
