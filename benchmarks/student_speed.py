"""How long the distilled student takes for a picture, beside a bare MobileNetV2.

python benchmarks/student_speed.py [--threads 1] [--rounds 40]

256 x 256, batch 1, float32, both laid out channels last, taking turns; the student is not trained,
which changes no time. Prints one JSON object with medians in milliseconds.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features.efficient_student import EfficientStudent
from medssl.data.sample import Sample
from medssl.models.layout import channels_last
from medssl.models.timm_encoder import TimmEncoder
from medssl.training import TrainingPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bare = TimmEncoder("mobilenetv2_100").eval()
    channels_last(bare)
    plan = TrainingPlan(total_samples=2, batch_size=2)
    student = EfficientStudent(
        TimmEncoder("mobilenetv2_100"),
        layers=["blocks.2", "blocks.4"],
        teacher_plan=plan,
        plan=plan,
    )
    student.fit(NormalData([colored(sample) for sample in smooth_pictures(3, (256, 256))])).eval()
    pixels = torch.randn(1, 3, 256, 256)
    batch = noise_batch(pixels, "HW")
    times: dict[str, list[float]] = {"mobilenet": [], "student": []}
    with torch.inference_mode():
        for _ in range(given.rounds):
            times["mobilenet"].append(timed(bare, pixels))
            times["student"].append(timed(student.predict, batch))
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    told: dict[str, Any] = {f"{name}_ms": round(1000 * s, 2) for name, s in middle.items()}
    told["ratio"] = round(middle["student"] / middle["mobilenet"], 3)
    print(json.dumps({"threads": given.threads, **told}))


def colored(sample: Sample) -> Sample:
    """Three equal channels, valid everywhere."""
    image = sample.images["image"]
    return sample.with_image(replace(image, pixels=image.pixels.repeat(3, 1, 1), valid=None))


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
