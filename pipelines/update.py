"""`medssl update`: normals in and out of a fitted detector, without fitting it again."""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import anomaly
from anomaly.base import Detector, NormalData
from anomaly.calibration import Calibration
from medssl.data.dataset import PreparedSamples
from medssl.data.manifest import Item, Manifest, build_manifest
from medssl.data.privacy import salted
from medssl.data.sample import Sample
from medssl.models.folder import SavedModel, digest, load_model, save_model, selftest_noise
from pipelines import record
from pipelines.calibrate import Normals, tell, told_of
from pipelines.card import detector_card
from pipelines.console import progress, say
from pipelines.fitting import check_axes, check_out
from pipelines.leakage import FILE, LeakageError, Trace, read_history, traces
from pipelines.normals import left_out, normal_items, read_hashes
from pipelines.score import sites_of
from pipelines.scoring import Scorer, read_calibration

_METRICS = ("num_added", "num_removed", "num_fitted", "num_calibration", "failed")
_RATE = 0.05
_MOST_NAMED = 5


@runtime_checkable
class Updatable(Protocol):
    """A detector that takes normals in, and forgets them, without a new fit."""

    def add(self, normal: NormalData, *, workdir: Path | None = None) -> Any:
        """Learn further normals; their item ids are none of those it knows."""

    def remove(self, items: Sequence[str]) -> Any:
        """Forget the normals with these item ids."""


