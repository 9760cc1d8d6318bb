"""The tables of a run: one row per item, as parquet, CSV and JSON lines."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomaly.fdr import adjusted_p_values
from pipelines.journal import write_whole

Row = dict[str, Any]
_NUMBERS = ("score", "p_value", "q_value", "threshold", "volume_mm3", "seconds")
COLUMNS = [
    *("item", "path", "file_sha256", "modality", "score", "p_value", "q_value", "threshold"),
    *("anomalous", "map_path", "boxes", "volume_mm3", "model", "status", "error", "seconds"),
]
"""q_value: the p-value adjusted for the number of items that were scored together; see
`anomaly.fdr`."""
CLASS_COLUMNS = ["predicted", "class_scores"]
"""What the tables of a classifier say besides; class_scores is JSON text but for .jsonl."""
SITE_COLUMNS = ["site", "no_verdict"]
"""What the tables of a model calibrated by site say besides: the item's site as it was named, which
like `path` is for this machine only, and why there is no verdict on it."""
TABLES = ("scores.parquet", "scores.csv", "scores.jsonl")


def write_tables(out: Path, rows: Sequence[Row]) -> None:
    """scores.parquet, scores.csv (boxes as JSON) and scores.jsonl, one row per item.

    rows: at least one; all have the same columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(rows[0])
    kinds = dict.fromkeys(columns, pa.string()) | dict.fromkeys(_NUMBERS, pa.float64())
    kinds |= {"anomalous": pa.bool_(), "boxes": pa.list_(pa.list_(_kind_of_boxes(rows)))}
    parquet = io.BytesIO()
    plain = [_with_json(row, "class_scores") for row in rows]
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(list(kinds.items()))), parquet)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_with_json(row, "boxes") for row in plain)
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    write_whole(out / TABLES[0], parquet.getvalue())
    write_whole(out / TABLES[1], text.getvalue())
    write_whole(out / TABLES[2], lines)


def _kind_of_boxes(rows: Sequence[Row]) -> Any:
    """Indices of pixels, or coordinates of points."""
    import pyarrow as pa

    sides = (side for row in rows for box in row["boxes"] or () for side in box)
    return pa.float64() if any(isinstance(side, float) for side in sides) else pa.int32()


def _with_json(row: Row, column: str) -> Row:
    """The row with one cell as JSON text, where it is there and holds something."""
    return row if row.get(column) is None else row | {column: json.dumps(row[column])}


def why_no_verdict(rows: Sequence[Row]) -> str:
    """Why some of these scored rows have no verdict, in words."""
    if any(row.get("no_verdict") is not None for row in rows):
        lacking = any(row.get("missing") for row in rows)
        what = "lack a modality" if lacking else "are of a site without a threshold"
        return f"some items {what}"
    return "the model is not calibrated"


def with_q_values(rows: Sequence[Row]) -> list[Row]:
    """The rows with the column q_value after p_value; None where there is no p-value."""
    judged = [place for place, row in enumerate(rows) if row["p_value"] is not None]
    adjusted = adjusted_p_values([rows[place]["p_value"] for place in judged])
    found = dict(zip(judged, adjusted, strict=True))
    told = []
    for place, row in enumerate(rows):
        names = [name for name in row if name != "q_value"]
        names.insert(names.index("p_value") + 1, "q_value")
        told.append({name: found.get(place) if name == "q_value" else row[name] for name in names})
    return told
