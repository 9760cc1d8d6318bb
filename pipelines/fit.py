"""`medssl fit`: a detector from normal images, calibrated on normal images it has not seen."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from anomaly.base import Detector
from anomaly.calibration import Calibration
from anomaly.learning import StoppedError
from medssl.data.manifest import Manifest, build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.distributed import rank
from medssl.models.encoder import Encoder
from medssl.models.folder import digest, save_model, selftest_noise
from pipelines import record
from pipelines.card import detector_card, flat_notes
from pipelines.console import progress, say
from pipelines.fitting import (
    Fitting,
    NormalScore,
    calibration_from,
    check_out,
    check_work,
    learns,
    one_group,
    own_device,
    remove_work,
)
from pipelines.leakage import FILE, History, Overlap, compare, demand_new, traces, without_copies
from pipelines.normals import Goal, Plan, account, make_plan, normal_items, read_hashes

_METRICS = ("num_fitted", "num_calibration", "threshold", "map_threshold", "failed", "seconds")
_MOST_NAMED = 20
_NOISE_POINTS = 500  # of the self-test of a detector on clouds
_STOPPED = "stopped as asked, and saved; --resume goes on from here"


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
    allow_seen: bool = False,
    register: str | None = None,
    resume: bool = False,
    batch_size: int = 8,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a detector on the normal images of a folder, calibrate it, save and record it.

    Of a folder with train and test sides only normal training images are used, of any other all
    that are not labelled anomalous. Images of the test side are never opened. Images that the
    encoder was pretrained on are fitted on, and never calibrate: it finds them too normal.

    A detector that trains a network keeps checkpoints in OUT.work until it is saved. On several
    GPUs: torchrun --nproc-per-node 4 --no-python medssl fit ...; the batch is shared among them.

    Args:
        data: a folder, a file, or a manifest written by `medssl manifest`.
        detector: what to fit.
        out: folder for the fitted detector; must not exist, unless with --resume.
        preprocessing: from the source's units to the network's; by default the encoder's own.
        calibration: normals for the threshold: "split" holds out 30 % of them, or as many as the
            rate needs while at least half stay for fitting; "cross" scores each in one of five
            folds and then fits on all; "none"; or a folder or manifest of further normals.
        rate: the share of normal items that may be called anomalous, in (0, 1).
        require_calibration: fail where there are too few normals for the rate.
        groups: FILE:COLUMN that names each picture's patient or part.
        select: only items for which this expression over manifest columns holds.
        max_train: use a random choice of at most this many normals.
        allow_seen: go on where the test side holds copies of images to fit on, as far as the
            manifest's hashes tell, or other images of their patients or parts.
        register: name under which the detector is registered in MLflow.
        resume: go on from the last checkpoints where there are some, with the result of an
            undisturbed fit; does nothing where OUT is finished.
        batch_size: images per batch.
        workers: processes that make the views of a training; the result does not depend on them.
            Auto by default.
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: seeds the choice of normals, the splits and the detector's random numbers.
    """
    arguments = dict(locals())
    if resume and out.exists():
        say(f"{out} is finished; nothing to do")
        return {"model": str(out.absolute()), "finished": True, "failed": 0}
    check_out(out)
    if rank() == 0 and learns(detector):
        check_work(out, resume=resume)
    preprocessing = choose_preprocessing(detector, preprocessing)
    detector.to(own_device(device))
    manifest = build_manifest(data, groups=groups)
    normals = normal_items(manifest, select=select, max_train=max_train, seed=seed)
    apart = build_manifest(calibration, groups=groups) if isinstance(calibration, Path) else None
    say(account(manifest, normals))
    goal = Goal("path" if isinstance(calibration, Path) else calibration, rate, require_calibration)
    goal.check(goal.shortfall(len(normals if apart is None else normal_items(apart))))
    work = Fitting(
        manifest,
        normals,
        detector,
        preprocessing,
        out,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
    )
    asked = _Asked(goal, apart, allow_seen=allow_seen, register=register)
    with one_group():
        if rank() > 0:  # the first process calibrates, records and saves
            return _fit_beside(work, asked)
        result = _recorded(arguments, work, asked)
    if result["finished"]:
        _tell(result, goal)
    return result


