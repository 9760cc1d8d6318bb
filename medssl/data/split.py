"""Splits that never part the items of one patient, part or other group."""

import random
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Grouped(Protocol):
    """What a split looks at: an item of a manifest, or a sample."""

    @property
    def item(self) -> str:
        """Its id."""

    @property
    def group(self) -> str | None:
        """Salted patient or part."""


Kind = TypeVar("Kind", bound=Grouped)


def split_by_group(items: Sequence[Kind], share: float, seed: int) -> tuple[list[Kind], list[Kind]]:
    """Hold out a share of the items, whole groups at a time: (the rest, the held-out).

    share: of the items, in (0, 1); met as closely as groups taken in random order allow. Both
        sides get something wherever there are two groups.

    The same items in the same order and the same seed give the same split, under any key. Each
    side keeps the order of `items`.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    groups = _shuffled_groups(items, seed)
    target = share * len(items)
    held_out: set[str] = set()
    count = 0
    for group, size in groups:
        if count + size <= target:
            held_out.add(group)
            count += size
    left = [(size, group) for group, size in groups if group not in held_out]
    if len(left) > 1:
        size, group = min(left, key=lambda one: one[0])  # the first of equals: still random
        if not held_out or count + size - target < target - count:
            held_out.add(group)
    return (
        [item for item in items if _group(item) not in held_out],
        [item for item in items if _group(item) in held_out],
    )


def folds_by_group(items: Sequence[Kind], k: int, seed: int) -> list[list[Kind]]:
    """Cut items into k folds of about equal size, whole groups at a time.

    The largest groups are dealt first, each to the smallest fold; equals in random order. Raises
    ValueError where there are fewer groups than folds.
    """
    groups = _shuffled_groups(items, seed)
    if k < 2 or k > len(groups):
        raise ValueError(
            f"{k} folds need at least 2 folds and as many groups; there are {len(groups)} groups"
        )
    sizes = [0] * k
    fold_of = {}
    for group, size in sorted(groups, key=lambda one: -one[1]):
        fold = sizes.index(min(sizes))
        fold_of[group] = fold
        sizes[fold] += size
    return [[item for item in items if fold_of[_group(item)] == fold] for fold in range(k)]


def _group(item: Grouped) -> str:
    """An item without a group is a group of its own."""
    return f"group {item.group}" if item.group is not None else f"item {item.item}"


def _shuffled_groups(items: Sequence[Grouped], seed: int) -> list[tuple[str, int]]:
    """Each group with its number of items, in an order that only `items` and the seed decide."""
    sizes: dict[str, int] = {}
    for item in items:
        sizes[_group(item)] = sizes.get(_group(item), 0) + 1
    groups = list(sizes.items())  # in order of first sight: salted names would order by the key
    random.Random(seed).shuffle(groups)
    return groups
