"""The folder layout of MVTec 3D-AD (Bergmann et al., VISAPP 2022, https://arxiv.org/abs/2112.09045).

    train/good/{rgb,xyz}/NAME             normal pictures (.png) and their xyz (.tiff)
    validation/good/{rgb,xyz}/NAME        more normals
    test/good/{rgb,xyz}/NAME              normals
    test/<kind>/{rgb,xyz,gt}/NAME         anomalous; <kind> names the defect, gt holds the masks

One such category, or a folder of categories. Eyecandies, converted to this layout, fits as well.
Masks lie on the picture's grid. The set's own validation normals count as the training side: they
may be fitted on or held out for calibration, whatever the job does; published numbers fit on
`train` alone.

Unit: the ten categories of the set itself are in meters (their camera, a Zivid One+ Small, works at
0.3 to 1 m, and the published plane removal of M3DM cuts at 0.005, 5 mm). In a category of any other
name the unit is not known, as the files do not say it.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from medssl.data.layouts.plain import Entry, Listing
from medssl.data.layouts.rgb_xyz import (
    GEOMETRY,
    PICTURES,
    by_name,
    companions_last,
    tied_geometry,
)

_log = logging.getLogger(__name__)

NORMAL = "good"
SECTIONS: Mapping[str, Literal["train", "test"]] = {
    "train": "train",
    "validation": "train",
    "test": "test",
}
MASKS = "gt"
IN_METERS = frozenset(
    {
        *("bagel", "cable_gland", "carrot", "cookie", "dowel"),
        *("foam", "peach", "potato", "rope", "tire"),
    }
)


def is_mvtec_3d(root: Path) -> bool:
    """Whether a folder is one category, or holds at least one."""
    if not root.is_dir():
        return False
    return _is_category(root) or any(_is_category(folder) for folder in root.iterdir())


def place_mvtec_3d(root: Path, listing: Listing) -> Listing:
    """The pictures of `root` with split, label, category and defect, their xyz and their masks.

    Where a picture is missing its xyz is the image. What lies outside the layout's folders and a
    mask without an image are counted as skipped.

    Raises ValueError where two files of a folder have one name but for the suffix.
    """
    found: dict[str, list[Entry]] = {PICTURES: [], GEOMETRY: [], MASKS: []}
    above = (root.name,) if _is_category(root) else ()
    for entry in listing.entries:
        parts = (*above, *entry.relative.parent.parts)
        if len(parts) == 4 and parts[1] in SECTIONS and parts[3] in found:
            category, section, kind, folder = parts
            found[folder].append(_told(entry, category, section, kind))
    geometry = [_in_meters(entry) for entry in tied_geometry(found[GEOMETRY], found[PICTURES])]
    entries = [*found[PICTURES], *geometry]
    entries.sort(key=lambda entry: entry.relative.parts)
    entries += _tied(found[MASKS], entries)
    left_out = len(listing.entries) - len(entries)
    return Listing(entries=companions_last(entries), skipped=listing.skipped + left_out)


def _is_category(folder: Path) -> bool:
    return any(
        (folder / section / NORMAL / name).is_dir()
        for section in SECTIONS
        for name in (PICTURES, GEOMETRY)
    )


def _told(entry: Entry, category: str, section: str, kind: str) -> Entry:
    normal = kind == NORMAL
    return replace(
        entry,
        split=SECTIONS[section],
        label=0 if normal else 1,
        category=category,
        defect=None if normal else kind,
    )


def _in_meters(geometry: Entry) -> Entry:
    return replace(geometry, unit="m") if geometry.category in IN_METERS else geometry


def _tied(masks: list[Entry], entries: list[Entry]) -> list[Entry]:
    """Each mask with the key of its image; masks without an image are dropped."""
    images = by_name(entry for entry in entries if entry.role == "image")
    tied = [
        replace(mask, role="mask", label=None, of=images[place].key)
        for place, mask in by_name(masks).items()
        if place in images
    ]
    if len(tied) < len(masks):
        missing = len(masks) - len(tied)
        _log.warning("%d of %d masks have no image and are left out", missing, len(masks))
    return tied
