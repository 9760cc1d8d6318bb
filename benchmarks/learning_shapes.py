"""What pretraining learns on made-up pictures of shapes, where raw pixels say little.

python benchmarks/learning_shapes.py [METHOD ...] [--seeds 3]

METHOD: dino, first_order, second_order, convirt, shuffled; all by default. 3,000 pictures without
labels are trained on; then a 20-nearest-neighbour probe and ridge regression are fitted on their
labels and asked about 1,000 others (8 shapes, chance .125). ConVIRT is asked which of 500 reports
belongs to each of 500 other pictures; reports of one wording are all right. "shuffled" is the same
with the reports given to other pictures. Prints one line per method and seed, and their means.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from medssl.data.physics import MRAugmentation
from medssl.data.sample import Sample
from medssl.data.synthetic.shapes import shape_pictures, shape_samples
from medssl.models.encoder import Encoder
from medssl.models.text import TextEncoder
from medssl.objectives.base import Objective
from medssl.objectives.image_text.convirt import ConVIRT
from medssl.objectives.joint_embedding.dino import DINO
from medssl.objectives.joint_embedding.lvm_med import LVMMed
from medssl.probes.knn import KNN
from medssl.probes.retrieval import recall_at
from medssl.training import TrainingPlan, train

CLASSIFIED = ("dino", "first_order", "second_order")
# what two views of a shape must not have in common: its sign and noise
AUGMENTATION = MRAugmentation(
    gain=0.8,
    offset=0.5,
    gamma=0.0,
    noise=1.0,
    noise_probability=1.0,
    blur_probability=0.0,
    artefact_probability=0.0,
    inversion_probability=0.5,
)


class SmallNet(Encoder):
    """Four convolutions of 16 to 96 channels."""

    in_channels = 1
    embedding_dim = 96

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (1, 16, 32, 96, 96)
        for stride, inside, outside in zip((1, 2, 2, 2), widths, widths[1:], strict=False):
            convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outside), nn.ReLU()]
        self.network = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed_with_map(images)[0]

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.network(images)
        return found.mean((2, 3)), found


def dino(encoder: Encoder, *, prototypes: int = 256, momentum: float = 0.99, **more: Any) -> DINO:
    return DINO(
        encoder,
        prototypes=prototypes,
        momentum=momentum,
        hidden_dim=512,
        bottleneck_dim=64,
        global_size=32,
        global_scale=(0.35, 1.0),
        local_crops=0,
        augmentation=AUGMENTATION,
        **more,
    )


def lvm_med(encoder: Encoder, *, second_order: bool) -> LVMMed:
    return LVMMed(
        encoder,
        second_order=second_order,
        size=32,
        scale=(0.5, 1.0),
        local_grid=4,
        local_pairs=8,
        augmentation=AUGMENTATION,
    )


def convirt(encoder: Encoder) -> ConVIRT:
    # reports say bright or dark, and small or large, which noise hides
    plain = replace(AUGMENTATION, inversion_probability=0.0, gain=0.3, noise=0.2)
    text = TextEncoder(vocabulary_size=400, width=64, depth=2, heads=4, length=24)
    return ConVIRT(encoder, text=text, dim=64, size=32, scale=(0.9, 1.0), augmentation=plain)


# how it is made, samples seen, batch size
OBJECTIVES: dict[str, tuple[Callable[[Encoder], Objective], int, int]] = {
    "dino": (dino, 64_000, 64),
    "first_order": (lambda encoder: lvm_med(encoder, second_order=False), 72_000, 128),
    "second_order": (lambda encoder: lvm_med(encoder, second_order=True), 72_000, 128),
    "convirt": (convirt, 128_000, 128),
    "shuffled": (convirt, 128_000, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print("raw pixels:", shown(classified(nn.Flatten())))
    table: dict[str, list[tuple[float, ...]]] = {}
    for method in given.methods:
        for seed in range(given.seeds):
            torch.manual_seed(seed)
            encoder = SmallNet()
            if method in CLASSIFIED:
                table.setdefault(f"random, seeds of {method}", []).append(classified(encoder))
            started = time.monotonic()
            objective, verdict = trained(method, encoder, seed)
            if method in CLASSIFIED:
                found = classified(objective.export()["image"])
            else:
                found = retrieved(objective)
            table.setdefault(method, []).append(found)
            seconds = time.monotonic() - started
            print(f"{method}, seed {seed}: {shown(found)}, {seconds:.0f} s, {verdict}", flush=True)
    for name, rows in table.items():
        print(f"{name}, mean: {shown([mean(column) for column in zip(*rows, strict=True)])}")


def trained(method: str, encoder: Encoder, seed: int) -> tuple[Objective, str]:
    make, total_samples, batch_size = OBJECTIVES[method]
    samples = shape_samples(3000, seed=100)
    if method == "shuffled":
        samples = with_reports_of_others(samples)
    objective = make(encoder)
    plan = TrainingPlan(
        total_samples=total_samples,
        batch_size=batch_size,
        learning_rate=2e-3,
        warmup_samples=1000,
        weight_decay=(0.04, 0.04),
    )
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            objective, samples, plan, workdir=Path(folder), device="cpu", workers=1, seed=seed
        )
    return objective, str(result["verdict"] or "healthy").partition(":")[0]


def with_reports_of_others(samples: Sequence[Sample]) -> list[Sample]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        replace(sample, report=samples[other].report)
        for sample, other in zip(samples, order, strict=True)
    ]


@torch.no_grad()
def classified(encoder: nn.Module) -> tuple[float, float]:
    """Accuracy of nearest neighbours and of ridge regression."""
    from sklearn.linear_model import RidgeClassifier

    known, asked = shape_pictures(3000, seed=100), shape_pictures(1000, seed=200)
    training = encoder.training
    features, queries = (encoder.eval()(part.pixels) for part in (known, asked))
    encoder.train(training)
    votes = KNN(neighbours=20, temperature=0.07).fit(features, known.labels).scores(queries)
    std, centre = torch.std_mean(features, 0)
    scaled, queries = ((part - centre) / std.clamp(min=1e-5) for part in (features, queries))
    ridge = RidgeClassifier().fit(scaled.numpy(), known.labels.numpy())
    found = float(ridge.score(queries.numpy(), asked.labels.numpy()))
    return float((votes.argmax(1) == asked.labels).float().mean()), found


@torch.no_grad()
def retrieved(objective: Objective) -> tuple[float, float]:
    """Recall at 1 of images -> reports of others, and the same of guessing."""
    assert isinstance(objective, ConVIRT)
    asked = shape_pictures(500, seed=300)
    objective.eval()
    space = objective.space
    firsts = [report.partition(". ")[0] for report in asked.reports]
    similarity = space.images(objective.encoder(asked.pixels)) @ space.sentences(firsts).mT
    wordings = {text: number for number, text in enumerate(dict.fromkeys(firsts))}
    number = torch.tensor([wordings[text] for text in firsts])
    same = number[:, None] == number[None]
    return float(recall_at(1, similarity, same).mean()), float(same.float().mean())


def shown(found: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in found)


if __name__ == "__main__":
    main()
