"""What memory buys: MemMC-MAE beside a masked and a plain autoencoder, on lesions.

python benchmarks/reconstruction.py TASK --out DIR [--data DIR] [--methods NAME ...] [--seeds 3]
    [--jobs 1] [--threads 1]

TASK: "slices" and "volumes" are the head-CT phantoms of the demo (140 normal heads to train on, 100
unseen normal heads and 60 with lesions); "development" is their slices on other heads, to choose
settings with; "ms" is FLAIR of three patients with multiple sclerosis (--data: its folder), one
left out at a time, slices without lesion of the other two as normals.
Lesion AP is average precision over all voxels that are looked at, pooled, with a 95 % bootstrap of
heads; its scores are counted in bins of equal share, which moves it by less than .001. "vs" is the
paired difference to MemMC-MAE. Each (method, seed) runs in a process of its own and leaves its
counts in DIR, so that a run that was stopped goes on.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reconstruction_settings import METHODS, PREPARE
from torch import Tensor

from anomaly.base import Detector, NormalData
from anomaly.slicewise import Slicewise
from medssl.data.image import Image
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample, collate
from medssl.data.synthetic import head_ct
from medssl.metrics import auroc

DRAWS = 500
REFERENCE = "MemMC-MAE"


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Prepared volumes; a test head without a lesion has no mask."""

    train: list[Sample]
    test: list[Sample]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["development", "slices", "volumes", "ms"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS["slices"]))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "SEED"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    if given.one:
        method, seed = given.one
        np.savez(place(given, method, int(seed)), **measured(given, method, int(seed)))
        return
    wanted = [(method, seed) for seed in range(given.seeds) for method in given.methods]
    missing = [one for one in wanted if not place(given, *one).exists()]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda one: in_a_process(*one), missing))
    print(table(given))


def in_a_process(method: str, seed: int) -> None:
    start = time.perf_counter()
    command = [sys.executable, *sys.argv, "--one", method, str(seed)]
    done = subprocess.run(command, check=False)
    told = "done" if done.returncode == 0 else f"FAILED with {done.returncode}"
    seconds = time.perf_counter() - start
    print(f"{method} {seed}: {told} in {seconds:.0f} s", file=sys.stderr, flush=True)


def place(given: argparse.Namespace, method: str, seed: int) -> Path:
    return given.out / f"{given.task}.{method}.{seed}.npz"


