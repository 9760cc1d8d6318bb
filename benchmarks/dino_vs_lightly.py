"""DINO from PNG files, here and in lightly: same network, head, crops, batch and workers.

python benchmarks/dino_vs_lightly.py FOLDER [--epochs 4] [--batch-size 32] [--workers 1]
    [--repeats 3]

FOLDER: pictures, in any layout. Both sides train on all of them in processes of their own, in turn,
from the first decoding on; each applies its own usual changes of intensity. Prints one JSON line:
images per second of each (the median) and their ratio. Needs lightly, which `pip install .[dev]`
brings.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

NETWORK, SIZE, LOCAL, CROPS, PROTOTYPES = "resnet10t", 64, 32, 4, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "lightly"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run = {"ours": ours, "lightly": lightly}[given.side]
        print(json.dumps(run(given.folder, given.epochs, given.batch_size, given.workers)))
        return
    rates: dict[str, list[float]] = {"lightly": [], "ours": []}
    for _ in range(given.repeats):
        for side, found in rates.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            said = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            found.append(json.loads(said.splitlines()[-1]))
    median = {side: statistics.median(found) for side, found in rates.items()}
    result = {f"{side}_images_per_s": round(value, 1) for side, value in median.items()}
    print(json.dumps({**result, "ratio": round(median["ours"] / median["lightly"], 2)}))


def ours(folder: Path, epochs: int, batch_size: int, workers: int) -> float:
    from medssl.data.dataset import PreparedSamples
    from medssl.data.manifest import build_manifest
    from medssl.data.preprocess import Preprocessing
    from medssl.models.timm_encoder import TimmEncoder
    from medssl.objectives.joint_embedding.dino import DINO
    from medssl.training import TrainingPlan, train

    manifest = build_manifest(folder)
    prepared = Preprocessing(size=(128, 128), intensity="range", channels=3)
    samples = PreparedSamples(manifest, manifest.images, prepared)
    objective = DINO(
        TimmEncoder(NETWORK, in_channels=3),
        prototypes=PROTOTYPES,
        global_size=SIZE,
        local_crops=CROPS,
        local_size=LOCAL,
    )
    steps = epochs * len(samples) // batch_size
    plan = TrainingPlan(
        total_samples=steps * batch_size, batch_size=batch_size, checkpoint_every_samples=10**9
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        train(objective, samples, plan, workdir=Path(work), device="cpu", workers=workers)
    return steps * batch_size / (time.perf_counter() - started)


def lightly(folder: Path, epochs: int, batch_size: int, workers: int) -> float:
    import timm
    from lightly.data import LightlyDataset
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.dino_transform import DINOTransform

    def head() -> DINOProjectionHead:
        return DINOProjectionHead(512, 2048, 256, PROTOTYPES)

    def network() -> torch.nn.Module:
        return torch.nn.Sequential(timm.create_model(NETWORK, num_classes=0), head())

    student, teacher = network(), network()
    deactivate_requires_grad(teacher)
    loss_of = DINOLoss(output_dim=PROTOTYPES)
    transform = DINOTransform(global_crop_size=SIZE, local_crop_size=LOCAL, n_local_views=CROPS)
    dataset = LightlyDataset(str(folder), transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    seen, steps = 0, epochs * len(dataset) // batch_size
    started = time.perf_counter()
    while seen < steps:
        for views, *_ in loader:
            update_momentum(student, teacher, m=0.996)
            answers = [teacher(view) for view in views[:2]]
            said = [student(view) for view in views]
            loss = loss_of(answers, said)
            loss.backward()
            student[1].cancel_last_layer_gradients(current_epoch=0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seen += 1
            if seen == steps:
                break
    return steps * batch_size / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
