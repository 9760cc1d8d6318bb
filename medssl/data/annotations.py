"""What a table says of images: labels, sides, patients, masks, reports."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from medssl.data.manifest import Item, Manifest
from medssl.data.modality import Modality
from medssl.data.privacy import salted
from medssl.data.readers.any import sniff
from medssl.data.table import Row, Table, read_table

COLUMNS = ("label", "split", "category", "defect", "group", "modality", "mask", "report")
"""Columns of a table that are joined; `mask` and `report` name files."""

_LABELS = {"0": 0, "normal": 0, "1": 1, "anomalous": 1}
_SPLITS = {"train": "train", "test": "test"}


def join_table(manifest: Manifest, name: str, root: Path) -> tuple[Manifest, int]:
    """The manifest with what a CSV table says, and the number of images that the table names.

    name: of the table, looked for in `root`, beside it, and from the working directory. Its column
        `path` finds the image (see `Table.by_item`); of the others those in `COLUMNS` are joined:
        label (0, 1, normal or anomalous), split (train or test), category, defect, group (patient
        or part, salted), modality (as `Modality`), mask and report (files, relative to the table).
        An empty cell changes nothing.

    Raises ValueError where the table has none of these, names no image of the manifest, holds a
    value that is none of the above, or names a file that is not there.
    """
    table = read_table(name, root)
    joined = [column for column in COLUMNS if column in table.columns]
    if not joined:
        raise ValueError(
            f"the table has none of the columns {', '.join(COLUMNS)}; it has {list(table.columns)}"
        )
    paths = manifest.paths()
    rows = table.by_item(paths)
    if not rows:
        raise ValueError(
            f"none of the {len(paths)} images has a row in the table; its column path must end "
            "their paths, counted from any folder above them"
        )
    images = [_annotated(item, rows.get(item.item, {}), joined) for item in manifest.images]
    files = [
        _file(item, role, rows[item.item][role], table)
        for item in images
        for role in ("mask", "report")
        if rows.get(item.item, {}).get(role)
    ]
    told = {(item.of, item.role) for item in files}
    others = [
        item for item in manifest.items if item.role != "image" and (item.of, item.role) not in told
    ]
    return replace(manifest, items=(*images, *others, *files)), len(rows)


def _annotated(item: Item, row: Row, columns: list[str]) -> Item:
    ways: Mapping[str, Callable[[str], Any]] = {
        "label": lambda text: _one_of(text.lower(), _LABELS, "label"),
        "split": lambda text: _one_of(text.lower(), _SPLITS, "split"),
        "category": str,
        "defect": str,
        "group": salted,
        "modality": lambda text: _one_of(text, {m.value: m.value for m in Modality}, "modality"),
    }
    changes = {c: ways[c](row[c]) for c in columns if c in ways and row.get(c)}
    return replace(item, **changes)


def _one_of(text: str, known: Mapping[str, Any], column: str) -> Any:
    if text not in known:
        raise ValueError(f"the table's {column} must be one of {', '.join(known)}; got {text!r}")
    return known[text]


def _file(image: Item, role: str, name: str, table: Table) -> Item:
    """The item of a mask or report of an image."""
    path = (table.file.parent / name).absolute()
    if not path.exists():
        raise ValueError(f"the {role} of item {image.item} is not where the table says; correct it")
    kind = "text" if role == "report" else sniff(path)
    if kind is None:
        raise ValueError(f"the mask of item {image.item} is of no kind that can be read")
    return Item(
        item=salted(f"{role} {image.item}", length=len(image.item)),
        path=str(path),
        kind=kind,
        role="report" if role == "report" else "mask",
        of=image.item,
        split=image.split,
        category=image.category,
        defect=image.defect,
        group=image.group,
        study=image.study,
    )
