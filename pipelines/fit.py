"""`medssl fit`: a detector from normal images, calibrated on normal images it has not seen."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import Subset

from anomaly.base import Detector, NormalData
from anomaly.calibration import Calibration
from medssl.data.dataset import PreparedSamples
from medssl.data.domain import learn_domain
from medssl.data.image import Image
from medssl.data.manifest import Item, Manifest, NoDataError, build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.models.encoder import Encoder, seen_by_encoders
from medssl.models.folder import digest, save_model, selftest_noise
from pipelines import record
from pipelines.card import detector_card
from pipelines.console import Progress, progress, say
from pipelines.device import choose_device
from pipelines.normals import Goal, Plan, account, make_plan, normal_items, num_groups
from pipelines.scoring import Scorer

_METRICS = ("num_fitted", "num_calibration", "threshold", "map_threshold", "failed", "seconds")
_MOST_NAMED = 20


def fit(
    data: Path,
    detector: Detector,
    out: Path,
    *,
    preprocessing: Preprocessing | None = None,
    calibration: Literal["split", "cross", "none"] | Path = "split",
    rate: float = 0.05,
    require_calibration: bool = False,
    groups: str | None = None,
    select: str | None = None,
    max_train: int | None = None,
    register: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a detector on the normal images of a folder, calibrate it, save and record it.

    Of a folder with train and test sides only normal training images are used, of any other all
    that are not labelled anomalous. Images of the test side are never opened. Images that the
    encoder was pretrained on are fitted on, and never calibrate: it finds them too normal.

    Args:
        data: a folder, a file, or a manifest written by `medssl manifest`.
        detector: what to fit.
        out: folder for the fitted detector; must not exist.
        preprocessing: from the source's units to the network's; by default the encoder's own.
        calibration: normals for the threshold: "split" holds out 30 % of them, or as many as the
            rate needs while at least half stay for fitting; "cross" scores each in one of five
            folds and then fits on all; "none"; or a folder or manifest of further normals.
        rate: the share of normal items that may be called anomalous, in (0, 1).
        require_calibration: fail where there are too few normals for the rate.
        groups: FILE:COLUMN that names each picture's patient or part.
        select: only items for which this expression over manifest columns holds.
        max_train: use a random choice of at most this many normals.
        register: name under which the detector is registered in MLflow.
        batch_size: images per batch.
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: seeds the choice of normals, the splits and the detector's random numbers.
    """
    arguments = dict(locals())
    check_out(out)
    preprocessing = choose_preprocessing(detector, preprocessing)
    detector.to(choose_device(device))
    manifest = build_manifest(data, groups=groups)
    normals = normal_items(manifest, select=select, max_train=max_train, seed=seed)
    apart = build_manifest(calibration, groups=groups) if isinstance(calibration, Path) else None
    say(account(manifest, normals))
    goal = Goal("path" if isinstance(calibration, Path) else calibration, rate, require_calibration)
    goal.check(goal.shortfall(len(normals if apart is None else normal_items(apart))))
    with record.recorded("fit", arguments) as run:
        run.manifest(manifest)
        work = _Work(manifest, normals, detector, preprocessing, out, batch_size, seed)
        result = _fit(work, goal, apart)
        run.metrics({name: result[name] for name in _METRICS})
        run.artifact(out / "card.md")
        if register is not None:
            result["registered"] = record.register(out, register, run).version
    _tell(result, goal)
    return result


def check_out(out: Path) -> None:
    """Raises FileExistsError where `out` exists, PermissionError where it could not be written."""
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write into {out.parent} ({error.strerror}); choose another --out"
        ) from error


def choose_preprocessing(detector: Detector, given: Preprocessing | None) -> Preprocessing:
    """The preprocessing that was given, or the one the detector's encoder was trained with.

    Raises ValueError where there is neither, and where they differ.
    """
    encoders = (module for module in detector.modules() if isinstance(module, Encoder))
    own = next((one.preprocessing for one in encoders if one.preprocessing is not None), None)
    if given is None and own is None:
        raise ValueError(
            "no preprocessing: this encoder does not say what it was trained with; give at least "
            "--preprocessing.size and --preprocessing.intensity"
        )
    if given is not None and own is not None and given != own:
        differences = [
            f"{name} {getattr(given, name)} against {getattr(own, name)}"
            for name in (entry.name for entry in fields(given))
            if getattr(given, name) != getattr(own, name)
        ]
        raise ValueError(
            "the given preprocessing differs from the encoder's own: "
            f"{'; '.join(differences)}. Leave it out to take the encoder's"
        )
    chosen = given if given is not None else own
    assert chosen is not None
    return chosen


