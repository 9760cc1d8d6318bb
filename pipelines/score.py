"""`medssl score`: verdicts, maps, overlays and a report for a folder of images."""

import csv
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medssl.data.image import Image
from medssl.data.manifest import Item, Manifest, NoDataError, build_manifest, load_sample
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.data.writers.nifti import write_nifti
from medssl.data.writers.picture import write_tiff
from medssl.models.folder import digest
from pipelines.console import progress, say
from pipelines.journal import Journal, alone, write_whole
from pipelines.record import resolve
from pipelines.report.overlay import view
from pipelines.report.page import predicted_counts, write_overlays, write_report
from pipelines.scoring import OutsideDomainError, Scored, Scorer

Row = dict[str, Any]
_NUMBERS = ("score", "p_value", "threshold", "volume_mm3", "seconds")
COLUMNS = [
    *("item", "path", "file_sha256", "modality", "score", "p_value", "threshold", "anomalous"),
    *("map_path", "boxes", "volume_mm3", "model", "status", "error", "seconds"),
]
CLASS_COLUMNS = ["predicted", "class_scores"]
"""What the tables of a classifier say besides; class_scores is JSON text but for .jsonl."""
TABLES = ("scores.parquet", "scores.csv", "scores.jsonl")
_MOST_NAMED = 20


