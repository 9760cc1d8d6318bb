"""Encoders, each asked about each task with few labels and many: scores of the test images."""

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medssl.data.dataset import PreparedSamples
from medssl.data.domain import learn_domain
from medssl.data.manifest import load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.errors import ReadError
from medssl.data.sample import Sample
from medssl.metrics import auroc_of_draws
from medssl.models.encoder import Encoder
from medssl.models.features import FeatureStore, encoder_digest
from medssl.models.folder import describe, load_encoder, save_model, selftest_noise
from medssl.probes.base import Probe
from medssl.probes.classifier import Classifier
from medssl.probes.few_shot import draws
from medssl.probes.task import Asked, Task, without
from pipelines.console import say


@dataclass(kw_only=True)
class Contender:
    """An encoder of a contest: folders of one method, one per seed, or a network.

    folders: encoder folders, whose results are averaged.
    network: an encoder by its class path, instead; it needs `preprocessing`.
    """

    folders: list[Path] = field(default_factory=list)
    network: Encoder | None = None
    preprocessing: Preprocessing | None = None

    def members(self) -> Iterator[tuple[Encoder, Preprocessing]]:
        """Each encoder with what its images go through."""
        if bool(self.folders) == (self.network is not None):
            raise ValueError("an encoder of a contest is given by folders or by network, not both")
        if self.network is not None:
            if self.preprocessing is None:
                raise ValueError("a network needs preprocessing; only encoder folders know theirs")
            yield self.network, self.preprocessing
        for folder in self.folders:
            encoder = load_encoder(folder)
            assert encoder.preprocessing is not None
            if self.preprocessing not in (None, encoder.preprocessing):
                raise ValueError(
                    f"{folder.name} was trained with {encoder.preprocessing}, and the contest asks "
                    f"for {self.preprocessing}; leave preprocessing out"
                )
            yield encoder, encoder.preprocessing


@dataclass(frozen=True, kw_only=True)
class Design:
    """How a contest is held: the probes by name, the shares of the labels and how often each."""

    probes: Mapping[str, Probe]
    shares: Sequence[float]
    draws: int
    seed: int

    def shown(self, asked: Asked, share: float) -> list[Tensor]:
        """Rows of the task whose labels are shown, one tensor per draw; all of them, once."""
        rows = (~asked.test).nonzero()[:, 0]
        if share >= 1:
            return [rows]
        groups = [asked.groups[row] for row in rows.tolist()]
        chosen = draws(asked.labels[rows], groups, share=share, repeats=self.draws, seed=self.seed)
        return [rows[one] for one in chosen]


def readable(asked: Asked, preprocessing: Preprocessing) -> Asked:
    """The task without images that cannot be read, each of which is named."""
    samples = PreparedSamples(asked.manifest, asked.items, preprocessing)
    broken = set()
    for row, item in enumerate(asked.items):
        try:
            samples[row]
        except ReadError as error:  # names its item
            say(f"left out: {error}")
            broken.add(item.item)
    return without(asked, broken)


def features_of(
    asked: Asked, encoder: Encoder, preprocessing: Preprocessing, store: FeatureStore, device: str
) -> Tensor:
    """Embeddings (S, E) of a task's images, read once and kept in the store."""
    samples = PreparedSamples(asked.manifest, asked.items, preprocessing)
    return store.features(encoder, cast(Sequence[Sample], samples), device=device)


def scores_of(asked: Asked, features: Tensor, design: Design) -> dict[str, Tensor]:
    """Of the test images: "probe/share/draw" -> (S, K)."""
    found = {}
    numbers = asked.group_numbers()
    for share in design.shares:
        for draw, rows in enumerate(design.shown(asked, share)):
            for name, probe in design.probes.items():
                fitted = copy.deepcopy(probe)
                fitted.fit(features[rows], asked.labels[rows], groups=numbers[rows])
                scores = fitted.scores(features[asked.test])
                missing = len(asked.classes) - scores.shape[1]  # classes after the last one shown
                padded = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
                found[f"{name}/{share:g}/{draw}"] = padded.contiguous()
    return found


def cell(
    folder: Path, key: Mapping[str, Any], asked: Asked, features: Tensor, design: Design
) -> dict[str, Tensor]:
    """`scores_of`, kept in a file of its own, so that a contest that is killed goes on.

    key: plain values that decide the scores, besides the task and the design.
    """
    about = {
        **key,
        "labels": hashlib.sha256(asked.labels.numpy().tobytes()).hexdigest(),
        "test": hashlib.sha256(asked.test.numpy().tobytes()).hexdigest(),
        "items": [item.item for item in asked.items],
        "groups": asked.groups,
        "probes": {name: describe(probe) for name, probe in design.probes.items()},
        "design": [list(design.shares), design.draws, design.seed],
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        save_file(scores_of(asked, features, design), unfinished)
        os.replace(unfinished, file)
    return load_file(file)


def save_classifier(
    folder: Path,
    task: Task,
    asked: Asked,
    member: tuple[Encoder, Preprocessing],
    features: Tensor,
    probe: Probe,
) -> None:
    """Fit a probe on all that may be learnt from, and save it with its encoder as one model.

    member: of a contender. features: (S, E) of the task's images by its encoder.
    """
    encoder, preprocessing = member
    rows = ~asked.test
    fitted = copy.deepcopy(probe)
    fitted.fit(features[rows], asked.labels[rows], groups=asked.group_numbers()[rows])
    learnt = [item for item, row in zip(asked.items, rows.tolist(), strict=True) if row]
    raw = (load_sample(asked.manifest, item).images["image"] for item in learnt)
    classes = list(asked.classes)
    save_model(
        folder,
        Classifier(encoder, fitted, classes=classes, normal=task.normal),
        kind="probe",
        preprocessing=preprocessing,
        domain=learn_domain(raw),
        card=(
            f"# {type(probe).__name__} on {type(encoder).__name__}\n\nClasses: "
            f"{', '.join(classes)}; fitted on {len(learnt)} images (manifest "
            f"{asked.manifest.digest}).\n"
        ),
        noise=selftest_noise(encoder.selftest_shape(preprocessing.picture_size)),
    )


def key_of(encoder: Encoder, preprocessing: Preprocessing) -> dict[str, Any]:
    """What of an encoder decides its scores."""
    return {"encoder": encoder_digest(encoder), "preprocessing": asdict(preprocessing)}


def macro_auroc(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean over the classes of each against the rest, in each draw of the items, (R,) float64.

    scores: (S, K). labels: (S,). counts: (R, S). Of two classes it is the AUROC of how much the
    second is ahead of the first; of more, each class is judged by its own column, as scikit-learn's
    "ovr". A draw counts the classes that it can.
    """
    if scores.shape[1] == 2:
        return auroc_of_draws(scores[:, 1] - scores[:, 0], labels, counts)
    one_by_one = [
        auroc_of_draws(scores[:, index], (labels == index).long(), counts)
        for index in range(scores.shape[1])
    ]
    return torch.stack(one_by_one).nanmean(0)


def balanced_accuracy(scores: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean over the classes of the share of their items that are named right, (R,) float64."""
    right = (scores.argmax(1) == labels).double()
    weights = counts.double()
    of_class = [
        (weights * right * (labels == index)).sum(1) / (weights * (labels == index)).sum(1)
        for index in labels.unique().tolist()
    ]
    return torch.stack(of_class).nanmean(0)
