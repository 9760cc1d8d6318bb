"""What encoders are asked about: images with a class each, of whom they are, what is held out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from medssl.data.groups import read_column
from medssl.data.manifest import Item, Manifest, NoDataError, build_manifest
from medssl.data.split import split_by_group

TEST_SHARE, TEST_SEED = 0.3, 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question to encoders; every FILE:COLUMN is a CSV table beside the images with `path`.

    data: a folder, or a manifest written by `medssl manifest`.
    target: FILE:COLUMN of the class; images without one are left out.
    groups: FILE:COLUMN of the patient or part, which no split parts; DICOM's patient without it.
    split: FILE:COLUMN; what says "test" is asked about and the rest may be learnt from. Without it
        the split of the folder counts, and where there is none, 30 % of the patients are drawn.
    columns: FILE:COLUMN of what results are told apart by: site, scanner, sex, age band.
    select: an expression over manifest columns; only these images count.
    normal: the class that is normal, so that a classifier's score tells how anomalous an image is.
    """

    data: Path
    target: str
    groups: str | None = None
    split: str | None = None
    columns: list[str] = field(default_factory=list)
    select: str | None = None
    normal: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A task with its answers, S images.

    labels: (S,) int64, index into `classes`. test: (S,) bool, what is asked about.
    groups: salted patient or part. columns: by the name of the column, a cell per image.
    """

    manifest: Manifest
    items: tuple[Item, ...]
    classes: tuple[str, ...]
    labels: Tensor
    test: Tensor
    columns: dict[str, list[str | None]]

    @property
    def groups(self) -> list[str | None]:
        """Of each image."""
        return [item.group for item in self.items]

    def group_numbers(self) -> Tensor:
        """(S,) int64; an image without a group has a number of its own."""
        names = [item.group or f"item {item.item}" for item in self.items]
        number = {name: n for n, name in enumerate(dict.fromkeys(names))}
        return torch.tensor([number[name] for name in names])


def read_task(task: Task) -> Asked:
    """Look the images and the answers up; no pixel is read.

    Raises NoDataError where no image has a class, and ValueError where there are fewer than two
    classes, where a class has no image to learn from, or where a patient is on both sides.
    """
    manifest = build_manifest(task.data, groups=task.groups)
    if task.select is not None:
        manifest = manifest.select(task.select)
    root = task.data if task.data.is_dir() else task.data.parent
    paths = manifest.paths()
    names = read_column(task.target, root, paths)
    items = tuple(item for item in manifest.images if item.item in names)
    if not items:
        raise NoDataError(f"none of the {len(manifest.images)} images has a {task.target}")
    classes = tuple(sorted(set(names.values())))
    asked = Asked(
        manifest=manifest,
        items=items,
        classes=classes,
        labels=torch.tensor([classes.index(names[item.item]) for item in items]),
        test=_held_out(task, items, read_column(task.split, root, paths) if task.split else {}),
        columns={
            spec.rpartition(":")[2]: _cells(items, read_column(spec, root, paths))
            for spec in task.columns
        },
    )
    _check(asked)
    if task.normal not in (None, *classes):
        raise ValueError(f"normal must be one of the classes {list(classes)}, got {task.normal!r}")
    return asked


def _held_out(task: Task, items: Sequence[Item], told: dict[str, str]) -> Tensor:
    splits = [told.get(item.item) if task.split else item.split for item in items]
    if "test" in splits:
        return torch.tensor([split == "test" for split in splits])
    if task.split is not None:
        raise ValueError(f"{task.split} says test of no image; nothing would be asked about")
    by_path = sorted(items, key=lambda item: item.path)  # the draw must not depend on the key
    held_out = {item.item for item in split_by_group(by_path, TEST_SHARE, TEST_SEED)[1]}
    return torch.tensor([item.item in held_out for item in items])


def _cells(items: Sequence[Item], told: dict[str, str]) -> list[str | None]:
    return [told.get(item.item) for item in items]


def _check(asked: Asked) -> None:
    if len(asked.classes) < 2:
        raise ValueError(f"a task needs two classes at least, got {list(asked.classes)}")
    seen = set(asked.labels[~asked.test].tolist())
    missing = [name for index, name in enumerate(asked.classes) if index not in seen]
    if missing:
        raise ValueError(f"no image to learn the classes {missing} from; all of them are test")
    sides = {side: {g for g, test in zip(asked.groups, asked.test.tolist(), strict=True)
                    if g is not None and test is side} for side in (True, False)}  # fmt: skip
    both = sides[True] & sides[False]
    if both:
        raise ValueError(
            f"{len(both)} patients or parts are both learnt from and asked about; split by them"
        )


def without(asked: Asked, items: set[str]) -> Asked:
    """The same without some images, such as those that cannot be read."""
    keep = [row for row, item in enumerate(asked.items) if item.item not in items]
    rows = torch.tensor(keep, dtype=torch.int64)
    return replace(
        asked,
        items=tuple(asked.items[row] for row in keep),
        labels=asked.labels[rows],
        test=asked.test[rows],
        columns={name: [cells[row] for row in keep] for name, cells in asked.columns.items()},
    )
