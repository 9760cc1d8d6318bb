"""Small normal pictures and volumes, for the examples that the contract tests use."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample


def smooth_pictures(count: int = 8, size: Sequence[int] = (64, 48)) -> list[Sample]:
    """Smooth noise of one channel; the first picture has invalid pixels at its left."""
    return _smooth(count, size, "HW")


def smooth_volumes(count: int = 8, size: Sequence[int] = (16, 32, 24)) -> list[Sample]:
    """Smooth noise of one channel, (D, H, W); the first volume has invalid voxels at its left."""
    return _smooth(count, size, "DHW")


def _smooth(count: int, size: Sequence[int], axes: str) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        coarse = torch.randn(1, 1, *(max(2, side // 8) for side in size), generator=generator)
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
