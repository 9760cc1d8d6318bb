"""A fitted model, its preprocessing and its calibration as one: raw samples to verdicts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector
from anomaly.calibration import Calibration
from medssl.data.domain import check_sample
from medssl.data.geometry import resample
from medssl.data.image import Image
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch, Sample, collate
from medssl.models.folder import ModelFolderError, SavedModel, load_model
from medssl.probes.classifier import Classifier
from pipelines.clouds import PointMap, in_own_unit, reason_of_missing, regions_of_points
from pipelines.device import choose_device


class OutsideDomainError(ValueError):
    """An item unlike anything the model was fitted on; the message is the reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """The verdict on one item; larger scores and map values are more anomalous.

    score: raw; of a classifier what `Classifier.item_scores` says.
    map: (1, *axes) raw float32 on the source's grid, NaN where the source is not valid, or one
        value per point of a free cloud; None from a classifier, and boxes and volume_mm3 with it.
    p_value, threshold, anomalous: None where the model is not calibrated, or not for the item's
        site, or where a modality is missing.
    boxes: regions above the calibrated map threshold, largest first, in source indices, half-open:
        (h0, w0, h1, w1) or (d0, h0, w0, d1, h1, w1); of a cloud (x0, y0, z0, x1, y1, z1) in its own
        unit; None where there is no threshold.
    volume_mm3: of all regions together; None in 2D, of clouds, without physical spacing or
        calibration.
    predicted, class_scores: the likeliest class, and the score of each by its name; None from a
        detector.
    no_verdict: why a calibrated model has none on this item, for its site or what is missing; None
        where it has one.
    missing: modalities that the model was fitted on and this item has not, such as ("color",).
    """

    item: str
    score: float
    map: Image | PointMap | None
    p_value: float | None
    threshold: float | None
    anomalous: bool | None
    boxes: tuple[tuple[float, ...], ...] | None
    volume_mm3: float | None
    predicted: str | None = None
    class_scores: Mapping[str, float] | None = None
    no_verdict: str | None = None
    missing: tuple[str, ...] = ()


