"""A CSV table beside the images, its rows found by the path of each image."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by their path, with stripped values; the column `path` is needed.

    file: where the table lies; what its cells name relatively lies beside it.
    """

    file: Path
    columns: tuple[str, ...]
    rows: Mapping[PurePosixPath, Row]

    def by_item(self, paths: Mapping[str, PurePosixPath]) -> dict[str, Row]:
        """The row of each item that has one.

        paths: the absolute path of each item. A row belongs to an item when its path ends the
            item's path (the longest such row, so the table may count from any folder above), or
            else when both share a file name that is unique among rows and items.
        """
        by_name = _unique_names(list(self.rows))
        times = Counter(path.name for path in set(paths.values()))
        found = {}
        for item, path in paths.items():
            row = self._longest_end(path)
            if row is None and times[path.name] == 1:
                row = by_name.get(path.name)
            if row is not None:
                found[item] = self.rows[row]
        return found

    def _longest_end(self, path: PurePosixPath) -> PurePosixPath | None:
        for start in range(len(path.parts)):
            end = PurePosixPath(*path.parts[start:])
            if end in self.rows:
                return end
        return None


def read_table(name: str, root: Path, *, needed: Sequence[str] = ()) -> Table:
    """The table of that name in `root`, beside it, or from the working directory.

    Raises ValueError where there is none, where a needed column is missing, or where two rows of
    one path disagree in it (in any column, where none is needed).
    """
    file = _find(name, root)
    with file.open(newline="", encoding="utf-8-sig") as stream:
        lines = csv.DictReader(stream)
        columns = tuple(lines.fieldnames or ())
        for column in ("path", *needed):
            if column not in columns:
                raise ValueError(f"the table needs a column {column!r}; it has {list(columns)}")
        rows: dict[PurePosixPath, Row] = {}
        for line in lines:
            row = {column: (line[column] or "").strip() for column in columns}
            other = rows.setdefault(PurePosixPath(row["path"]), row)
            for column in needed or columns:
                if other[column] != row[column]:
                    raise ValueError(
                        f"the table gives two values of {column} for one path; keep one row per "
                        "path"
                    )
    return Table(file=file, columns=columns, rows=rows)


def _find(name: str, root: Path) -> Path:
    for folder in (root, root.parent, Path.cwd()):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"the table {name!r} is neither in the data folder, nor beside it, nor in the working "
        "directory"
    )


def _unique_names(paths: Sequence[PurePosixPath]) -> dict[str, PurePosixPath]:
    """File name -> path, of the names that only one path has."""
    names: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        names.setdefault(path.name, []).append(path)
    return {name: of_name[0] for name, of_name in names.items() if len(of_name) == 1}
