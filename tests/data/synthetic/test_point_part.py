import numpy as np
import pytest
import torch
from scipy.spatial import KDTree, transform
from sklearn.metrics import roc_auc_score

from medssl.data.sample import Sample, collate
from medssl.data.synthetic.point_part import (
    DEFECTS,
    DEPTH_MM,
    HOLE_RADIUS_MM,
    LABEL_MM,
    NOISE_MM,
    RIM_MM,
    SCALE,
    SCRATCH_MM,
    point_part,
)
from medssl.data.synthetic.point_shapes import GEAR_MM, KINDS, PLATE_MM, shape_mesh

SEEDS = range(12)
LIMITS_MM = {"bulge": DEPTH_MM, "sink": DEPTH_MM, "scratch": SCRATCH_MM}
FLOAT_MM = 1e-4


def points(sample: Sample) -> np.ndarray:
    return sample.points.points.double().numpy()


def labels(sample: Sample) -> np.ndarray:
    return sample.point_labels.numpy()


def volume(kind: str) -> float:
    a, b, c = shape_mesh(kind).corners.swapaxes(0, 1)
    return float((a * np.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("kind", KINDS)
def test_meshes_are_closed_and_their_normals_point_outwards(kind):
    mesh = shape_mesh(kind)
    assert np.abs((mesh.areas[:, None] * mesh.normals).sum(0)).max() < 1e-8 * mesh.areas.sum()
    by_divergence = (mesh.areas * (mesh.corners.mean(1) * mesh.normals).sum(1)).sum() / 3
    assert by_divergence == pytest.approx(volume(kind), rel=1e-9)
    assert volume(kind) > 0


def test_volumes_are_those_of_the_drawings():
    bore, middle, tooth, thickness = GEAR_MM
    wave = np.tanh(2.5 * np.sin(np.linspace(0, 2 * np.pi, 100_001))) / np.tanh(2.5)
    teeth = tooth**2 * (wave**2).mean()  # the wave itself has mean 0
    gear = np.pi * thickness * (middle**2 + teeth - bore**2)
    assert volume("gear") == pytest.approx(gear, rel=0.003)
    plate = np.prod(PLATE_MM)
    ribs = (100 + 60) * 6 * 6 - 6 * 6 * 6 + np.pi * 9**2 * 4
    assert volume("bracket") == pytest.approx(plate + ribs, rel=0.01)
    bottle = 0.8 * np.pi * (30**2 * 76 + 12**2 * 20 + 14**2 * 7 + 26**2 * 12)  # coarse cylinders
    assert volume("bottle") == pytest.approx(bottle, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defect", ["bulge", "sink", "scratch"])
def test_exactly_the_labelled_points_have_moved(kind, defect):
    for seed in SEEDS:
        normal, sample = point_part(kind, seed), point_part(kind, seed, defect=defect)
        moved = np.linalg.norm(points(sample) - points(normal), axis=1)
        assert (moved[~labels(sample)] == 0).all()
        assert (moved[labels(sample)] > LABEL_MM * SCALE[0] - FLOAT_MM).all()
        assert moved.max() < LIMITS_MM[defect][1] * SCALE[1] + FLOAT_MM
        assert 4 <= labels(sample).sum() < 400


def test_depths_of_bulges_cover_their_limits():
    deepest = [
        np.linalg.norm(
            points(point_part("egg", seed, defect="bulge")) - points(point_part("egg", seed)),
            axis=1,
        ).max()
        for seed in range(40)
    ]
    assert min(deepest) < 1.5 * DEPTH_MM[0]
    assert max(deepest) > 0.8 * DEPTH_MM[1]


@pytest.mark.parametrize(("defect", "sign"), [("bulge", 1), ("sink", -1), ("scratch", -1)])
def test_bulges_go_outwards_sinks_and_scratches_inwards(defect, sign):
    for seed in SEEDS:  # an egg is seen from its middle in full
        normal, sample = point_part("egg", seed), point_part("egg", seed, defect=defect)
        middle = points(normal).mean(0)
        out = [
            np.linalg.norm(points(one) - middle, axis=1)[labels(sample)] for one in (sample, normal)
        ]
        assert (sign * (out[0] - out[1]) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defect", ["bulge", "sink"])
def test_labelled_points_lie_off_the_surface_without_the_defect(kind, defect):
    far, label = [], []
    for seed in SEEDS[:4]:
        surface = KDTree(points(point_part(kind, seed, count=40_000)))
        sample = point_part(kind, seed, defect=defect)
        far.append(surface.query(points(sample))[0])
        label.append(labels(sample))
    assert roc_auc_score(np.concatenate(label), np.concatenate(far)) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_has_no_points_and_its_rim_is_labelled(kind):
    for seed in SEEDS:
        normal, sample = point_part(kind, seed, count=6000), point_part(kind, seed, defect="hole")
        old, new = points(normal), points(sample)
        away = KDTree(new).query(points(point_part(kind, seed)))[0]
        gone = points(point_part(kind, seed))[away > 0]
        assert len(gone) >= 4
        assert KDTree(old).query(new)[0].max() == 0  # no point moved
        assert np.linalg.norm(gone - gone.mean(0), axis=1).max() < 2 * HOLE_RADIUS_MM[1] * SCALE[1]
        to_hole = KDTree(gone).query(new[labels(sample)])[0]
        assert to_hole.max() < RIM_MM + 6  # the gone points lie a little inside the edge
        assert labels(sample).sum() >= 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_clouds_have_the_count_that_was_asked_for(kind, defect):
    for count in (500, 4000):
        sample = point_part(kind, 1, defect=defect, count=count)
        assert sample.points.points.shape == (count, 3)
        assert sample.point_labels.shape == (count,)
        assert (sample.label, sample.points.unit) == (int(defect is not None), "mm")
        assert sample.group == f"{kind}1"
        assert sample.images == {}


def test_a_normal_cloud_has_no_label_set():
    assert not labels(point_part("gear", 0)).any()


@pytest.mark.parametrize("limit", [0.0, 10.0, 60.0])
def test_the_turn_and_the_scale_are_within_their_limits(limit):
    angles = []
    for seed in range(20):
        still = points(point_part("bracket", seed, max_turn_deg=0))
        turned = points(point_part("bracket", seed, max_turn_deg=limit))
        turn, _ = transform.Rotation.align_vectors(turned - turned.mean(0), still - still.mean(0))
        angles.append(np.rad2deg(turn.magnitude()))
        length = np.ptp(still[:, 0]) / PLATE_MM[0]
        assert SCALE[0] - 0.01 < length < SCALE[1] + 0.01
    assert max(angles) <= limit + 0.01
    assert max(angles) >= 0.8 * limit
    assert len(set(np.round(angles, 3))) == (1 if limit == 0 else 20)


def test_density_varies_over_a_part_and_from_part_to_part():
    shares = []
    for seed in range(40):
        x = points(point_part("gear", seed, max_turn_deg=0))[:, 0]
        shares.append((x > (x.min() + x.max()) / 2).mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert 0.02 < np.std(shares) < 0.15  # 0.008 if density were even


def test_points_are_spread_by_area():
    bore, _, _, thickness = GEAR_MM
    expected = 2 * np.pi * bore * thickness / shape_mesh("gear").areas.sum()
    found = []
    for seed in range(30):
        x, y, _ = points(point_part("gear", seed, max_turn_deg=0)).T
        middle = [(axis.min() + axis.max()) / 2 for axis in (x, y)]
        found.append((np.hypot(x - middle[0], y - middle[1]) < bore + 0.4).mean())
    flat = 2 * np.pi * 0.4 * bore * 2 / shape_mesh("gear").areas.sum()  # a seam of both faces
    assert np.mean(found) == pytest.approx(expected + flat, rel=0.1)


def test_noise_is_within_its_limits():
    for seed in SEEDS:
        z = points(point_part("gear", seed, max_turn_deg=0))[:, 2]
        top = z[z > z.max() - 0.7]  # and of the walls a little
        median = np.median(top)
        spread = 1.4826 * np.median(np.abs(top - median))
        assert 0.8 * NOISE_MM[0] < spread < 1.2 * NOISE_MM[1]


def test_seeds_and_kinds_give_different_clouds_and_the_same_ones_again():
    clouds = {(k, s): points(point_part(k, s)).tobytes() for k in KINDS for s in SEEDS}
    assert len(set(clouds.values())) == len(clouds)
    assert points(point_part("egg", 7)).tobytes() == clouds["egg", 7]


def test_clouds_make_a_batch():
    batch = collate([point_part("egg", 0), point_part("egg", 1, defect="sink")])
    assert batch.labels.tolist() == [0, 1]
    assert all(cloud.points.dtype == torch.float32 for cloud in batch.points)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="kind is one of gear, bottle, egg, bracket, got 'cup'"):
        point_part("cup", 0)
    with pytest.raises(ValueError, match="defect is one of bulge, sink, hole, scratch"):
        point_part("egg", 0, defect="dent")
    with pytest.raises(ValueError, match="got count=5"):
        point_part("egg", 0, count=5)
