"""What LVM-Med's matching costs beside the network's own step.

python benchmarks/matching_cost.py [--batch-size 64] [--repeats 5]

The network is ViT-S/16 on two crops of 224 x 224 per image, forward and backward, 16 crops at a
time; the matching is everything else of the loss (projection, message passing, affinities of
places, the solver and its gradient) on embeddings and maps of that network's shapes. Prints one
JSON line: seconds of each and the share of the matching in the step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medssl.models.encoder import Encoder
from medssl.models.vit import ViTEncoder
from medssl.objectives.joint_embedding.lvm_med import LVMMed

PART = 16  # crops


class Given(Encoder):
    """Gives embeddings and maps that were made before."""

    in_channels = 1
    embedding_dim = 384

    def __init__(self, embedding: Tensor, features: Tensor) -> None:
        super().__init__()
        self.network = nn.Identity()
        self.embedding, self.features = nn.Parameter(embedding), nn.Parameter(features)

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.embedding, self.features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    crops = 2 * given.batch_size
    torch.manual_seed(0)
    base = torch.randn(given.batch_size, 384)  # two views of the same images, noisily
    views = torch.cat([base, base]) + 0.5 * torch.randn(crops, 384)
    method = LVMMed(Given(views, torch.randn(crops, 384, 14, 14)), graph_size=16)
    place = torch.tensor([[1 / 224, 0, 0], [0, 1 / 224, 0]]).expand(given.batch_size, 2, 2, 3)
    batch = {
        "global": torch.zeros(given.batch_size, 2, 1, 1, 1),
        "global_place": place,
        "item": torch.arange(given.batch_size),
    }
    network = ViTEncoder("vit_small_patch16_224")
    images = torch.randn(PART, 1, 224, 224)

    def step() -> None:
        for _ in range(crops // PART):
            embedding, features = network.embed_with_map(images)
            (embedding.sum() + features.sum()).backward()

    encoder_s = median(step, 1)
    matching_s = median(lambda: method.loss(batch)["loss"].backward(), given.repeats)
    result = {"network_s": round(encoder_s, 2), "matching_s": round(matching_s, 3)}
    print(json.dumps({**result, "share": round(matching_s / (matching_s + encoder_s), 4)}))


def median(work: Callable[[], None], repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])  # the first warms up


if __name__ == "__main__":
    main()
