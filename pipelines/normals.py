"""Which images are normal and can be read, and which are fitted on, held out or folded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from anomaly.calibration import Method, required_normals
from medssl.data.manifest import Item, Manifest, NoDataError, read_item
from medssl.data.seen import Seen
from medssl.data.split import folds_by_group, split_by_group
from pipelines.console import progress

HELD_OUT = 0.3
FOLDS = 5


def normal_items(
    manifest: Manifest, *, select: str | None = None, max_train: int | None = None, seed: int = 0
) -> list[Item]:
    """The images to fit on, in the manifest's order; nothing labelled anomalous or for testing.

    Raises NoDataError where none is left.
    """
    if max_train is not None and max_train < 1:
        raise ValueError(f"max_train must be at least 1, got {max_train}")
    images = (manifest if select is None else manifest.select(select)).images
    sides = any(item.split is not None for item in manifest.images)
    normals = [item for item in images if item.label != 1 and (item.split == "train" or not sides)]
    if not normals:
        raise NoDataError(
            f"none of the {len(manifest.images)} images is a normal "
            f"{'training ' if sides else ''}image"
            f"{'' if select is None else f' with {select}'}; check the folder and the selection"
        )
    if max_train is None or max_train >= len(normals):
        return normals
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(normals), generator=generator)[:max_train]
    return [normals[index] for index in chosen.sort().values.tolist()]


def read_hashes(items: Sequence[Item], what: str, errors: list[dict[str, str]]) -> dict[str, str]:
    """Pixel hash by item, as the manifest knows it, else read; what cannot be is added to `errors`.

    Masks, xyz and their faults are not looked at.

    what: the work in a few words, for the progress.
    """
    hashes = {item.item: item.pixel_sha256 for item in items if item.pixel_sha256 is not None}
    with progress(len(items), what) as bar:
        bar.advance(len(hashes))
        for item in (item for item in items if item.pixel_sha256 is None):
            try:
                found = read_item(item, hashes=True)
            except Exception as error:  # one bad file never ends a batch job
                errors.append(left_out(item, error))
            else:
                hashes[item.item] = found.provenance["pixel_sha256"]
            bar.advance(1)
    return hashes


def left_out(item: Item, error: Exception) -> dict[str, str]:
    """Which item is left out, and why; a third party's words might name a path."""
    ours = type(error).__module__.split(".")[0] in ("medssl", "anomaly", "pipelines")
    known = ours or isinstance(error, ValueError)
    reason = str(error) if known else f"reading failed with {type(error).__name__}"
    return {"item": item.item, "reason": reason.removeprefix(f"item {item.item}: ")}


