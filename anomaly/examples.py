"""Small normal images and clouds, for the examples that the contract tests use."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from medssl.data.image import Image, PointCloud, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample


def smooth_pictures(count: int = 8, size: Sequence[int] = (64, 48)) -> list[Sample]:
    """Smooth noise of one channel; the first picture has invalid pixels at its left."""
    return _smooth(count, size, "HW")


def smooth_volumes(count: int = 8, size: Sequence[int] = (16, 32, 24)) -> list[Sample]:
    """Smooth noise of one channel, (D, H, W); the first volume has invalid voxels at its left."""
    return _smooth(count, size, "DHW")


def bumpy_clouds(count: int = 8, num_points: int = 400) -> list[Sample]:
    """Points on bumpy balls of a radius of about 50 mm, colored; some of the first do not count."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        toward = F.normalize(torch.randn(num_points, 3, generator=generator), dim=1)
        phase = 6.28 * torch.rand(3, generator=generator)
        radius = 50 + 3 * torch.sin(3 * toward + phase).sum(1, keepdim=True)
        cloud = PointCloud(
            points=radius * toward,
            unit="mm",
            colors=0.5 + 0.4 * torch.sin(2 * toward + phase),
            valid=torch.arange(num_points) >= (num_points // 8 if i == 0 else 0),
        )
        samples.append(Sample(item=f"normal{i}", points=cloud, label=0))
    return samples


def relief_pictures(count: int = 8, size: Sequence[int] = (64, 48)) -> list[Sample]:
    """Smooth pictures of three channels over smooth reliefs in mm, as of a depth camera at 500 mm.

    The first has invalid pixels in both; the second misses depth in a patch of its own.
    """
    pictures = _smooth(count, size, "HW", channels=3)
    reliefs = _smooth(count, size, "HW", seed=1)
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    samples = []
    for i, (picture, relief) in enumerate(zip(pictures, reliefs, strict=True)):
        color = picture.images["image"]
        z = 500 + 3 * relief.images["image"].pixels[0]
        valid = torch.ones(*size, dtype=torch.bool) if color.valid is None else color.valid.clone()
        valid[4:12, 4:12] &= i != 1
        xyz = Image(
            pixels=torch.stack([columns - size[1] / 2, rows - size[0] / 2, z]),
            axes="HW",
            modality=Modality.DEPTH,
            affine=pixel_affine(),
            frame="sensor",
            valid=valid,
            channels=("x", "y", "z"),
            units="mm",
        )
        samples.append(Sample(item=f"normal{i}", images={"image": color, "xyz": xyz}, label=0))
    return samples


def _smooth(
    count: int, size: Sequence[int], axes: str, *, channels: int = 1, seed: int = 0
) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(count):
        coarse = torch.randn(
            1, channels, *(max(2, side // 8) for side in size), generator=generator
        )
        mode = "bilinear" if len(size) == 2 else "trilinear"
        valid = torch.ones(*size, dtype=torch.bool)
        valid[..., : size[-1] // 3] = i > 0
        image = Image(
            pixels=F.interpolate(coarse, tuple(size), mode=mode)[0],
            axes=axes,
            modality=Modality.UNKNOWN,
            affine=pixel_affine(),
            frame="pixel",
            valid=valid,
        )
        samples.append(Sample(item=f"normal{i}", images={"image": image}, label=0))
    return samples
