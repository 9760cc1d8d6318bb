"""Surface normals of what a depth camera saw."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from medssl.data.image import Image


def normals(xyz: Image) -> Image:
    """The unit normal of the surface at each pixel of an organized cloud: (3, H, W), no unit.

    The cross product of the central differences along rows and columns, turned towards the sensor,
    which is the origin of the sensor frame: n . p <= 0. NaN and invalid where the pixel or one of
    its four neighbors is missing, and so on the border. Where one object ends in front of another,
    a normal spans the step between the two.
    Raises ValueError for anything but channels x, y, z of one picture in the sensor frame.
    """
    given = (xyz.axes, xyz.frame, xyz.channels)
    if given != ("HW", "sensor", ("x", "y", "z")) or min(xyz.spatial_shape) < 3:
        raise ValueError(
            "normals need channels ('x', 'y', 'z') of at least 3 x 3 pixels in the sensor frame, "
            f"got channels {xyz.channels} of {xyz.axes} {xyz.spatial_shape} in frame {xyz.frame!r}"
        )
    points = xyz.pixels.double()
    if xyz.valid is not None:
        points = points.masked_fill(~xyz.valid, torch.nan)
    down = points[:, 2:, 1:-1] - points[:, :-2, 1:-1]  # (3, H - 2, W - 2)
    right = points[:, 1:-1, 2:] - points[:, 1:-1, :-2]
    here = points[:, 1:-1, 1:-1]
    across = torch.linalg.cross(down, right, dim=0)
    unit = across / across.norm(dim=0)  # NaN next to a missing pixel and where a difference is 0
    unit = torch.where((unit * here).sum(0) > 0, -unit, unit)
    unit = unit.masked_fill(~here.isfinite().all(0), torch.nan)
    pixels = F.pad(unit, (1, 1, 1, 1), value=torch.nan).float()
    return replace(
        xyz,
        pixels=pixels,
        valid=pixels.isfinite().all(0),
        channels=("normal_x", "normal_y", "normal_z"),
        units="1",
        value_range=(-1.0, 1.0),
    )
