"""What kind of images or clouds a model was fitted on, so that it can refuse others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medssl.data.geometry import orientation
from medssl.data.image import Image, PointCloud
from medssl.data.sample import Sample

_FACTOR = 2.0  # how far beyond the range seen a spacing or size may lie
_ACROSS = {"S": 0, "I": 0, "A": 1, "P": 1, "L": 2, "R": 2}


def domain_of(samples: Iterable[Sample]) -> dict[str, Any]:
    """The domain of a model's items, in plain values for model.yaml.

    Of images that of `learn_domain`. Of pictures with xyz beside them, that of the pictures, and
    under "xyz" that of the geometry, wherever it lies. Of free clouds:

    axes: "points". unit: every one seen. extent: the range of twice the distance of the farthest
        point from the mean of all, in that unit, which no turn changes. num_points: their range.

    Raises ValueError where there is no item, where axes differ, and for clouds beside images.
    """
    pictures, geometry, clouds = _Images(), _Images(), _Clouds()
    for sample in samples:
        if sample.points is not None:
            clouds.add(sample.points)
        for role in sample.images.keys() & {"image", "xyz"}:
            image = sample.images[role]
            (geometry if _is_xyz(image) else pictures).add(image)
    if clouds.seen and (pictures.seen or geometry.seen):
        raise ValueError("a domain is of free clouds or of images, got both; select one kind")
    if clouds.seen:
        return clouds.domain()
    if pictures.seen and geometry.seen:
        return {**pictures.domain(), "xyz": geometry.domain()}
    return (geometry if geometry.seen else pictures).domain()


def check_sample(sample: Sample, domain: Mapping[str, Any]) -> str | None:
    """Why an item lies outside a domain of `domain_of`; None where it lies inside.

    Clouds as images: outside is another unit, and an extent or a number of points more than a
    factor of two beyond the range seen. Where picture or xyz is missing, the other one is checked.
    """
    if sample.points is not None:
        return _check_cloud(sample.points, domain)
    image, xyz = sample.images["image"], sample.images.get("xyz")
    of_xyz = domain.get("xyz")
    if of_xyz is not None and _is_xyz(image):
        return check_domain(image, of_xyz)
    reason = check_domain(image, domain)
    if reason is None and of_xyz is not None and xyz is not None:
        return check_domain(xyz, of_xyz)
    return reason


def learn_domain(images: Iterable[Image]) -> dict[str, Any]:
    """The domain of a model's images as they are read, in plain values for model.yaml.

    modality, channels: every one seen. axes: the one seen.
    spacing_mm: {"min": [...], "max": [...]} per axis, or None where an image has no spacing.
    size: the same in pixels.
    units: every one seen, of xyz images only.
    Axes are the array's; those of a volume in the patient frame are put in the order
    head-foot, front-back, left-right, so that the plane of acquisition does not matter.

    Raises ValueError where there is no image or where axes differ.
    """
    seen = _Images()
    for image in images:
        seen.add(image)
    return seen.domain()


def check_domain(image: Image, domain: Mapping[str, Any]) -> str | None:
    """Why an image, as it is read, lies outside a domain; None where it lies inside.

    Outside is another modality, other axes or another number of channels, another unit of xyz, and
    a spacing or size more than a factor of two beyond the range seen.
    """
    if domain["axes"] == "points":
        return f"an image with axes {image.axes}, but the model was fitted on free point clouds"
    if image.modality.value not in domain["modality"]:
        return _reason("modality", image.modality.value, " or ".join(domain["modality"]))
    if image.axes != domain["axes"]:
        return _reason("axes", image.axes, domain["axes"])
    if len(image.pixels) not in domain["channels"]:
        seen = " or ".join(map(str, domain["channels"]))
        return _reason("number of channels", len(image.pixels), seen)
    if "units" in domain and image.units not in domain["units"]:
        return _reason("unit", image.units, " or ".join(domain["units"]))
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


class _Images:
    """What was seen of images so far."""

    def __init__(self) -> None:
        self.modalities: set[str] = set()
        self.channels: set[int] = set()
        self.axes: set[str] = set()
        self.units: set[str] = set()
        self.sizes: list[tuple[float, ...]] = []
        self.spacings: list[tuple[float, ...] | None] = []

    @property
    def seen(self) -> bool:
        return bool(self.sizes)

    def add(self, image: Image) -> None:
        self.modalities.add(image.modality.value)
        self.channels.add(len(image.pixels))
        self.axes.add(image.axes)
        if _is_xyz(image):
            self.units.add(image.units)
        size, spacing = _size_and_spacing(image)
        self.sizes.append(size)
        self.spacings.append(spacing)

    def domain(self) -> dict[str, Any]:
        if len(self.axes) != 1:
            raise ValueError(
                "a domain needs images of one kind of axes, got "
                f"{sorted(self.axes) or 'no image'}; select one kind"
            )
        known = [spacing for spacing in self.spacings if spacing is not None]
        return {
            "modality": sorted(self.modalities),
            "axes": next(iter(self.axes)),
            "channels": sorted(self.channels),
            "spacing_mm": _range(known) if len(known) == len(self.spacings) else None,
            "size": _range(self.sizes),
            **({"units": sorted(self.units)} if self.units else {}),
        }


class _Clouds:
    """What was seen of free clouds so far."""

    def __init__(self) -> None:
        self.units: set[str] = set()
        self.extents: list[tuple[float, ...]] = []
        self.counts: list[tuple[float, ...]] = []

    @property
    def seen(self) -> bool:
        return bool(self.counts)

    def add(self, cloud: PointCloud) -> None:
        self.units.add(cloud.unit)
        self.extents.append((_extent(cloud),))
        self.counts.append((float(len(cloud.points)),))

    def domain(self) -> dict[str, Any]:
        return {
            "axes": "points",
            "unit": sorted(self.units),
            "extent": _range(self.extents),
            "num_points": _range(self.counts),
        }


def _check_cloud(cloud: PointCloud, domain: Mapping[str, Any]) -> str | None:
    if domain["axes"] != "points":
        seen = f"images with axes {domain['axes']}"
        return f"a free point cloud, but the model was fitted on {seen}"
    if cloud.unit not in domain["unit"]:
        return _reason("unit", cloud.unit, " or ".join(domain["unit"]))
    for name, value in (("extent", _extent(cloud)), ("num_points", float(len(cloud.points)))):
        if _beyond((value,), domain[name]):
            what = name.replace("num_", "number of ")
            return _reason(what, f"{value:g}", _shown(domain[name]))
    return None


def _extent(cloud: PointCloud) -> float:
    points = cloud.points.double()
    points = points[cloud.looked_at & points.isfinite().all(1)]
    if len(points) == 0:
        return 0.0
    return float(f"{2 * (points - points.mean(0)).norm(dim=1).max():.6g}")


def _is_xyz(image: Image) -> bool:
    return image.channels == ("x", "y", "z")


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
