"""Normals and FPFH beside open3d's, and farthest-point sampling: seconds and agreement.

python benchmarks/point_operators.py [--threads 2] [--runs 5]

Run it with the python of an environment that has open3d, torch and scipy. The cloud is a made-up
bumpy sphere of 28,000 points; normals from 30 neighbours, FPFH from 100 within a radius that holds
about as many. Both sides take turns, on the same number of threads, after one run each that does
not count; open3d's normals are turned outwards beforehand, so that both describe the same surface.
Prints one JSON line: median seconds and the median of the ratios (ours / open3d, wanted: at most
1.5), the largest difference of the normals (1 - |cosine|) and of the histograms on the same normals
(wanted: 1e-4; of 200), and the median seconds for 1,024 of 50,000 points (wanted: under 1.5).
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

RADIUS = 0.13
Described = tuple[Tensor, Tensor]  # normals (P, 3), histograms (P, 33)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    if importlib.util.find_spec("open3d") is None:
        raise SystemExit(f"{sys.executable} has no open3d; pip install open3d there")
    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # open3d reads it when it is imported
    torch.set_num_threads(given.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    print(json.dumps({"threads": given.threads} | descriptors(given.runs) | sampling(given.runs)))


def descriptors(runs: int) -> dict[str, float]:
    from medssl.models.fpfh import fpfh

    points = bumpy_sphere(28_000)
    ours, theirs = timed_in_turn(runs, lambda: by_us(points), lambda: by_open3d(points))
    (normals, _), (their_normals, their_histograms) = by_us(points), by_open3d(points)
    histograms = fpfh(points[None].double(), their_normals[None], radius=RADIUS)[0]
    cosine = (normals.double() * their_normals).sum(-1).abs()
    difference = (histograms - their_histograms).abs()
    return {
        "ours_s": statistics.median(ours),
        "open3d_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "normals_differ": float((1 - cosine).max()),
        "histograms_differ": float(difference.max()),
        "points_beyond_1e-4": int((difference.amax(1) > 1e-4).sum()),
    }


def sampling(runs: int) -> dict[str, float]:
    from medssl.models.points import farthest_point_sampling

    points = torch.randn(1, 50_000, 3, generator=torch.Generator().manual_seed(0))
    (seconds,) = timed_in_turn(runs, lambda: farthest_point_sampling(points, 1024))
    return {"farthest_s": statistics.median(seconds)}


def bumpy_sphere(count: int) -> Tensor:
    sphere = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    sphere = torch.nn.functional.normalize(sphere, dim=-1)
    return sphere * (1 + 0.1 * torch.sin(5 * sphere[:, :1]) * torch.cos(7 * sphere[:, 1:2]))


def by_us(points: Tensor) -> Described:
    from medssl.models.fpfh import fpfh
    from medssl.models.points import estimate_normals

    normals = estimate_normals(points[None])
    return normals[0], fpfh(points[None], normals, radius=RADIUS)[0]


def by_open3d(points: Tensor) -> Described:
    import open3d

    geometry, registration = open3d.geometry, open3d.pipelines.registration
    cloud = geometry.PointCloud(open3d.utility.Vector3dVector(points.double().numpy()))
    cloud.normals = cloud.points  # a first guess of the side, which open3d keeps
    cloud.estimate_normals(geometry.KDTreeSearchParamKNN(30))
    search = geometry.KDTreeSearchParamHybrid(RADIUS, 100)
    histograms = np.asarray(registration.compute_fpfh_feature(cloud, search).data).T.copy()
    return torch.from_numpy(np.array(cloud.normals)), torch.from_numpy(histograms)


def timed_in_turn(runs: int, *sides: Callable[[], Any]) -> list[list[float]]:
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for took, side in zip(seconds, sides, strict=True):
            start = time.perf_counter()
            side()
            took.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
