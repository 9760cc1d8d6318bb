"""`medssl score`: verdicts, maps, overlays and a report for a folder of images."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medssl.data.dataset import looked_at
from medssl.data.groups import read_column
from medssl.data.image import Image
from medssl.data.manifest import Item, Manifest, NoDataError, build_manifest, load_sample
from medssl.data.privacy import salted
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.data.writers.nifti import write_nifti
from medssl.data.writers.picture import write_tiff
from medssl.models.folder import digest
from pipelines.clouds import PointMap
from pipelines.console import progress, say
from pipelines.journal import Journal, alone, read_header
from pipelines.record import resolve
from pipelines.report.cloud_view import view_of_cloud
from pipelines.report.overlay import View, view
from pipelines.report.page import predicted_counts, write_overlays, write_report
from pipelines.scoring import (
    OutsideDomainError,
    Scored,
    Scorer,
    check_sites,
    read_calibration,
)
from pipelines.tables import (
    CLASS_COLUMNS,
    COLUMNS,
    SITE_COLUMNS,
    TABLES,
    with_q_values,
    write_tables,
)

Row = dict[str, Any]
_MOST_NAMED = 20
MODALITY_COLUMNS = ["missing", "no_verdict"]
"""What the tables of a model on pictures with xyz say besides: the modalities that an item has not,
and why there is no verdict on it."""


def score(
    path: Path,
    model: str,
    out: Path,
    *,
    force: bool = False,
    select: str | None = None,
    groups: str | None = None,
    site: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Score images with a fitted model; write tables, maps, overlays and a report.

    A detector gives scores and maps; a classifier the class and its scores, and no maps.

    A model calibrated by site judges each item by the threshold of its own site, and has no verdict
    on items of other sites.

    Started again in the same folder it continues where it was stopped, and does nothing where it
    was finished.

    Args:
        path: a folder, a file, or a manifest written by `medssl manifest`.
        model: folder of a fitted model, or models:/NAME@champion, or models:/NAME/3.
        out: folder for scores.parquet, .csv and .jsonl, maps, overlays and report.html.
        force: score items outside the model's domain too, such as an MR with a CT detector.
        select: only items for which this expression over manifest columns holds.
        groups: FILE:COLUMN that names each picture's patient or part.
        site: FILE:COLUMN that names the site, scanner or line of each item; needed where the model
            was calibrated by site, and only there.
        batch_size: pictures scored at once; volumes are scored one by one.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    manifest = build_manifest(path, groups=groups)
    if select is not None:
        manifest = manifest.select(select)
    folder = resolve(model)
    sites = None if site is None else sites_of(manifest, site, path)
    summary = score_manifest(
        manifest, folder, out, sites=sites, force=force, batch_size=batch_size, device=device
    )
    _tell(summary, read_rows(out))
    return summary


def sites_of(manifest: Manifest, spec: str, path: Path) -> dict[str, str]:
    """The site of each image that has one, as FILE:COLUMN names it.

    path: what was given to be scored; the table lies in it, beside it, or where `read_column` says.
    """
    place = path.absolute()
    return read_column(spec, place if place.is_dir() else place.parent, manifest.paths())


def score_manifest(
    manifest: Manifest,
    model_folder: Path,
    out: Path,
    *,
    sites: Mapping[str, str] | None = None,
    force: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """What `score` does once its inputs are found. Returns counts and absolute paths.

    sites: of the items that have one, as their table names them.

    Raises NoDataError for a manifest without images, ValueError where `out` holds another run's
    work or another process is at work there, and ValueError as `check_sites` and
    `refuse_model_folder` do.
    """
    if not manifest.images:
        raise NoDataError("no image is left to score; check the selection")
    check_sites(read_calibration(model_folder), sites)
    refuse_model_folder(out)
    manifest = _without_truth(manifest)
    batches = cut(manifest.images, batch_size)
    header: dict[str, Any] = {
        "manifest": identity(manifest),
        "model": digest(model_folder),
        "batch_size": batch_size,
        "force": force,
    }
    if sites is not None:
        sites = {item.item: sites[item.item] for item in manifest.images if item.item in sites}
        header["sites"] = salted(json.dumps(sites, sort_keys=True))
    with alone(out):
        journal = Journal(out / "journal", header)
        todo = [part for part in range(len(batches)) if not journal.has(part)]
        if todo:
            scorer = Scorer(model_folder, device=device, force=force)
            work = _Work(scorer, manifest, out, header["model"], sites)
            with progress(len(manifest.images), "scoring") as bar:
                bar.advance(len(manifest.images) - sum(len(batches[part]) for part in todo))
                for part in todo:
                    journal.write(part, work.rows(batches[part]))
                    bar.advance(len(batches[part]))
        rows = with_q_values([row for part in range(len(batches)) for row in journal.read(part)])
        if todo or not all((out / name).is_file() for name in (*TABLES, "report.html")):
            write_overlays(out, rows, model_folder)
            write_tables(out, rows)
            write_report(out, rows, model_folder, labels_of(manifest))
    return _summary(rows, out, header["model"])


def refuse_model_folder(out: Path) -> None:
    """Raises ValueError where `out` holds a model: what is local to a run would travel with it."""
    if (out / "model.yaml").exists():
        raise ValueError(f"{out} holds a model; choose another --out for the results")


def score_again(
    manifest: Manifest,
    part: Manifest,
    model_folder: Path,
    out: Path,
    *,
    sites: Mapping[str, str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score `part`, or go on with what `out` holds of it, or of all of `manifest`, and as that."""
    begun = read_header(out / "journal")
    if begun is None:
        return score_manifest(part, model_folder, out, sites=sites, device=device)
    whole = manifest if begun["manifest"] == identity(manifest) else part
    settings = {name: begun[name] for name in ("force", "batch_size")}
    return score_manifest(whole, model_folder, out, sites=sites, device=device, **settings)


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
    """16 hex digits of the images, with their xyz, and their order, which decide the batches."""
    images = _without_truth(manifest)
    order = " ".join([images.digest, *(item.item for item in images.items)])
    return hashlib.sha256(order.encode()).hexdigest()[:16]


