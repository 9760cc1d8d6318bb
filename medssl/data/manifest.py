"""A folder as a table of items: what is on disk, without having decoded it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medssl.data.companions import beside, on_image
from medssl.data.groups import read_groups
from medssl.data.image import Image, PointCloud
from medssl.data.layouts.eyecandies import is_eyecandies_depth, read_eyecandies_depth
from medssl.data.layouts.placed import placed
from medssl.data.layouts.plain import Entry, Listing, find_images
from medssl.data.layouts.real3d import point_labels
from medssl.data.layouts.reports_csv import report_of
from medssl.data.modality import Modality
from medssl.data.privacy import key_fingerprint, salted
from medssl.data.readers.any import Kind, read_image
from medssl.data.readers.errors import ReadError, UnsupportedFormatError
from medssl.data.readers.points import read_points
from medssl.data.readers.points_stored import Unit
from medssl.data.readers.stored import read_text
from medssl.data.sample import Sample
from medssl.data.select import compile_selection


class NoDataError(ValueError):
    """Nothing that could be worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of a manifest, or the mask, report or xyz of one.

    item: salted identifier; the only name of the item that may leave this machine.
    path: absolute; local.
    kind: which reader; a mask of kind "text" is a label for each point of a free cloud.
    role: "xyz" is what a depth camera measured beside its picture; without a picture it is "image".
    series: salted series identifier, as `read_image(series=...)` takes it.
    of: the item that a mask, report or xyz belongs to.
    label: 0 normal, 1 anomalous, None unknown.
    defect: what kind of anomaly, where the folder says so.
    group: salted patient or part. study: salted study.
    modality: what the headers say; see `Modality`.
    unit: of points, xyz and depth, where the folder or the user says; files do not.
    file_sha256, pixel_sha256: None until somebody has read the file.
    """

    item: str
    path: str
    kind: Kind | Literal["text"]
    series: str | None = None
    role: Literal["image", "mask", "report", "xyz"] = "image"
    of: str | None = None
    split: Literal["train", "test"] | None = None
    label: int | None = None
    category: str | None = None
    defect: str | None = None
    group: str | None = None
    study: str | None = None
    modality: str = Modality.UNKNOWN.value
    unit: Unit | None = None
    file_sha256: str | None = None
    pixel_sha256: str | None = None


COLUMNS: dict[str, type] = {
    field.name: int if field.name == "label" else str for field in fields(Item)
}
_LOCAL = ("path", "file_sha256", "pixel_sha256")
_LATER = ("unit",)
"""Not in older tables: those are read as well, and have the digest that they had."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Images in the order of their relative paths, then masks, reports and xyz.

    key: fingerprint of the key that salted the identifiers.
    skipped: number of files of the folder that are no image, or that its layout has no place for.
    """

    items: tuple[Item, ...]
    key: str
    skipped: int = 0

    @property
    def images(self) -> tuple[Item, ...]:
        """The items that belong to no other."""
        return tuple(item for item in self.items if item.role == "image")

    @property
    def digest(self) -> str:
        """16 hex digits of what the manifest says; neither the place on disk nor the order count.

        Identifiers are salted, so equal digests need the same key.
        """
        rows = [json.dumps(_lasting(item)) for item in self.items]
        return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]

    @cached_property
    def _belonging(self) -> dict[tuple[str, str | None], Item]:
        return {(item.role, item.of): item for item in self.items if item.role != "image"}

    def mask_of(self, item: Item) -> Item | None:
        """The mask item of an image item, or None."""
        return self._belonging.get(("mask", item.item))

    def report_of(self, item: Item) -> Item | None:
        """The report item of an image item, or None."""
        return self._belonging.get(("report", item.item))

    def xyz_of(self, item: Item) -> Item | None:
        """The item of the geometry beside a picture item, or None."""
        return self._belonging.get(("xyz", item.item))

    def paths(self) -> dict[str, PurePosixPath]:
        """The absolute path of each image."""
        return {item.item: PurePosixPath(Path(item.path).as_posix()) for item in self.images}

    def where(self, **equal: str | int | None) -> "Manifest":
        """The images whose columns have these values, with what belongs to them."""
        for name in equal:
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}; the manifest has {', '.join(COLUMNS)}")
        return self._with_images(
            [
                item
                for item in self.images
                if all(getattr(item, name) == value for name, value in equal.items())
            ]
        )

    def select(self, expression: str) -> "Manifest":
        """The images for which an expression over the columns holds, with what belongs to them.

        `split == 'train' and label == 0`, `category in ['nut', 'bolt']`, `defect is None`.
        Raises ValueError as `compile_selection` does.
        """
        matches = compile_selection(expression, COLUMNS)
        return self._with_images([item for item in self.images if matches(asdict(item))])

    def _with_images(self, images: Sequence[Item]) -> "Manifest":
        kept = {item.item for item in images}
        items = [item for item in self.items if (item.of or item.item) in kept]
        return replace(self, items=tuple(items))

    def write(self, path: Path) -> None:
        """Write as parquet; whole or not at all."""
        import pyarrow as pa
        from pyarrow import parquet

        types = {str: pa.string(), int: pa.int64()}
        about = {"medssl_key": self.key, "medssl_skipped": str(self.skipped)}
        schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()], metadata=about)
        table = pa.Table.from_pylist([asdict(item) for item in self.items], schema=schema)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        parquet.write_table(table, fresh)
        fresh.replace(path)


def _lasting(item: Item) -> dict[str, str | int | None]:
    """What a digest is over."""
    return {
        name: value
        for name, value in asdict(item).items()
        if name not in _LOCAL and not (name in _LATER and value is None)
    }


def read_manifest(path: Path) -> Manifest:
    """A manifest that `Manifest.write` wrote.

    Raises ValueError where the file is none, or was made with another key: its identifiers and
    groups could not be compared with any made here.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"expected a manifest in parquet, and this is none: {error}") from None
    about = table.schema.metadata or {}
    if b"medssl_key" not in about or {*table.column_names, *_LATER} != set(COLUMNS):
        raise ValueError(
            f"expected a manifest with the columns {', '.join(COLUMNS)} and the fingerprint of its "
            f"key; got the columns {', '.join(table.column_names)}. Write it with medssl manifest"
        )
    key = about[b"medssl_key"].decode()
    if key != key_fingerprint():
        raise ValueError(
            f"the manifest was made with the key {key} and yours is {key_fingerprint()}, so their "
            "identifiers cannot be compared; let MEDSSL_KEY_FILE name that key, or build the "
            "manifest again from the folder"
        )
    items = tuple(Item(**row) for row in table.to_pylist())
    return Manifest(items=items, key=key, skipped=int(about.get(b"medssl_skipped", b"0")))


