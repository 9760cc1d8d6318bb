"""Coreset and scoring speed of PatchCore beside anomalib's, in one run on the same features.

python benchmarks/patchcore_speed.py PICTURES --weights FILE --peer-python FILE [--threads 2]

PICTURES: a folder of photographs. FILE: a state dict of timm's mobilenetv2_100; the peer's python
runs `anomalib_patchcore_speed.py`, beside this file.
Coreset: 50,000 patches of 384 channels (blocks.3 and blocks.6), of which a tenth is picked; and the
same count of Gaussian noise, in which nothing can be left out.
Scoring: ResNet-18 (randomly initialized, the same weights on both sides), layers 2 and 3,
224 x 224, a bank of 5,000 x 384 of 60 photographs, one new photograph and eight. What counts is the
time beyond the bare encoder; the two sides take turns.
Prints one JSON object.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detector_settings import FEATURES
from torch import Tensor

from anomaly.base import NormalData, noise_batch
from anomaly.features.patchcore import PatchCore
from anomaly.memory import Shortlist, greedy_coreset
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample, collate
from medssl.models.timm_encoder import TimmEncoder

ROWS, RATIO, BANK = 50_000, 0.1, 5_000
NUM_NORMAL = 60
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=["coreset", "scoring"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(given.peer_python, Path(folder), given.threads)
        result: dict[str, Any] = {"threads": given.threads}
        if "coreset" in given.parts:
            patches = real_patches(given.pictures, given.weights)
            for name, features in (("real", patches), ("noise", torch.randn(ROWS, 384))):
                result[f"coreset_{name}"] = coresets(features, peer)
        if "scoring" in given.parts:
            result |= scoring(given.pictures, peer)
        peer.close()
    print(json.dumps(result, indent=1))


class Peer:
    """The peer's process; a line of JSON each way."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("anomalib_patchcore_speed.py")
        self.folder = folder
        self.process = subprocess.Popen(
            [str(python), str(script), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, task: str, **tensors: Tensor | dict[str, Tensor]) -> dict[str, Any]:
        """What the peer measured."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        file = self.folder / "tensors.pt"
        torch.save(tensors, file)
        self.process.stdin.write(json.dumps({"task": task, "file": str(file)}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def prepared(folder: Path, count: int, size: int = 224) -> list[Sample]:
    """The first photographs of a random order."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".png"))
    random.Random(0).shuffle(files)
    prepare = replace(FEATURES, size=(size, size))
    found: list[Sample] = []
    for file in files:
        image = read_image(file)
        if image.pixels.shape[0] == 3:  # no mask
            found.append(Sample(item=file.stem, images={"image": prepare(image)}))
        if len(found) == count:
            break
    return found


def real_patches(folder: Path, weights: Path) -> Tensor:
    """ROWS patch features (ROWS, 384) of photographs, in a random order."""
    encoder = TimmEncoder("mobilenetv2_100", weights=weights)
    extractor = PatchCore(encoder, layers=["blocks.3", "blocks.6"])
    samples = prepared(folder, -(-ROWS // (16 * 16)), size=256)
    found = [
        extractor.patches(sample.images["image"].pixels[None]).flatten(0, 2) for sample in samples
    ]
    patches = torch.cat(found)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    return patches[order[:ROWS]].clone()


def coresets(features: Tensor, peer: Peer) -> dict[str, Any]:
    """Seconds of both, and the largest distance of a patch to its nearest pick."""
    count = int(RATIO * len(features))
    start = time.perf_counter()
    picks = greedy_coreset(features, count)
    ours = time.perf_counter() - start
    theirs = peer.ask("coreset", features=features)
    return {
        "shape": list(features.shape),
        "picks": count,
        "ours_s": round(ours, 2),
        "peer_s": round(theirs["seconds"], 2),
        "ratio": round(theirs["seconds"] / ours, 1),
        "ours_radius": round(radius(features, picks), 4),
        "peer_radius": round(radius(features, torch.tensor(theirs["picks"])), 4),
    }


def radius(features: Tensor, picks: Tensor) -> float:
    """The largest distance of a row to its nearest pick; greedy k-centre keeps it small."""
    bank = features[picks].double()
    farthest = 0.0
    for block in features.split(2048):
        farthest = max(farthest, float(torch.cdist(block.double(), bank).amin(1).max()))
    return farthest


def scoring(folder: Path, peer: Peer) -> dict[str, Any]:
    """Milliseconds beyond the bare encoder for one and for eight pictures."""
    encoder = TimmEncoder("resnet18", in_channels=3)
    layers = ["layer2", "layer3"]
    known, new = prepared(folder, NUM_NORMAL), prepared(folder, NUM_NORMAL + 8)[NUM_NORMAL:]
    ratio = BANK / (len(known) * 28 * 28)
    detector = PatchCore(encoder, layers=layers, coreset_ratio=ratio + 1e-9, sigma=4.0)
    detector.fit(NormalData(known)).eval()
    assert len(detector.bank_) == BANK
    peer.ask("hold", bank=detector.bank_, state=dict(encoder.network.state_dict()))
    pictures = collate(new).images["image"].pixels
    found: dict[str, Any] = {}
    for count in (1, 8):
        batch = noise_batch(pictures[:count], "HW")
        timings: dict[str, list[float]] = {"bare": [], "whole": [], "peer_bare": [], "peer": []}
        for _ in range(ROUNDS):
            with torch.inference_mode():
                timings["bare"].append(timed(encoder.feature_maps, pictures[:count], layers))
            timings["whole"].append(timed(detector.predict, batch))
            theirs = peer.ask("score", pictures=pictures[:count])
            timings["peer_bare"].append(theirs["bare"])
            timings["peer"].append(theirs["whole"])
        middle = {name: median(values) for name, values in timings.items()}
        ours = middle["whole"] - middle["bare"]
        theirs_beyond = middle["peer"] - middle["peer_bare"]
        found[f"score_batch_{count}"] = {
            **{f"{name}_ms": round(1000 * value, 2) for name, value in middle.items()},
            "ours_beyond_ms": round(1000 * ours, 2),
            "peer_beyond_ms": round(1000 * theirs_beyond, 2),
            "ratio": round(ours / theirs_beyond, 3),
        }
    found |= shortlisted(detector, pictures)
    found["largest_error"] = against_brute_force(detector, pictures)
    return found


def shortlisted(detector: PatchCore, pictures: Tensor) -> dict[str, float]:
    """How many rows a patch is compared with exactly, and how often the nearest is among them."""
    patches = detector.patches(pictures).flatten(0, 2)
    query, row, many = Shortlist(detector.bank_)._pairs(patches)
    truth = torch.cdist(patches.double(), detector.bank_.double()).argmin(1)
    kept = torch.zeros(len(patches), dtype=torch.bool)
    kept[query[row == truth[query]]] = True
    kept[many] = True  # these are searched whole
    return {
        "rows_per_patch": round(len(query) / max(1, len(patches) - len(many)), 2),
        "patches_searched_whole": round(len(many) / len(patches), 4),
        "shortlist_recall": float(kept.double().mean()),
    }


def against_brute_force(detector: PatchCore, pictures: Tensor) -> float:
    """Relative, of the largest patch distance of each picture, in float64."""
    detector.num_neighbors, detector.sigma = 1, 0.0
    grid = detector.patches(pictures).flatten(1, 2).double()  # (B, N, E)
    truth = torch.cdist(grid, detector.bank_.double()[None]).amin(2).amax(1)
    found = detector.predict(noise_batch(pictures, "HW")).score.double()
    return float(((found - truth).abs() / truth).max())


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
