"""Every detector on four real sets: quality with intervals, time and memory, in one table.

python benchmarks/detectors.py DATA --weights FILE --out DIR [--sets NAME ...]
    [--detectors NAME ...] [--seeds 3] [--jobs 1] [--threads 1]

DATA holds the folders of the sets (see SETS). FILE: a state dict of timm's mobilenetv2_100, the
encoder of every detector on features. Each (set, detector, seed) runs in a process of its own, and
what it found lies in DIR, so that a run that was stopped goes on. Image metrics are means over
seeds, with a 95 % bootstrap by patient or part; "vs PatchCore" is the paired difference of image
AUROC. Pixel metrics are on the network's grid of 256 x 256. The settings are those of SETTINGS, the
same on every set. Seconds are of the processor, summed over threads: with --threads 1 those of one
quiet core, whatever else the machine does.
"""

import argparse
import csv
import json
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detector_settings import GRID, SETTINGS
from torch import Tensor

from anomaly.base import NormalData
from anomaly.metrics import PixelScores
from medssl.data.geometry import crop, resample
from medssl.data.image import Image
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample, collate
from medssl.metrics import Interval, auroc, average_precision, bootstrap
from pipelines.scoring import map_to_source


@dataclass(frozen=True, kw_only=True)
class RealSet:
    """Raw samples; test samples have labels, groups and, where there are any, masks."""

    train: list[Sample]
    test: list[Sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--detectors", nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("SET", "DETECTOR", "SEED"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    if given.one:
        name, detector, seed = given.one
        found = measured(SETS[name](given.data), detector, given.weights, int(seed))
        place(given.out, name, detector, int(seed)).write_text(json.dumps(found))
        return
    wanted = [
        (name, detector, seed)
        for seed in range(given.seeds)
        for name in given.sets
        for detector in given.detectors
    ]
    missing = [one for one in wanted if not place(given.out, *one).exists()]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda one: in_a_process(given, *one), missing))
    for name in given.sets:
        print(table(given.out, name, given.detectors, given.seeds), flush=True)


def in_a_process(given: argparse.Namespace, name: str, detector: str, seed: int) -> None:
    """Run this script for one of them; a failure is told and leaves a gap."""
    command = [sys.executable, __file__, str(given.data), "--weights", str(given.weights)]
    command += ["--out", str(given.out), "--threads", str(given.threads)]
    done = subprocess.run([*command, "--one", name, detector, str(seed)], check=False)
    told = "done" if done.returncode == 0 else f"FAILED with {done.returncode}"
    print(f"{name} {detector} {seed}: {told}", file=sys.stderr, flush=True)


def place(out: Path, name: str, detector: str, seed: int) -> Path:
    return out / f"{name}.{detector}.{seed}.json"


