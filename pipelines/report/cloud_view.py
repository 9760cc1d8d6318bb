"""A picture of a free cloud, from the side that shows its most anomalous points best.

Orthographic: every point is a small disk that hides what lies behind it (a z-buffer), shaded by how
steeply its surface is seen and by depth. For display only.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medssl.models.points import point_spacing
from pipelines.clouds import PointMap
from pipelines.report.overlay import LONGEST, View

Floats = NDArray[np.floating]
Whole = NDArray[np.integer]
_BACKGROUND = (24, 27, 32)
_GREY = 0.8  # of points without a color
_MARGIN = 12  # pixels around the cloud
_DIRECTIONS = 64  # that are tried
_TRIED = 20_000  # points that they are tried with
_COARSE = 96  # pixels of the longer side while they are tried
_MOST_SHOWN = 0.01  # share of the points, by value, that must be seen
_AROUND = 12  # points that a normal is estimated from
_WIDEST = 0.03  # of the longer side: no disk has a larger radius


def view_of_cloud(found: PointMap) -> View:
    """The points that are looked at, with the largest value of each pixel as its heat.

    `where` is the direction towards the eye, in the cloud's own axes; z is up.
    """
    known = (~found.values.isnan()).numpy()
    if not known.any():
        known[:] = True
    places = found.cloud.points.double()[known]
    apart, points = float(point_spacing(places)), places.numpy()
    values = found.values.numpy()[known]
    eye = _best_direction(points, values, apart)
    camera = _camera(eye)
    shot = _Shot.of(points @ camera, LONGEST - 2 * _MARGIN, apart)
    front, heat = shot.drawn(values)
    colors = None if found.cloud.colors is None else found.cloud.colors.numpy()[known]
    picture = _shaded(front, points, camera, colors)
    told = ", ".join(f"{axis} {part:+.2f}" for axis, part in zip("xyz", eye, strict=True))
    return View(_framed(picture, _BACKGROUND), _framed(heat, -np.inf), f"seen from {told}")


@dataclass(frozen=True, eq=False)
class _Shot:
    """Points on the pixels of a picture.

    rows, columns: (P,) pixels. depth: (P,) towards the eye. size: H, W. radius: of a disk, pixels.
    hidden: how far behind the front a point is hidden, in the unit of the points.
    """

    rows: Whole
    columns: Whole
    depth: Floats
    size: tuple[int, int]
    radius: int
    hidden: float

    @classmethod
    def of(cls, seen: Floats, longest: int, apart: float) -> "_Shot":
        """seen: (P, 3) to the right, upwards and towards the eye. apart: the points' spacing."""
        low, high = seen.min(0), seen.max(0)
        side = max(float((high - low)[:2].max()), 1e-12)
        scale = (longest - 1) / side  # pixels per unit
        columns = ((seen[:, 0] - low[0]) * scale).round().astype(int)
        rows = ((high[1] - seen[:, 1]) * scale).round().astype(int)
        radius = max(1, round(min(_WIDEST * longest, 2 * apart * scale)))
        return cls(
            rows,
            columns,
            seen[:, 2],
            (int(rows.max()) + 1, int(columns.max()) + 1),
            radius,
            max(3 * apart, 2 * radius / scale),
        )

    def drawn(self, values: Floats) -> tuple[Whole, Floats]:
        """The point in front of each pixel (H, W), -1 for none; the largest value, -inf for none.

        Points close behind the front count, those of a surface behind it do not.
        """
        nearest = np.full(self.size, -np.inf)
        for at, rows in self._disks():
            np.maximum.at(nearest, at, self.depth[rows])
        front = np.full(self.size, -1)
        heat = np.full(self.size, -np.inf, np.float32)
        heard = np.where(np.isnan(values), -np.inf, values).astype(np.float32)
        for at, rows in self._disks():
            first = self.depth[rows] == nearest[at]
            front[tuple(axis[first] for axis in at)] = rows[first]
            close = self.depth[rows] >= nearest[at] - self.hidden
            np.maximum.at(heat, tuple(axis[close] for axis in at), heard[rows[close]])
        return front, heat

    def _disks(self) -> list[tuple[tuple[Whole, Whole], Whole]]:
        """Pixels of the disks, and whose they are: one entry per pixel of a disk."""
        reach = range(-self.radius, self.radius + 1)
        offsets = [(i, j) for i in reach for j in reach if i * i + j * j <= self.radius**2]
        found: list[tuple[tuple[Whole, Whole], Whole]] = []
        for down, right in offsets:
            rows, columns = self.rows + down, self.columns + right
            inside = (rows >= 0) & (rows < self.size[0]) & (columns >= 0) & (columns < self.size[1])
            found.append(((rows[inside], columns[inside]), np.flatnonzero(inside)))
        return found


