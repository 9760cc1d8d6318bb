"""PatchCore beside anomalib's on an MVTec-style folder, with the same pictures and settings.

python benchmarks/patchcore_vs_anomalib.py ROOT --weights FILE --num-train 60 --ratio 0.1
    [--peer-python FILE --peer-script FILE]

Prints one JSON object. The peer runs in its own environment: its script takes ROOT WEIGHTS
NUM_TRAIN RATIO and prints one JSON line with image_auroc, pixel_auroc, embed_s and coreset_s.
Reading the pictures is timed on neither side.
"""

import argparse
import json
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly.base import NormalData
from anomaly.features import patchcore
from anomaly.features.patchcore import PatchCore
from anomaly.metrics import PixelScores
from medssl.data.geometry import resample
from medssl.data.image import Image
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample, collate
from medssl.models.timm_encoder import TimmEncoder
from pipelines.scoring import map_to_source

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
PREPROCESSING = Preprocessing(
    size=(256, 256),
    intensity="range",
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


def main() -> None:
    """Run ours for every seed, then the peer where it is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--num-train", type=int, required=True)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--peer-script", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train, test = pictures(given.root, given.num_train)
    prepared = [PREPROCESSING.sample(picture(file)) for file in train]
    runs = [ours(prepared, test, given, seed) for seed in range(given.seeds)]
    result: dict[str, Any] = {"root": given.root.name, "ours": runs, "ours_mean": mean(runs)}
    if given.peer_python and given.peer_script:
        result["peer"] = peer(given)
        for name in ("fit_s", "coreset_s"):
            result[f"{name}_ratio"] = round(result["peer"][name] / result["ours_mean"][name], 1)
    print(json.dumps(result, indent=1))


def pictures(root: Path, num_train: int) -> tuple[list[Path], list[tuple[Path, int, Path | None]]]:
    """Training pictures as the peer picks them; test pictures with label and mask."""
    train = listed(root / "train" / "good")
    random.Random(0).shuffle(train)
    test = []
    for folder in sorted((root / "test").iterdir()):
        for file in listed(folder):
            mask = root / "ground_truth" / folder.name / f"{file.stem}_mask.png"
            test.append((file, int(folder.name != "good"), mask if mask.exists() else None))
    return train[:num_train], test


def ours(
    prepared: list[Sample],
    test: list[tuple[Path, int, Path | None]],
    given: argparse.Namespace,
    seed: int,
) -> dict[str, float]:
    """Fit with one seed and score every test picture."""
    encoder = TimmEncoder("mobilenetv2_100", weights=given.weights)
    layers = ["blocks.2", "blocks.4"]
    detector = PatchCore(encoder, layers=layers, coreset_ratio=given.ratio, seed=seed)
    seconds = timed_coreset()
    start = time.perf_counter()
    detector.fit(NormalData(prepared, batch_size=8))
    fit_s = time.perf_counter() - start
    scores, predict_s = [], 0.0
    coarse: list[tuple[Tensor, Tensor]] = []  # on the peer's grid
    fine: list[tuple[Tensor, Tensor]] = []  # on the source's
    for file, label, mask_file in test:
        sample = picture(file)
        image = PREPROCESSING(sample.images["image"])
        start = time.perf_counter()
        found = detector.predict(collate([sample.with_image(image)]))
        predict_s += time.perf_counter() - start
        scores.append(float(found.score))
        if label == 0 or mask_file is not None:
            values = found.maps["image"]
            assert isinstance(values, Tensor)
            pair = on_both_grids(values[0], image, sample.images["image"], mask_file)
            coarse.append(pair[0])
            fine.append(pair[1])
    labels = [label for _, label, _ in test]
    result = {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "fit_s": fit_s,
        "coreset_s": seconds[0],
        "predict_ms": 1000 * predict_s / len(test),
    }
    if any(mask.any() for _, mask in fine):
        result["pixel_auroc"] = PixelScores(*zip(*coarse, strict=True)).auroc()
        pixels = PixelScores(*zip(*fine, strict=True))
        result |= {"pixel_auroc_source": pixels.auroc(), "aupro_source": pixels.aupro()}
    return {name: round(value, 4) for name, value in result.items()}


def timed_coreset() -> list[float]:
    """A list that will hold the seconds of the next coreset."""
    choose, seconds = patchcore.greedy_coreset, []

    def timed(*arguments: Any, **keywords: Any) -> Tensor:
        patchcore.greedy_coreset = choose
        start = time.perf_counter()
        chosen = choose(*arguments, **keywords)
        seconds.append(time.perf_counter() - start)
        return chosen

    patchcore.greedy_coreset = timed
    return seconds


def picture(file: Path) -> Sample:
    """One picture as a sample."""
    return Sample(item=file.stem, images={"image": read_image(file)})


def on_both_grids(
    values: Tensor, prepared: Image, source: Image, mask_file: Path | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Map and mask on every second pixel of the network's grid, as the peer; and on the source."""
    home = map_to_source(values, prepared, source).pixels[0]
    if mask_file is None:
        return (values[::2, ::2], torch.zeros(128, 128)), (home, torch.zeros_like(home))
    mask = read_image(mask_file)
    coarse = resample(mask, to=prepared, mode="nearest", outside=0.0).pixels[0] > 127
    return (values[::2, ::2], coarse[::2, ::2]), (home, mask.pixels[0] > 127)


def peer(given: argparse.Namespace) -> dict[str, float]:
    """What the peer's script printed."""
    command = [given.peer_python, given.peer_script, given.root, given.weights]
    command += [given.num_train, given.ratio]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "fit_s": found["embed_s"] + found["coreset_s"]}


def mean(runs: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the seeds."""
    return {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}


def listed(folder: Path) -> list[Path]:
    """The pictures of a folder, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


if __name__ == "__main__":
    main()
