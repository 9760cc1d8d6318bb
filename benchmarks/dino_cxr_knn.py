"""What DINO adds on chest X-rays: a k-NN probe, normal against pneumonia, no label in pretraining.

python benchmarks/dino_cxr_knn.py ROOT [--config configs/pretrain/dino_cxr.yaml] [--seeds 3]
    [--out DIR]

ROOT holds train, train_extra and test pictures and labels.csv with a patient_id per picture. For
each seed the encoder of the config is pretrained on train and train_extra, and the probe is fitted
on their labels and asked about test, with features of the random initialization, of the raw
preprocessed pixels, and of the pretrained teacher. "train" columns ask about each training picture
with its own patient left out; a config is to be chosen by these, not by the test columns.
Intervals are bootstraps by patient; the last line is that of the paired difference, mean score
over the seeds, DINO minus raw pixels.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from medssl.data.dataset import PreparedSamples
from medssl.data.manifest import build_manifest
from medssl.metrics import Interval, auroc, bootstrap
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from medssl.probes.knn import KNN
from pipelines.console import table
from pipelines.pretrain import pretrain

PROBE = KNN(neighbours=20, temperature=0.07)


def main() -> None:
    """Pretrain once per seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--config", type=Path, default=Path("configs/pretrain/dino_cxr.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    pictures = Pictures(given.root, arguments(given.config, 0)["preprocessing"])
    scores: dict[str, list[Tensor]] = {"raw pixels": [pictures.ask(pictures.pixels.flatten(1))]}
    seconds = []
    for seed in range(given.seeds):
        run = arguments(given.config, seed)
        random = pictures.features(run["objective"].encoder)
        scores.setdefault("random initialization", []).append(pictures.ask(random))
        folder = out / f"seed{seed}"
        result = pretrain(given.root, out=folder, groups=pictures.groups_file, resume=True, **run)
        seconds.append(result.get("samples_per_second"))
        trained = pictures.features(load_encoder(folder))
        scores.setdefault("DINO", []).append(pictures.ask(trained))
    pictures.report(scores)
    print("samples per second:", seconds)


def arguments(config: Path, seed: int) -> dict[str, Any]:
    """The job's arguments of a config, with networks initialized by the seed."""
    parser = ArgumentParser(exit_on_error=False)
    skipped = {"data", "out", "groups", "resume", "seed"}
    parser.add_function_arguments(pretrain, skip=skipped, as_group=False)
    lines = [line for line in config.read_text().splitlines() if not line.startswith("seed:")]
    parsed = parser.parse_string("\n".join(lines))
    torch.manual_seed(seed)
    return {**vars(parser.instantiate(parsed)), "seed": seed}


class Pictures:
    """All pictures of ROOT, preprocessed, with what is known of each."""

    def __init__(self, root: Path, preprocessing: Any) -> None:
        self.groups_file = f"{root / 'labels.csv'}:patient_id"
        manifest = build_manifest(root, groups=self.groups_file)
        samples = PreparedSamples(manifest, manifest.images, preprocessing)
        self.pixels = torch.stack([sample.images["image"].pixels for sample in samples])
        self.labels = torch.tensor([item.label for item in manifest.images])
        self.groups = [item.group for item in manifest.images]
        self.test = torch.tensor([item.split == "test" for item in manifest.images])

    @torch.no_grad()
    def features(self, encoder: Encoder) -> Tensor:
        """Embeddings (S, E) in evaluation mode."""
        training = encoder.training
        found = torch.cat([encoder.eval()(block) for block in self.pixels.split(64)])
        encoder.train(training)
        return found

    def ask(self, features: Tensor) -> Tensor:
        """(S,) share of the vote for abnormal; a training picture is asked without its patient."""
        train = ~self.test
        scores = torch.empty(len(features))
        fitted = PROBE.fit(features[train], self.labels[train])
        scores[self.test] = fitted.scores(features[self.test])[:, 1]
        for group in {self.groups[i] for i in train.nonzero()[:, 0].tolist()}:
            own = torch.tensor([other == group for other in self.groups])
            fitted = PROBE.fit(features[train & ~own], self.labels[train & ~own])
            scores[train & own] = fitted.scores(features[train & own])[:, 1]
        return scores

    def report(self, scores: dict[str, list[Tensor]]) -> None:
        """One row per kind of features: the mean over the seeds, and each seed's test AUROC."""
        rows = []
        for name, runs in scores.items():
            both = torch.stack(runs, dim=1)  # (S, seeds)
            row = [name]
            for rows_of in (~self.test, self.test):
                row += [shown(self.interval(m, both, rows_of)) for m in (mean_auroc, mean_balanced)]
            rows.append([*row, " ".join(f"{self.one(run):.3f}" for run in runs)])
        columns = ["features", "train AUROC", "train balanced", "test AUROC", "test balanced"]
        table([*columns, "test AUROC per seed"], rows)
        if "DINO" not in scores:
            return
        raw, dino = (torch.stack(scores[name], dim=1) for name in ("raw pixels", "DINO"))
        for name, metric in (("AUROC", mean_auroc), ("balanced accuracy", mean_balanced)):
            paired = bootstrap(
                lambda a, b, y, metric=metric: metric(a, y) - metric(b, y),
                *(array[self.test] for array in (dino, raw, self.labels)),
                groups=self.test_groups,
            )
            print(f"test {name}, DINO minus raw pixels: {shown(paired)}")

    @property
    def test_groups(self) -> list[str | None]:
        return [self.groups[i] for i in self.test.nonzero()[:, 0].tolist()]

    def interval(self, metric: Any, scores: Tensor, rows: Tensor) -> Interval:
        """The metric over some pictures, its interval by patient."""
        groups = [self.groups[i] for i in rows.nonzero()[:, 0].tolist()]
        return bootstrap(metric, scores[rows], self.labels[rows], groups=groups)

    def one(self, scores: Tensor) -> float:
        """Test AUROC of one seed."""
        return auroc(scores[self.test], self.labels[self.test])


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """scores: (S, seeds). The mean AUROC over seeds."""
    return sum(auroc(one, labels) for one in scores.unbind(1)) / scores.shape[1]


def mean_balanced(scores: Tensor, labels: Tensor) -> float:
    """scores: (S, seeds). The mean balanced accuracy at a vote of one half, over seeds."""
    called = (scores > 0.5).float()
    recall = called[labels == 1].mean() / 2 + (1 - called[labels == 0]).mean() / 2
    return float(recall)


def shown(interval: Interval) -> str:
    """Value and interval."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