@dataclass(frozen=True)
class _Asked:
    """What is wanted beyond a fit.

    apart: further normals that calibrate; None where they are held out.
    """

    goal: Goal
    apart: Manifest | None
    allow_seen: bool
    register: str | None


def _recorded(arguments: Mapping[str, Any], work: Fitting, asked: _Asked) -> dict[str, Any]:
    with record.recorded("fit", arguments) as run:
        run.manifest(work.manifest)
        try:
            result = _fit(work, asked)
        except StoppedError:
            say(_STOPPED)
            run.tags({"stopped": True})
            return {"model": None, "finished": False, "failed": len(work.errors) + 1}
        run.metrics({name: result[name] for name in _METRICS})
        run.metrics(_numbers(result["notes"]), prefix="notes.")
        run.artifact(work.out / "card.md")
        if asked.register is not None:
            result["registered"] = record.register(work.out, asked.register, run).version
        remove_work(work.out)
    return result


def choose_preprocessing(detector: Detector, given: Preprocessing | None) -> Preprocessing:
    """The preprocessing that was given, or the one the detector's encoder was trained with.

    An encoder of pictures does not say what to do with geometry; that may be added.
    Raises ValueError where there is neither, and where they differ.
    """
    encoders = (module for module in detector.modules() if isinstance(module, Encoder))
    own = next((one.preprocessing for one in encoders if one.preprocessing is not None), None)
    if given is None and own is None:
        raise ValueError(
            "no preprocessing: this encoder does not say what it was trained with; give at least "
            "--preprocessing.size and --preprocessing.intensity, of points --preprocessing.geometry"
        )
    differences = []
    if given is not None and own is not None:
        differences = [
            f"{name} {getattr(given, name)} against {getattr(own, name)}"
            for name in (entry.name for entry in fields(given))
            if getattr(given, name) != getattr(own, name)
            and not (name == "geometry" and own.geometry is None)
        ]
    if differences:
        raise ValueError(
            "the given preprocessing differs from the encoder's own: "
            f"{'; '.join(differences)}. Leave it out to take the encoder's"
        )
    chosen = given if given is not None else own
    assert chosen is not None
    return chosen


def _fit(work: Fitting, asked: _Asked) -> dict[str, Any]:
    plan, hashes, overlap = _planned(work, asked)
    found = _fitted(work, plan, asked.apart or work.manifest)
    goal, missing = asked.goal, _missing(work, asked, plan, len(found))
    goal.check(missing)
    history = History(
        fitted=traces(plan.fitted, work.hashes),
        calibration=traces([one.item for one in found], hashes),
        pretrained=work.seen,
    )
    calibration = calibration_from(
        found, rate=goal.rate, method=goal.method, fitted_on=history.learnt_from
    )
    with work.timed("save"):
        _save(work, calibration, history)
    return {
        "model": str(work.out.absolute()),
        "digest": digest(work.out),
        "finished": True,
        "num_fitted": len(plan.fitted),
        "num_calibration": len(calibration.scores),
        "calibrated": calibration.calibrated,
        "rate": calibration.rate,
        "threshold": calibration.threshold,
        "map_threshold": calibration.map_threshold,
        "missing": missing,
        "guarantee": calibration.guarantee,
        "notes": dict(work.detector.notes),
        "overlap": overlap.to_dict(),
        "seconds": {name: round(seconds, 3) for name, seconds in work.seconds.items()},
        "failed": len(work.errors),
        "errors": work.errors,
        "registered": None,
    }


def _fit_beside(work: Fitting, asked: _Asked) -> dict[str, Any]:
    """The same fits as the first process, and nothing else."""
    plan, _, _ = _planned(work, asked)
    try:
        _fitted(work, plan, asked.apart or work.manifest)
    except StoppedError:
        return {"model": None, "finished": False, "failed": 0}
    return {"model": None, "finished": True, "failed": 0}


