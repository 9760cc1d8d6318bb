"""One detector and its normals: reading, fitting as often as the plan says, scoring, saving."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset

from anomaly.base import Detector, NormalData
from anomaly.calibration import Calibration, Method
from anomaly.learning import LearnedDetector, device_of, frozen_digest
from anomaly.tails import MapTail
from medssl.data.cache import DecodedCache
from medssl.data.dataset import PreparedSamples, looked_at
from medssl.data.domain import domain_of
from medssl.data.manifest import Item, Manifest, NoDataError, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.distributed import join, leave, processes, rank, sum_of_all
from medssl.models.encoder import seen_by_encoders
from medssl.models.folder import describe
from pipelines.clouds import PointMap, in_own_unit
from pipelines.console import Progress, progress
from pipelines.device import choose_device
from pipelines.journal import Journal
from pipelines.normals import left_out, num_groups
from pipelines.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class NormalScore:
    """What a detector says of a normal item that it has not seen; larger is more anomalous.

    tail: of the map on the source's grid.
    """

    item: Item
    score: float
    tail: MapTail


class Fitting:
    """One detector and its normals: what was read and fitted, and what failed.

    workers: processes that make the views of a training.
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
        *,
        batch_size: int,
        workers: int | None,
        seed: int,
    ) -> None:
        self.manifest, self.detector, self.out = manifest, detector, out
        self.preprocessing, self.seed = preprocessing, seed
        self.batch_size, self.workers = batch_size, workers
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
            samples = self._usable(bar)
            first = next(samples, None)
            if first is None:
                raise NoDataError(
                    f"none of the {len(self.samples)} normal images can be used; "
                    f"the first: {self.errors[0]['reason']}"
                )
            self.domain = domain_of(chain([first], samples))
        self.samples.on_read = None  # what did not fit into memory is read again, and not watched
        self.samples.hashes = False

    def fit(self, items: Sequence[Item], name: str) -> None:
        """Fit the detector anew; equal items give an equal detector.

        name: of this fit among those of the job; one that was killed goes on from what lies under
            it in the work folder.
        """
        rows = {item.item: row for row, item in enumerate(self.samples.items)}
        part = Subset(cast(Any, self.samples), [rows[item.item] for item in items])
        normal = NormalData(
            cast(Sequence[Sample], part), batch_size=self.batch_size, workers=self.workers
        )
        torch.manual_seed(self.seed)
        with self.timed("fit"), self._place(items, name) as workdir:
            self.detector.fit(normal, workdir=workdir)
            wait_for_all()  # the first removes what the others may still read

    def scores(self, manifest: Manifest, items: Sequence[Item], bar: Progress) -> list[NormalScore]:
        """What the detector, as it is now, says of each item that can be scored."""
        scorer = Scorer.from_parts(
            self.detector,
            self.preprocessing,
            domain=self.domain,
            device=device_of(self.detector),
        )
        with self.timed("calibrate"):
            return score_normals(scorer, manifest, items, bar, self.errors)

    @contextmanager
    def _place(self, items: Sequence[Item], name: str) -> Iterator[Path]:
        """A folder for one fit: that of its checkpoints where it has such, else for its duration.

        A training asks for its normals again and again, and in any order; beside the checkpoints
        lie those, prepared, that memory does not hold.
        Raises ValueError where it holds checkpoints of other normals or another detector.
        """
        if not learns(self.detector):
            prefix = f".{self.out.name}."
            with tempfile.TemporaryDirectory(prefix=prefix, dir=self.out.parent) as folder:
                yield Path(folder)
            return
        place = work_name(self.out) / name
        if rank() == 0:
            Journal(place, self._identity(items))
        (place / "fit").mkdir(parents=True, exist_ok=True)
        self.samples.cache = DecodedCache(work_name(self.out) / "prepared")
        yield place / "fit"

    def _identity(self, items: Sequence[Item]) -> dict[str, Any]:
        """What a fit depends on: it goes on only where all of it is the same."""
        return {
            "normals": _short([(item.item, self.hashes[item.item]) for item in items]),
            "preprocessing": _short(self.preprocessing.to_dict()),
            "detector": _short(describe(self.detector)),
            "encoder weights": frozen_digest(self.detector),
            "seed": self.seed,
        }

    def _usable(self, bar: Progress) -> Iterator[Sample]:
        """The usable normals as they are read, their geometry in the unit of the preprocessing."""
        both = any(self.samples.manifest.xyz_of(item) for item in self.samples.items)
        for row, item in enumerate(self.samples.items):
            try:
                if both and self.samples.manifest.xyz_of(item) is None:
                    raise ValueError("a picture with xyz beside it is needed, as others have")
                check_axes(self.samples[row], self.detector)
                sample = in_own_unit(self._raw[-1], self.preprocessing)
            except Exception as error:  # one bad file never ends a batch job
                self.errors.append(left_out(item, error))
            else:
                self.items.append(item)
                yield sample
            self._raw.clear()
            bar.advance(1)