def build_manifest(path: Path, *, groups: str | None = None) -> Manifest:
    """The images of a folder (in a layout of `medssl.data.layouts`, or any other), of one file, or
    of a manifest.

    Headers are read, pixels are not.

    groups: FILE:COLUMN, a CSV table that names the patient or part of every image; without it
        DICOM's patient counts, and a picture has no group.

    Raises FileNotFoundError where nothing lies at `path`, NoDataError where no image does, and
    ValueError as `read_groups` and `read_manifest` do.
    """
    given, path = path, Path(os.path.abspath(path))
    if not path.exists():
        raise FileNotFoundError(f"expected a folder, an image or a manifest; there is no {given}")
    if path.suffix == ".parquet":
        manifest = read_manifest(path)
    else:
        manifest = manifest_of(path, find_images(path))
    check_any(manifest, given)
    if groups is not None:
        manifest = with_groups(manifest, groups, path if path.is_dir() else path.parent)
    return manifest


def check_any(manifest: Manifest, path: Path) -> None:
    """Raises NoDataError where a manifest holds no image."""
    if not manifest.images:
        raise NoDataError(
            f"no image found in {path}: expected DICOM, NIfTI, pictures or points, "
            f"found {manifest.skipped} other files"
        )


def manifest_of(path: Path, listing: Listing) -> Manifest:
    """The manifest of what was found in a folder, placed as its layout says where it has one."""
    listing = placed(path, listing)
    items = _items(listing.entries)
    return Manifest(items=items, key=key_fingerprint(), skipped=listing.skipped)


def _items(entries: Sequence[Entry]) -> tuple[Item, ...]:
    keys = [entry.key for entry in entries]
    assert len(set(keys)) == len(keys), "two entries of one name"
    length = 12
    while len({salted(key, length=length) for key in keys}) < len(keys):
        length += 4  # as good as never: 1 in 500 for a million items
    return tuple(_item(entry, length) for entry in entries)


def _item(entry: Entry, length: int) -> Item:
    return Item(
        item=salted(entry.key, length=length),
        path=str(entry.path),
        kind=entry.kind,
        series=entry.series,
        role=entry.role,
        of=salted(entry.of, length=length) if entry.of is not None else None,
        split=entry.split,
        label=entry.label,
        category=entry.category,
        defect=entry.defect,
        group=entry.group,
        study=entry.study,
        modality=entry.modality.value,
        unit=entry.unit,
    )


