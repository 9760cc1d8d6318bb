"""Closed triangle meshes of four made-up parts, in mm, the z axis up, each about 100 mm large."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np

from medssl.data.synthetic.fields import Field

Kind = Literal["gear", "bottle", "egg", "bracket"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TEETH = 18
GEAR_MM = (14.0, 45.0, 4.0, 14.0)
"""Radius of the bore, middle radius of the teeth, half their height; thickness."""

PLATE_MM = (100.0, 60.0, 6.0)
RIB_MM = 12.0  # over the bottom, at its highest


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """corners: (T, 3, 3) mm, corner by corner; normals: (T, 3), unit, outwards; areas: (T,) mm^2.

    A triangle without area has the normal zero.
    """

    corners: Field
    normals: Field
    areas: Field


@cache
def shape_mesh(kind: Kind) -> Mesh:
    """The mesh of a part, around the middle of its corners. Do not change its arrays."""
    makers: dict[Kind, Callable[[], list[Field]]] = {
        "gear": _gear,
        "bottle": _bottle,
        "egg": _egg,
        "bracket": _bracket,
    }
    corners = np.concatenate([_triangles(grid) for grid in makers[kind]()])
    corners -= corners.mean((0, 1))
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(cross, axis=1)
    normals = cross / np.maximum(length, 1e-12)[:, None]
    return Mesh(corners=corners, normals=normals, areas=length / 2)


def _triangles(grid: Field) -> Field:
    """(T, 3, 3) of a grid of points (N, M, 3); the normal is its first axis x its second."""
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    halves = [np.stack([a, b, c], 2), np.stack([a, c, d], 2)]
    return np.concatenate([half.reshape(-1, 3, 3) for half in halves])


def _turned(radius: Field, z: Field, angle: Field) -> Field:
    """Grid (N, M, 3) around the z axis; angle is (N, 1), radius and z broadcast to (N, M).

    The profile, along the second axis, runs outwards at the bottom and then up.
    """
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    return np.stack(np.broadcast_arrays(x, y, z), -1)


def _around(count: int) -> Field:
    return np.linspace(0, 2 * np.pi, count + 1)[:, None]


def _gear() -> list[Field]:
    bore, middle, tooth, thickness = GEAR_MM
    angle = _around(20 * TEETH)
    outline = middle + tooth * np.tanh(2.5 * np.sin(TEETH * angle)) / np.tanh(2.5)
    wide = middle - bore
    loop = [(0, 0), (wide, 0), (wide, thickness), (0, thickness), (0, 0)]
    out, z = _resampled(np.array(loop), 24)
    return [_turned(bore + out / wide * (outline - bore), z, angle)]


def _bottle() -> list[Field]:
    """Oval, with a shoulder, a neck and a lip; closed."""
    t = np.linspace(0, np.pi / 2, 12)
    base = np.stack([26 + 4 * np.sin(t), 4 - 4 * np.cos(t)], 1)
    shoulder = np.stack([30 - 9 * (1 - np.cos(2 * t)), 78 + 14 * 2 * t / np.pi], 1)
    neck = np.array([(12, 112), (14, 113), (14, 118), (12, 119), (0, 119)])
    profile = np.concatenate([[(0, 0)], base, shoulder, neck])
    radius, z = _resampled(profile, 120)
    grid = _turned(radius, z, _around(120))
    return [grid * (1, 0.8, 1)]


def _egg() -> list[Field]:
    """A smooth egg with nine bumps of different width."""
    angle, rise = _around(160), np.linspace(-np.pi / 2, np.pi / 2, 100)
    direction = _turned(np.cos(rise), np.sin(rise), angle)  # (N, M, 3), unit
    radius = 42 + 5 * direction[..., 2] ** 2 - 4 * direction[..., 2]
    for bump in range(9):
        up, turn = (bump + 0.5) / 4.5 - 1, 2.4 * bump
        flat = np.sqrt(1 - up * up)
        cosine = direction @ np.array([flat * np.cos(turn), flat * np.sin(turn), up])
        radius += 5 * np.exp((cosine - 1) / (0.02 + 0.003 * bump))
    return [direction * radius[..., None]]


def _bracket() -> list[Field]:
    """A plate with two crossing ribs and a boss: a relief, its flat bottom and four walls."""
    length, width, thickness = PLATE_MM
    x, y = np.meshgrid(np.linspace(0, length, 101), np.linspace(0, width, 61), indexing="ij")
    ribs = np.minimum(np.abs(y - 30) - 3, np.abs(x - 65 - 0.3 * (y - 30)) - 3)
    boss = np.hypot(x - 22, y - 16) - 9
    top = thickness + np.maximum(
        (RIB_MM - thickness) * np.clip(0.5 - ribs / 2, 0, 1), 4 * np.clip(0.5 - boss / 2, 0, 1)
    )
    share = np.linspace(0, 1, 9)[:, None]
    relief, bottom = np.stack([x, y, top], -1), np.stack([x, y, 0 * top], -1)
    edges = [(relief[:, 0], bottom[:, 0]), (relief[:, -1], bottom[:, -1])]
    edges += [(relief[0], bottom[0]), (relief[-1], bottom[-1])]
    walls = [low + share[..., None] * (high - low) for high, low in edges]  # first axis up
    front, back, left, right = walls
    return [relief, bottom.swapaxes(0, 1), front.swapaxes(0, 1), back, left, right.swapaxes(0, 1)]


def _resampled(profile: Field, count: int) -> tuple[Field, Field]:
    """Both coordinates of a polyline (N, 2): its own corners and about `count` points between."""
    steps = np.linalg.norm(np.diff(profile, axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    at = np.union1d(np.linspace(0, length[-1], count), length)
    return np.interp(at, length, profile[:, 0]), np.interp(at, length, profile[:, 1])
