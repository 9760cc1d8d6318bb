"""Which patient or part a picture belongs to, from a table beside the pictures."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

Row = tuple[PurePosixPath, str]


def read_groups(spec: str, root: Path, paths: Mapping[str, PurePosixPath]) -> dict[str, str]:
    """The unsalted group of every item, from a CSV table with a column `path`.

    spec: FILE:COLUMN. FILE is looked for in `root`, beside it, and from the working directory.
    paths: the absolute path of each item. A row belongs to an item when its path ends the item's
        path (the longest such row, so the table may count from any folder above), or else when
        both share a file name that is unique among rows and items.

    Raises ValueError where the table, the column or an item's row is missing, or where rows of one
    path disagree.
    """
    file_name, _, column = spec.rpartition(":")
    if not file_name or not column:
        raise ValueError(
            f"groups must be FILE:COLUMN, for example labels.csv:patient_id; got {spec!r}"
        )
    rows = _read_rows(_find(file_name, root), column)
    by_path = _by_path(rows, column)
    by_name = _unique_names(list(by_path))
    times = Counter(path.name for path in paths.values())
    found = {}
    for item, path in paths.items():
        row = _longest_end(path, by_path)
        if row is None and times[path.name] == 1:
            row = by_name.get(path.name)
        if row is not None and by_path[row]:
            found[item] = by_path[row]
    missing = [item for item in paths if item not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} items have no {column} in the groups table (the first "
            f"is item {missing[0]}); add their rows, or choose a folder that the table covers"
        )
    return found


def _find(name: str, root: Path) -> Path:
    for folder in (root, root.parent, Path.cwd()):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"groups table {name!r} is neither in the data folder, nor beside it, nor in the working "
        "directory"
    )


def _read_rows(file: Path, column: str) -> list[Row]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        header = table.fieldnames or []
        for name in ("path", column):
            if name not in header:
                raise ValueError(f"the groups table needs a column {name!r}; it has {list(header)}")
        return [(PurePosixPath(row["path"].strip()), (row[column] or "").strip()) for row in table]


def _by_path(rows: Sequence[Row], column: str) -> dict[PurePosixPath, str]:
    groups: dict[PurePosixPath, str] = {}
    for path, group in rows:
        if groups.setdefault(path, group) != group:
            raise ValueError(
                f"the groups table gives two values of {column} for one path; keep one row per path"
            )
    return groups


def _unique_names(paths: Sequence[PurePosixPath]) -> dict[str, PurePosixPath]:
    """File name -> path, of the names that only one path has."""
    names: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        names.setdefault(path.name, []).append(path)
    return {name: of_name[0] for name, of_name in names.items() if len(of_name) == 1}


def _longest_end(path: PurePosixPath, by_path: Mapping[PurePosixPath, str]) -> PurePosixPath | None:
    """The longest path of the table that is the end of `path`."""
    for start in range(len(path.parts)):
        end = PurePosixPath(*path.parts[start:])
        if end in by_path:
            return end
    return None
