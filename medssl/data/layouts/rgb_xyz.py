"""Any folder in which a depth camera's pictures and points lie side by side.

    rgb/NAME.png     a picture
    xyz/NAME.tiff    three float channels x, y, z on the picture's grid (or an organized PCD)

An `xyz` file without its picture is an image of its own. An `xyz` folder without an `rgb` folder
beside it may hold anything, and stays as it is.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from medssl.data.layouts.plain import Entry, Listing
from medssl.data.modality import Modality

PICTURES = "rgb"
GEOMETRY = "xyz"


def place_rgb_xyz(listing: Listing) -> Listing:
    """The images, then the geometry of each picture tied to it.

    Raises ValueError as `tied_geometry` does.
    """
    folders = {entry.relative.parent for entry in listing.entries}
    pictures = [entry for entry in listing.entries if entry.relative.parent.name == PICTURES]
    geometry = [entry for entry in listing.entries if _beside_pictures(entry, folders)]
    told = {entry.key: entry for entry in tied_geometry(geometry, pictures)}
    entries = [told.get(entry.key, entry) for entry in listing.entries]
    return replace(listing, entries=companions_last(entries))


def tied_geometry(geometry: Iterable[Entry], pictures: Iterable[Entry]) -> list[Entry]:
    """Each file of geometry as the companion of the picture of its name in the folder beside its
    own, or as an image of its own (modality DEPTH) where there is none.

    Raises ValueError where a name fits two pictures or two files of geometry.
    """
    by_place = by_name(pictures)
    return [_told(one, by_place.get(place)) for place, one in by_name(geometry).items()]


def by_name(entries: Iterable[Entry]) -> dict[PurePosixPath, Entry]:
    """Each file by the folder above its own, and its name without the suffix.

    Raises ValueError where two files have one such place.
    """
    found: dict[PurePosixPath, Entry] = {}
    for entry in entries:
        folder = entry.relative.parent
        place = folder.parent / entry.relative.stem
        if place in found:
            raise ValueError(
                f"two files of a folder {folder.name!r} have one name but for their suffix; give "
                "each a name of its own"
            )
        found[place] = entry
    return found


def companions_last(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The images in their order, then what belongs to them in its order."""
    return tuple(sorted(entries, key=lambda entry: entry.role != "image"))


def _beside_pictures(entry: Entry, folders: set[PurePosixPath]) -> bool:
    folder = entry.relative.parent
    return folder.name == GEOMETRY and folder.with_name(PICTURES) in folders


def _told(geometry: Entry, picture: Entry | None) -> Entry:
    depth = replace(geometry, modality=Modality.DEPTH)
    return depth if picture is None else replace(depth, role="xyz", of=picture.key, label=None)
