"""The folder layout of MVTec AD (Bergmann et al., CVPR 2019).

    train/good/*            normal images
    test/good/*             normal images
    test/<kind>/*           anomalous images; <kind> names the defect
    ground_truth/<kind>/<name>_mask.png (.tif, .nii, .nii.gz): the mask of test/<kind>/<name>.*

One such category, or a folder of categories. Beside it, with no counterpart in the original:
`train_extra/<kind>` (more training images, normal or not, for pretraining without labels) and
`test_nomask/<kind>` (a label and no mask).
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from medssl.data.layouts.plain import Entry, Listing

_log = logging.getLogger(__name__)

NORMAL = "good"
SECTIONS: Mapping[str, Literal["train", "test"]] = {
    "train": "train",
    "train_extra": "train",
    "test": "test",
    "test_nomask": "test",
}
MASKS = "ground_truth"


def is_mvtec_ad(root: Path) -> bool:
    """Whether a folder is one category, or holds at least one."""
    if not root.is_dir():
        return False
    return _is_category(root) or any(_is_category(folder) for folder in root.iterdir())


def place_mvtec_ad(root: Path, listing: Listing) -> Listing:
    """The images of `root` with split, label, category and defect, and the masks tied to them.

    An image outside the layout's folders and a mask without an image are counted as skipped.
    """
    images: list[Entry] = []
    masks: list[Entry] = []
    for entry in listing.entries:
        place = _place(root, entry)
        if place is None:
            continue
        category, section, kind = place
        if section == MASKS:
            masks.append(replace(entry, role="mask", split="test", category=category, defect=kind))
            continue
        normal = kind == NORMAL
        images.append(
            replace(
                entry,
                split=SECTIONS[section],
                label=0 if normal else 1,
                category=category,
                defect=None if normal else kind,
            )
        )
    tied = _tied(masks, images)
    left_out = len(listing.entries) - len(images) - len(tied)
    return Listing(entries=(*images, *tied), skipped=listing.skipped + left_out)


def _is_category(folder: Path) -> bool:
    parts = (f"train/{NORMAL}", f"test/{NORMAL}", MASKS)
    return any((folder / part).is_dir() for part in parts)


def _place(root: Path, entry: Entry) -> tuple[str, str, str] | None:
    """Category, section and kind of an entry; None where the layout has no place for it."""
    is_folder = entry.path.is_dir()
    parts = entry.relative.parts if is_folder else entry.relative.parent.parts
    if _is_category(root):
        parts = (root.name, *parts)
    if len(parts) < 3 or parts[1] not in (*SECTIONS, MASKS):
        return None
    return parts[0], parts[1], parts[2]


def _tied(masks: list[Entry], images: list[Entry]) -> list[Entry]:
    """Each mask with the key of its image; masks without an image are dropped."""
    by_place: dict[PurePosixPath, list[str]] = {}
    for image in images:
        by_place.setdefault(_without_suffix(image), []).append(image.key)
    tied = []
    for mask in masks:
        parts = list(_without_suffix(mask).parts)
        parts[parts.index(MASKS)] = "test"
        place = PurePosixPath(*parts[:-1], parts[-1].removesuffix("_mask"))
        keys = by_place.get(place, []) if parts[-1].endswith("_mask") else []
        if len(keys) > 1:
            raise ValueError(
                f"a mask of kind {mask.defect!r} fits {len(keys)} images of the same name; "
                "give each image a name, or each series a folder, of its own"
            )
        if keys:
            tied.append(replace(mask, of=keys[0]))
    if len(tied) < len(masks):
        missing = len(masks) - len(tied)
        _log.warning("%d of %d masks have no image and are left out", missing, len(masks))
    return tied


def _without_suffix(entry: Entry) -> PurePosixPath:
    """The relative path without the suffix of a file; a series' folder keeps its dots."""
    if entry.path.is_dir():
        return entry.relative
    name = entry.relative.name
    if name.lower().endswith(".nii.gz"):
        return entry.relative.with_name(name[: -len(".nii.gz")])
    return entry.relative.with_suffix("")
