"""`medssl calibrate`: thresholds of a fitted detector from normal images that it has not seen."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomaly.base import Detector
from anomaly.calibration import Calibration, required_normals
from medssl.data.manifest import Manifest, build_manifest
from medssl.models.folder import digest, load_model
from pipelines import record
from pipelines.card import recalibrated_card
from pipelines.console import progress, say
from pipelines.fitting import calibration_from, check_out, score_normals
from pipelines.leakage import FILE, History, compare, read_history, traces, without_copies
from pipelines.normals import normal_items, read_hashes
from pipelines.score import sites_of
from pipelines.scoring import Scorer

_METRICS = ("num_calibration", "threshold", "map_threshold", "failed")
_MOST_NAMED = 20


def calibrate(
    model: str,
    data: Path,
    out: Path,
    *,
    rate: float = 0.05,
    by: str | None = None,
    groups: str | None = None,
    select: str | None = None,
    register: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Calibrate a fitted detector anew, with held-out normal images, and save it as a new model.

    The detector itself stays as it was fitted. Images that it was fitted on, or that its encoder
    was pretrained on, are refused, and so are other images of their patients or parts: it finds
    them too normal. Those that calibrated it before may do so again.

    Args:
        model: folder of a fitted detector, or models:/NAME@champion, or models:/NAME/3.
        data: the normals: a folder, a file, or a manifest written by `medssl manifest`. Of a
            folder with train and test sides only the training side is used.
        out: folder for the calibrated detector; must not exist.
        rate: the share of normal items that may be called anomalous, in (0, 1).
        by: FILE:COLUMN that names each image's site, scanner or line; each gets thresholds of its
            own.
        groups: FILE:COLUMN that names each picture's patient or part.
        select: only items for which this expression over manifest columns holds.
        register: name under which the calibrated detector is registered in MLflow.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    arguments = dict(locals())
    check_out(out)
    folder = record.resolve(model)
    manifest = build_manifest(data, groups=groups)
    sites = None if by is None else sites_of(manifest, by, data)
    normals = Normals(manifest, rate=rate, select=select, sites=sites, by=by)
    saved = load_model(folder, kind="detector")
    assert isinstance(saved.model, Detector)
    scorer = Scorer.from_parts(saved.model, saved.preprocessing, domain=saved.domain, device=device)
    with record.recorded("calibrate", arguments) as run:
        run.manifest(manifest)
        history = read_history(folder)
        calibration, history = normals.calibrate(scorer, history)
        _write(folder, out, calibration, history)
        result = {
            "model": str(out.absolute()),
            "digest": digest(out),
            **told_of(calibration),
            "failed": len(normals.errors),
            "errors": normals.errors,
            "registered": None,
        }
        run.metrics({name: result[name] for name in _METRICS})
        run.artifact(out / "card.md")
        if register is not None:
            result["registered"] = record.register(out, register, run).version
    tell(result)
    return result


class Normals:
    """Held-out normals that thresholds are to come from.

    sites: of each item that has one. by: FILE:COLUMN that they are from.
    Raises ValueError where there are too few for the rate.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        rate: float,
        select: str | None = None,
        sites: Mapping[str, str] | None = None,
        by: str | None = None,
    ) -> None:
        self.manifest, self.sites = manifest, sites
        self.column = None if by is None else by.rpartition(":")[2]
        self.rate = rate
        self.items = normal_items(manifest, select=select)
        self.errors: list[dict[str, str]] = []
        self._check_enough(len(self.items))

    def calibrate(self, scorer: Scorer, history: History) -> tuple[Calibration, History]:
        """The thresholds of a detector with this history, and the history with what gave them.

        Raises LeakageError where the detector has seen one of the normals, and ValueError where
        too few of them can be scored, in all or of every site.
        """
        before = replace(history, calibration={})  # what gave a threshold may give another
        hashes = read_hashes(self.items, "reading calibration normals", self.errors)
        usable = [item for item in self.items if item.item in hashes]
        overlap = compare(usable, hashes, before)
        overlap.tell_doubts()
        overlap.refuse("calibration normals", "leave them out with --select, or give others")
        usable = without_copies(usable, hashes, self.errors)
        self._check_enough(len(usable))
        with progress(len(usable), "calibrating") as bar:
            found = score_normals(scorer, self.manifest, usable, bar, self.errors)
        self._check_enough(len(found))
        self._tell_without_site([one.item.item for one in found])
        calibration = calibration_from(
            found,
            rate=self.rate,
            method="path",
            fitted_on=before.learnt_from,
            sites=self.sites,
            by=self.column,
        )
        if calibration.by and not any(site.calibrated for site in calibration.sites.values()):
            raise ValueError(
                f"{calibration.guarantee} Add normals, try a higher --rate, or calibrate all "
                "together"
            )
        return calibration, replace(history, calibration=traces([s.item for s in found], hashes))

    def _tell_without_site(self, names: Sequence[str]) -> None:
        if self.sites is None:
            return
        count = sum(name not in self.sites for name in names)
        if count:
            say(
                f"{count} of {len(names)} calibration normals have no {self.column} in the table, "
                "and count for none; add their rows"
            )

    def _check_enough(self, count: int) -> None:
        needed = required_normals(self.rate)
        if count < needed:
            raise ValueError(
                f"a false-alarm rate of {self.rate:g} takes {needed} held-out normal images, got "
                f"{count} that can be used; add more, or try a higher --rate"
            )


def told_of(calibration: Calibration) -> dict[str, Any]:
    """What a job's result says of a calibration; by site there is no threshold for all."""
    by_site = calibration.by is not None
    return {
        "num_calibration": len(calibration.scores),
        "rate": calibration.rate,
        "by": calibration.by,
        "calibrated": calibration.calibrated,
        "threshold": None if by_site else calibration.threshold,
        "map_threshold": None if by_site else calibration.map_threshold,
        "sites": {
            name: {
                "num_calibration": len(site.scores),
                "threshold": site.threshold,
                "map_threshold": site.map_threshold,
            }
            for name, site in calibration.sites.items()
        },
        "guarantee": calibration.guarantee,
    }


def tell(result: Mapping[str, Any]) -> None:
    """The closing lines of a job that calibrates."""
    for error in result["errors"][:_MOST_NAMED]:
        say(f"item {error['item']} left out: {error['reason']}")
    if result["calibrated"]:
        threshold = "" if result["threshold"] is None else f": threshold {result['threshold']:.6g}"
        say(
            f"calibrated with {result['num_calibration']} normal images for a false-alarm rate of "
            f"{result['rate']:g}{threshold}. {result['guarantee']}"
        )
    for name, site in result["sites"].items():
        threshold = "no threshold"
        if site["threshold"] is not None:
            threshold = f"threshold {site['threshold']:.6g}"
        say(f"{result['by']} {name}: {site['num_calibration']} normal images, {threshold}")
    say(f"saved in {result['model']}")
    if result["registered"] is not None:
        say(f"registered as version {result['registered']}")


def _write(folder: Path, out: Path, calibration: Calibration, history: History) -> None:
    """A copy of the model's files with another calibration; whole or not at all."""
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        copy = work / "model"
        copy.mkdir()
        for file in filter(Path.is_file, folder.iterdir()):
            shutil.copyfile(file, copy / file.name)  # without its mode: it may be read only
        card = copy / "card.md"
        card.write_text(recalibrated_card(card.read_text(), calibration))
        (copy / "calibration.json").write_text(json.dumps(calibration.to_dict(), indent=1))
        (copy / FILE).write_text(json.dumps(history.to_dict(), indent=1))
        os.rename(copy, out)
    finally:
        shutil.rmtree(work)