def score(
    path: Path,
    model: str,
    out: Path,
    *,
    force: bool = False,
    select: str | None = None,
    groups: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Score images with a fitted model; write tables, maps, overlays and a report.

    A detector gives scores and maps; a classifier the class and its scores, and no maps.

    Started again in the same folder it continues where it was stopped, and does nothing where it
    was finished.

    Args:
        path: a folder, a file, or a manifest written by `medssl manifest`.
        model: folder of a fitted model, or models:/NAME@champion, or models:/NAME/3.
        out: folder for scores.parquet, .csv and .jsonl, maps, overlays and report.html.
        force: score items outside the model's domain too, such as an MR with a CT detector.
        select: only items for which this expression over manifest columns holds.
        groups: FILE:COLUMN that names each picture's patient or part.
        batch_size: pictures scored at once; volumes are scored one by one.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    manifest = build_manifest(path, groups=groups)
    if select is not None:
        manifest = manifest.select(select)
    folder = resolve(model)
    summary = score_manifest(
        manifest, folder, out, force=force, batch_size=batch_size, device=device
    )
    _tell(summary, read_rows(out))
    return summary


def score_manifest(
    manifest: Manifest,
    model_folder: Path,
    out: Path,
    *,
    force: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """What `score` does once its inputs are found. Returns counts and absolute paths.

    Raises NoDataError for a manifest without images, and ValueError where `out` holds another
    run's work or another process is at work there.
    """
    if not manifest.images:
        raise NoDataError("no image is left to score; check the selection")
    manifest = replace(manifest, items=manifest.images)  # masks and their faults are not looked at
    batches = cut(manifest.images, batch_size)
    header: dict[str, Any] = {
        "manifest": identity(manifest),
        "model": digest(model_folder),
        "batch_size": batch_size,
        "force": force,
    }
    with alone(out):
        journal = Journal(out / "journal", header)
        todo = [part for part in range(len(batches)) if not journal.has(part)]
        if todo:
            scorer = Scorer(model_folder, device=device, force=force)
            work = _Work(scorer, manifest, out, header["model"])
            with progress(len(manifest.images), "scoring") as bar:
                bar.advance(len(manifest.images) - sum(len(batches[part]) for part in todo))
                for part in todo:
                    journal.write(part, work.rows(batches[part]))
                    bar.advance(len(batches[part]))
        rows = [row for part in range(len(batches)) for row in journal.read(part)]
        if todo or not all((out / name).is_file() for name in (*TABLES, "report.html")):
            write_overlays(out, rows, model_folder)
            write_tables(out, rows)
            write_report(out, rows, model_folder, labels_of(manifest))
    return _summary(rows, out, header["model"])


def cut(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Fixed batches in the manifest's order: neighbouring pictures together, a volume alone."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batches: list[list[Item]] = []
    for item in items:
        last = batches[-1] if batches else []
        joins = item.kind == "picture" and last and last[0].kind == "picture"
        if joins and len(last) < batch_size:
            last.append(item)
        else:
            batches.append([item])
    return batches


def identity(manifest: Manifest) -> str:
    """16 hex digits of the images and their order, which decide the batches."""
    images = replace(manifest, items=manifest.images)
    order = " ".join([images.digest, *(item.item for item in images.items)])
    return hashlib.sha256(order.encode()).hexdigest()[:16]


def labels_of(manifest: Manifest) -> dict[str, int | None]:
    """Item -> 0 normal, 1 anomalous, None unknown."""
    return {item.item: item.label for item in manifest.images}


def read_rows(out: Path) -> list[Row]:
    """The rows of a finished run, in the manifest's order."""
    lines = (out / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class _Work:
    """Scores batches into the folder `out`; every map is on disk before its rows are returned."""

    def __init__(self, scorer: Scorer, manifest: Manifest, out: Path, model: str) -> None:
        self.scorer, self.manifest, self.out, self.model = scorer, manifest, out, model
        self.columns = COLUMNS if scorer.classes is None else COLUMNS + CLASS_COLUMNS
        maps = ["maps"] if scorer.classes is None else []
        for name in (*maps, "overlays", "journal/views"):
            (out / name).mkdir(parents=True, exist_ok=True)
        for half in (out / "maps").glob(".*"):  # left by a process that was killed
            half.unlink()

    def rows(self, items: Sequence[Item]) -> list[Row]:
        """One row per item, in order, whatever happens to it."""
        rows, samples, seconds = {}, {}, {}
        for item in items:
            started = time.perf_counter()
            rows[item.item] = dict.fromkeys(self.columns) | {
                "item": item.item,
                "path": item.path,
                "file_sha256": item.file_sha256,
                "modality": str(item.modality),
                "model": self.model,
            }
            read = self._read(item)
            if isinstance(read, Sample):
                samples[item.item] = read
                image = read.images["image"]
                rows[item.item]["modality"] = str(image.modality)
                rows[item.item]["file_sha256"] = image.provenance["file_sha256"]
            else:
                rows[item.item] |= read
            seconds[item.item] = time.perf_counter() - started
        started = time.perf_counter()
        verdicts = _verdicts(self.scorer, list(samples.values()))
        for (name, sample), verdict in zip(samples.items(), verdicts, strict=True):
            rows[name] |= self._kept(sample, verdict)
        shared = (time.perf_counter() - started) / max(1, len(samples))
        for name, row in rows.items():
            row["error"] = row["error"] and row["error"].removeprefix(f"item {name}: ")
            row["seconds"] = round(seconds[name] + (shared if name in samples else 0), 4)
        return list(rows.values())

    def _read(self, item: Item) -> Sample | Row:
        """The sample, or why there is none; third parties' messages may hold paths, ours do not."""
        try:
            sample = load_sample(self.manifest, item, hashes=True)
            self.scorer.check(sample)
        except OutsideDomainError as error:
            return {"status": "refused", "error": str(error)}
        except ReadError as error:
            return {"status": "error", "error": str(error)}
        except OSError as error:
            return {"status": "error", "error": f"the file cannot be read: {error.strerror}"}
        except Exception as error:  # one bad file never ends a batch job
            kind = type(error).__name__
            return {"status": "error", "error": f"reading failed with {kind}; see medssl inspect"}
        return sample

    def _kept(self, sample: Sample, verdict: Scored | Exception) -> Row:
        """Write the map and what the overlay needs. Returns what the table says of them."""
        if isinstance(verdict, Exception):
            return {"status": "error", "error": str(verdict)}
        shown = view(sample.images["image"], verdict.map, self.scorer.preprocessing)
        shown.save(self.out / "journal" / "views" / f"{sample.item}.npz")
        classes = {"predicted": verdict.predicted, "class_scores": verdict.class_scores}
        return {
            "score": verdict.score,
            "p_value": verdict.p_value,
            "threshold": verdict.threshold,
            "anomalous": verdict.anomalous,
            "map_path": None if verdict.map is None else self._write_map(sample.item, verdict.map),
            "boxes": None if verdict.boxes is None else [list(box) for box in verdict.boxes],
            "volume_mm3": verdict.volume_mm3,
            "status": "ok",
            **({} if verdict.class_scores is None else classes),
        }

    def _write_map(self, item: str, values: Image) -> str:
        """Returns the path below `out`."""
        placed = values.frame == "patient"
        ending, write = (".nii.gz", write_nifti) if placed else (".tiff", write_tiff)
        map_path = f"maps/{item}{ending}"
        write(values, self.out / map_path)
        return map_path


def _verdicts(scorer: Scorer, samples: list[Sample]) -> list[Scored | Exception]:
    """A verdict or its reason per sample; a sample that fails does not take the others along."""
    if not samples:
        return []
    try:
        return list(scorer.score(samples))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        if len(samples) == 1:
            return [error]
        return [verdict for sample in samples for verdict in _verdicts(scorer, [sample])]


def write_tables(out: Path, rows: Sequence[Row]) -> None:
    """scores.parquet, scores.csv (boxes as JSON) and scores.jsonl, one row per item.

    rows: at least one; all have the same columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(rows[0])
    kinds = dict.fromkeys(columns, pa.string()) | dict.fromkeys(_NUMBERS, pa.float64())
    kinds |= {"anomalous": pa.bool_(), "boxes": pa.list_(pa.list_(pa.int32()))}
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


def _with_json(row: Row, column: str) -> Row:
    """The row with one cell as JSON text, where it is there and holds something."""
    return row if row.get(column) is None else row | {column: json.dumps(row[column])}


def _summary(rows: Sequence[Mapping[str, Any]], out: Path, model: str) -> dict[str, Any]:
    counts = {
        status: sum(row["status"] == status for row in rows)
        for status in ("ok", "refused", "error")
    }
    verdicts = [row["anomalous"] for row in rows if row["anomalous"] is not None]
    classes = {"predicted": predicted_counts(rows)} if "predicted" in rows[0] else {}
    return {
        "items": len(rows),
        **counts,
        "failed": counts["refused"] + counts["error"],
        "anomalous": sum(verdicts) if verdicts else None,
        **classes,
        "model": model,
        "scores": str((out / "scores.parquet").resolve()),
        "maps": None if classes else str((out / "maps").resolve()),
        "report": str((out / "report.html").resolve()),
    }


def _tell(summary: Mapping[str, Any], rows: Sequence[Row]) -> None:
    for row in [row for row in rows if row["status"] != "ok"][:_MOST_NAMED]:
        say(f"item {row['item']} {row['status']}: {row['error']}")
    anomalous = summary["anomalous"]
    verdict = "no verdicts" if anomalous is None else f"{anomalous} anomalous"
    if "predicted" in summary:
        told = [f"{count} {name}" for name, count in summary["predicted"].items()]
        verdict = ", ".join(told) or verdict
    say(
        f"{summary['ok']} of {summary['items']} items scored ({verdict}), "
        f"{summary['refused']} refused, {summary['error']} failed; see {summary['report']}"
    )