def measured(data: RealSet, name: str, weights: Path, seed: int) -> dict[str, Any]:
    """Fit once and score every test picture alone."""
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    detector = setting.make(weights, seed)
    prepared = [setting.preprocessing.sample(sample) for sample in data.train]
    start = time.process_time()
    detector.fit(NormalData(prepared, batch_size=8))
    fit_s = time.process_time() - start
    detector.eval()
    scores, predict_s = [], 0.0
    maps: list[Tensor] = []
    masks: list[Tensor | None] = []
    for sample in data.test:
        image = setting.preprocessing(sample.images["image"])
        batch = collate([replace(sample, images={"image": image}, mask=None)])
        start = time.process_time()
        with torch.inference_mode():
            found = detector.predict(batch)
        predict_s += time.process_time() - start
        scores.append(float(found.score))
        if sample.label == 0 or sample.mask is not None:
            pair = on_grid(found.maps["image"][0].clone(), image, sample)
            maps.append(pair[0])
            masks.append(pair[1])
    result = {
        "scores": scores,
        "labels": [sample.label for sample in data.test],
        "groups": [sample.group or sample.item for sample in data.test],
        "fit_s": fit_s,
        "score_ms": 1000 * predict_s / len(data.test),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if any(mask is not None for mask in masks):
        pixels = PixelScores(maps, masks)
        result |= {"pixel_auroc": pixels.auroc(), "aupro": pixels.aupro()}
    return result


def on_grid(values: Tensor, prepared: Image, sample: Sample) -> tuple[Tensor, Tensor | None]:
    """Map and mask on GRID, whatever the detector's own size."""
    source = sample.images["image"]
    grid = GRID(source)
    home = map_to_source(values.float(), prepared, grid).pixels[0]
    if sample.mask is None:
        return home, None
    return home, resample(sample.mask, to=grid, mode="nearest", outside=0.0).pixels[0] > 0.5


def table(out: Path, name: str, detectors: list[str], seeds: int) -> str:
    """One set as Markdown."""
    runs = {d: [json.loads(f.read_text()) for f in files(out, name, d, seeds)] for d in detectors}
    runs = {detector: found for detector, found in runs.items() if found}
    lines = [
        f"\n### {name}\n",
        "| detector | image AUROC | vs PatchCore | image AP | pixel AUROC | AUPRO | fit s | "
        "score ms | peak GiB | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for detector, found in runs.items():
        lines.append(f"| {detector} | {' | '.join(cells(found, runs.get('PatchCore')))} |")
    return "\n".join(lines)


def files(out: Path, name: str, detector: str, seeds: int) -> Iterator[Path]:
    for seed in range(seeds):
        if place(out, name, detector, seed).exists():
            yield place(out, name, detector, seed)


def cells(found: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> list[str]:
    labels, groups = torch.tensor(found[0]["labels"]), found[0]["groups"]
    scores = torch.tensor([run["scores"] for run in found]).T  # (S, seeds)
    told = [bootstrapped(mean_of(auroc), scores, labels, groups=groups)]
    if reference is None or reference is found:
        told.append("-")
    else:
        both = torch.cat([scores, torch.tensor([run["scores"] for run in reference]).T], dim=1)
        ahead = Ahead(len(found))
        told.append(bootstrapped(ahead, both, labels, groups=groups, sign="+"))
    told.append(bootstrapped(mean_of(average_precision), scores, labels, groups=groups))
    for metric in ("pixel_auroc", "aupro"):
        values = [run[metric] for run in found if metric in run]
        told.append(f"{sum(values) / len(values):.3f}" if values else "-")
    for metric, form in (("fit_s", ".1f"), ("score_ms", ".0f"), ("peak_gib", ".1f")):
        values = [run[metric] for run in found if metric in run]
        told.append(f"{sum(values) / len(values):{form}}" if values else "-")
    return [*told, str(len(found))]


def bootstrapped(metric: Callable[..., float], *arrays: Tensor, groups: Any, sign: str = "") -> str:
    found: Interval = bootstrap(metric, *arrays, groups=groups, repeats=500)
    return f"{found.value:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def mean_of(metric: Callable[[Tensor, Tensor], float]) -> Callable[[Tensor, Tensor], float]:
    """The mean over seeds, of scores (S, seeds)."""

    def mean(scores: Tensor, labels: Tensor) -> float:
        return sum(metric(one, labels) for one in scores.unbind(1)) / scores.shape[1]

    return mean


@dataclass(frozen=True)
class Ahead:
    """Mean AUROC of the first `count` columns less that of the others."""

    count: int

    def __call__(self, scores: Tensor, labels: Tensor) -> float:
        mean = mean_of(auroc)
        return mean(scores[:, : self.count], labels) - mean(scores[:, self.count :], labels)


def folder_set(
    root: Path, *, num_train: int, groups: str | None = None, part: str | None = None
) -> RealSet:
    """An MVTec-style folder; training pictures drawn as by the peer's script.

    part: a regular expression whose first group names the part in a file's name.
    """
    manifest = build_manifest(root, groups=groups)
    images = manifest.images
    normal = sorted((i for i in images if i.split == "train"), key=lambda i: i.path)
    normal = [item for item in normal if Path(item.path).parent.name == "good"]
    random.Random(0).shuffle(normal)
    tested = [item for item in images if item.split == "test"]
    test = [load_sample(manifest, item) for item in tested]
    if part is not None:
        names = [re.search(part, Path(item.path).name) for item in tested]
        test = [
            replace(sample, group=name[1] if name else None)
            for sample, name in zip(test, names, strict=True)
        ]
    return RealSet(train=[load_sample(manifest, i) for i in normal[:num_train]], test=test)


def cookies(data: Path) -> RealSet:
    return folder_set(data / "industrial-cookies" / "cookie", num_train=22)


def ballscrew(data: Path) -> RealSet:
    """A part is a position on a spindle, of which there are five in the test."""
    root = data / "industrial-ballscrew" / "ballscrew"
    return folder_set(root, num_train=60, part=r"^01_\d+_(\d+_\d+)_crop")


def chest(data: Path) -> RealSet:
    root = data / "cxr-pneumonia"
    return folder_set(root, num_train=100, groups=f"{root / 'labels.csv'}:patient_id")


TILE, NUM_CELL_TRAIN, NUM_CELL_TEST = 160, 100, 100


def cells_set(data: Path) -> RealSet:
    """Tiles of blood smears: with red cells alone normal, with a platelet or white cell not.

    The masks are the boxes. Tiles are cut on a fixed grid; a box of which less than half lies in a
    tile leaves the tile out. A smear's tiles are one part, and lie on one side.
    """
    root = data / "microscopy-bccd"
    boxes: dict[str, list[dict[str, str]]] = {}
    with (root / "boxes.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            boxes.setdefault(row["path"], []).append(row)
    names = sorted(boxes)
    random.Random(0).shuffle(names)
    half = len(names) // 2
    train = [tile for name in names[:half] for tile in tiles(root, name, boxes[name])]
    test = [tile for name in names[half:] for tile in tiles(root, name, boxes[name])]
    chosen = [[tile for tile in test if tile.label == label] for label in (0, 1)]
    for side in chosen:
        random.Random(1).shuffle(side)
    normal = [tile for tile in train if tile.label == 0]
    random.Random(2).shuffle(normal)
    return RealSet(
        train=normal[:NUM_CELL_TRAIN],
        test=[*chosen[0][:NUM_CELL_TEST], *chosen[1][:NUM_CELL_TEST]],
    )


def tiles(root: Path, name: str, boxes: list[dict[str, str]]) -> Iterator[Sample]:
    image = read_image(root / name)
    marked = torch.zeros(1, *image.spatial_shape)
    sides = [[int(float(row[side])) for side in ("x1", "y1", "x2", "y2")] for row in boxes]
    rare = [row["class"] != "RBC" for row in boxes]
    for (x1, y1, x2, y2), is_rare in zip(sides, rare, strict=True):
        if is_rare:
            marked[0, y1:y2, x1:x2] = 1
    mask = replace(image, pixels=marked, channels=("mask",), units="1", value_range=None)
    for top in range(0, image.spatial_shape[0] - TILE + 1, TILE):
        for left in range(0, image.spatial_shape[1] - TILE + 1, TILE):
            shares = [
                inside((x1 - left, y1 - top, x2 - left, y2 - top))
                for (x1, y1, x2, y2), is_rare in zip(sides, rare, strict=True)
                if is_rare
            ]
            if any(0 < share < 0.5 for share in shares):
                continue
            label = int(any(shares))
            start, size = (top, left), (TILE, TILE)
            yield Sample(
                item=f"{Path(name).stem}-{top}-{left}",
                images={"image": crop(image, start, size)},
                label=label,
                mask=crop(mask, start, size) if label else None,
                group=name,
            )


def inside(box: tuple[int, int, int, int]) -> float:
    """The share of a box (x1, y1, x2, y2) that lies in a tile at the origin."""
    x1, y1, x2, y2 = box
    width = max(0, min(x2, TILE) - max(x1, 0))
    height = max(0, min(y2, TILE) - max(y1, 0))
    return width * height / max(1, (x2 - x1) * (y2 - y1))


SETS: dict[str, Callable[[Path], RealSet]] = {
    "cookies": cookies,
    "ballscrew": ballscrew,
    "chest": chest,
    "cells": cells_set,
}

if __name__ == "__main__":
    main()
