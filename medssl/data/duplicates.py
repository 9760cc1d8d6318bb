"""The same pixels more than once: re-packed, re-anonymized, or on both sides of a split."""

from collections.abc import Sequence
from dataclasses import dataclass

from medssl.data.manifest import Item


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Images with one `pixel_sha256`.

    across_splits: some are for training and some for testing.
    across_groups: they are said to be of different patients or parts.
    """

    items: tuple[str, ...]
    across_splits: bool
    across_groups: bool


def find_duplicates(items: Sequence[Item]) -> list[Duplicate]:
    """The images that are the same, in the manifest's order; images without a hash are left out."""
    same: dict[str, list[Item]] = {}
    for item in items:
        if item.role == "image" and item.pixel_sha256 is not None:
            same.setdefault(item.pixel_sha256, []).append(item)
    return [
        Duplicate(
            items=tuple(item.item for item in copies),
            across_splits=len({item.split for item in copies}) > 1,
            across_groups=len({item.group or item.item for item in copies}) > 1,
        )
        for copies in same.values()
        if len(copies) > 1
    ]
