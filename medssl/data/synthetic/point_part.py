"""Free clouds of made-up parts, with defects and a label per point: for development and tests.

The parts are in `point_shapes`. A cloud is a new random sample of the part's surface, denser on one
side than on the other, with noise, a little larger or smaller, shifted and turned. The seed and the
kind alone decide it: with a defect the pose, the points and their noise are those of the same seed
without, and only labelled points have moved (or, around a hole, are where they were).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.data.image import PointCloud
from medssl.data.sample import Sample
from medssl.data.synthetic.fields import Field
from medssl.data.synthetic.point_shapes import KINDS, Kind, Mesh, shape_mesh

PointDefect = Literal["bulge", "sink", "hole", "scratch"]
DEFECTS: tuple[PointDefect, ...] = get_args(PointDefect)

LABEL_MM = 0.3
"""A point is labelled where a bulge, sink or scratch moved it by more: two to four times the noise
(one standard deviation)."""

RIM_MM = 3.0
"""Points this near to the edge of a hole are labelled; about the distance between points."""

NOISE_MM = (0.08, 0.15)
SCALE = (0.99, 1.01)
DEPTH_MM = (1.0, 4.0)  # of a bulge or sink, in its middle
RADIUS_MM = (7.0, 14.0)
HOLE_RADIUS_MM = (5.0, 10.0)
SCRATCH_MM = (0.8, 2.0)  # deepest
SCRATCH_LENGTH_MM = (20.0, 40.0)
SCRATCH_WIDTH_MM = (4.0, 7.0)

_SPARE = 1.3  # points drawn for each that is asked for, as a hole takes some
_SAME_SIDE = 0.3  # cosine between normals of one side of a wall


@dataclass(frozen=True, slots=True, eq=False)
class _Points:
    """places, normals: (P, 3) on the surface of the part in its own frame, without noise."""

    places: Field
    normals: Field


def point_part(
    kind: Kind,
    seed: int,
    *,
    defect: PointDefect | None = None,
    count: int = 4000,
    max_turn_deg: float = 10.0,
) -> Sample:
    """A cloud of `count` points in mm with a label per point.

    max_turn_deg: the part is turned about a random axis by up to this angle.
    A bulge or sink moves points along the surface's normal, a scratch inwards; a hole takes points
    away, and its rim is labelled. The other side of a wall stays. The group is the same with and
    without a defect.
    Raises ValueError for an unknown kind or defect and for less than 100 points.
    """
    _check(kind, defect, count)
    points = _sampled(shape_mesh(kind), _stream(kind, seed, 0), round(_SPARE * count))
    places, labels = points.places, np.zeros(len(points.places), bool)
    noise_rng = _stream(kind, seed, 1)
    noise = noise_rng.uniform(*NOISE_MM) * noise_rng.standard_normal(places.shape)
    left = np.ones(len(places), bool)
    if defect == "hole":
        left, labels = _hole(points, _stream(kind, seed, 2))
    elif defect is not None:
        moved = _moved(points, _stream(kind, seed, 2), defect)
        labels = np.abs(moved) > LABEL_MM
        places = places + np.where(labels, moved, 0.0)[:, None] * points.normals
    kept = np.flatnonzero(left)[:count]
    turned = _posed((places + noise)[kept], _stream(kind, seed, 3), max_turn_deg)
    return Sample(
        item=f"{kind}{seed}" if defect is None else f"{kind}{seed}-{defect}",
        points=PointCloud(
            points=torch.from_numpy(turned.astype(np.float32)),
            unit="mm",
            provenance={"reader": "synthetic"},
        ),
        label=0 if defect is None else 1,
        point_labels=torch.from_numpy(labels[kept]),
        group=f"{kind}{seed}",
    )


def _check(kind: Kind, defect: PointDefect | None, count: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    if defect is not None and defect not in DEFECTS:
        raise ValueError(f"defect is one of {', '.join(DEFECTS)}, or None, got {defect!r}")
    if count < 100:
        raise ValueError(f"a part needs at least 100 points to be told, got count={count}")


def _stream(kind: Kind, seed: int, use: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, KINDS.index(kind), use]))


def _sampled(mesh: Mesh, rng: np.random.Generator, count: int) -> _Points:
    """Random points of the surface, up to three times as dense on one side as on the other."""
    lit = mesh.corners.mean(1) @ _direction(rng)
    share = np.cumsum(mesh.areas * (1 + rng.uniform(0, 0.5) * lit / np.abs(lit).max()))
    draws = rng.uniform(size=(count, 3))  # the first do not depend on `count`
    chosen = np.searchsorted(share, draws[:, 0] * share[-1], side="right")
    chosen = np.minimum(chosen, len(share) - 1)
    first, second = np.where(
        draws[:, 1:].sum(1, keepdims=True) > 1, 1 - draws[:, 1:], draws[:, 1:]
    ).T
    a, b, c = mesh.corners[chosen].swapaxes(0, 1)
    places = a + first[:, None] * (b - a) + second[:, None] * (c - a)
    return _Points(places, mesh.normals[chosen])


def _direction(rng: np.random.Generator) -> Field:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _center(points: _Points, rng: np.random.Generator, radius: float) -> int:
    """Of ten random points the one whose surroundings bend least, so that few lie on an edge."""
    chosen = rng.integers(len(points.places), size=10)

    def flatness(point: int) -> float:
        near = np.linalg.norm(points.places - points.places[point], axis=1) < radius
        cosines = points.normals[near] @ points.normals[point]
        return float(cosines[cosines > -_SAME_SIDE].mean())

    return int(max(chosen, key=flatness))


def _around(points: _Points, center: int) -> tuple[Field, NDArray[np.bool_]]:
    """Distance (P,) to a point, mm, and which points lie on its side of a wall."""
    distance = np.linalg.norm(points.places - points.places[center], axis=1)
    return distance, points.normals @ points.normals[center] > _SAME_SIDE


def _hole(points: _Points, rng: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which points are left, and which of all are the rim's, (P,) each."""
    radius = _log_uniform(rng, HOLE_RADIUS_MM)
    distance, same_side = _around(points, _center(points, rng, radius))
    gone = same_side & (distance <= radius)
    return ~gone, same_side & ~gone & (distance <= radius + RIM_MM)


