"""Which patient or part a picture belongs to, from a table beside the pictures."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from medssl.data.table import read_table


def read_groups(spec: str, root: Path, paths: Mapping[str, PurePosixPath]) -> dict[str, str]:
    """The unsalted group of every item, from a CSV table with a column `path`.

    spec: FILE:COLUMN. FILE is looked for in `root`, beside it, and from the working directory.
    paths: the absolute path of each item; see `Table.by_item`.

    Raises ValueError where the table, the column or an item's row is missing, or where rows of one
    path disagree.
    """
    file_name, _, column = spec.rpartition(":")
    if not file_name or not column:
        raise ValueError(
            f"groups must be FILE:COLUMN, for example labels.csv:patient_id; got {spec!r}"
        )
    rows = read_table(file_name, root, needed=[column]).by_item(paths)
    found = {item: row[column] for item, row in rows.items() if row[column]}
    missing = [item for item in paths if item not in found]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} items have no {column} in the groups table (the first "
            f"is item {missing[0]}); add their rows, or choose a folder that the table covers"
        )
    return found
