"""The largest plane among points: RANSAC, then least squares on its inliers."""

from dataclasses import dataclass

import torch
from torch import Tensor

_DRAWS = 500  # planes tried: with half of the points on the plane, 1e-29 to miss it
_SAMPLE = 5000  # points that judge each of them
_MIN_SHARE = 0.3  # a plane with less of the points is none


@dataclass(frozen=True, eq=False)
class Plane:
    """normal . p = offset.

    normal: (3,) float64, of length 1. share: of the points that lie on it.
    """

    normal: Tensor
    offset: float
    share: float

    def distance(self, points: Tensor) -> Tensor:
        """(P,) signed distance of points (P, 3), positive on the side of the normal."""
        return (points.double() @ self.normal - self.offset).to(points.dtype)


def find_plane(points: Tensor, distance: float) -> Plane | None:
    """The plane that most of the points (P, 3) lie within `distance` of; None where there is none.

    Fischler and Bolles, "Random sample consensus", CACM 1981: the best of 500 planes through three
    points, by an even sample of at most 5,000, refined twice by least squares on its inliers. Equal
    points give an equal plane. No plane holds less than three tenths of the points.
    """
    if len(points) < 3:
        return None
    center = points.double().mean(0)  # map coordinates of 1e6 would lose their millimetres
    around = points.double() - center
    generator = torch.Generator().manual_seed(0)
    judges = around[torch.randperm(len(around), generator=generator)[:_SAMPLE].to(points.device)]
    corners = judges[torch.randint(len(judges), (_DRAWS, 3), generator=generator).to(points.device)]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = normals.norm(dim=1)
    usable = length > 1e-12 * length.max().clamp_min(1e-300)
    normals = normals[usable] / length[usable, None]
    offsets = (normals * corners[usable, 0]).sum(1)
    if not len(normals):
        return None
    on_plane = (judges @ normals.T - offsets).abs() <= distance  # (J, draws)
    best = int(on_plane.sum(0).argmax())
    normal, offset = normals[best], offsets[best]
    for _ in range(2):
        inliers = around[(around @ normal - offset).abs() <= distance]
        normal, offset = _fitted(inliers)
    share = float(((around @ normal - offset).abs() <= distance).double().mean())
    if share < _MIN_SHARE:
        return None
    return Plane(normal, float(offset + center @ normal), share)


def _fitted(points: Tensor) -> tuple[Tensor, Tensor]:
    """The normal and offset of least squared distances; the largest component is positive."""
    middle = points.mean(0)
    _, directions = torch.linalg.eigh((points - middle).mT @ (points - middle))
    normal = directions[:, 0]
    normal = normal * normal[normal.abs().argmax()].sign()
    return normal, normal @ middle