def _best_direction(points: Floats, values: Floats, apart: float) -> Floats:
    """The unit vector (3,) towards the eye that sees most of the highest values, then most."""
    step = -(-len(points) // _TRIED)
    top = np.argsort(-values, kind="stable")[: max(1, round(_MOST_SHOWN * len(points)))]
    weight = np.zeros(len(points))
    weight[top] = np.nan_to_num(values[top] - np.median(values))  # none where nothing is known
    chosen = np.unique(np.concatenate([np.arange(0, len(points), step), top]))
    points, weight = points[chosen], weight[chosen]
    seen = [_seen_from(eye, points, weight, apart) for eye in _directions()]
    return _directions()[max(range(len(seen)), key=seen.__getitem__)]


def _seen_from(eye: Floats, points: Floats, weight: Floats, apart: float) -> tuple[float, int]:
    """The weight of the points in front, pixel by pixel, and the number of their pixels."""
    front, _ = _Shot.of(points @ _camera(eye), _COARSE, apart).drawn(weight)
    shown = front[front >= 0]
    return float(weight[shown].sum()), len(shown)


def _directions() -> Floats:
    """(_DIRECTIONS, 3) unit vectors, even on the sphere: a Fibonacci spiral."""
    step = np.arange(_DIRECTIONS) + 0.5
    z = 1 - 2 * step / _DIRECTIONS
    turn = np.pi * (1 + np.sqrt(5)) * step
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(turn), across * np.sin(turn), z], axis=1)


def _camera(eye: Floats) -> Floats:
    """(3, 3) with the columns right, up and towards the eye; z is up, or y seen along z."""
    upright = np.array([0.0, 0.0, 1.0] if abs(eye[2]) < 0.99 else [0.0, 1.0, 0.0])
    right = np.cross(upright, eye)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(eye, right), eye], axis=1)


def _shaded(
    front: Whole, points: Floats, camera: Floats, colors: Floats | None
) -> NDArray[np.uint8]:
    """(H, W, 3) of what lies in front."""
    shown, place = np.unique(front[front >= 0], return_inverse=True)
    steep = np.abs(_normals(points[shown]) @ camera[:, 2])  # 1 is seen head on
    depth = points[shown] @ camera[:, 2]
    near = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-12)
    light = (0.3 + 0.7 * steep) * (0.75 + 0.25 * near)
    base = np.full((len(shown), 3), _GREY) if colors is None else colors[shown]
    picture = np.empty((*front.shape, 3), np.uint8)
    picture[:] = _BACKGROUND
    picture[front >= 0] = (255 * (base * light[:, None]).clip(0, 1)).round()[place]
    return picture


def _normals(points: Floats) -> Floats:
    """(P, 3) unit normals: the axis of least spread of each point's neighborhood."""
    from scipy.spatial import cKDTree

    count = min(_AROUND, len(points))
    around = points[cKDTree(points).query(points, k=[*range(1, count + 1)])[1]]  # (P, n, 3)
    around = around - around.mean(1, keepdims=True)
    return np.linalg.eigh(around.transpose(0, 2, 1) @ around)[1][:, :, 0]


def _framed(picture: NDArray, fill: object) -> NDArray:
    """The picture (H, W, ...) with a margin around it."""
    height, width = picture.shape[:2]
    whole = height + 2 * _MARGIN, width + 2 * _MARGIN, *picture.shape[2:]
    framed = np.empty(whole, picture.dtype)
    framed[:] = fill
    framed[_MARGIN : _MARGIN + height, _MARGIN : _MARGIN + width] = picture
    return framed
