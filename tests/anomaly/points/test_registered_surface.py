"""RegisteredSurface on made-up parts, whose defects are known point by point."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from anomaly.base import NormalData
from anomaly.points.registered_surface import RegisteredSurface
from medssl.data.image import PointCloud
from medssl.data.sample import Sample, collate
from medssl.data.synthetic.point_part import PointDefect, point_part
from medssl.metrics import auroc
from medssl.models.registration import even_rotations

COUNT = 1000
FINE = 2000  # points that a small defect takes some of
NORMAL = range(4)


@cache
def fitted(factor: float = 1.0, coverage: float = 1.0) -> RegisteredSurface:
    """On four brackets."""
    samples = [moved(part(seed), factor=factor) for seed in NORMAL]
    return RegisteredSurface(coverage=coverage).fit(NormalData(samples))


@cache
def part(seed: int, defect: PointDefect | None = None, count: int = COUNT) -> Sample:
    return point_part("bracket", seed, defect=defect, count=count)


def moved(
    sample: Sample, *, turn: Tensor | None = None, shift: float = 0.0, factor: float = 1.0
) -> Sample:
    cloud = sample.points
    assert cloud is not None
    points = factor * cloud.points.double() @ (torch.eye(3).double() if turn is None else turn).T
    return replace(sample, points=replace(cloud, points=(points + shift).float()))


def cloud_of(points: Tensor, valid: Tensor | None = None) -> Sample:
    return Sample(item="one", points=PointCloud(points=points, unit="mm", valid=valid))


def scored(detector: RegisteredSurface, *samples: Sample) -> tuple[Tensor, list[Tensor]]:
    found = detector.predict(collate(list(samples)))
    maps = found.maps["points"]
    assert isinstance(maps, list)
    return found.score, maps


@cache
def finely_fitted() -> RegisteredSurface:
    samples = [part(seed, count=FINE) for seed in NORMAL]
    return RegisteredSurface().fit(NormalData(samples))


@pytest.mark.parametrize("defect", ["bulge", "sink", "hole", "scratch"])
def test_a_defect_scores_above_the_same_part_without_and_at_its_points(defect):
    values, marked = [], []
    for seed in (50, 51):
        broken = part(seed, defect, FINE)
        score, maps = scored(finely_fitted(), broken, part(seed, count=FINE))
        assert score[0] > 1.2 * score[1]
        values.append(maps[0])
        marked.append(broken.point_labels)
    assert auroc(torch.cat(values), torch.cat(marked).long()) > 0.9


def test_without_coverage_a_hole_is_no_defect():
    score, _ = scored(fitted(coverage=0.0), part(60, "hole"), part(60))
    assert float(score[0]) == pytest.approx(float(score[1]), rel=0.2)


def test_neither_pose_nor_position_change_a_score():
    turns = even_rotations(5)
    here = [moved(part(60, "sink"), turn=turn, shift=50.0) for turn in turns]
    score, maps = scored(fitted(), part(60, "sink"), *here)
    torch.testing.assert_close(score[1:], score[:1].expand(5), rtol=0.01, atol=0)
    for values in maps[1:]:
        assert (values - maps[0]).abs().mean() < 0.01 * maps[0].mean()


def test_the_unit_does_not_change_a_score():
    score, _ = scored(fitted(), part(60, "bulge"))
    small, _ = scored(fitted(factor=1e-3), moved(part(60, "bulge"), factor=1e-3))
    large, _ = scored(fitted(factor=1e3), moved(part(60, "bulge"), factor=1e3))
    torch.testing.assert_close(small, score, rtol=1e-2, atol=0)
    torch.testing.assert_close(large, score, rtol=1e-2, atol=0)


@pytest.mark.parametrize("count", [COUNT // 2, 3 * COUNT])
def test_more_or_less_points_of_a_normal_part_are_no_defect(count):
    score, _ = scored(fitted(), part(70), part(70, count=count), part(70, "hole"))
    assert score[1] < 1.5 * score[0]
    assert score[1] < score[2]


def test_points_that_are_not_looked_at_count_for_nothing():
    sample = part(60, "bulge")
    assert sample.points is not None
    points = torch.cat([sample.points.points, torch.full((50, 3), torch.nan)])
    valid = torch.arange(len(points)) < COUNT
    score, maps = scored(fitted(), cloud_of(points, valid), sample)
    torch.testing.assert_close(score[0], score[1])
    assert maps[0].isnan().equal(~valid)


def test_points_that_are_not_finite_are_refused_with_what_to_do():
    sample = part(60)
    assert sample.points is not None
    points = sample.points.points.clone()
    points[3, 1] = torch.nan
    points[4, 0] = torch.inf
    with pytest.raises(ValueError, match=r"2 of 1000 points are NaN .* mark them as not valid"):
        scored(fitted(), cloud_of(points))


def test_an_item_without_a_valid_point_scores_nan():
    for points in (torch.empty(0, 3), torch.randn(5, 3)):
        valid = torch.zeros(len(points), dtype=torch.bool)
        score, maps = scored(fitted(), cloud_of(points, valid))
        assert score.isnan().all()
        assert maps[0].shape == (len(points),)
        assert maps[0].isnan().all()


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_points_are_refused(count):
    with pytest.raises(ValueError, match=f"at least 3 points on both sides, got {count}"):
        scored(fitted(), cloud_of(torch.randn(count, 3)))


def test_points_at_one_place_and_three_points_are_scored():
    for points in (torch.ones(30, 3), 40 * torch.randn(3, 3)):
        score, maps = scored(fitted(), cloud_of(points))
        assert score.isfinite().all()
        assert maps[0].isfinite().all()


def test_doubled_points_score_as_they_do_once():
    sample = part(60)
    assert sample.points is not None
    twice = cloud_of(sample.points.points.repeat(2, 1))
    score, _ = scored(fitted(), sample, twice)
    assert score[1] < 1.5 * score[0]


def test_the_same_clouds_again_and_again_leave_a_finite_spread():
    cloud = cloud_of(part(0).points.points.repeat(2, 1))  # type: ignore[union-attr]
    detector = RegisteredSurface().fit(NormalData([cloud, cloud]))
    score, _ = scored(detector, cloud, part(60, "bulge"))
    assert score.isfinite().all()
    assert score[1] > score[0]


def test_fitting_refuses_what_says_nothing_of_normal_spread():
    with pytest.raises(ValueError, match="at least 2 normal clouds, got 1"):
        RegisteredSurface().fit(NormalData([part(0)]))
    with pytest.raises(ValueError, match=r"max_reference \(40\) leaves 20 points"):
        RegisteredSurface(max_reference=40).fit(NormalData([part(0), part(1)]))
    empty = cloud_of(torch.empty(0, 3))
    with pytest.raises(ValueError, match="1 of 2 normal clouds have no valid point"):
        RegisteredSurface().fit(NormalData([part(0), empty]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_plane": 2}, "num_plane must be at least 3"),
        ({"num_smooth": 0}, "num_smooth must be at least 1"),
        ({"top": 0.0}, "top is a share"),
        ({"coverage": -1.0}, "coverage is a weight"),
    ],
)
def test_settings_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RegisteredSurface(**arguments)