def measured(given: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Scores of the test heads, and how many of their voxels lie in each bin."""
    make: Callable[[int], Detector] = METHODS[kind_of(given.task)][method]
    maps: list[Tensor] = []
    masks: list[Tensor] = []
    scores: list[float] = []
    fit_s = 0.0
    for heads in folds(given):
        detector = make(seed)
        if detector.axes == "HW":
            detector = Slicewise(detector, aggregation="top_mean", num_top=3, across=1.0)
        start = time.process_time()
        detector.fit(NormalData(heads.train))
        fit_s += time.process_time() - start
        detector.eval()
        for sample in heads.test:
            with torch.inference_mode():
                found = detector.predict(collate([replace(sample, mask=None)]))
            values = found.maps["image"][0]
            known = ~values.isnan()
            mask = torch.zeros_like(values, dtype=torch.bool)
            if sample.mask is not None:
                mask = sample.mask.pixels[0] > 0.5
            maps.append(values[known].float().cpu())
            masks.append(mask[known])
            scores.append(float(found.score))
    labels = [int(mask.any()) for mask in masks]
    normal, defect = counted(maps, masks)
    told = {"scores": scores, "labels": labels, "fit_s": fit_s}
    return {"normal": normal, "defect": defect, **{k: np.array(v) for k, v in told.items()}}


def counted(maps: list[Tensor], masks: list[Tensor]) -> tuple[Any, Any]:
    """Voxels of each head by bin of score, ascending: normal ones and those of lesions."""
    every = torch.cat([values[~mask] for values, mask in zip(maps, masks, strict=True)]).sort()[0]
    tails = torch.cat([torch.linspace(1, 0.05, 400), torch.logspace(np.log10(0.05), -6, 1600)])
    edges = every[((1 - tails) * (len(every) - 1)).round().long()].unique()
    sides = []
    for side in (False, True):
        rows = [
            torch.bincount(
                torch.bucketize(v[m == side], edges, right=True), minlength=len(edges) + 1
            )
            for v, m in zip(maps, masks, strict=True)
        ]
        sides.append(torch.stack(rows).numpy().astype(np.float64))
    return sides[0], sides[1]


def average_precision(normal: Any, defect: Any) -> float:
    """From voxels by bin, ascending."""
    found = defect[::-1].cumsum()
    precision = found / np.maximum(1e-12, found + normal[::-1].cumsum())
    return float((precision * defect[::-1]).sum() / defect.sum())


def table(given: argparse.Namespace) -> str:
    """The methods as Markdown."""
    runs = {
        method: [
            dict(np.load(place(given, method, seed)))
            for seed in range(given.seeds)
            if place(given, method, seed).exists()
        ]
        for method in given.methods
    }
    runs = {method: found for method, found in runs.items() if found}
    by = "patient" if given.task == "ms" else "seed"
    lines = [
        f"\n### {given.task}\n",
        f"| method | lesion AP | vs {REFERENCE} | AP by {by} | AUROC | fit s |",
        "|---|---|---|---|---|---|",
    ]
    for method, found in runs.items():
        value = interval(found, None)
        ahead = "-" if method == REFERENCE else interval(found, runs.get(REFERENCE))
        by_seed = ", ".join(f"{value:.3f}" for value in parts(found, given.task))
        auc = "-"
        if 0 < found[0]["labels"].sum() < len(found[0]["labels"]):
            told = [
                auroc(torch.from_numpy(one["scores"]), torch.from_numpy(one["labels"]))
                for one in found
            ]
            auc = f"{np.mean(told):.3f}"
        seconds = np.mean([one["fit_s"] for one in found])
        lines.append(f"| {method} | {value} | {ahead} | {by_seed} | {auc} | {seconds:.0f} |")
    return "\n".join(lines)


def parts(found: list[dict[str, Any]], task: str) -> list[float]:
    """Lesion AP of each seed; of each patient, mean over seeds, where there are few."""
    if task != "ms":
        return [average_precision(one["normal"].sum(0), one["defect"].sum(0)) for one in found]
    heads = range(len(found[0]["labels"]))
    return [
        float(np.mean([average_precision(one["normal"][i], one["defect"][i]) for one in found]))
        for i in heads
    ]


def interval(found: list[dict[str, Any]], reference: list[dict[str, Any]] | None) -> str:
    """The mean over seeds, or what it is ahead of the reference, with its bootstrap interval."""
    rng = np.random.default_rng(0)
    heads = len(found[0]["labels"])
    draws = [np.ones(heads)]
    draws += [np.bincount(rng.integers(0, heads, heads), minlength=heads) for _ in range(DRAWS)]

    def of(runs: list[dict[str, Any]], weight: Any) -> float:
        return float(
            np.mean([average_precision(weight @ r["normal"], weight @ r["defect"]) for r in runs])
        )

    values = [of(found, d) - (of(reference, d) if reference else 0) for d in draws if ok(found, d)]
    low, high = np.quantile(values[1:], [0.025, 0.975])
    sign = "+" if reference else ""
    return f"{values[0]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def ok(found: list[dict[str, Any]], weight: Any) -> bool:
    return bool((weight @ found[0]["defect"]).sum() > 0)


def folds(given: argparse.Namespace) -> list[Heads]:
    if given.task == "ms":
        return ms_folds(given.data)
    kind = kind_of(given.task)
    development = given.task == "development"
    normal = head_ct.DEVELOPMENT_NORMAL_SEEDS if development else head_ct.TEST_NORMAL_SEEDS
    lesion = head_ct.DEVELOPMENT_LESION_SEEDS if development else head_ct.TEST_LESION_SEEDS
    if development:
        normal = normal[:40]
    return [
        Heads(
            train=[head(seed, False, kind) for seed in head_ct.TRAIN_SEEDS[:140]],
            test=[
                *(head(seed, False, kind) for seed in normal),
                *(head(seed, True, kind) for seed in lesion),
            ],
        )
    ]


def kind_of(task: str) -> str:
    return "slices" if task == "development" else task


def head(seed: int, lesion: bool, kind: str) -> Sample:
    phantom = head_ct.head_ct(seed, lesion=lesion)
    sample = Sample(item=f"head{seed}", images={"image": phantom.image}, mask=phantom.mask)
    return PREPARE[kind].sample(sample)


def ms_folds(root: Path) -> list[Heads]:
    """One patient left out at a time; the lesions' slices of the others are left out too."""
    patients = []
    for folder in sorted((root / "cases").iterdir()):
        image = read_image(folder / "FLAIR.nii.gz")
        image = replace(image, valid=image.pixels[0] > 0)  # the brain was extracted
        mask = read_image(folder / "lesion.nii.gz")
        sample = Sample(item=folder.name, images={"image": image}, mask=mask, group=folder.name)
        patients.append(PREPARE["ms"].sample(sample))
    return [
        Heads(
            train=[without_lesions(other) for other in patients if other is not left_out],
            test=[left_out],
        )
        for left_out in patients
    ]


def without_lesions(sample: Sample) -> Sample:
    image = sample.images["image"]
    assert sample.mask is not None
    assert image.valid is not None
    clean = (sample.mask.pixels[0] < 0.5).flatten(1).all(1)
    valid = image.valid & clean[:, None, None]
    held: Image = replace(image, valid=valid)
    return replace(sample.with_image(held), mask=None)


if __name__ == "__main__":
    main()
