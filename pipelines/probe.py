"""`medssl probe`: which encoder, for which task, with how many labels, and for whom it fails."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.metrics import Interval, draws_of_groups
from medssl.models.cost import Cost, cost_of
from medssl.models.features import FeatureStore
from medssl.probes.base import Probe
from medssl.probes.standings import Standing, standings
from medssl.probes.task import Asked, Task, read_task
from pipelines.breakdown import by_columns, growth, shortcuts
from pipelines.console import progress, table
from pipelines.contest import (
    Contender,
    Design,
    balanced_accuracy,
    cell,
    features_of,
    key_of,
    macro_auroc,
    readable,
    save_classifier,
)
from pipelines.device import choose_device
from pipelines.journal import write_whole
from pipelines.record import Run, recorded
from pipelines.report.contest import interval_text, write_plot, write_table

REPEATS = 500
METRICS = {"auroc": macro_auroc, "balanced_accuracy": balanced_accuracy}


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One test of one encoder, the mean over its folders and the draws of the labels.

    shown: labels per draw, on average.
    values: by metric, (1 + R,) as measured and in R draws of the test patients.
    """

    task: str
    encoder: str
    probe: str
    share: float
    shown: float
    values: dict[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, each metric with its 95 % interval."""
        named = {"task": self.task, "encoder": self.encoder, "probe": self.probe}
        intervals = {name: interval_of(value).to_dict() for name, value in self.values.items()}
        return {**named, "share": self.share, "shown": self.shown, **intervals}


def probe(
    out: Path,
    encoders: dict[str, Contender],
    tasks: dict[str, Task],
    probes: dict[str, Probe],
    *,
    shares: tuple[float, ...] = (0.01, 0.1, 1.0),
    draws: int = 3,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Ask frozen encoders about tasks with few labels and many; rank them, and keep classifiers.

    Started again in the same folder it goes on where it was stopped: features and scores that are
    there are not computed again.

    Args:
        out: folder for results.json, table.md, plot.png, what was computed on the way, and, per
            task, the best encoder with the first probe as a model that `medssl score` takes.
        encoders: by name: encoder folders of one method, one per seed, or a network.
        tasks: by name: images, their classes, and of whom they are.
        probes: by name: what is fitted on the features.
        shares: of the labels that are shown; 1 is all.
        draws: how often a share is drawn, whole patients at a time.
        seed: of the draws and the bootstrap.
        device: "auto", "cpu", "cuda" or "cuda:1".
    """
    arguments = dict(locals())
    design = Design(probes=probes, shares=shares, draws=draws, seed=seed)
    device = str(choose_device(device))
    with recorded("probe", arguments) as run:
        results, details = _asked_all(out, encoders, tasks, design, device)
        found = {
            "results": [result.to_dict() for result in results],
            "details": details,
            "standings": [asdict(one) for one in ranked(results)] if len(encoders) > 1 else [],
            "cost": {name: asdict(_cost(one, device)) for name, one in encoders.items()},
            "classifiers": {
                name: str(_classifier(out, name, task, encoders, results, design, device))
                for name, task in tasks.items()
            },
        }
        write_whole(out / "results.json", json.dumps(found, indent=1))
        write_table(out / "table.md", found)
        if found["standings"]:
            write_plot(out / "plot.png", found)
        _keep(run, out, results)
    _tell(found)
    plot = out / "plot.png"
    return {**found, "table": out / "table.md", "plot": plot if plot.is_file() else None}


def ranked(results: list[Result]) -> list[Standing]:
    """The encoders over all tests by AUROC, the best first."""
    names = list(dict.fromkeys(result.encoder for result in results))
    tests: dict[tuple[Any, ...], dict[str, Tensor]] = {}
    for one in results:
        tests.setdefault((one.task, one.probe, one.share), {})[one.encoder] = one.values["auroc"]
    values = [torch.stack([of[name] for name in names], dim=1) for of in tests.values()]
    return standings(torch.stack(values, dim=1), names)


def interval_of(values: Tensor) -> Interval:
    """values: (1 + R,) as measured and in draws. The 95 % interval of the draws."""
    drawn = values[1:][~values[1:].isnan()]
    tails = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return Interval(values[0].item(), *torch.quantile(drawn, tails).tolist())


def _asked_all(
    out: Path,
    encoders: Mapping[str, Contender],
    tasks: Mapping[str, Task],
    design: Design,
    device: str,
) -> tuple[list[Result], list[dict[str, Any]]]:
    """The results, and what stands behind each encoder's on each task."""
    store = FeatureStore(out / "features")
    results: list[Result] = []
    details: list[dict[str, Any]] = []
    with progress(len(tasks) * len(encoders), "asking") as bar:
        for task_name, task in tasks.items():
            asked = _asked(task, encoders)
            for name, contender in encoders.items():
                named = {"task": task_name, "encoder": name}
                features, scores = [], []
                for encoder, preprocessing in contender.members():
                    features.append(features_of(asked, encoder, preprocessing, store, device))
                    key = key_of(encoder, preprocessing)
                    scores.append(cell(out / "cells", key, asked, features[-1], design))
                results += _of_cells(scores, asked, design, **named)
                details.append(named | _behind(asked, features[0], scores, design))
                bar.advance(1, f"{task_name}, {name}")
    return results, details


def _behind(
    asked: Asked, features: Tensor, scores: list[dict[str, Tensor]], design: Design
) -> dict[str, Any]:
    """Of an encoder's first folder by the first probe with the most labels, and over all folders
    what more labels bring."""
    most = scores[0][f"{next(iter(design.probes))}/{max(design.shares):g}/0"]
    return {
        "groups": by_columns(asked, most, seed=design.seed),
        "shortcuts": shortcuts(asked, features, seed=design.seed),
        "scaling": growth(asked, scores, design),
    }


def _asked(task: Task, encoders: Mapping[str, Contender]) -> Asked:
    """The task without images that cannot be read."""
    _, preprocessing = next(next(iter(encoders.values())).members())
    return readable(read_task(task), preprocessing)


def _of_cells(
    cells: list[dict[str, Tensor]], asked: Asked, design: Design, *, task: str, encoder: str
) -> Iterator[Result]:
    """Of one encoder and task, the mean over its folders and the draws."""
    groups = [asked.groups[row] for row in asked.test.nonzero()[:, 0].tolist()]
    drawn = draws_of_groups(groups, REPEATS, design.seed)
    counts = torch.cat([torch.ones_like(drawn[:1]), drawn])  # the test set itself comes first
    labels = asked.labels[asked.test]
    for share in design.shares:
        shown = [float(len(rows)) for rows in design.shown(asked, share)]
        for probe in design.probes:
            scores = [found[f"{probe}/{share:g}/{d}"] for found in cells for d in range(len(shown))]
            yield Result(
                task=task,
                encoder=encoder,
                probe=probe,
                share=share,
                shown=sum(shown) / len(shown),
                values={
                    name: torch.stack([metric(one, labels, counts) for one in scores]).mean(0)
                    for name, metric in METRICS.items()
                },
            )


def _classifier(
    out: Path,
    name: str,
    task: Task,
    encoders: Mapping[str, Contender],
    results: list[Result],
    design: Design,
    device: str,
) -> Path:
    """The first probe, fitted on all labels, with the encoder it does best on; as a folder."""
    probe = next(iter(design.probes))
    of_task = [one for one in results if one.task == name and one.probe == probe]
    most = [one for one in of_task if one.share == max(design.shares)]
    best = max(most, key=lambda one: one.values["auroc"][0].item()).encoder
    folder = out / "classifiers" / f"{name} {best}".replace(" ", "_").replace(",", "")
    if not folder.exists():
        encoder, preprocessing = next(encoders[best].members())
        asked = _asked(task, encoders)
        store = FeatureStore(out / "features")
        features = features_of(asked, encoder, preprocessing, store, device)
        member = encoder, preprocessing
        save_classifier(folder, task, asked, member, features, design.probes[probe])
    return folder


def _cost(contender: Contender, device: str) -> Cost:
    encoder, preprocessing = next(contender.members())
    return cost_of(encoder, encoder.selftest_shape(preprocessing.picture_size)[2:], device=device)


def _keep(run: Run, out: Path, results: list[Result]) -> None:
    """Everything on the record, each result in a run below."""
    for file in (out / "results.json", out / "table.md", out / "plot.png"):
        if file.is_file():
            run.artifact(file)
    for one in results:
        told = one.to_dict()
        metrics = {name: told.pop(name) for name in METRICS}
        run.child(f"{one.encoder} {one.task}", told, metrics)


def _tell(found: Mapping[str, Any]) -> None:
    names = ("task", "encoder", "probe", "share", "shown")
    rows = [[*(one[name] for name in names), interval_text(one["auroc"])]
            for one in found["results"]]  # fmt: skip
    table([*names, "AUROC"], rows)
    ranks = [[one["name"], interval_text(one["z"], 2), interval_text(one["rank"], 1)]
             for one in found["standings"]]  # fmt: skip
    if ranks:
        table(["encoder", "z-score", "rank"], ranks, title="over all tests")
