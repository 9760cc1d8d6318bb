"""Small RGB-D items, an encoder that says the mean color of 4 x 4 pixels, and a bare descriptor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anomaly.base import Detector
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample
from medssl.models.encoder import Encoder
from medssl.models.folder import load_model, save_model, selftest_noise


class MeanColor(Encoder):
    """Layer "0" is the mean color of each cell of 4 x 4 pixels, or its first pixel alone."""

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.in_channels = self.embedding_dim = 3
        self.first = first
        self.network = nn.Sequential(nn.Conv2d(3, 3, 4, stride=4, bias=False))
        with torch.no_grad():
            weight = self.network[0].weight.zero_()
            for channel in range(3):
                if first:
                    weight[channel, channel, 0, 0] = 1
                else:
                    weight[channel, channel] = 1 / 16


class Heights(nn.Module):
    """Describes a point by its coordinates, and remembers what it was shown."""

    embedding_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []
        self.normals: list[Tensor] = []

    def describe(self, points: Tensor, normals: Tensor) -> Tensor:
        self.shown.append(points)
        self.normals.append(normals)
        return points


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def color_image(pixels: Tensor, valid: Tensor | None = None) -> Image:
    """Of pixels (3, H, W)."""
    return Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
        valid=valid,
    )


def xyz_image(z: Tensor, valid: Tensor | None = None, *, pitch: float = 1.0) -> Image:
    """Of heights (H, W) before the sensor, one point every `pitch`."""
    rows, columns = torch.meshgrid(*(torch.arange(float(n)) for n in z.shape), indexing="ij")
    return Image(
        pixels=torch.stack([pitch * columns, pitch * rows, z]),
        axes="HW",
        modality=Modality.DEPTH,
        affine=pixel_affine(),
        frame="sensor",
        valid=valid,
        channels=("x", "y", "z"),
    )


def scene(
    seed: int,
    *,
    size: tuple[int, int] = (32, 24),
    group: str | None = None,
    color_valid: Tensor | None = None,
    xyz_valid: Tensor | None = None,
) -> Sample:
    """Fine noise on a grey picture, and on a plane 100 before the sensor."""
    color = 0.5 + 0.05 * noise(3, *size, seed=seed)
    z = 100 + 0.05 * noise(*size, seed=1000 + seed)
    images = {"image": color_image(color, color_valid), "xyz": xyz_image(z, xyz_valid)}
    return Sample(item=f"scene{seed}", images=images, label=0, group=group)


def damaged(sample: Sample, cell: tuple[int, int], *roles: str) -> Sample:
    """The sample with one cell of 4 x 4 pixels bright, or raised to a pyramid, or both."""
    at = (..., *(slice(4 * i, 4 * i + 4) for i in cell))
    for role in roles:
        image = sample.images[role]
        pixels = image.pixels.clone()
        if role == "image":
            pixels[at] += 3
        else:
            ramp = torch.tensor([1.0, 2.0, 2.0, 1.0])
            pixels[2][at] -= torch.minimum(ramp[:, None], ramp)
        sample = sample.with_image(replace(image, pixels=pixels), role)
    return sample


def spoiled(sample: Sample, rubbish: float) -> Sample:
    """The sample with `rubbish` in every pixel that is not valid."""
    for role, image in sample.images.items():
        assert image.valid is not None
        pixels = torch.where(image.valid, image.pixels, rubbish)
        sample = sample.with_image(replace(image, pixels=pixels), role)
    return sample


def without(sample: Sample, modality: str) -> Sample:
    """The sample as it is where no depth camera, or no color camera, was there."""
    if modality == "geometry":
        images = {"image": sample.images["image"]}
    else:
        images = {"image": sample.images["xyz"]}
    return Sample(item=sample.item, images=images, label=sample.label, group=sample.group)


def reloaded(detector: Detector, folder: Path, size: tuple[int, int]) -> Any:
    """The fitted detector of pictures of this size as its model folder gives it back."""
    save_model(
        folder,
        detector,
        kind="detector",
        preprocessing=Preprocessing(size=size, intensity="percentile"),
        domain={},
        card="",
        noise=selftest_noise(detector.selftest_shape((3, *size))),
    )
    return load_model(folder, kind="detector", trust=["rgbd_scenes"]).model


def peak(values: Tensor) -> tuple[int, int]:
    """The cell of 4 x 4 pixels in which a map (H, W) is largest."""
    row, column = divmod(int(values.nan_to_num(-torch.inf).argmax()), values.shape[1])
    return row // 4, column // 4
