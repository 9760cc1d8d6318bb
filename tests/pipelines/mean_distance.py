"""A detector whose answers are known: the distance of each pixel from the mean of the normals."""

import os
import time
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

import medssl.models.folder
from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.calibration import Calibration
from medssl.data.domain import learn_domain
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch

medssl.models.folder.TRUSTED = ("medssl", "anomaly", "mean_distance")


class MeanDistance(Detector):
    """|pixel - mean of all normal pixels|; the score is the largest."""

    mean_: Tensor

    def __init__(self, *, axes: str = "HW") -> None:
        super().__init__()
        self.axes = axes
        self.register_buffer("mean_", torch.empty(0))

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        means = [batch.images["image"].pixels.mean() for batch in normal.batches()]
        self.mean_ = torch.stack(means).mean()[None]
        return self

    def predict(self, batch: Batch) -> AnomalyMap:
        self.check_fitted()
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
        images = batch.images["image"]
        maps = (images.pixels - self.mean_).abs().mean(1)
        maps = torch.where(images.valid, maps, torch.nan)
        return AnomalyMap(score=maps.nan_to_num(0).flatten(1).amax(1), maps={"image": maps})


def save_mean_distance(
    data: Path,
    out: Path,
    preprocessing: Preprocessing,
    *,
    calibration: Calibration | None = None,
    select: str = "label == 0",
) -> Path:
    """Fit on the normal items of a folder, and save with this calibration."""
    manifest = build_manifest(data).select(select)
    samples = [load_sample(manifest, item) for item in manifest.images]
    prepared = [preprocessing.sample(sample) for sample in samples]
    axes = prepared[0].images["image"].axes
    detector = MeanDistance(axes=axes).fit(NormalData(prepared))
    channels = preprocessing.channels or len(prepared[0].images["image"].pixels)
    depth = () if axes == "HW" else (2,)
    return medssl.models.folder.save_model(
        out,
        detector,
        kind="detector",
        preprocessing=preprocessing,
        domain=learn_domain([sample.images["image"] for sample in samples]),
        card="A mean of pixels, for tests.",
        noise=medssl.models.folder.selftest_noise((2, channels, *depth, *preprocessing.size)),
        files=None if calibration is None else {"calibration.json": calibration.to_dict()},
    )