def account(manifest: Manifest, normals: Sequence[Item]) -> str:
    """In words, what was taken for normal; it names no file or folder."""
    told = f"fitting on {len(normals)} of {len(manifest.images)} images"
    if all(item.split is None for item in normals):
        told += ", all that are not labelled anomalous, for there is no train and test side"
    unknown = sum(item.label is None for item in normals)
    if unknown and unknown < len(normals):
        told += f"; {unknown} of them have no label and are taken for normal"
    categories = {item.category for item in normals if item.category is not None}
    if len(categories) > 1:
        told += (
            f"; they are of {len(categories)} categories, and one detector is fitted to all: "
            "choose one with --select \"category == 'NAME'\""
        )
    return told


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who is fitted on, and who is scored by a detector that has not seen them.

    fitted: by the final detector.
    scored: by the final detector, to calibrate it.
    folds: (fitted, scored) of each fold, before the final fit.
    """

    fitted: Sequence[Item]
    scored: Sequence[Item] = ()
    folds: Sequence[tuple[Sequence[Item], Sequence[Item]]] = ()

    @property
    def calibrating(self) -> list[Item]:
        """Every item whose score counts for the threshold."""
        return [*self.scored, *(item for _, scored in self.folds for item in scored)]


@dataclass(frozen=True)
class Goal:
    """What calibration is wanted: the method, the rate, and whether less is an error."""

    method: Method
    rate: float
    required: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"calibration must be split, cross, none or a Path, got {self.method!r}"
            )
        required_normals(self.rate)  # refuses a rate outside (0, 1)

    @property
    def needed(self) -> int:
        """Held-out normals that the rate takes."""
        return required_normals(self.rate)

    def shortfall(self, count: int) -> int:
        """How many more normal images than `count` it takes, if groups allow; 0 for enough."""
        wanted = {"split": 2 * self.needed, "cross": max(2, self.needed), "path": self.needed}
        return self.needed if self.method == "none" else max(0, wanted[self.method] - count)

    def missing(self, count: int, num_scores: int) -> int:
        """How many more normal images it takes, with `num_scores` held out of `count`."""
        still = max(0, self.needed - num_scores)
        return (self.shortfall(count) or still) if still else 0

    def check(self, missing: int) -> None:
        """Raises ValueError where calibration is required and images are missing."""
        if self.required and missing:
            raise ValueError(self.too_few(missing))

    def too_few(self, missing: int) -> str:
        """What is missing, and what to do."""
        takes = f"a false-alarm rate of {self.rate:g} takes {self.needed}"
        if self.method == "none":
            return f"{takes} held-out normal images, and --calibration none holds out none"
        why = {
            "split": "held-out ones, and as many must stay for fitting",
            "cross": "of at least two patients or parts",
            "path": "of their own",
        }[self.method]
        others = [name for name in ("cross", "PATH") if name.lower() != self.method]
        return (
            f"{missing} more normal images are needed ({takes} {why}). Add them, or try a higher "
            f"--rate or --calibration {' or '.join(others)}"
        )


def make_plan(
    items: Sequence[Item], hashes: Mapping[str, str], goal: Goal, *, seen: Seen, seed: int
) -> Plan:
    """Split or fold whole patients or parts; hold nothing out where that would not do.

    hashes: pixel hash by item; a copy of a fitted picture calibrates nothing.
    seen: what the encoder was pretrained on, which calibrates nothing either.
    """
    known = seen.known(items, hashes)
    new = [item for item in items if item.item not in known]
    plan = Plan(fitted=items)
    if goal.method == "split":
        plan = _split(items, new, hashes, goal.needed, seed)
    elif goal.method == "cross":
        plan = Plan(fitted=items, folds=_folds(items, new, hashes, seed))
    return plan if len(plan.calibrating) >= goal.needed else Plan(fitted=items)


def num_groups(items: Sequence[Item]) -> int:
    """Patients or parts among the items; an item without one is its own."""
    return len({item.group or f"item {item.item}" for item in items})


def _split(
    items: Sequence[Item], new: Sequence[Item], hashes: Mapping[str, str], needed: int, seed: int
) -> Plan:
    """The smallest share of `new`, from 30 % on, that reaches the rate; half of all must stay."""
    if len(new) < needed:
        return Plan(fitted=items)
    shares = [needed / len(new), *(HELD_OUT + 0.02 * step for step in range(36))]
    for share in sorted(share for share in shares if HELD_OUT <= share <= 1):
        held_out = split_by_group(new, share, seed)[1] if share < 1 else new
        names = {item.item for item in held_out}
        fitted = [item for item in items if item.item not in names]
        scored = _unseen(held_out, fitted, hashes)
        if len(scored) >= needed and 2 * len(fitted) >= len(items):
            return Plan(fitted=fitted, scored=scored)
    return Plan(fitted=items)


def _folds(
    items: Sequence[Item], new: Sequence[Item], hashes: Mapping[str, str], seed: int
) -> list[tuple[list[Item], list[Item]]]:
    count = min(FOLDS, num_groups(items))
    if count < 2:
        return []
    names = {item.item for item in new}
    folds = []
    for fold in folds_by_group(items, count, seed):
        held_out = {item.item for item in fold}
        fitted = [item for item in items if item.item not in held_out]
        candidates = [item for item in fold if item.item in names]
        folds.append((fitted, _unseen(candidates, fitted, hashes)))
    return folds


def _unseen(items: Sequence[Item], fitted: Sequence[Item], hashes: Mapping[str, str]) -> list[Item]:
    """Without copies of fitted pictures, whose scores would be too low, and each picture once."""
    seen = {hashes[item.item] for item in fitted}
    first = {hashes[item.item]: item for item in reversed(items)}
    return [
        item for item in items if hashes[item.item] not in seen and first[hashes[item.item]] is item
    ]
