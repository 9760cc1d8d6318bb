"""What pretraining is worth on chest X-rays: probes at 1, 10 and 100 % of the labels.

python benchmarks/encoders_cxr.py PNEUMONIA COVID WEIGHTS [--seeds 3] [--out DIR]

PNEUMONIA: pictures with labels.csv (path, abnormal, patient_id, split). COVID: pictures with
reports.csv (path, text, view, patient_id, split). WEIGHTS: of mobilenetv2_100, trained on ImageNet.
DINO and LVM-Med are pretrained on the training pictures of PNEUMONIA and ConVIRT on those of COVID,
by the configs of the house, once per seed. Every encoder is then asked about both: abnormal or not,
and PA or AP. A share of the labels is drawn by patients, three times (100 % once), with at least
two pictures of each class. Test AUROC, mean over seeds and draws, with a 95 % bootstrap by patient.
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.data.dataset import PreparedSamples
from medssl.data.manifest import Manifest, build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.metrics import auroc, bootstrap
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from medssl.models.timm_encoder import TimmEncoder
from medssl.probes.knn import KNN
from pipelines.cli import _parser
from pipelines.console import table
from pipelines.pretrain import pretrain

METHODS = {"DINO": "dino_cxr", "LVM-Med": "lvm_med_cxr", "ConVIRT": "convirt_cxr"}
SHARES, DRAWS = (0.01, 0.1, 1.0), 3
IMAGENET = Preprocessing(
    size=(224, 224),
    intensity="range",
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """labels: 0 or 1 of every picture. test: which are asked about."""

    name: str
    manifest: Manifest
    labels: Tensor
    test: Tensor
    groups: list[str | None]

    def features(self, encoder: Encoder, preprocessing: Preprocessing) -> Tensor:
        """Embeddings (S, E) in evaluation mode."""
        samples = PreparedSamples(self.manifest, self.manifest.images, preprocessing)
        pixels = torch.stack([sample.images["image"].pixels for sample in samples])
        with torch.no_grad():
            return torch.cat([encoder.eval()(block) for block in pixels.split(64)])

    def draws(self, share: float) -> Iterator[Tensor]:
        """Rows of training pictures that may show their labels, whole patients at a time."""
        train = (~self.test).nonzero()[:, 0].tolist()
        patients = sorted({str(self.groups[row]) for row in train})
        for draw in range(DRAWS if share < 1 else 1):
            generator = torch.Generator().manual_seed(draw)
            rows: list[int] = []
            for patient in torch.randperm(len(patients), generator=generator).tolist():
                rows += [row for row in train if str(self.groups[row]) == patients[patient]]
                seen = torch.bincount(self.labels[rows], minlength=2)
                if len(rows) >= share * len(train) and seen.min() >= 2:
                    break
            yield torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pneumonia", "covid", "weights"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{out.absolute()}/mlflow.db")
    tasks = [
        task_of("abnormal", given.pneumonia, "labels.csv", "abnormal", {"0": 0, "1": 1}),
        task_of("view", given.covid, "reports.csv", "view", {"PA": 0, "AP": 1, "AP Supine": 1}),
    ]
    encoders: dict[str, list[tuple[Encoder, Preprocessing]]] = {"random": [], "ImageNet": []}
    imagenet = TimmEncoder("mobilenetv2_100", weights=given.weights, options={"pad_type": "same"})
    encoders["ImageNet"].append((imagenet, IMAGENET))
    for method, config in METHODS.items():
        folder = given.covid if method == "ConVIRT" else given.pneumonia
        for seed in range(given.seeds):
            run = arguments(Path(f"configs/pretrain/{config}.yaml"), seed)
            if method == "DINO":
                fresh = arguments(Path(f"configs/pretrain/{config}.yaml"), seed)
                encoders["random"].append((fresh["objective"].encoder, run["preprocessing"]))
            place = out / f"{config}_{seed}"
            groups = None if method == "ConVIRT" else f"{folder / 'labels.csv'}:patient_id"
            pretrain(folder, out=place, groups=groups, resume=True, **run)
            encoders.setdefault(method, []).append((load_encoder(place), run["preprocessing"]))
    for task in tasks:
        rows = [row for name, found in encoders.items() for row in asked(task, name, found)]
        columns = [f"{share:.0%} of labels" for share in SHARES]
        table(["encoder", "probe", *columns], rows, title=f"{task.name}: {told(task)}")


def arguments(config: Path, seed: int) -> dict[str, Any]:
    """The job's arguments of a config, with networks initialized by the seed."""
    parser = _parser("pretrain", pretrain)
    values = parser.parse_args(["--config", str(config), "--data", ".", "--out", "there"])
    torch.manual_seed(seed)
    found = vars(parser.instantiate(values))
    left_out = ("data", "out", "groups", "resume", "seed", "config", "json")
    return {**{name: v for name, v in found.items() if name not in left_out}, "seed": seed}


def task_of(name: str, root: Path, file: str, column: str, classes: Mapping[str, int]) -> Task:
    manifest = build_manifest(root, groups=f"{root / file}:patient_id")
    with (root / file).open(newline="") as stream:
        rows = {(root / row["path"]).absolute(): row for row in csv.DictReader(stream)}
    found = [rows[Path(item.path)] for item in manifest.images]
    return Task(
        name=name,
        manifest=manifest,
        labels=torch.tensor([classes[row[column]] for row in found]),
        test=torch.tensor([row["split"] == "test" for row in found]),
        groups=[item.group for item in manifest.images],
    )


def asked(
    task: Task, name: str, encoders: list[tuple[Encoder, Preprocessing]]
) -> Iterator[list[str]]:
    """One row per probe."""
    features = [task.features(encoder, preprocessing) for encoder, preprocessing in encoders]
    truth = task.labels[task.test]
    groups = [task.groups[row] for row in task.test.nonzero()[:, 0].tolist()]
    for probe, scores_of in (("20-NN", neighbours), ("linear", linear)):
        cells = []
        for share in SHARES:
            scores = torch.stack(
                [
                    scores_of(one[rows], task.labels[rows], one[task.test])
                    for one in features
                    for rows in task.draws(share)
                ],
                dim=1,
            )
            found = bootstrap(mean_auroc, scores, truth, groups=groups)
            cells.append(f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})")
        yield [name, probe, *cells]


def neighbours(known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    return (
        KNN(neighbours=min(20, len(known)), temperature=0.07)
        .fit(known, labels)
        .scores(queries)[:, 1]
    )


def linear(known: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    std, centre = torch.std_mean(known, 0)
    scaled, asked = ((part - centre) / std.clamp(min=1e-5) for part in (known, queries))
    fitted = LogisticRegression(C=0.01, max_iter=1000).fit(scaled.numpy(), labels.numpy())
    return torch.from_numpy(fitted.decision_function(asked.numpy())).float()


def mean_auroc(scores: Tensor, labels: Tensor) -> float:
    """scores: (S, runs)."""
    return sum(auroc(one, labels) for one in scores.unbind(1)) / scores.shape[1]


def told(task: Task) -> str:
    known = [[len(rows) for rows in task.draws(share)] for share in SHARES]
    test = torch.bincount(task.labels[task.test], minlength=2).tolist()
    return f"labels shown {known}, test {test[0]} and {test[1]}"


if __name__ == "__main__":
    main()
