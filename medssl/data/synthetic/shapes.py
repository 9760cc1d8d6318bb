"""Small pictures of one of eight shapes, with a report: a set where raw pixels say little."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample

SIDE = 32

_Outline = Callable[[Tensor, Tensor], Tensor]
_SHAPES: dict[str, _Outline] = {  # inside, for down and right in units of half the shape's size
    "disk": lambda y, x: y.square() + x.square() < 1,
    "ring": lambda y, x: (y.square() + x.square() < 1) & (y.square() + x.square() > 0.35),
    "square": lambda y, x: torch.maximum(y.abs(), x.abs()) < 0.85,
    "frame": lambda y, x: (torch.maximum(y.abs(), x.abs()) - 0.7).abs() < 0.2,
    "triangle": lambda y, x: (y < 0.8) & (y > 2 * x.abs() - 1),
    "cross": lambda y, x: (torch.minimum(y.abs(), x.abs()) < 0.25) & (y.abs() + x.abs() < 1.2),
    "bar": lambda y, x: (y.abs() < 0.3) & (x.abs() < 1.1),
    "chevron": lambda y, x: (y + 0.6 - 1.2 * x.abs()).abs() < 0.35,
}
SHAPES = tuple(_SHAPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapePictures:
    """pixels: (S, 1, 32, 32), about -2 to 2. labels: (S,) int64, index into `SHAPES`. reports: one
    sentence or two per picture, of shape, size, brightness and place.
    """

    pixels: Tensor
    labels: Tensor
    reports: tuple[str, ...]


def shape_pictures(count: int, *, seed: int) -> ShapePictures:
    """Pictures of random shape and place, bright or dark, on a faint ramp and in noise.

    Bright and dark shapes are equally frequent and lie anywhere, so that neither neighbours in raw
    pixels nor a linear function of these tell the shapes apart. Size varies little and contrast not
    at all: two crops of a picture would share them, and they would be learnt before the shape.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    draws = torch.rand(count, 6, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    pixels = torch.empty(count, 1, SIDE, SIDE)
    reports = []
    for picture, label, (size, y, x, sign, slope, turn) in zip(
        pixels, labels.tolist(), draws.tolist(), strict=True
    ):
        half = 4.7 + 1.6 * size
        middle = [1.1 * half + (SIDE - 1 - 2.2 * half) * share for share in (y, x)]
        name, bright = SHAPES[label], sign > 0.5
        inside = _SHAPES[name]((rows - middle[0]) / half, (columns - middle[1]) / half)
        angle = torch.tensor(turn * 2 * torch.pi)
        ramp = ((rows / SIDE - 0.5) * angle.sin() + (columns / SIDE - 0.5) * angle.cos()) * slope
        contrast = 1 if bright else -1
        noise = 0.5 * torch.randn(SIDE, SIDE, generator=generator)
        picture[0] = inside * contrast + 0.2 * ramp + noise
        reports.append(_report(name, half, bright, middle))
    return ShapePictures(pixels=pixels, labels=labels, reports=tuple(reports))


def shape_samples(count: int, *, seed: int) -> list[Sample]:
    """The same as samples: one per patient and study, with its report."""
    made = shape_pictures(count, seed=seed)
    return [
        Sample(
            item=f"shape{index}",
            images={
                "image": Image(
                    pixels=pixels,
                    axes="HW",
                    modality=Modality.PICTURE,
                    affine=pixel_affine(),
                    frame="pixel",
                )
            },
            report=report,
            group=f"patient{index}",
            study=f"study{index}",
        )
        for index, (pixels, report) in enumerate(zip(made.pixels, made.reports, strict=True))
    ]


def _report(name: str, half: float, bright: bool, middle: list[float]) -> str:
    size = "small" if half < 5.2 else "large" if half > 5.8 else "medium"
    down = "upper" if middle[0] < SIDE / 2 else "lower"
    right = "left" if middle[1] < SIDE / 2 else "right"
    light = "bright" if bright else "dark"
    return f"There is a {size} {light} {name}. It lies in the {down} {right} part."
