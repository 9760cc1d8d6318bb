"""What kind of images a model was fitted on, so that it can refuse others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medssl.data.geometry import orientation
from medssl.data.image import Image

_FACTOR = 2.0  # how far beyond the range seen a spacing or size may lie
_ACROSS = {"S": 0, "I": 0, "A": 1, "P": 1, "L": 2, "R": 2}


def learn_domain(images: Iterable[Image]) -> dict[str, Any]:
    """The domain of a model's images as they are read, in plain values for model.yaml.

    modality, channels: every one seen. axes: the one seen.
    spacing_mm: {"min": [...], "max": [...]} per axis, or None where an image has no spacing.
    size: the same in pixels.
    Axes are the array's; those of a volume in the patient frame are put in the order
    head-foot, front-back, left-right, so that the plane of acquisition does not matter.

    Raises ValueError where there is no image or where axes differ.
    """
    modalities: set[str] = set()
    channels: set[int] = set()
    axes: set[str] = set()
    sizes: list[tuple[float, ...]] = []
    spacings: list[tuple[float, ...] | None] = []
    for image in images:
        modalities.add(image.modality.value)
        channels.add(len(image.pixels))
        axes.add(image.axes)
        size, spacing = _size_and_spacing(image)
        sizes.append(size)
        spacings.append(spacing)
    if len(axes) != 1:
        raise ValueError(
            f"a domain needs images of one kind of axes, got {sorted(axes) or 'no image'}; "
            "select one kind"
        )
    known = [spacing for spacing in spacings if spacing is not None]
    return {
        "modality": sorted(modalities),
        "axes": axes.pop(),
        "channels": sorted(channels),
        "spacing_mm": _range(known) if len(known) == len(spacings) else None,
        "size": _range(sizes),
    }


def check_domain(image: Image, domain: Mapping[str, Any]) -> str | None:
    """Why an image, as it is read, lies outside a domain; None where it lies inside.

    Outside is another modality, other axes or another number of channels, and a spacing or size
    more than a factor of two beyond the range seen.
    """
    if image.modality.value not in domain["modality"]:
        return _reason("modality", image.modality.value, " or ".join(domain["modality"]))
    if image.axes != domain["axes"]:
        return _reason("axes", image.axes, domain["axes"])
    if len(image.pixels) not in domain["channels"]:
        seen = " or ".join(map(str, domain["channels"]))
        return _reason("number of channels", len(image.pixels), seen)
    size, spacing = _size_and_spacing(image)
    seen_spacing = domain["spacing_mm"]
    if seen_spacing is not None:
        if spacing is None:
            return _reason("spacing", "unknown", f"{_shown(seen_spacing)} mm")
        if _beyond(spacing, seen_spacing):
            return _reason("spacing", f"{_joined(spacing)} mm", f"{_shown(seen_spacing)} mm")
    if _beyond(size, domain["size"]):
        return _reason("size", f"{_joined(size)} pixels", f"{_shown(domain['size'])} pixels")
    return None


def _size_and_spacing(image: Image) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    order = list(range(len(image.spatial_shape)))
    if image.frame == "patient" and len(order) == 3:
        code = orientation(image.affine)
        order.sort(key=lambda axis: _ACROSS[code[axis]])
    size = tuple(float(image.spatial_shape[axis]) for axis in order)
    spacing = image.spacing and tuple(image.spacing[axis] for axis in order)
    return size, spacing


def _range(values: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    per_axis = list(zip(*values, strict=True))
    return {"min": [min(axis) for axis in per_axis], "max": [max(axis) for axis in per_axis]}


def _beyond(values: Sequence[float], seen: Mapping[str, Sequence[float]]) -> bool:
    return any(
        value * _FACTOR < low or value > high * _FACTOR
        for value, low, high in zip(values, seen["min"], seen["max"], strict=True)
    )


def _reason(what: str, got: object, seen: object) -> str:
    return f"{what} {got}, but the model was fitted on {seen}"


def _joined(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _shown(seen: Mapping[str, Sequence[float]]) -> str:
    return f"{_joined(seen['min'])} to {_joined(seen['max'])}"