def update(
    model: str,
    /,
    out: Path,
    calibration: Literal["none"] | Path,
    *,
    add: Path | None = None,
    remove: Path | None = None,
    select: str | None = None,
    rate: float | None = None,
    by: str | None = None,
    groups: str | None = None,
    register: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Add normals to a fitted detector or remove some, calibrate it, and save it as a new model.

    The scores of all images change with that, so the old thresholds do not hold any more, and the
    held-out normals are scored again.

    Args:
        model: folder of a fitted detector, or models:/NAME@champion, or models:/NAME/3.
        out: folder for the updated detector; must not exist.
        calibration: held-out normals for the new thresholds, a folder or a manifest, such as those
            of the last calibration; or "none" for a detector without thresholds.
        add: further normals to learn: a folder, a file or a manifest.
        remove: pictures to forget: a folder, a file or a manifest; found again by their pixels.
        select: of what is added, only items for which this expression over manifest columns holds.
        rate: the share of normal items that may be called anomalous; by default as before.
        by: FILE:COLUMN that names the site of each calibration image, for thresholds by site.
        groups: FILE:COLUMN that names each picture's patient or part.
        register: name under which the updated detector is registered in MLflow.
        batch_size: images per batch.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    arguments = dict(locals())
    check_out(out)
    if add is None and remove is None:
        raise ValueError("nothing to do; give --add NORMALS, --remove PICTURES or both")
    if select is not None and add is None:
        raise ValueError("--select chooses among what is added, and nothing is; leave it out")
    folder = record.resolve(model)
    saved = load_model(folder, kind="detector")
    work = _Update(saved, device=device, batch_size=batch_size)
    before = read_calibration(folder)
    if rate is None:
        rate = _RATE if before is None else before.rate
    held_out = None
    if isinstance(calibration, Path):
        manifest = build_manifest(calibration, groups=groups)
        sites = None if by is None else sites_of(manifest, by, calibration)
        held_out = Normals(manifest, rate=rate, sites=sites, by=by)
    with record.recorded("update", arguments) as run:
        if remove is not None:
            work.remove(build_manifest(remove))
        if add is not None:
            work.add(build_manifest(add, groups=groups), select)
        thresholds = work.calibrate(held_out, rate)
        work.save(out, thresholds)
        result = work.result(out, thresholds)
        run.metrics({name: result[name] for name in _METRICS})
        run.artifact(out / "card.md")
        if register is not None:
            result["registered"] = record.register(out, register, run).version
    say(
        f"added {work.num_added} and removed {work.num_removed} normal images; it knows "
        f"{result['num_fitted']} now"
    )
    if held_out is None:
        say("not calibrated: the old thresholds do not hold for its new scores")
    elif before is not None and before.by is not None and by is None:
        say(
            f"it had thresholds for each {before.by} by itself, and has one for all now; give "
            f"--by FILE:{before.by} for the former"
        )
    tell(result)
    return result


class _Update:
    """A loaded detector, what it has seen, and how that changes.

    Raises ValueError for a detector that cannot be updated, or a folder that does not tell what it
    was fitted on.
    """

    def __init__(self, saved: SavedModel, *, device: str, batch_size: int) -> None:
        detector = saved.model
        assert isinstance(detector, Detector)
        if not isinstance(detector, Updatable):
            raise ValueError(
                f"{type(detector).__name__} learns from all normals at once and cannot be updated; "
                f"fit it again, or fit one that can: {', '.join(_updatable_names())}"
            )
        if not (saved.path / FILE).is_file():
            raise ValueError(
                f"the model does not tell which images it was fitted on (it has no {FILE}); fit "
                "it again with this version"
            )
        self.saved, self.detector, self.batch_size = saved, detector, batch_size
        self.updatable: Updatable = detector
        self.scorer = Scorer.from_parts(
            detector, saved.preprocessing, domain=saved.domain, device=device
        )
        self.history = read_history(saved.path)
        self.errors: list[dict[str, str]] = []
        self.num_added = self.num_removed = 0

    def remove(self, manifest: Manifest) -> None:
        """Forget the pictures of a manifest, and every copy of them.

        One that it was not fitted on is an error of its own, unless it gave the threshold: that
        goes with the calibration. Raises ValueError where there is none, or nothing would stay.
        """
        images = manifest.images
        hashes = read_hashes(images, "reading what to remove", self.errors)
        given = set(hashes.values())
        fitted, kept = dict[str, Trace](), dict[str, Trace]()
        for name, trace in self.history.fitted.items():
            (fitted if trace.pixel_sha256 in given else kept)[name] = trace
        if not fitted or not kept:
            raise ValueError(
                f"of {len(images)} pictures to remove, {len(fitted)} are among the "
                f"{len(self.history.fitted)} that the detector was fitted on; remove at least one, "
                "and leave at least one"
            )
        known = _pixels(fitted) | _pixels(self.history.calibration)
        self.errors += [
            {"item": name, "reason": "the detector was not fitted on these pixels"}
            for name, pixel_sha256 in hashes.items()
            if pixel_sha256 not in known
        ]
        self.updatable.remove(list(fitted))
        self.history = replace(self.history, fitted=kept)
        self.num_removed = len(fitted)

    def add(self, manifest: Manifest, select: str | None) -> None:
        """Learn the normals of a manifest.

        Raises LeakageError for copies of what it was fitted on or calibrated with, and ValueError
        where no normal can be used.
        """
        normals = normal_items(manifest, select=select)
        samples = PreparedSamples(manifest, normals, self.saved.preprocessing, hashes=True)
        rows = list(self._usable_rows(samples))
        if not rows:
            raise ValueError(
                f"none of the {len(normals)} normal images to add can be used; the first: "
                f"{self.errors[-1]['reason']}"
            )
        hashes = samples.pixel_hashes
        items = [normals[row] for row in rows]
        self._refuse_copies(items, hashes)
        items = [self._named_anew(item, hashes[item.item]) for item in items]
        new = {item.item: hashes[normals[row].item] for row, item in zip(rows, items, strict=True)}
        named = cast(Sequence[Sample], _Named(samples, rows, list(new)))
        with progress(len(new), "adding") as bar:
            self.updatable.add(NormalData(named, batch_size=self.batch_size))
            bar.advance(len(new))
        self.history = replace(self.history, fitted={**self.history.fitted, **traces(items, new)})
        self.num_added = len(new)

    def calibrate(self, held_out: Normals | None, rate: float) -> Calibration:
        """The thresholds of the detector as it is now."""
        if held_out is None:
            self.history = replace(self.history, calibration={})
            return Calibration.from_scores(
                [], [], rate=rate, method="none", fitted_on=self.history.learnt_from
            )
        calibration, self.history = held_out.calibrate(self.scorer, self.history)
        self.errors += held_out.errors
        return calibration

    def save(self, out: Path, calibration: Calibration) -> None:
        """Write the new folder."""
        selftest = json.loads((self.saved.path / "selftest.json").read_text())
        save_model(
            out,
            self.detector,
            kind="detector",
            preprocessing=self.saved.preprocessing,
            domain=self.saved.domain,
            card=detector_card(
                self.detector,
                preprocessing=self.saved.preprocessing,
                domain=self.saved.domain,
                calibration=calibration,
                num_fitted=len(self.history.fitted),
                num_groups=self.history.num_groups,
                origin=f"after an update: {self.num_added} added, {self.num_removed} removed",
            ),
            noise=selftest_noise(selftest["shape"]),
            files={"calibration.json": calibration.to_dict(), FILE: self.history.to_dict()},
        )

    def result(self, out: Path, calibration: Calibration) -> dict[str, Any]:
        """What the job returns."""
        return {
            "model": str(out.absolute()),
            "digest": digest(out),
            "num_added": self.num_added,
            "num_removed": self.num_removed,
            "num_fitted": len(self.history.fitted),
            **told_of(calibration),
            "failed": len(self.errors),
            "errors": self.errors,
            "registered": None,
        }

    def _usable_rows(self, samples: PreparedSamples) -> Iterator[int]:
        """The rows that can be read and lie in the detector's domain."""
        raw: list[Sample] = []
        samples.on_read = raw.append
        with progress(len(samples), "reading what to add") as bar:
            for row, item in enumerate(samples.items):
                try:
                    check_axes(samples[row], self.detector)
                    self.scorer.check(raw[-1])
                except Exception as error:  # one bad file never ends a batch job
                    self.errors.append(left_out(item, error))
                else:
                    yield row
                raw.clear()
                bar.advance(1)
        samples.on_read = None

    def _refuse_copies(self, items: Sequence[Item], hashes: dict[str, str]) -> None:
        """Of fitted images: they would count twice. Of calibrating ones: those must stay new."""
        known = _pixels(self.history.fitted) | _pixels(self.history.calibration)
        copies = [item.item for item in items if hashes[item.item] in known]
        if copies:
            raise LeakageError(
                f"{len(copies)} of {len(items)} normals to add have the same pixels as an image "
                "that the detector was fitted on or calibrated with (items "
                f"{', '.join(copies[:_MOST_NAMED])}{', ...' if copies[_MOST_NAMED:] else ''}); "
                "leave them out with --select"
            )

    def _named_anew(self, item: Item, pixel_sha256: str) -> Item:
        """Under an id that is free: a file of the same name in another folder has the same one."""
        if item.item not in self.history.fitted:
            return item
        return replace(item, item=salted(f"{item.item} {pixel_sha256}", length=16))


@dataclass(frozen=True)
class _Named:
    """Some of the samples, under names of their own."""

    samples: PreparedSamples
    rows: Sequence[int]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.samples[self.rows[index]], item=self.names[index])


def _pixels(kept: Mapping[str, Trace]) -> set[str]:
    return {trace.pixel_sha256 for trace in kept.values()}


def _updatable_names() -> list[str]:
    """Detectors with both methods, read from their files."""
    wanted = {"add", "remove"}
    return sorted(
        node.name
        for file in Path(anomaly.__path__[0]).rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
        and wanted <= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
    )