class Scorer:
    """Scores samples as they were read, and brings the maps home.

    On one machine and thread count, equal lists of samples give equal bits. Volumes are predicted
    one by one, so theirs do not depend on the list at all.

    model_folder: of a detector, as written by `medssl fit`, or of a `Classifier`.
    device: "auto" takes a GPU where there is one.
    force: score items outside the model's domain too.
    Raises FileNotFoundError or ModelFolderError for a folder of anything else.
    """

    saved: SavedModel | None

    def __init__(self, model_folder: Path, *, device: str = "auto", force: bool = False) -> None:
        saved = load_model(model_folder)
        if not isinstance(saved.model, Detector | Classifier):
            raise ModelFolderError(
                f"{model_folder.name} holds a fitted {saved.kind}, expected a detector, or a probe "
                "together with its encoder"
            )
        self._hold(
            saved.model,
            saved.preprocessing,
            domain=None if force else saved.domain,
            calibration=read_calibration(model_folder),
            device=device,
        )
        self.saved = saved

    @classmethod
    def from_parts(
        cls,
        model: Detector | Classifier,
        preprocessing: Preprocessing,
        *,
        domain: Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """A scorer of a model that is not saved yet.

        domain: None scores whatever comes.
        calibration: None leaves verdicts, boxes and volumes empty.
        """
        scorer = cls.__new__(cls)
        scorer.saved = None
        scorer._hold(model, preprocessing, domain=domain, calibration=calibration, device=device)
        return scorer

    def _hold(
        self,
        model: Detector | Classifier,
        preprocessing: Preprocessing,
        *,
        domain: Mapping[str, Any] | None,
        calibration: Calibration | None,
        device: str | torch.device,
    ) -> None:
        self.device = choose_device(str(device))
        self.model = model.to(self.device).eval()
        self.preprocessing = preprocessing
        self.domain = domain
        self.calibration = calibration

    @property
    def classes(self) -> Sequence[str] | None:
        """What a classifier tells apart; None of a detector."""
        return self.model.classes if isinstance(self.model, Classifier) else None

    def check(self, sample: Sample) -> None:
        """Raises OutsideDomainError for a sample unlike what the model was fitted on."""
        if not self.domain:
            return
        try:
            reason = check_sample(in_own_unit(sample, self.preprocessing), self.domain)
        except ValueError as error:  # a unit that nobody knows
            raise OutsideDomainError(str(error)) from None
        if reason is not None:
            raise OutsideDomainError(reason)

    def prepare(self, sample: Sample) -> Sample:
        """The sample as the model sees it, without its mask and what it does not look at.

        Raises what `check` raises, and ValueError where the preprocessing cannot take the item.
        """
        self.check(sample)
        roles = {"image"} if self.preprocessing.geometry is None else {"image", "xyz"}
        images = {role: image for role, image in sample.images.items() if role in roles}
        return self.preprocessing.sample(replace(sample, images=images, mask=None))

    def score(
        self, samples: Sequence[Sample], *, sites: Mapping[str, str] | None = None
    ) -> list[Scored]:
        """One verdict per sample, in their order; samples are as read, on the source's grid.

        sites: the site of each item that has one, as the table names it (not salted).
        Raises what `prepare` raises, ValueError where the model gives no finite score, and
        ValueError as `check_sites` does.
        """
        check_sites(self.calibration, sites)
        sites = {} if sites is None else sites
        prepared = [self.prepare(sample) for sample in samples]
        found: dict[int, Scored] = {}
        for rows in _alike(prepared):
            batch = collate([prepared[row] for row in rows]).to(self.device)
            pairs = [(prepared[row], samples[row]) for row in rows]
            with torch.inference_mode():
                if isinstance(self.model, Classifier):
                    verdicts = self._classified(self.model, batch, sites)
                else:
                    verdicts = self._mapped(self.model, batch, pairs, sites)
            found.update(zip(rows, verdicts, strict=True))
        return [found[row] for row in range(len(samples))]

    def _mapped(
        self,
        model: Detector,
        batch: Batch,
        pairs: Sequence[tuple[Sample, Sample]],
        sites: Mapping[str, str],
    ) -> list[Scored]:
        """pairs: each item as the detector sees it, and as it was read."""
        answer = model.predict(batch)
        scores = answer.score.float().cpu().tolist()
        missing = answer.missing or ((),) * len(scores)
        return [
            self._verdict(item, score, home, sites.get(item), missing=lacks)
            for item, score, home, lacks in zip(
                batch.items, scores, _homes(answer, pairs), missing, strict=True
            )
        ]

    def _classified(
        self, model: Classifier, batch: Batch, sites: Mapping[str, str]
    ) -> list[Scored]:
        class_scores = model.predict(batch.images["image"].pixels).cpu().double()  # (B, K)
        scores = model.item_scores(class_scores).tolist()
        verdicts = []
        for item, score, row in zip(batch.items, scores, class_scores, strict=True):
            _check_finite(item, row.tolist())
            verdicts.append(
                replace(
                    self._verdict(item, score, None, sites.get(item)),
                    predicted=model.classes[int(row.argmax())],
                    class_scores=dict(zip(model.classes, row.tolist(), strict=True)),
                )
            )
        return verdicts

    def _verdict(
        self,
        item: str,
        score: float,
        values: Image | PointMap | None,
        site: str | None,
        *,
        missing: tuple[str, ...] = (),
    ) -> Scored:
        _check_finite(item, [score])
        known = self.calibration and self.calibration.of_site(site)
        by_site = self.calibration is not None and self.calibration.by is not None
        reason = known.guarantee if by_site and known and not known.calibrated else None
        if missing:
            known, reason = None, reason_of_missing(missing)
        boxes, volume_mm3 = None, None
        if values is not None and known is not None and known.map_threshold is not None:
            boxes, volume_mm3 = _boxes(values, known.map_threshold)
        return Scored(
            item=item,
            score=score,
            map=values,
            p_value=None if known is None else known.p_value(score),
            threshold=None if known is None else known.threshold,
            anomalous=None if known is None else known.anomalous(score),
            boxes=boxes,
            volume_mm3=volume_mm3,
            no_verdict=reason,
            missing=missing,
        )


def _check_finite(item: str, scores: Sequence[float]) -> None:
    if not torch.tensor(scores).isfinite().all():
        told = ", ".join(map(str, scores))
        raise ValueError(f"item {item}: the model gave the score {told}; look at its pixels")


def map_to_source(values: Tensor, prepared: Image, source: Image) -> Image:
    """Bring a map home: onto the source's grid, NaN where the source is not valid.

    values: (*spatial axes) on the grid of `prepared`, padding at the end of the axes allowed.
    prepared: the image the model saw; only its place in the world is used.
    Returns an image of one channel with the source's affine, spacing and axes.
    """
    shape = prepared.spatial_shape
    inside = values[tuple(slice(length) for length in shape)].float()
    if tuple(inside.shape) != shape:
        raise ValueError(f"a map of {tuple(values.shape)} does not cover the image's {shape}")
    if prepared.valid is not None:
        inside = torch.where(prepared.valid, inside, torch.nan)
    image = replace(
        prepared,
        pixels=inside[None],
        valid=None,
        channels=("anomaly",),
        units="raw score",
        value_range=None,
        provenance={},
    )
    home = resample(image, to=source)
    if source.valid is not None:
        home = replace(home, pixels=torch.where(source.valid, home.pixels, torch.nan))
    return replace(home, valid=source.valid)


def regions(values: Image, threshold: float) -> tuple[tuple[tuple[int, ...], ...], float | None]:
    """Boxes of the connected regions above `threshold`, and their volume in mm3.

    Corners connect. Boxes are half-open, in the indices of `values`, all starts before all ends,
    the region of most pixels first. The volume is None in 2D and without physical spacing.
    """
    import numpy as np
    from scipy import ndimage

    above = (values.pixels[0] > threshold).numpy()  # NaN is never above
    labels, count = ndimage.label(above, structure=np.ones((3,) * above.ndim))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:].tolist()
    boxes = [
        (*(side.start for side in sides), *(side.stop for side in sides))
        for sides in ndimage.find_objects(labels)
    ]
    order = sorted(range(count), key=lambda region: (-sizes[region], boxes[region]))
    volume_mm3 = None
    if above.ndim == 3 and values.spacing is not None:
        volume_mm3 = float(values.affine[:3, :3].det().abs()) * sum(sizes)
    return tuple(boxes[region] for region in order), volume_mm3


