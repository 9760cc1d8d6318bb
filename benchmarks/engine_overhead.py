"""A DINO step through the training loop beside the same step written out, on the same tensors.

python benchmarks/engine_overhead.py [--network resnet10t] [--size 64] [--batch-size 32]
    [--steps 20] [--repeats 7]

Both sides take turns in one process, `steps` steps at a time. Prints one JSON line: seconds per
step of each (the median over repeats) and their ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from medssl import distributed
from medssl.models.layout import channels_last
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.joint_embedding.dino import DINO
from medssl.training import TrainingPlan, _Loop, split_by_decay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet10t")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    plan = TrainingPlan(
        total_samples=given.batch_size * given.steps * (given.repeats + 1) * 2,
        batch_size=given.batch_size,
        checkpoint_every_samples=10**9,
    )
    views = batch_of(given.batch_size, given.size)
    with tempfile.TemporaryDirectory() as folder:
        loop = _Loop(
            objective(given.network, given.size),
            plan,
            Path(folder),
            fabric=distributed.started("cpu", "fp32"),
            seed=0,
        )
        parts = cycle([(("made up",) * given.batch_size, views)])
        bare = written_out(objective(given.network, given.size), plan, views)
        sides: dict[str, Callable[[], object]] = {"bare": bare, "ours": lambda: loop.advance(parts)}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(given.repeats + 1):
            for name, step in sides.items():
                started = time.perf_counter()
                for _ in range(given.steps):
                    step()
                if repeat:  # the first warms up
                    seconds[name].append((time.perf_counter() - started) / given.steps)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    result = {f"{name}_s": round(value, 4) for name, value in median.items()}
    print(json.dumps({**result, "ratio": round(median["ours"] / median["bare"], 3)}))


def objective(network: str, size: int) -> DINO:
    torch.manual_seed(0)
    encoder = TimmEncoder(network, in_channels=1)
    found = DINO(encoder, prototypes=1024, global_size=size, local_crops=4, local_size=size // 2)
    channels_last(found)  # as `train` lays it out
    return found.train()


def batch_of(size: int, side: int) -> dict[str, Tensor]:
    numbers = torch.arange(size)
    return {
        "global": torch.randn(size, 2, 1, side, side),
        "local": torch.randn(size, 4, 1, side // 2, side // 2),
        **dict.fromkeys(("item", "group", "study"), numbers),
    }


def written_out(dino: DINO, plan: TrainingPlan, views: dict[str, Tensor]) -> Callable[[], object]:
    groups = split_by_decay(dino)
    for group in groups:
        group["weight_decay"] = 0.04 if group.pop("decay", True) else 0.0
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
    steps = 0

    def step() -> None:
        nonlocal steps
        loss = dino.loss(views)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dino.parameters(), plan.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        dino.after_step(plan.clock(steps))

    return step


if __name__ == "__main__":
    main()