def score_normals(
    scorer: Scorer,
    manifest: Manifest,
    items: Sequence[Item],
    bar: Progress,
    errors: list[dict[str, str]],
) -> list[NormalScore]:
    """Score each item that can be scored; the others are added to `errors`."""
    manifest = looked_at(manifest, scorer.preprocessing)
    found = []
    for item in items:
        try:
            scored = scorer.score([load_sample(manifest, item)])[0]
            if scored.missing:
                raise ValueError(f"{' and '.join(scored.missing)} missing; it calibrates nothing")
            assert scored.map is not None  # a detector's
            found_map = scored.map
            one = found_map.values if isinstance(found_map, PointMap) else found_map.pixels
            tail = MapTail.of(one)
        except (ReadError, ValueError) as error:
            errors.append(left_out(item, error))
        else:
            found.append(NormalScore(item=item, score=scored.score, tail=tail))
        bar.advance(1)
    return found


def calibration_from(
    found: Sequence[NormalScore],
    *,
    rate: float,
    method: Method,
    fitted_on: frozenset[str],
    sites: Mapping[str, str] | None = None,
    by: str | None = None,
) -> Calibration:
    """A calibration from held-out normals; see `Calibration.from_scores`.

    fitted_on: pixel hashes. sites: of each item that has one. by: the column they are from.
    """
    return Calibration.from_scores(
        [one.score for one in found],
        [one.tail.values[0] for one in found],  # the level that nothing lies above
        rate=rate,
        method=method,
        fitted_on=fitted_on,
        num_groups=num_groups([one.item for one in found]),
        tails=[one.tail for one in found],
        sites=None if sites is None else [sites.get(one.item.item) for one in found],
        by=by,
    )


def learns(detector: Detector) -> bool:
    """Whether it trains a network, so that a fit has checkpoints to go on from."""
    return any(isinstance(module, LearnedDetector) for module in detector.modules())


def own_device(name: str) -> torch.device:
    """As `choose_device`; of several processes on one machine each takes its own GPU."""
    device = choose_device(name)
    if device.type == "cuda" and processes() > 1:
        return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return device


@contextmanager
def one_group() -> Iterator[None]:
    """Let the processes of a torchrun begin together, and part from each other in the end."""
    join()
    wait_for_all()  # the first looks for a work folder before the others write there
    yield
    wait_for_all()  # a process whose partner is gone may be aborted
    leave()


def wait_for_all() -> None:
    """Let every process come here before any goes on."""
    sum_of_all(torch.zeros(1))


def check_axes(sample: Sample, detector: Detector) -> None:
    """Raises ValueError for an item that the detector does not take."""
    axes = "points" if sample.points is not None else sample.images["image"].axes
    if axes == detector.axes:
        return
    name = type(detector).__name__
    if "points" in (axes, detector.axes):
        kinds = {True: "free point clouds", False: "images"}
        taken, given = kinds[detector.axes == "points"], kinds[axes == "points"]
        raise ValueError(f"{name} takes {taken}, and this item is one of {given}")
    advice = "; wrap it in anomaly.slicewise.Slicewise" if axes == "DHW" else ""
    raise ValueError(f"{name} takes images with axes {detector.axes}, this one has {axes}{advice}")


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


def check_work(out: Path, *, resume: bool) -> None:
    """Raises ValueError where an unfinished fit would be overwritten."""
    if work_name(out).exists() and not resume:
        raise ValueError(
            f"{work_name(out)} holds an unfinished run; go on with --resume, or remove it to start "
            "anew"
        )


def work_name(out: Path) -> Path:
    """Where the checkpoints of a fit lie until it is saved."""
    return out.with_name(f"{out.name}.work")


def remove_work(out: Path) -> None:
    """Remove the checkpoints of a finished fit."""
    shutil.rmtree(work_name(out), ignore_errors=True)


def _short(values: Any) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
