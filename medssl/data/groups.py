"""What a table beside the pictures says of each: its patient or part, its class, its site."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from medssl.data.table import read_table


def read_column(spec: str, root: Path, paths: Mapping[str, PurePosixPath]) -> dict[str, str]:
    """The cell of every item whose cell is not empty, from a CSV table with a column `path`.

    spec: FILE:COLUMN. FILE is looked for in `root`, beside it, and from the working directory.
    paths: the absolute path of each item; see `Table.by_item`.

    Raises ValueError where the table or the column is missing, or where rows of one path disagree.
    """
    file_name, _, column = spec.rpartition(":")
    if not file_name or not column:
        raise ValueError(f"expected FILE:COLUMN, for example labels.csv:patient_id; got {spec!r}")
    rows = read_table(file_name, root, needed=[column]).by_item(paths)
    return {item: row[column] for item, row in rows.items() if row[column]}


def read_groups(spec: str, root: Path, paths: Mapping[str, PurePosixPath]) -> dict[str, str]:
    """The unsalted group of every item, as of `read_column`.

    Raises ValueError as that does, and where an item has none.
    """
    found = read_column(spec, root, paths)
    missing = [item for item in paths if item not in found]
    if missing:
        column = spec.rpartition(":")[2]
        raise ValueError(
            f"{len(missing)} of {len(paths)} items have no {column} in the groups table (the first "
            f"is item {missing[0]}); add their rows, or choose a folder that the table covers"
        )
    return found