def _moved(points: _Points, rng: np.random.Generator, defect: PointDefect) -> Field:
    """(P,) mm along the outward normal."""
    if defect == "scratch":
        return _scratched(points, rng)
    radius, depth = _log_uniform(rng, RADIUS_MM), _log_uniform(rng, DEPTH_MM)
    distance, same_side = _around(points, _center(points, rng, radius))
    bowl = np.maximum(1 - (distance / radius) ** 2, 0) ** 2
    return (depth if defect == "bulge" else -depth) * bowl * same_side


def _scratched(points: _Points, rng: np.random.Generator) -> Field:
    length, depth = _log_uniform(rng, SCRATCH_LENGTH_MM), _log_uniform(rng, SCRATCH_MM)
    half_width = rng.uniform(*SCRATCH_WIDTH_MM) / 2
    center = _center(points, rng, length / 2)
    normal = points.normals[center]
    along = np.cross(normal, _direction(rng))
    along /= np.linalg.norm(along)
    offset = points.places - points.places[center]
    past_end = np.maximum(np.abs(offset @ along) - length / 2, 0)
    distance = np.hypot(past_end, offset @ np.cross(normal, along))
    reached = _around(points, center)[1] & (np.abs(offset @ normal) < length / 4)
    return -depth * np.maximum(1 - (distance / half_width) ** 2, 0) * reached


def _posed(points: Field, rng: np.random.Generator, max_turn_deg: float) -> Field:
    """Scaled about the part's middle, turned and shifted."""
    axis = _direction(rng)
    angle = np.deg2rad(rng.uniform(0, max_turn_deg))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    scaled: Field = rng.uniform(*SCALE) * points @ turn.T
    return scaled + rng.uniform(-3, 3, 3)


def _log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(limits[0]), np.log(limits[1]))))