def with_unit(manifest: Manifest, unit: Unit) -> Manifest:
    """The manifest with the unit of all its points, xyz and depth, whatever the folder said.

    Depth of Eyecandies stays in meters: it has a scale of its own beside it.
    """
    items = [replace(item, unit=unit) if _has_no_unit(item) else item for item in manifest.items]
    return replace(manifest, items=tuple(items))


def _has_no_unit(item: Item) -> bool:
    """Whether it holds coordinates or distances whose unit is not in the file."""
    if item.kind == "points":
        return True
    return item.modality == Modality.DEPTH and not is_eyecandies_depth(Path(item.path))


def with_groups(manifest: Manifest, spec: str, root: Path) -> Manifest:
    """The manifest with the salted groups of its images, from FILE:COLUMN as for `read_groups`.

    A mask belongs where its image does.
    """
    groups = read_groups(spec, root, manifest.paths())
    items = [replace(item, group=salted(groups[item.of or item.item])) for item in manifest.items]
    return replace(manifest, items=tuple(items))


def load_sample(manifest: Manifest, item: Item, *, hashes: bool = False) -> Sample:
    """Read an item with its mask, report and xyz; each on its own grid in one frame.

    The xyz beside a picture becomes the role "xyz", on the picture's grid; without a picture it is
    the role "image". A free point cloud becomes `points` instead of an image, and its mask
    `point_labels`.

    hashes: put `file_sha256` and `pixel_sha256` into the provenance of the image or the points.

    Raises ReadError, naming the item, where a file is missing or broken, or where mask or xyz
    cannot lie on the image, or the labels on the points.
    """
    try:
        found = _found(manifest, item, read_item(item, hashes=hashes))
    except ReadError as error:
        raise type(error)(f"item {item.item}: {error}") from error
    return replace(annotated(manifest, item), **found)


def _found(manifest: Manifest, item: Item, given: Image | PointCloud) -> dict[str, Any]:
    """What a sample gets from files: its images and mask, or its points and their labels."""
    mask, xyz = manifest.mask_of(item), manifest.xyz_of(item)
    if isinstance(given, PointCloud):
        if mask is not None and mask.kind != "text":
            raise UnsupportedFormatError(
                "its mask is a picture and it has free points; give it a label for each point"
            )
        labels = None if mask is None else point_labels(Path(mask.path), given)
        return {"points": given, "point_labels": labels}
    images = {"image": given}
    if xyz is not None:
        images["xyz"] = beside(read_item(xyz), given)
    marked = None if mask is None else read_image(Path(mask.path), series=mask.series)
    return {"images": images, "mask": None if marked is None else on_image(marked, given)}


def annotated(manifest: Manifest, item: Item) -> Sample:
    """What the manifest says of an item, and its report, without image and mask.

    Raises ReadError, naming the item, where the report cannot be read.
    """
    report = manifest.report_of(item)
    try:
        text = None if report is None else _report(Path(report.path), item)
    except ReadError as error:
        raise type(error)(f"item {item.item}: {error}") from error
    return Sample(item=item.item, report=text, label=item.label, group=item.group, study=item.study)


def _report(file: Path, item: Item) -> str:
    """Of a file of its own, or of a table of reports."""
    return report_of(file, Path(item.path)) if file.suffix == ".csv" else read_text(file)


def files_of(item: Item) -> list[Path]:
    """The files behind an item. Raises ReadError, naming the item, where they are not there."""
    path = Path(item.path)
    if not path.exists():
        raise ReadError(f"item {item.item}: its file is not there; build the manifest again")
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def read_item(item: Item, *, hashes: bool = False) -> Image | PointCloud:
    """What an item's file holds, alone. Raises ReadError, without naming the item."""
    path = Path(item.path)
    if item.kind == "points":
        return read_points(path, unit=item.unit, hashes=hashes)
    if item.modality == Modality.DEPTH and is_eyecandies_depth(path):
        return read_eyecandies_depth(path, hashes=hashes)
    return read_image(path, series=item.series, modality=_said(item), unit=item.unit, hashes=hashes)


def _said(item: Item) -> Modality | None:
    """The modality that a manifest gives to what has none in its header."""
    modality = Modality(item.modality)
    return None if modality in (Modality.UNKNOWN, Modality.PICTURE) else modality
