"""From the source's units and grid to what a network sees, on the record and reversible."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from medssl.data.geometry import reorient, resample, resize
from medssl.data.geometry_steps import Geometry, removed
from medssl.data.image import Image
from medssl.data.modality import Modality, ct_window
from medssl.data.region import crop_ultrasound, foreground, intracranial
from medssl.data.sample import Sample

PLANES = {"axial": "SPL", "coronal": "PIL", "sagittal": "LIP"}
"""Plane -> the direction in which the index of each array axis (D, H, W) grows, so that a slice is
shown as radiologists hang it: axial with anterior up, and the patient's right on the left."""

_PERCENTILES = (0.005, 0.995)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What every image goes through before a network; saved with each model.

    `size` and `intensity` belong to pictures and volumes, `geometry` to xyz images and free clouds;
    RGB-D takes all three. What the geometry leaves out as background is invalid in the picture too.

    size: (H, W) in pixels after resizing with antialiasing; the aspect ratio is not kept. Of
        volumes (D, H, W) too, for networks that take whole ones; with two sides D stays.
    intensity: "window" clips `window_hu` (CT); "range" divides by what the source can hold (8- and
        16-bit pictures, normals); "percentile" stretches the 0.5th to the 99.5th percentile of the
        valid pixels (float pictures); "foreground" does so with those of the body alone (MR, PET;
        see `medssl.data.region.foreground`), so that the air around it does not count; "depth" with
        the distances of a depth image, near is 0, x and y are left out. Each maps to [0, 1].
    window_hu: a name in `medssl.data.modality.CT_WINDOWS`, or centre and width in HU; with
        "window" only.
    channels: 1 keeps or makes grey; 3 repeats grey; None keeps what the source has.
    mean, std: subtracted and divided after the intensity step, one per channel or one for all.
    plane: volumes are turned so that the last two axes are this plane and D runs across it.
    slab: slices of a volume that make up one picture (odd): each slice gets those before and behind
        it as further channels (2.5D), so that a 2D network sees across slices. Beyond the ends the
        last slice is repeated.
    slab_mm: distance of the slices of a slab, rounded to whole slices, so that volumes with slices
        of different thickness are seen alike; None takes the next ones.
    region: what is looked at; the rest becomes invalid: set to the low end of the intensities, not
        fitted, and without a map. "intracranial" is what the skull encloses in a head CT;
        "ultrasound" cuts a picture to the regions that its DICOM header declares (see
        `medssl.data.region`).
    geometry: of xyz images, also of those beside a picture, and of free clouds.
    """

    size: tuple[int, int] | tuple[int, int, int] | None = None
    intensity: Literal["window", "range", "percentile", "foreground", "depth"] | None = None
    window_hu: tuple[float, float] | str | None = None
    channels: int | None = None
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    region: Literal["all", "intracranial", "ultrasound"] = "all"
    slab: int = 1
    slab_mm: float | None = None
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        if self.geometry is None and (self.size is None or self.intensity is None):
            raise ValueError("pictures and volumes need size and intensity; clouds need geometry")
        if self.size is not None and len(self.size) not in (2, 3):
            raise ValueError(f"size is (H, W), or (D, H, W) of volumes, got {self.size}")
        if self.slab < 1 or self.slab % 2 == 0:
            raise ValueError(f"slab is 1, 3, 5 ... slices, got {self.slab}")
        if (self.intensity == "window") != (self.window_hu is not None):
            raise ValueError(
                f"window_hu belongs to intensity 'window': got {self.intensity!r} "
                f"and window_hu {self.window_hu}"
            )
        if self.window_hu is not None:
            ct_window(self.window_hu)  # a name that is none is refused here, before any image
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"one positive std per mean, got mean {self.mean} and std {self.std}")

    def __call__(self, image: Image) -> Image:
        """The image on the network's grid and scale; its affine still leads home."""
        if "T" in image.axes:
            raise ValueError(f"images with a T axis are not supported yet, got {image.axes!r}")
        if self.geometry is not None and image.channels == ("x", "y", "z"):
            size = self.size
            return self.geometry.of_image(image, None if size is None else (size[-2], size[-1]))
        if self.intensity == "depth":
            image = _depth(image)
        image = resize(self._looked_at(self._oriented(image)), self.picture_size)
        pixels = self._with_neighbours(
            image, self._standardized(self._matched(self._scaled(image)))
        )
        return replace(image, pixels=pixels, value_range=None, units="normalized")

    @property
    def picture_size(self) -> tuple[int, int] | tuple[int, int, int]:
        """Raises ValueError where this is the preprocessing of clouds alone."""
        if self.size is None:
            raise ValueError("this preprocessing is of clouds and takes no picture; give its size")
        return self.size

    def sample(self, sample: Sample) -> Sample:
        """The sample with its images and points preprocessed and its mask on the same grid.

        Without `geometry`, the xyz beside a picture is left out: it would stay on its own grid.
        """
        if sample.points is not None:
            if self.geometry is None:
                raise ValueError("a free point cloud has no picture to preprocess; leave it out")
            return replace(sample, points=self.geometry.of_cloud(sample.points))
        images = {**sample.images, "image": self(sample.images["image"])}
        xyz = images.pop("xyz", None)
        if xyz is not None and self.geometry is not None:
            images |= self._with_geometry(images["image"], xyz)
        mask = sample.mask
        if mask is not None:
            mask = resample(mask, to=images["image"], mode="nearest", outside=0.0)
        return replace(sample, images=images, mask=mask)

    def _with_geometry(self, picture: Image, xyz: Image) -> dict[str, Image]:
        """The prepared geometry, and the prepared picture without the background it shows."""
        assert self.geometry is not None
        plain = Geometry(unit=self.geometry.unit)
        height, width = picture.spatial_shape
        seen = self.geometry.of_image(xyz, (height, width))
        valid = ~removed(plain.of_image(xyz, (height, width)), seen)
        if picture.valid is not None:
            valid &= picture.valid
        return {"image": replace(picture, valid=valid), "xyz": seen}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for model.yaml."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`."""
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        if arguments.get("geometry") is not None:
            arguments["geometry"] = Geometry(**arguments["geometry"])
        return cls(**arguments)

    def _oriented(self, image: Image) -> Image:
        if image.axes == "DHW" and image.frame == "patient":
            return reorient(image, PLANES[self.plane])
        return image

    def _looked_at(self, image: Image) -> Image:
        if self.region == "all":
            return image
        if self.region == "ultrasound":
            return crop_ultrasound(image)
        region = intracranial(image)
        return replace(image, valid=region if image.valid is None else region & image.valid)

    def _scaled(self, image: Image) -> Image:
        """Intensities to [0, 1]; invalid pixels become 0."""
        low, high = self._limits(image)
        pixels = ((image.pixels - low) / max(high - low, 1e-12)).clamp(0, 1)
        if image.valid is not None:
            pixels = torch.where(image.valid, pixels, 0.0)
        return replace(image, pixels=pixels)

    def _limits(self, image: Image) -> tuple[float, float]:
        if self.intensity is None:
            raise ValueError(
                f"this preprocessing is of geometry alone and takes no {image.modality} picture; "
                "give its intensity"
            )
        if self.intensity == "window":
            if image.modality is not Modality.CT:
                raise ValueError(
                    f"an HU window needs CT, got {image.modality}; use intensity 'percentile' or "
                    "'range'"
                )
            assert self.window_hu is not None
            center, width = ct_window(self.window_hu)
            return center - width / 2, center + width / 2
        if self.intensity == "range":
            if image.value_range is None:
                raise ValueError(
                    f"intensity 'range' needs a source with a fixed range, and {image.modality} in "
                    f"{image.units} has none; use 'percentile' or, for CT, 'window'"
                )
            return image.value_range
        valid = image.valid
        if self.intensity == "foreground":
            inside = foreground(image)
            valid = inside if valid is None else inside & valid
        values = image.pixels if valid is None else image.pixels[:, valid]
        return _percentiles(values.flatten())

    def _matched(self, image: Image) -> torch.Tensor:
        """(C, *axes) pixels with the wanted number of channels."""
        pixels = image.pixels
        if self.channels is None or len(pixels) == self.channels:
            return pixels
        if len(pixels) == 1:
            return pixels.expand(self.channels, *pixels.shape[1:])
        if self.channels == 1 and len(pixels) == 3:  # ITU-R BT.601 luma, as every picture tool
            weights = torch.tensor([0.299, 0.587, 0.114])
            return torch.tensordot(weights, pixels, dims=1)[None]
        raise ValueError(
            f"an image of {len(pixels)} channels cannot become {self.channels}; only grey is "
            "repeated and only RGB is made grey"
        )

    def _standardized(self, pixels: torch.Tensor) -> torch.Tensor:
        shape = (-1,) + (1,) * (pixels.ndim - 1)
        mean = torch.tensor(self.mean).reshape(shape)
        std = torch.tensor(self.std).reshape(shape)
        if len(self.mean) not in (1, len(pixels)):
            raise ValueError(
                f"{len(self.mean)} means for an image of {len(pixels)} channels; give one, "
                "or one per channel"
            )
        return ((pixels - mean) / std).contiguous()

    def _with_neighbours(self, image: Image, pixels: torch.Tensor) -> torch.Tensor:
        """(C, D, H, W) -> (slab C, D, H, W), slice by slice."""
        if self.slab == 1:
            return pixels
        if image.axes != "DHW":
            raise ValueError(
                f"a slab of {self.slab} slices needs a volume, got axes {image.axes!r}; set slab 1"
            )
        step = 1
        if self.slab_mm is not None:
            if image.spacing is None:
                raise ValueError("slab_mm needs a volume with a spacing; leave it out")
            step = max(1, round(self.slab_mm / image.spacing[0]))
        depth, reach = pixels.shape[1], self.slab // 2
        places = torch.arange(depth) + step * torch.arange(-reach, reach + 1)[:, None]  # (slab, D)
        return pixels[:, places.clamp(0, depth - 1)].transpose(0, 1).flatten(0, 1)


def _depth(image: Image) -> Image:
    """The distances of a depth image: its channel z, or the only one it has."""
    if image.modality is not Modality.DEPTH:
        raise ValueError(f"intensity 'depth' needs a depth image, got {image.modality}")
    if "z" in image.channels:
        z = image.channels.index("z")
        return replace(image, pixels=image.pixels[z : z + 1], channels=("z",))
    if len(image.pixels) > 1:
        raise ValueError(
            f"a depth image has one channel or one that is called 'z', got {len(image.pixels)} "
            f"channels {image.channels}"
        )
    return image


def _percentiles(values: torch.Tensor, at_most: int = 1_000_000) -> tuple[float, float]:
    """The limits of a robust stretch, from at most a million evenly strided finite values."""
    values = values[values.isfinite()]
    if values.numel() == 0:
        raise ValueError("the image has no valid finite pixel")
    values = values[:: max(1, values.numel() // at_most)]
    low, high = torch.quantile(values[:16_000_000], torch.tensor(_PERCENTILES)).tolist()
    return low, high
