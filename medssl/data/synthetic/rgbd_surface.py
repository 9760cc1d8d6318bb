"""The shape of a made-up machined casting on a tilted table, as a depth camera sees it.

The casting is a rounded plate with a pocket, two ribs, a bored boss, four bolt holes and an
embossed mark. Rim, ribs and boss are milled to bare metal, the pocket is painted. Items differ in
place, turn, tilt, dimensions and waviness; the table's tilt and the camera's distance differ too.

A pixel's ray meets the table at one point, and the height of the casting over that point is taken
off the depth: heights run along the camera's z, and no wall hides what lies behind it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.data.synthetic.fields import Field, smooth_field

DISTANCE_MM = 300.0
FOCAL = 3.0  # of the picture's shorter side

_WALL_MM = 1.3  # over which a step in height rises
_MARK_MM = 0.7


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Surface:
    """What lies in front of the camera, without a defect and without noise; (H, W) each.

    rays: (2, H, W), x / z and y / z of each pixel's ray.
    table: z of the table, mm.
    height: of what lies on the table, mm along z.
    across, along: mm from the part's center, in the part's own axes.
    inside: mm to the outline of the plate, negative inside.
    solid: share of the plate's material there, 0 on the table and in holes.
    metal: share of bare metal on the part, the rest is paint.
    pitch: mm between neighboring pixels.
    """

    rays: Field
    table: Field
    height: Field
    across: Field
    along: Field
    inside: Field
    solid: Field
    metal: Field
    pitch: float


def stream(seed: int, use: int) -> np.random.Generator:
    """Random numbers of one use, so that drawing more for one use does not change another."""
    return np.random.Generator(np.random.PCG64([seed, use]))


def part_surface(seed: int, size: tuple[int, int]) -> Surface:
    """The casting of a seed on its table; size: height and width in pixels."""
    rng = stream(seed, 0)
    rays, table = _table(rng, size)
    x, y = rays * table
    turn = np.deg2rad(rng.uniform(-6, 6))
    x, y = x - rng.uniform(-3, 3), y - rng.uniform(-3, 3)
    across = np.cos(turn) * x + np.sin(turn) * y
    along = np.cos(turn) * y - np.sin(turn) * x
    height, inside, solid, metal = _casting(rng, across, along)
    tilt = rng.uniform(-0.006, 0.006, 2)  # chips under the plate
    pitch = float(table.mean()) / (FOCAL * min(size))
    wave = _waviness(seed, size, pitch)
    height = height + solid * (tilt[0] * across + tilt[1] * along + wave)
    return Surface(
        rays=rays,
        table=table,
        height=np.maximum(height, 0.0),
        across=across,
        along=along,
        inside=inside,
        solid=solid,
        metal=metal,
        pitch=pitch,
    )


def _table(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Field, Field]:
    """The rays (2, H, W) and z of the table (H, W)."""
    rows, columns = np.mgrid[: size[0], : size[1]].astype(np.float64)
    focal = FOCAL * min(size)
    rays = np.stack([columns - (size[1] - 1) / 2, rows - (size[0] - 1) / 2]) / focal
    slope_x, slope_y = rng.uniform(-0.03, 0.03), 0.07 + rng.uniform(-0.02, 0.02)
    middle = DISTANCE_MM + rng.uniform(-2, 2)
    return rays, middle / (1 - slope_x * rays[0] - slope_y * rays[1])


def _casting(
    rng: np.random.Generator, across: Field, along: Field
) -> tuple[Field, Field, Field, Field]:
    """Height (mm), distance to the outline (mm), share of material and of bare metal."""
    half = np.array([32.0, 24.0]) + rng.normal(0, 0.15, 2)
    rim, floor, boss = np.array([9.0, 6.4, 10.4]) + rng.normal(0, 0.08, 3)
    inside = _rounded_box(across, along, half[0], half[1], 8.0)
    pocket = _rounded_box(across, along, half[0] - 6.5, half[1] - 6.5, 4.0)
    raised = _step(-pocket)  # 1 on the rim
    for center in (-13.5, 13.5):
        rib = np.abs(across - center - rng.normal(0, 0.1)) - 1.9
        raised = np.maximum(raised, _step(rib))
    radius = np.hypot(across, along)
    around = _step(radius - 10.5 - rng.normal(0, 0.1))
    mark = (1 - raised) * _step(_mark(across + 20.2, along - 7.5))
    height = floor + (rim - floor) * raised + _MARK_MM * mark
    height += around * (boss - height)
    solid = _step(inside) * (1 - _step(radius - 5.2 - rng.normal(0, 0.05)))
    for sign_x, sign_y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        x, y = sign_x * (half[0] - 6.0), sign_y * (half[1] - 6.0)
        shift = rng.normal(0, 0.1, 2)
        hole = np.hypot(across - x - shift[0], along - y - shift[1])
        raised = np.maximum(raised, _step(hole - 5.0))
        height += _step(hole - 5.0) * (rim - height)
        solid = solid * (1 - _step(hole - 2.6))
    worn = 0.35 * mark
    return solid * height, inside, solid, np.maximum.reduce([raised, around, worn])


def _mark(x: Field, y: Field) -> Field:
    """Distance (mm) to the lines of the embossed mark, an arrow over a bar."""
    strokes = [((-3, 4), (3, 4)), ((0, 1.5), (0, -5)), ((0, -5), (-2.6, -2)), ((0, -5), (2.6, -2))]
    distances = [_to_segment(x, y, *stroke) for stroke in strokes]
    return np.minimum.reduce(distances) - 0.7


def _to_segment(x: Field, y: Field, start: tuple[float, float], end: tuple[float, float]) -> Field:
    direction = np.subtract(end, start)
    share = ((x - start[0]) * direction[0] + (y - start[1]) * direction[1]) / (direction**2).sum()
    share = np.clip(share, 0, 1)
    return np.hypot(x - start[0] - share * direction[0], y - start[1] - share * direction[1])


def _rounded_box(x: Field, y: Field, half_x: float, half_y: float, radius: float) -> Field:
    """Signed distance (mm) to a rounded rectangle, negative inside."""
    over_x, over_y = np.abs(x) - half_x + radius, np.abs(y) - half_y + radius
    corner = np.hypot(np.maximum(over_x, 0), np.maximum(over_y, 0))
    return corner + np.minimum(np.maximum(over_x, over_y), 0) - radius


def _step(distance: Field) -> Field:
    """1 where the distance is clearly negative, 0 where positive, smooth over a wall."""
    t = np.clip(0.5 - distance / _WALL_MM, 0, 1)
    return t * t * (3 - 2 * t)


def _waviness(seed: int, size: tuple[int, int], pitch: float) -> Field:
    """Height (mm) by which a casting of this kind differs from its drawing, smooth."""
    rng = stream(seed, 1)
    long, short = rng.uniform(0.05, 0.12), rng.uniform(0.02, 0.05)
    return long * field(rng, size, pitch, 9.0) + short * field(rng, size, pitch, 4.0)


def field(rng: np.random.Generator, size: tuple[int, int], pitch: float, knot_mm: float) -> Field:
    """(H, W) smooth random field of mean 0 and standard deviation about 1."""
    return smooth_field(rng, (1, *size), (1.0, pitch, pitch), knot_mm)[0]


def steepness(height: Field, pitch: float) -> NDArray[np.float64]:
    """mm of height per mm, (H, W): the larger of both sides' and both axes' differences."""
    padded = np.pad(height, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    sides = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return np.maximum.reduce([np.abs(side - middle) for side in sides]) / pitch
