"""PatchCore on features pretrained in the domain, on random ones and on ImageNet's.

python benchmarks/pretraining_pays.py DATA --weights FILE --out DIR [--seeds 3]

DATA holds the folder cxr-pneumonia. DINO is pretrained by configs/pretrain/dino_cxr.yaml on its 460
training pictures, normal and not, without labels (OUT/dino_cxr_SEED, made where it is missing). The
bank is of 100 normals; the test pictures were seen by nobody. FILE: mobilenetv2_100, ImageNet.
Image AUROC, mean over seeds, with a 95 % bootstrap by patient, and the paired difference to the
first row of DINO.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detector_settings import FEATURES, mobilenet
from detectors import Ahead, RealSet, bootstrapped, chest, mean_of
from encoders_cxr import arguments
from torch import Tensor

from anomaly.base import NormalData
from anomaly.features.patchcore import PatchCore
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import collate
from medssl.metrics import auroc
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from pipelines.console import table
from pipelines.pretrain import pretrain

CONFIG = Path("configs/pretrain/dino_cxr.yaml")
LAYERS = (["layer3"], ["layer2", "layer3"], ["layer2"])
IMAGENET_LAYERS = (["blocks.2", "blocks.4"], ["blocks.4", "blocks.6"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{given.out.absolute()}/mlflow.db")
    data = chest(given.data)
    seeds = range(given.seeds)
    trained = [pretrained(given.data / "cxr-pneumonia", given.out, seed) for seed in seeds]
    prepare = arguments(CONFIG, 0)["preprocessing"]
    fresh = [arguments(CONFIG, seed)["objective"].encoder for seed in seeds]
    found: dict[str, Tensor] = {}
    for layers in LAYERS:
        named = " + ".join(layers)
        found[f"DINO, {named}"] = scores(data, trained, prepare, layers)
        found[f"random, {named}"] = scores(data, fresh, prepare, layers)
    for layers in IMAGENET_LAYERS:
        named = " + ".join(layers)
        found[f"ImageNet, {named}"] = scores(data, [mobilenet(given.weights)], FEATURES, layers)
    table(("features", "image AUROC", "DINO is ahead by"), list(rows(data, found)))


def pretrained(folder: Path, out: Path, seed: int) -> Encoder:
    place = out / f"dino_cxr_{seed}"
    groups = f"{folder / 'labels.csv'}:patient_id"
    pretrain(folder, out=place, groups=groups, resume=True, **arguments(CONFIG, seed))
    return load_encoder(place)


def scores(
    data: RealSet, encoders: Sequence[Encoder], prepare: Preprocessing, layers: list[str]
) -> Tensor:
    """Of the test pictures by each encoder, (S, encoders)."""
    columns = []
    normals = NormalData([prepare.sample(sample) for sample in data.train])
    for encoder in encoders:
        detector = PatchCore(encoder, layers=layers, coreset_ratio=0.1).fit(normals).eval()
        images = [sample.with_image(prepare(sample.images["image"])) for sample in data.test]
        batches = [collate(images[i : i + 16]) for i in range(0, len(images), 16)]
        columns.append(torch.cat([detector.predict(batch).score for batch in batches]))
    return torch.stack(columns, dim=1)


def rows(data: RealSet, found: dict[str, Tensor]) -> list[list[str]]:
    labels = torch.tensor([sample.label for sample in data.test])
    groups = [sample.group for sample in data.test]
    first = next(iter(found.values()))
    told = []
    for name, values in found.items():
        both = torch.cat([first, values], dim=1)
        ahead = bootstrapped(Ahead(first.shape[1]), both, labels, groups=groups, sign="+")
        told.append([name, bootstrapped(mean_of(auroc), values, labels, groups=groups), ahead])
    return told


if __name__ == "__main__":
    main()
