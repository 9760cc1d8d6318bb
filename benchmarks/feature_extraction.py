"""Features into a fresh store beside the bare encoder, on the same decoded pictures.

python benchmarks/feature_extraction.py [--network resnet18] [--size 128] [--samples 512]
    [--batch-size 32] [--repeats 5]

Both sides take turns in one process, a pass over all pictures at a time; the store is given keys
and begins empty every time. Prints one JSON line: pictures per second of each (the median over
repeats), their ratio (1 is as fast as the bare encoder), and the same of a second pass, which
finds every row.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.models.encoder import frozen
from medssl.models.features import FeatureStore
from medssl.models.timm_encoder import TimmEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    encoder = frozen(TimmEncoder(given.network, in_channels=1))
    pixels = torch.randn(given.samples, 1, given.size, given.size)
    samples = [sample(one) for one in pixels]
    keys = [str(number) for number in range(given.samples)]

    @torch.inference_mode()
    def bare() -> Tensor:
        return torch.cat([encoder(block) for block in pixels.split(given.batch_size)])

    def stored() -> Tensor:
        return store.features(encoder, samples, keys=keys, batch_size=given.batch_size)

    sides: dict[str, Callable[[], Tensor]] = {"bare": bare, "stored": stored, "known": stored}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(given.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(Path(folder))
            found = []
            for name, side in sides.items():
                started = time.perf_counter()
                found.append(side())
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
            if not all(torch.equal(found[0], features) for features in found):
                raise SystemExit("the sides differ")
    speed = {name: given.samples / statistics.median(taken) for name, taken in seconds.items()}
    result = {f"{name}_per_s": round(value, 1) for name, value in speed.items()}
    print(json.dumps({**result, "ratio": round(speed["stored"] / speed["bare"], 3)}))


def sample(pixels: Tensor) -> Sample:
    image = Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
    )
    return Sample(item="made up", images={"image": image})


if __name__ == "__main__":
    main()
