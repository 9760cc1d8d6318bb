"""Pixels and points with their place in the world."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from medssl.data.modality import Modality

Frame = Literal["patient", "pixel", "sensor"]
AXES = ("HW", "DHW", "THW", "TDHW")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Image:
    """Pixels and their place in the world.

    pixels: (C, *axes) float32, in the modality's own unit (HU for CT, the stored integers for a
        picture).
    axes: "HW", "DHW", "THW" or "TDHW".
    modality: what the numbers mean.
    affine: (4, 4) float64; maps the voxel-centre index (d, h, w, 1), in the order of the array's
        spatial axes, to coordinates of `frame`. A 2D image has d = 0.
    frame: "patient" (mm, RAS+), "pixel" (the source's own index grid (d, h, w): the identity when
        read) or "sensor" (depth camera).
    spacing: mm between pixel centres, one per spatial axis of `axes`; None where not physical.
    valid: (*spatial axes) bool, False on padding, gaps and missing depth; None where all are valid.
    times_s: seconds of each frame, present exactly when `axes` has T.
    channels: a name per channel.
    units: what one count is ("HU", "stored", ...).
    value_range: the smallest and largest value the source can hold ((0, 255) for 8 bits);
        None for physical units.
    provenance: how the pixels came to be (reader, transfer syntax, hashes, choices made).
    """

    pixels: Tensor
    axes: str
    modality: Modality
    affine: Tensor
    frame: Frame
    spacing: tuple[float, ...] | None = None
    valid: Tensor | None = None
    times_s: tuple[float, ...] | None = None
    channels: tuple[str, ...] = ()
    units: str = "stored"
    value_range: tuple[float, float] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.axes not in AXES:
            raise ValueError(f"axes must be one of {', '.join(AXES)}, got {self.axes!r}")
        if self.pixels.ndim != 1 + len(self.axes):
            raise ValueError(
                f"axes {self.axes!r} need pixels of {1 + len(self.axes)} dimensions, "
                f"got {tuple(self.pixels.shape)}; add the channel axis with pixels[None]"
            )
        if self.pixels.dtype != torch.float32:
            raise ValueError(f"pixels must be float32, got {self.pixels.dtype}; use pixels.float()")
        if tuple(self.affine.shape) != (4, 4) or self.affine.dtype != torch.float64:
            raise ValueError(
                f"affine must be a (4, 4) float64 tensor, got {tuple(self.affine.shape)} "
                f"{self.affine.dtype}"
            )
        if self.spacing is not None and len(self.spacing) != len(self.spatial_shape):
            raise ValueError(
                f"one spacing per spatial axis: got {len(self.spacing)} "
                f"for {len(self.spatial_shape)} axes"
            )
        if self.valid is not None and tuple(self.valid.shape) != self.spatial_shape:
            raise ValueError(
                f"valid must have the spatial shape {self.spatial_shape}, "
                f"got {tuple(self.valid.shape)}"
            )
        if ("T" in self.axes) != (self.times_s is not None):
            raise ValueError(f"times_s belongs to a T axis; axes are {self.axes!r}")

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Sizes of the spatial axes: (H, W) or (D, H, W)."""
        return tuple(self.pixels.shape[2 if "T" in self.axes else 1 :])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PointCloud:
    """Free points; an organized cloud is an `Image` of xyz in the sensor frame instead.

    points: (P, 3) float32.
    unit: "m", "mm" or "unknown".
    colors, normals: (P, 3) float32 or None; colors in 0..1, normals as stored.
    valid: (P,) bool, False on points that are not looked at (a table, clutter); None: all are.
        Points keep their number and order, so that one value per point leads home.
    provenance: how the points came to be (reader, points left out, hashes, doubts).
    """

    points: Tensor
    unit: str
    colors: Tensor | None = None
    normals: Tensor | None = None
    valid: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.valid is not None and tuple(self.valid.shape) != (len(self.points),):
            raise ValueError(f"valid must be ({len(self.points)},), got {tuple(self.valid.shape)}")
        for name in ("points", "colors", "normals"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (len(self.points), 3):
                raise ValueError(
                    f"{name} must be ({len(self.points)}, 3), got {tuple(value.shape)}"
                )

    @property
    def looked_at(self) -> Tensor:
        """(P,) bool: `valid`, or True everywhere."""
        if self.valid is None:
            return torch.ones(len(self.points), dtype=torch.bool, device=self.points.device)
        return self.valid

    def to(self, device: torch.device | str) -> "PointCloud":
        """The same cloud on `device`."""
        tensors = {
            name: value.to(device)
            for name in ("points", "colors", "normals", "valid")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **tensors)


def pixel_affine() -> Tensor:
    """The affine of an image read in its own index grid: the identity, (4, 4) float64."""
    return torch.eye(4, dtype=torch.float64)
