"""What a training has seen, so that nobody calibrates or tests with it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from medssl.data.manifest import Item
from medssl.data.privacy import key_fingerprint


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The pictures and patients of a training, without their names.

    pixels: `pixel_sha256` of every image.
    groups: salted patients or parts.
    key: fingerprint of the key that salted the groups; under another key they say nothing.
    """

    pixels: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()
    key: str = ""

    @classmethod
    def of(cls, items: Iterable[Item], hashes: Mapping[str, str]) -> Self:
        """What these items are; hashes: pixel hash by item id."""
        kept = list(items)
        groups = frozenset(item.group for item in kept if item.group is not None)
        pixels = frozenset(hashes[item.item] for item in kept)
        return cls(pixels=pixels, groups=groups, key=key_fingerprint())

    def __or__(self, other: "Seen") -> "Seen":
        """What either has seen; groups under an unlike key are left out, for nothing knows them."""
        same = not self.key or not other.key or self.key == other.key
        return Seen(
            pixels=self.pixels | other.pixels,
            groups=self.groups | other.groups if same else self.groups,
            key=self.key or other.key,
        )

    def knows(self, item: Item, pixel_sha256: str) -> bool:
        """Whether the training saw these pixels, or another image of the same patient or part."""
        related = self.key == key_fingerprint() and item.group in self.groups
        return pixel_sha256 in self.pixels or related

    def known(self, items: Iterable[Item], hashes: Mapping[str, str]) -> set[str]:
        """Ids of the items that the training knows, and of all others of their patients or parts.

        hashes: pixel hash by item id.
        """
        kept = list(items)
        names = {item.item for item in kept if self.knows(item, hashes[item.item])}
        groups = {item.group for item in kept if item.item in names} - {None}
        return names | {item.item for item in kept if item.group in groups}

    @property
    def foreign(self) -> bool:
        """Whether its groups were salted with another key, so that nothing can be said of them."""
        return bool(self.groups) and self.key != key_fingerprint()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"pixels": sorted(self.pixels), "groups": sorted(self.groups), "key": self.key}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            pixels=frozenset(values["pixels"]),
            groups=frozenset(values["groups"]),
            key=str(values["key"]),
        )
