"""Does the false-alarm rate that a threshold promises hold over random splits?

python benchmarks/conformal_promise.py [--splits 1000] [--scores scores.parquet]

For false-alarm rates of 1 %, 5 % and 10 % it draws held-out and new normals again and again, takes
the threshold from the first and counts alarms among the second: normal and gamma distributed
scores, the latter without and with heavy ties, from the fewest held-out normals that the rate takes
to ten times as many. With --scores also splits of the scored items of a table, which must be normal
ones that the detector was not fitted on, into two halves. Prints one JSON object per line: the mean
rate (wanted: at most the bound), and the share of the splits inside the 95 % interval of the
beta-binomial (wanted: at least 0.95; ties only make alarms rarer, and then `below` is large).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from anomaly.calibration import conformal_threshold, false_alarm_interval, required_normals

RATES = (0.01, 0.05, 0.1)
NEW = 200
Draw = Callable[[np.random.Generator, int], np.ndarray]
SCORES: dict[str, Draw] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "gamma": lambda rng, count: rng.gamma(2.0, size=count),
    "gamma, tied": lambda rng, count: rng.gamma(2.0, size=count).round(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--scores", type=Path)
    given = parser.parse_args()
    for rate in RATES:
        needed = required_normals(rate)
        for count in (needed, 2 * needed + 1, 10 * needed):
            for name, draw in SCORES.items():
                found = promise(draw, count, NEW, rate, splits=given.splits)
                print(json.dumps({"scores": name, **found}), flush=True)
    if given.scores is not None:
        known = read_scores(given.scores)
        half = len(known) // 2
        for rate in (rate for rate in RATES if half >= required_normals(rate)):
            found = promise(permuted(known), half, len(known) - half, rate, splits=given.splits)
            print(json.dumps({"scores": "table", **found}), flush=True)


def promise(
    draw: Draw, num_calibration: int, num_new: int, rate: float, *, splits: int, seed: int = 0
) -> dict[str, float | bool | list[float]]:
    """What became of the promise over random splits.

    draw: generator and count to that many exchangeable scores.
    """
    rng = np.random.default_rng(seed)
    shares = np.empty(splits)
    for split in range(splits):
        scores = draw(rng, num_calibration + num_new)
        threshold = conformal_threshold(scores[:num_calibration].tolist(), rate)
        shares[split] = (scores[num_calibration:] > threshold).mean()
    low, high = false_alarm_interval(num_calibration, num_new, rate)
    error = shares.std() / np.sqrt(splits)
    return {
        "num_calibration": num_calibration,
        "num_new": num_new,
        "bound": rate,
        "mean_rate": float(shares.mean()),
        "standard_error": float(error),
        "kept": bool(shares.mean() <= rate + 3 * error),
        "interval": [low, high],
        "inside": float(((shares >= low) & (shares <= high)).mean()),
        "below": float((shares < low).mean()),
        "above": float((shares > high).mean()),
    }


def permuted(scores: np.ndarray) -> Draw:
    """Draws that are all of `scores` in random order."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        assert count == len(scores)
        return rng.permutation(scores)

    return draw


def read_scores(file: Path) -> np.ndarray:
    """The scores of the items of a table that were scored."""
    from pyarrow import parquet

    table = parquet.read_table(file, columns=["score", "status"]).to_pylist()
    return np.array([row["score"] for row in table if row["status"] == "ok"])


if __name__ == "__main__":
    main()