def _without_truth(manifest: Manifest) -> Manifest:
    """Without masks and reports, so that their faults are not looked at."""
    kept = tuple(item for item in manifest.items if item.role in ("image", "xyz"))
    return replace(manifest, items=kept)


def labels_of(manifest: Manifest) -> dict[str, int | None]:
    """Item -> 0 normal, 1 anomalous, None unknown."""
    return {item.item: item.label for item in manifest.images}


def read_rows(out: Path) -> list[Row]:
    """The rows of a finished run, in the manifest's order."""
    lines = (out / "scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class _Work:
    """Scores batches into the folder `out`; every map is on disk before its rows are returned."""

    def __init__(
        self,
        scorer: Scorer,
        manifest: Manifest,
        out: Path,
        model: str,
        sites: Mapping[str, str] | None,
    ) -> None:
        self.scorer, self.out, self.model = scorer, out, model
        self.manifest = looked_at(manifest, scorer.preprocessing)
        self.sites = sites
        self.columns = COLUMNS if scorer.classes is None else COLUMNS + CLASS_COLUMNS
        self.columns = self.columns if sites is None else self.columns + SITE_COLUMNS
        assert scorer.saved is not None
        self.both = "xyz" in scorer.saved.domain  # fitted on pictures with xyz
        self.columns = self.columns + MODALITY_COLUMNS if self.both else self.columns
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
                "modality": "POINTS" if item.kind == "points" else str(item.modality),
                "model": self.model,
            }
            if self.sites is not None:
                rows[item.item]["site"] = self.sites.get(item.item)
            read = self._read(item)
            if isinstance(read, Sample):
                samples[item.item] = read
                if read.points is None:
                    rows[item.item]["modality"] = str(read.images["image"].modality)
                rows[item.item]["file_sha256"] = read.subject.provenance["file_sha256"]
            else:
                rows[item.item] |= read
            seconds[item.item] = time.perf_counter() - started
        started = time.perf_counter()
        verdicts = _verdicts(self.scorer, list(samples.values()), self.sites)
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
        shown = self._view(sample, verdict.map)
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
            **({"no_verdict": verdict.no_verdict} if "no_verdict" in self.columns else {}),
            **({"missing": ", ".join(verdict.missing) or None} if self.both else {}),
        }

    def _view(self, sample: Sample, values: Image | PointMap | None) -> View:
        if isinstance(values, PointMap):
            return view_of_cloud(values)
        return view(sample.images["image"], values, self.scorer.preprocessing)

    def _write_map(self, item: str, values: Image | PointMap) -> str:
        """Returns the path below `out`; beside a PLY lies the same as CSV."""
        if isinstance(values, PointMap):
            map_path = f"maps/{item}.ply"
            values.write(self.out / map_path)
            return map_path
        placed = values.frame == "patient"
        ending, write = (".nii.gz", write_nifti) if placed else (".tiff", write_tiff)
        map_path = f"maps/{item}{ending}"
        write(values, self.out / map_path)
        return map_path


def _verdicts(
    scorer: Scorer, samples: list[Sample], sites: Mapping[str, str] | None
) -> list[Scored | Exception]:
    """A verdict or its reason per sample; a sample that fails does not take the others along."""
    if not samples:
        return []
    try:
        return list(scorer.score(samples, sites=sites))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:
        if len(samples) == 1:
            return [error]
        return [verdict for sample in samples for verdict in _verdicts(scorer, [sample], sites)]


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
    reasons = Counter(row["no_verdict"] for row in rows if row.get("no_verdict") is not None)
    for reason, count in reasons.items():
        say(f"{count} items scored without a verdict: {reason}")
    anomalous = summary["anomalous"]
    verdict = "no verdicts" if anomalous is None else f"{anomalous} anomalous"
    if "predicted" in summary:
        told = [f"{count} {name}" for name, count in summary["predicted"].items()]
        verdict = ", ".join(told) or verdict
    say(
        f"{summary['ok']} of {summary['items']} items scored ({verdict}), "
        f"{summary['refused']} refused, {summary['error']} failed; see {summary['report']}"
    )
