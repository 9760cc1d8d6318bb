"""What a person looks at: an original beside itself with the suspicious places coloured.

For display only. Heat starts at one value for a whole run, never at an image's own minimum, so that
a normal image stays clean.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.geometry import reorient
from medssl.data.image import Image
from medssl.data.modality import Modality, ct_window
from medssl.data.preprocess import PLANES, Preprocessing

LONGEST = 448
"""Pixels of the longer side of a displayed picture."""
COLORS = ((255, 221, 51), (250, 70, 40), (196, 0, 120))
"""From where heat starts to where it is full."""
OUTLINE = (0, 235, 255)
"""Rare in photographs and in grey images alike."""
BRAIN_WINDOW_HU = (40.0, 80.0)
_LINE = 2  # pixels between the original and the overlay


@dataclass(frozen=True, eq=False)
class View:
    """One displayed plane of an item, with square pixels.

    picture: (H, W, 3) uint8. heat: (H, W) float32 raw map values, -inf where there is none.
    where: which slice of a volume this is, "" for a picture.
    """

    picture: np.ndarray
    heat: np.ndarray
    where: str

    def save(self, file: Path) -> None:
        """Keep it until the heat scale of the run is known."""
        with file.open("wb") as stream:
            np.savez_compressed(stream, picture=self.picture, heat=self.heat, where=self.where)

    @classmethod
    def load(cls, file: Path) -> Self:
        """The inverse of `save`."""
        with np.load(file) as kept:
            return cls(kept["picture"], kept["heat"], str(kept["where"]))


@dataclass(frozen=True)
class HeatScale:
    """Which raw map values are coloured, for all items of a run alike.

    start: nothing below it is coloured. full: the strongest colour from here on.
    calibrated: `start` is the calibrated map threshold; else a percentile of the run.
    """

    start: float
    full: float
    calibrated: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def view(source: Image, values: Image | None, preprocessing: Preprocessing) -> View:
    """The picture, or the slice of a volume with the highest map value, ready to look at.

    values: (1, *axes) map on the grid of `source`; without one a volume shows its middle slice.
    Of xyz the distance z is shown, in grey.
    """
    if source.channels == ("x", "y", "z"):
        source = replace(source, pixels=source.pixels[2:], channels=("z",))
    if values is None:
        values = replace(
            source, pixels=torch.full_like(source.pixels[:1], torch.nan), channels=("none",)
        )
    low, high = _display_limits(source, preprocessing)
    plane = ""
    if source.axes == "DHW" and source.frame == "patient":
        plane = preprocessing.plane + " "
        code = PLANES[preprocessing.plane]
        source, values = reorient(source, code), reorient(values, code)
    pixels = source.pixels
    heat = torch.where(values.pixels[0].isnan(), -torch.inf, values.pixels[0])
    where = ""
    if source.axes == "DHW":
        highest = heat.amax((1, 2))
        d = int(highest.argmax()) if highest.isfinite().any() else len(heat) // 2
        where = f"{plane}slice {d + 1} of {len(heat)}"
        pixels, heat = pixels[:, d], heat[d]
    size = _square(pixels.shape[-2:], source.spacing)
    shown = ((pixels - low) / max(high - low, 1e-12)).nan_to_num(0.0).clamp(0, 1)
    shown = F.interpolate(_rgb(shown)[None], size, mode="bilinear", antialias=True)[0]
    picture = (shown * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return View(picture, F.adaptive_max_pool2d(heat[None], size)[0].numpy(), where)


def heat_scale(views: Iterable[View], map_threshold: float | None) -> HeatScale:
    """One scale for a run, from the calibrated map threshold where there is one.

    Without it, heat starts at the 99.5th percentile of the displayed map values of the run.
    """
    maxima, values = [], []
    for one in views:
        finite = one.heat[np.isfinite(one.heat)]
        if finite.size:
            maxima.append(float(finite.max()))
            values.append(finite[:: max(1, finite.size // 10_000)])
    start = map_threshold
    if start is None:
        start = float(np.quantile(np.concatenate(values), 0.995)) if values else 0.0
    above = [value for value in maxima if value > start]
    full = float(np.quantile(above, 0.95)) if above else start + max(abs(start), 1.0) / 2
    return HeatScale(start, full, map_threshold is not None)


def side_by_side(one: View, scale: HeatScale) -> np.ndarray:
    """The original, a thin line, and the original with heat: (H, 2 W + 2, 3) uint8."""
    line = np.full((len(one.picture), _LINE, 3), 128, np.uint8)
    return np.concatenate([one.picture, line, overlay(one, scale)], axis=1)


def overlay(one: View, scale: HeatScale) -> np.ndarray:
    """The picture with heat above `scale.start` and an outline around it: (H, W, 3) uint8."""
    from scipy.ndimage import binary_erosion

    above = one.heat > scale.start
    if not above.any():
        return one.picture
    thick = 1 + max(above.shape) // 300  # pixels of the outline
    span = max(scale.full - scale.start, 1e-12)
    strength = np.where(above, (one.heat - scale.start) / span, 0).clip(0, 1)
    knots = np.linspace(0, 1, len(COLORS))
    color = np.stack([np.interp(strength, knots, band) for band in np.transpose(COLORS)], axis=-1)
    alpha = np.where(above, 0.35 + 0.35 * strength, 0)[..., None]
    mixed = one.picture * (1 - alpha) + color * alpha
    mixed[above & ~binary_erosion(above, iterations=thick)] = OUTLINE
    return mixed.round().astype(np.uint8)


def _display_limits(image: Image, preprocessing: Preprocessing) -> tuple[float, float]:
    """Which values are shown black and white."""
    if image.modality is Modality.CT:
        center, width = ct_window(preprocessing.window_hu or BRAIN_WINDOW_HU)
        return center - width / 2, center + width / 2
    if image.value_range == (0, 255):
        return 0.0, 255.0
    values = image.pixels if image.valid is None else image.pixels[:, image.valid]
    values = values[values.isfinite()]
    if values.numel() == 0:
        return 0.0, 1.0
    sampled = values[:: max(1, values.numel() // 1_000_000)].numpy()
    low, high = np.quantile(sampled, (0.005, 0.995))
    return float(low), float(high)


def _rgb(pixels: Tensor) -> Tensor:
    return pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)


def _square(shape: torch.Size, spacing: tuple[float, ...] | None) -> tuple[int, int]:
    """The size (H, W) with square pixels, at most LONGEST."""
    height, width = shape
    tall, wide = spacing[-2:] if spacing is not None else (1.0, 1.0)
    unit = min(tall, wide)
    sides = height * tall / unit, width * wide / unit
    factor = min(1.0, LONGEST / max(sides))
    return max(1, round(sides[0] * factor)), max(1, round(sides[1] * factor))