def read_calibration(model_folder: Path) -> Calibration | None:
    """The calibration saved with a model, or None where none was.

    Raises ModelFolderError where the file is damaged.
    """
    file = model_folder / "calibration.json"
    if not file.is_file():
        return None
    try:
        return Calibration.from_dict(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"{model_folder.name}/calibration.json is damaged") from error


def check_sites(calibration: Calibration | None, sites: Mapping[str, str] | None) -> None:
    """Raises ValueError unless sites are given exactly where the calibration is by site.

    So that no item is judged by the threshold of all sites together without anybody noticing.
    Raises ValueError too where its sites were salted with another key than this user's.
    """
    by = None if calibration is None else calibration.by
    if by is not None and sites is None:
        raise ValueError(
            f"the model was calibrated for each {by} by itself; say which one each item is of, "
            f"with --site FILE:{by}"
        )
    if by is None and sites is not None:
        raise ValueError(
            "the model was not calibrated by site, so --site would change nothing; leave it out, "
            "or calibrate the model by site first"
        )
    if calibration is not None:
        calibration.check_key()


def check_ranks_anomalies(model_folder: Path) -> None:
    """Raises ValueError where larger scores do not mean more anomalous: no class is normal.

    A folder that cannot be read is left to `load_model`, which says why.
    """
    import yaml

    try:
        description = yaml.safe_load((model_folder / "model.yaml").read_text())
        arguments = description["model"]["init_args"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return
    if "classes" in arguments and arguments.get("normal") is None:
        raise ValueError(
            f"none of the classes {arguments['classes']} is the normal one, so scores cannot be "
            "held against normal and anomalous items; save the classifier with its normal class"
        )


def _homes(answer: AnomalyMap, pairs: Sequence[tuple[Sample, Sample]]) -> list[Image | PointMap]:
    """The map of each item on what was read."""
    found: list[Image | PointMap] = []
    for values, (prepared, source) in zip(next(iter(answer.maps.values())), pairs, strict=True):
        if prepared.points is None:
            images = prepared.images["image"], source.images["image"]
            found.append(map_to_source(values.cpu(), *images))
        else:
            assert source.points is not None
            known = torch.where(prepared.points.looked_at, values.float().cpu(), torch.nan)
            found.append(PointMap(cloud=source.points, values=known))
    return found


def _boxes(
    values: Image | PointMap, threshold: float
) -> tuple[tuple[tuple[float, ...], ...], float | None]:
    """Boxes and volume of the regions of a map above `threshold`."""
    if isinstance(values, PointMap):
        return regions_of_points(values, threshold), None
    return regions(values, threshold)


def _alike(samples: Sequence[Sample]) -> list[list[int]]:
    """Rows that may share a batch: 2D images of equal roles, modalities, sizes and channel counts,
    or clouds; a volume is alone."""
    kinds: dict[object, list[int]] = {}
    for row, sample in enumerate(samples):
        flat = all(image.axes == "HW" for image in sample.images.values())
        shapes = tuple(
            (role, image.modality, *image.pixels.shape) for role, image in sample.images.items()
        )
        kinds.setdefault(shapes if flat else row, []).append(row)
    return list(kinds.values())
