"""Whether a coreset of 800,000 x 1,152 patches ends within 16 GiB, and how.

python benchmarks/coreset_large.py --dir DIR [--rows 800000] [--ratio 0.01] [--sample 80000]
    [--threads 2]

Writes 3.4 GiB of made-up patches to DIR (2,000 kinds of patch, each with a spread of falling
variances, as features of networks have) and maps them into memory. Out of core, every patch counts
and `ratio` of all are picked. Sampled, `sample` patches are drawn evenly and a tenth of them are
picked; the distance of all patches to the nearest pick is shown beside the other's. Prints one JSON
object.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anomaly.memory import greedy_coreset, nearest

WIDTH, KINDS, BLOCK = 1152, 2_000, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=800_000)
    parser.add_argument("--ratio", type=float, default=0.01)
    parser.add_argument("--sample", type=int, default=80_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    features = written(given.dir / f"patches_{given.rows}.bin", given.rows)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    drawn = order[: given.sample].sort().values
    result = {
        "shape": list(features.shape),
        "sampled": coreset(features, drawn, given.sample // 10),
        "out_of_core": coreset(features, None, int(given.ratio * given.rows)),
    }
    print(json.dumps(result, indent=1))


def written(file: Path, rows: int) -> Tensor:
    """The patches (rows, WIDTH), mapped from the file."""
    size = rows * WIDTH
    made = file.exists() and file.stat().st_size == 4 * size
    features = torch.from_file(str(file), shared=True, size=size).reshape(rows, WIDTH)
    if not made:
        generator = torch.Generator().manual_seed(0)
        spread = torch.arange(1, WIDTH + 1).float().rsqrt()
        kinds = 3 * torch.randn(KINDS, WIDTH, generator=generator) * spread
        for start in range(0, rows, BLOCK):
            block = features[start : start + BLOCK]
            chosen = torch.randint(KINDS, (len(block),), generator=generator)
            noise = torch.randn(len(block), WIDTH, generator=generator) * spread
            block.copy_(kinds[chosen] + noise)
    return features


def coreset(features: Tensor, rows: Tensor | None, count: int) -> dict[str, Any]:
    start = time.perf_counter()
    part = features if rows is None else features[rows]
    picks = greedy_coreset(part, count)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bank = part[picks]
    seen = features[:: max(1, len(features) // BLOCK)]
    distance = nearest(seen, bank)[0][:, 0]
    return {
        "patches": len(part),
        "picks": count,
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
        "mean_distance": round(float(distance.mean()), 4),
        "largest_distance": round(float(distance.max()), 4),
    }


if __name__ == "__main__":
    main()