class _Work:
    """One detector and its normals: what was read, fitted and scored, and what failed.

    items: the usable normals. hashes: their pixel hashes by item. domain: learnt from them.
    seen: what the detector's encoder was pretrained on.
    """

    def __init__(
        self,
        manifest: Manifest,
        items: Sequence[Item],
        detector: Detector,
        preprocessing: Preprocessing,
        out: Path,
        batch_size: int,
        seed: int,
    ) -> None:
        self.manifest, self.detector, self.out = manifest, detector, out
        self.preprocessing, self.batch_size, self.seed = preprocessing, batch_size, seed
        self.seen = seen_by_encoders(detector)
        self.errors: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}
        self.items: list[Item] = []
        self.domain: dict[str, Any] = {}
        self._raw: list[Sample] = []
        self.samples = PreparedSamples(
            manifest, items, preprocessing, hashes=True, on_read=self._raw.append
        )
        self.hashes = self.samples.pixel_hashes

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[name]`."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def read(self) -> None:
        """Read every normal once; raises NoDataError where none can be used."""
        with self.timed("read"), progress(len(self.samples), "reading") as bar:
            images = self._images(bar)
            first = next(images, None)
            if first is None:
                raise NoDataError(
                    f"none of the {len(self.samples)} normal images can be used; "
                    f"the first: {self.errors[0]['reason']}"
                )
            self.domain = learn_domain(chain([first], images))
        self.samples.on_read = None  # what did not fit into memory is read again, and not watched

    def fit(self, items: Sequence[Item]) -> None:
        """Fit the detector anew; equal items give an equal detector."""
        rows = {item.item: row for row, item in enumerate(self.samples.items)}
        part = Subset(cast(Any, self.samples), [rows[item.item] for item in items])
        torch.manual_seed(self.seed)
        normal = NormalData(cast(Sequence[Sample], part), batch_size=self.batch_size)
        place = tempfile.TemporaryDirectory(prefix=f".{self.out.name}.", dir=self.out.parent)
        with self.timed("fit"), place as workdir:
            self.detector.fit(normal, workdir=Path(workdir))

    def scores(
        self, manifest: Manifest, items: Sequence[Item], bar: Progress
    ) -> list[tuple[float, float]]:
        """Score, and map maximum on the source's grid, of each item that can be scored."""
        device = next((one.device for one in self.detector.parameters()), torch.device("cpu"))
        scorer = Scorer.from_parts(
            self.detector, self.preprocessing, domain=self.domain, device=device
        )
        found = []
        with self.timed("calibrate"):
            for item in items:
                try:
                    scored = scorer.score([load_sample(manifest, item)])[0]
                    assert scored.map is not None  # a detector's
                    found.append((scored.score, _largest(scored.map)))
                except (ReadError, ValueError) as error:
                    self.failed(item, error)
                bar.advance(1)
        return found

    def failed(self, item: Item, error: Exception) -> None:
        """Remember why an item is left out; a third party's words might name a path."""
        ours = type(error).__module__.split(".")[0] in ("medssl", "anomaly", "pipelines")
        known = ours or isinstance(error, ValueError)
        reason = str(error) if known else f"reading failed with {type(error).__name__}"
        self.errors.append({"item": item.item, "reason": reason})

    def _images(self, bar: Progress) -> Iterator[Image]:
        """The usable normals as they are read."""
        for row, item in enumerate(self.samples.items):
            try:
                image = self.samples[row].images["image"]
                _check_axes(image, self.detector)
            except Exception as error:  # one bad file never ends a batch job
                self.failed(item, error)
            else:
                self.items.append(item)
                yield self._raw[-1].images["image"]
            self._raw.clear()
            bar.advance(1)


def _fit(work: _Work, goal: Goal, apart: Manifest | None) -> dict[str, Any]:
    work.read()
    if work.seen.foreign:
        say(
            "the encoder's patients or parts were salted with another key (MEDSSL_KEY_FILE): only "
            "its pictures are compared with yours, not its patients"
        )
    if apart is None:
        _tell_seen(work)
        plan = make_plan(work.items, work.hashes, goal, seen=work.seen, seed=work.seed)
        count = len(work.items)
    else:
        plan = Plan(fitted=work.items, scored=_read_apart(work, apart))
        count = len(plan.scored)
    goal.check(goal.missing(count, len(plan.calibrating)))
    calibration = _calibrated(work, plan, goal, apart or work.manifest)
    missing = goal.missing(count, len(calibration.scores))
    goal.check(missing)
    with work.timed("save"):
        _save(work, plan, calibration)
    return {
        "model": str(work.out.absolute()),
        "digest": digest(work.out),
        "num_fitted": len(plan.fitted),
        "num_calibration": len(calibration.scores),
        "calibrated": calibration.calibrated,
        "rate": calibration.rate,
        "threshold": calibration.threshold,
        "map_threshold": calibration.map_threshold,
        "missing": missing,
        "guarantee": calibration.guarantee,
        "seconds": {name: round(seconds, 3) for name, seconds in work.seconds.items()},
        "failed": len(work.errors),
        "errors": work.errors,
        "registered": None,
    }


def _read_apart(work: _Work, manifest: Manifest) -> list[Item]:
    """The usable calibration normals; raises ValueError where the detector will have seen one."""
    groups = {item.group for item in work.items if item.group is not None}
    fitted, usable = set(work.hashes.values()), []
    copies, related, hashes = 0, 0, dict[str, str]()
    normals = normal_items(manifest)
    with progress(len(normals), "reading calibration normals") as bar:
        for item in normals:
            try:
                image = load_sample(manifest, item, hashes=True).images["image"]
            except Exception as error:  # one bad file never ends a batch job
                work.failed(item, error)
            else:
                usable.append(item)
                hashes[item.item] = image.provenance["pixel_sha256"]
                copies += hashes[item.item] in fitted
                related += item.group in groups
            bar.advance(1)
    pretrained = len(work.seen.known(usable, hashes))
    if copies or related or pretrained:
        raise ValueError(
            f"calibration normals must be new to the detector: {copies} of {len(normals)} have the "
            f"same pixels as a normal to fit on, {related} are of the same patient or part, and "
            f"{pretrained} were seen when its encoder was pretrained; take them out of one of the "
            "two"
        )
    return usable


def _calibrated(work: _Work, plan: Plan, goal: Goal, manifest: Manifest) -> Calibration:
    """Fit as planned, and calibrate with the scores of items the fits have not seen."""
    pairs: list[tuple[float, float]] = []
    if plan.folds:
        with progress(len(plan.calibrating), f"fitting and scoring {len(plan.folds)} folds") as bar:
            for fitted, scored in plan.folds:
                work.fit(fitted)
                pairs += work.scores(work.manifest, scored, bar)
    with progress(len(plan.fitted), "fitting") as bar:
        work.fit(plan.fitted)
        bar.advance(len(plan.fitted))
    if plan.scored:
        with progress(len(plan.scored), "calibrating") as bar:
            pairs += work.scores(manifest, plan.scored, bar)
    return Calibration.from_scores(
        [score for score, _ in pairs],
        [maximum for _, maximum in pairs],
        rate=goal.rate,
        method=goal.method,
        fitted_on=work.seen.pixels | {work.hashes[item.item] for item in plan.fitted},
        num_groups=num_groups(plan.calibrating),
    )


def _save(work: _Work, plan: Plan, calibration: Calibration) -> None:
    image = work.samples[work.samples.items.index(work.items[0])].images["image"]
    shape = [2, *image.pixels.shape]
    if image.axes == "DHW":
        shape[0], shape[2] = 1, min(2, shape[2])  # a thin slab tells as much as a volume
    save_model(
        work.out,
        work.detector,
        kind="detector",
        preprocessing=work.preprocessing,
        domain=work.domain,
        card=detector_card(
            work.detector,
            preprocessing=work.preprocessing,
            domain=work.domain,
            calibration=calibration,
            num_fitted=len(plan.fitted),
            num_groups=num_groups(plan.fitted),
            seed=work.seed,
        ),
        noise=selftest_noise(shape),
        files={"calibration.json": calibration.to_dict()},
    )


def _tell_seen(work: _Work) -> None:
    count = len(work.seen.known(work.items, work.hashes))
    if count:
        say(
            f"{count} of the {len(work.items)} normal images, or others of their patients or "
            "parts, were seen when the encoder was pretrained and cannot calibrate; keep some out "
            "of pretraining, or give new ones with --calibration PATH"
        )


def _check_axes(image: Image, detector: Detector) -> None:
    if image.axes != detector.axes:
        advice = "; wrap it in anomaly.slicewise.Slicewise" if image.axes == "DHW" else ""
        raise ValueError(
            f"{type(detector).__name__} takes images with axes {detector.axes}, "
            f"this one has {image.axes}{advice}"
        )


def _largest(values: Image) -> float:
    """The largest value of a map, leaving out NaN."""
    known = values.pixels[~values.pixels.isnan()]
    if len(known) == 0:
        raise ValueError("its anomaly map has no value anywhere")
    return float(known.max())


def _tell(result: Mapping[str, Any], goal: Goal) -> None:
    for error in result["errors"][:_MOST_NAMED]:
        say(f"item {error['item']} left out: {error['reason']}")
    say(f"fitted on {result['num_fitted']} normal images, saved in {result['model']}")
    if result["calibrated"]:
        say(
            f"calibrated with {result['num_calibration']} normal images for a false-alarm rate of "
            f"{goal.rate:g}: threshold {result['threshold']:.6g}. {result['guarantee']}"
        )
    else:
        say(f"not calibrated: {goal.too_few(result['missing'])}")
    if result["registered"] is not None:
        say(f"registered as version {result['registered']}")