def _planned(work: Fitting, asked: _Asked) -> tuple[Plan, Mapping[str, str], Overlap]:
    """Read the normals and say what becomes of each.

    Returns the plan, the pixel hashes of what it calibrates with, and what of the test side is
    known. Raises LeakageError, and ValueError where calibration is required and out of reach.
    """
    work.read()
    if work.seen.foreign:
        say(
            "the encoder's patients or parts were salted with another key (MEDSSL_KEY_FILE): only "
            "its pictures are compared with yours, not its patients"
        )
    overlap = _test_overlap(work)
    demand_new(overlap, "test images", allow_seen=asked.allow_seen)
    if asked.apart is None:
        _tell_seen(work)
        hashes = work.hashes
        plan = make_plan(work.items, hashes, asked.goal, seen=work.seen, seed=work.seed)
    else:
        hashes = _read_apart(work, asked.apart)
        usable = [item for item in normal_items(asked.apart) if item.item in hashes]
        plan = Plan(fitted=work.items, scored=without_copies(usable, hashes, work.errors))
    asked.goal.check(_missing(work, asked, plan, len(plan.calibrating)))
    return plan, hashes, overlap


def _missing(work: Fitting, asked: _Asked, plan: Plan, num_scores: int) -> int:
    """How many more normals it takes, with this many scores."""
    count = len(work.items if asked.apart is None else plan.scored)
    return asked.goal.missing(count, num_scores)


def _test_overlap(work: Fitting) -> Overlap:
    """Which images of the test side the detector will know, from what the manifest says of them."""
    test = [item for item in work.manifest.images if item.split == "test"]
    hashes = {item.item: item.pixel_sha256 for item in test if item.pixel_sha256 is not None}
    return compare(test, hashes, _read_so_far(work))


def _read_apart(work: Fitting, manifest: Manifest) -> dict[str, str]:
    """Pixel hash by item of the usable calibration normals.

    Raises LeakageError where the detector will have seen one.
    """
    normals = normal_items(manifest)
    hashes = read_hashes(normals, "reading calibration normals", work.errors)
    usable = [item for item in normals if item.item in hashes]
    found = compare(usable, hashes, _read_so_far(work))
    found.refuse("calibration normals", "take them out of one of the two")
    return hashes


def _read_so_far(work: Fitting) -> History:
    """As if every normal that was read were fitted on."""
    return History(fitted=traces(work.items, work.hashes), pretrained=work.seen)


def _fitted(work: Fitting, plan: Plan, manifest: Manifest) -> list[NormalScore]:
    """Fit as planned, the final fit last; what the fits say of items that they have not seen."""
    found: list[NormalScore] = []
    if plan.folds:
        with progress(len(plan.calibrating), f"fitting and scoring {len(plan.folds)} folds") as bar:
            for place, (fitted, scored) in enumerate(plan.folds):
                work.fit(fitted, f"fold{place}")
                if rank() == 0:
                    found += work.scores(work.manifest, scored, bar)
    with progress(len(plan.fitted), "fitting") as bar:
        work.fit(plan.fitted, "final")
        bar.advance(len(plan.fitted))
    if plan.scored and rank() == 0:
        with progress(len(plan.scored), "calibrating") as bar:
            found += work.scores(manifest, plan.scored, bar)
    return found


def _save(work: Fitting, calibration: Calibration, history: History) -> None:
    first = work.samples[work.samples.items.index(work.items[0])]
    shape = first.images["image"].pixels.shape if first.points is None else (_NOISE_POINTS, 3)
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
            num_fitted=len(history.fitted),
            num_groups=history.num_groups,
            origin=f"seed {work.seed}",
        ),
        noise=selftest_noise(work.detector.selftest_shape(shape)),
        files={"calibration.json": calibration.to_dict(), FILE: history.to_dict()},
    )


def _tell_seen(work: Fitting) -> None:
    count = len(work.seen.known(work.items, work.hashes))
    if count:
        say(
            f"{count} of the {len(work.items)} normal images, or others of their patients or "
            "parts, were seen when the encoder was pretrained and cannot calibrate; keep some out "
            "of pretraining, or give new ones with --calibration PATH"
        )


def _numbers(notes: Mapping[str, Any]) -> dict[str, float]:
    """What of the notes can be a metric."""
    flat = flat_notes(notes)
    return {name: value for name, value in flat.items() if isinstance(value, (int, float))}


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
