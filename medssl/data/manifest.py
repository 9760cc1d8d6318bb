"""A folder as a table of items: what is on disk, without having decoded it."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

from medssl.data.groups import read_groups
from medssl.data.image import Image, PointCloud
from medssl.data.layouts.mvtec_ad import is_mvtec_ad, place_mvtec_ad
from medssl.data.layouts.plain import Entry, Listing, find_images
from medssl.data.layouts.reports_csv import is_reports_csv, place_reports_csv, report_of
from medssl.data.modality import Modality
from medssl.data.privacy import key_fingerprint, salted
from medssl.data.readers.any import Kind, read_image
from medssl.data.readers.errors import InconsistentGeometryError, ReadError
from medssl.data.readers.points import read_points
from medssl.data.readers.stored import read_text
from medssl.data.sample import Sample
from medssl.data.select import compile_selection


class NoDataError(ValueError):
    """Nothing that could be worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One image of a manifest, or the mask or report of one.

    item: salted identifier; the only name of the item that may leave this machine.
    path: absolute; local.
    kind: which reader.
    series: salted series identifier, as `read_image(series=...)` takes it.
    of: the item that a mask or report belongs to.
    label: 0 normal, 1 anomalous, None unknown.
    defect: what kind of anomaly, where the folder says so.
    group: salted patient or part. study: salted study.
    modality: what the headers say; see `Modality`.
    file_sha256, pixel_sha256: None until somebody has read the file.
    """

    item: str
    path: str
    kind: Kind | Literal["text"]
    series: str | None = None
    role: Literal["image", "mask", "report"] = "image"
    of: str | None = None
    split: Literal["train", "test"] | None = None
    label: int | None = None
    category: str | None = None
    defect: str | None = None
    group: str | None = None
    study: str | None = None
    modality: str = Modality.UNKNOWN.value
    file_sha256: str | None = None
    pixel_sha256: str | None = None


COLUMNS: dict[str, type] = {
    field.name: int if field.name == "label" else str for field in fields(Item)
}
_LOCAL = ("path", "file_sha256", "pixel_sha256")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Images in the order of their relative paths, then masks and reports.

    key: fingerprint of the key that salted the identifiers.
    skipped: number of files of the folder that are no image, or that its layout has no place for.
    """

    items: tuple[Item, ...]
    key: str
    skipped: int = 0

    @property
    def images(self) -> tuple[Item, ...]:
        """The items that are neither mask nor report."""
        return tuple(item for item in self.items if item.role == "image")

    @property
    def digest(self) -> str:
        """16 hex digits of what the manifest says; neither the place on disk nor the order count.

        Identifiers are salted, so equal digests need the same key.
        """
        rows = [
            json.dumps({name: value for name, value in asdict(item).items() if name not in _LOCAL})
            for item in self.items
        ]
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

    def paths(self) -> dict[str, PurePosixPath]:
        """The absolute path of each image."""
        return {item.item: PurePosixPath(Path(item.path).as_posix()) for item in self.images}

    def where(self, **equal: str | int | None) -> "Manifest":
        """The images whose columns have these values, with their masks."""
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
        """The images for which an expression over the columns holds, with their masks.

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
    if b"medssl_key" not in about or set(table.column_names) != set(COLUMNS):
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
    """The images of a folder (in MVTec AD's layout, with a table of reports, or any other), of one
    file, or of a manifest.

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
            f"no image found in {path}: expected DICOM, NIfTI or pictures, "
            f"found {manifest.skipped} other files"
        )


def manifest_of(path: Path, listing: Listing) -> Manifest:
    """The manifest of what was found in a folder, placed as its layout says where it has one."""
    if is_mvtec_ad(path):
        listing = place_mvtec_ad(path, listing)
    elif is_reports_csv(path):
        listing = place_reports_csv(path, listing)
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
    )


def with_groups(manifest: Manifest, spec: str, root: Path) -> Manifest:
    """The manifest with the salted groups of its images, from FILE:COLUMN as for `read_groups`.

    A mask belongs where its image does.
    """
    groups = read_groups(spec, root, manifest.paths())
    items = [replace(item, group=salted(groups[item.of or item.item])) for item in manifest.items]
    return replace(manifest, items=tuple(items))


def load_sample(manifest: Manifest, item: Item, *, hashes: bool = False) -> Sample:
    """Read an item with its mask and report; image and mask each on its own grid in one frame.

    A free point cloud becomes `points` instead of an image.

    hashes: put `file_sha256` and `pixel_sha256` into the image's provenance.

    Raises ReadError, naming the item, where a file is missing or broken, or where the mask cannot
    lie on the image.
    """
    try:
        given = _read(item, hashes=hashes)
        mask_item = manifest.mask_of(item)
        mask = None
        if mask_item is not None and isinstance(given, Image):
            mask = _on_image(read_image(Path(mask_item.path), series=mask_item.series), given)
    except ReadError as error:
        raise type(error)(f"item {item.item}: {error}") from error
    return replace(
        annotated(manifest, item),
        images={"image": given} if isinstance(given, Image) else {},
        points=given if isinstance(given, PointCloud) else None,
        mask=mask,
    )


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


def _read(item: Item, *, hashes: bool) -> Image | PointCloud:
    if item.kind == "points":
        return read_points(Path(item.path), hashes=hashes)
    path, series = Path(item.path), item.series
    return read_image(path, series=series, modality=_said(item), hashes=hashes)


def _said(item: Item) -> Modality | None:
    """The modality that a manifest gives to what has none in its header."""
    modality = Modality(item.modality)
    return None if modality in (Modality.UNKNOWN, Modality.PICTURE) else modality


def _on_image(mask: Image, image: Image) -> Image:
    """A mask of zeros and ones in the frame of `image`.

    A mask without a frame of its own (a picture) must have the image's shape and lies on its grid.
    """
    marked = (mask.pixels > 0).any(dim=0, keepdim=True).float()  # (1, *axes)
    mask = replace(mask, pixels=marked, value_range=(0.0, 1.0), channels=(), units="mask")
    if mask.frame == "pixel":
        if mask.spatial_shape != image.spatial_shape:
            raise InconsistentGeometryError(
                f"its mask has the size {mask.spatial_shape} and the image {image.spatial_shape}; "
                "draw the mask on the image's own grid"
            )
        return replace(mask, affine=image.affine, frame=image.frame, spacing=image.spacing)
    if mask.frame != image.frame:
        raise InconsistentGeometryError(
            f"its mask lies in the {mask.frame} frame and the image in the {image.frame} frame; "
            "save the mask in the geometry of the image"
        )
    return mask
