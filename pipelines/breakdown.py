"""Behind a result: for whom an encoder fails, what it leans on, and what more labels bring."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medssl.metrics import OneClassError
from medssl.probes.groups import by_group
from medssl.probes.scaling import scaling
from medssl.probes.shortcuts import audit
from medssl.probes.task import Asked
from pipelines.console import say
from pipelines.contest import Design, macro_auroc

_FEWEST_SIZES = 4  # that a law of growth is fitted to


def by_columns(asked: Asked, scores: Tensor, *, seed: int) -> dict[str, Any]:
    """AUROC of the test images by each column. scores: (S_test, K)."""
    rows = asked.test.nonzero()[:, 0].tolist()
    patients = [asked.groups[row] for row in rows]
    return {
        name: by_group(
            _auroc,
            scores,
            asked.labels[asked.test],
            column=[cells[row] for row in rows],
            patients=patients,
            seed=seed,
        ).to_dict()
        for name, cells in asked.columns.items()
    }


def shortcuts(asked: Asked, features: Tensor, *, seed: int) -> dict[str, Any]:
    """What the audit says of each column, of all images; of tasks with two classes.

    features: (S, E). A column that cannot be audited is named, with the reason.
    """
    found: dict[str, Any] = {}
    if len(asked.classes) != 2:
        return found
    for name, cells in asked.columns.items():
        try:
            report = audit(features, asked.labels, cells, asked.groups, seed=seed)
        except ValueError as error:
            say(f"{name} is not audited: {error}")
            continue
        found[name] = {**report.to_dict(), "verdict": report.verdict}
    return found


def growth(
    asked: Asked, scores: Sequence[dict[str, Tensor]], design: Design
) -> dict[str, dict[str, Any]]:
    """By probe, what twice the labels would bring; where at least four shares below 1 were drawn.

    scores: of each folder of the encoder, by "probe/share/draw".
    """
    sizes = {share: design.shown(asked, share) for share in design.shares if share < 1}
    if len(sizes) < _FEWEST_SIZES or design.draws < 2:
        return {}
    labels = asked.labels[asked.test]
    found = {}
    for probe in design.probes:
        shown, values = [], []
        for share, drawn in sizes.items():
            shown_of_share = round(sum(map(len, drawn)) / len(drawn))
            for draw in range(len(drawn)):
                each = [_auroc(one[f"{probe}/{share:g}/{draw}"], labels) for one in scores]
                shown.append(shown_of_share)
                values.append(sum(each) / len(each))
        found[probe] = scaling(shown, torch.tensor(values), seed=design.seed).to_dict()
    return found


def _auroc(scores: Tensor, labels: Tensor) -> float:
    value = macro_auroc(scores, labels, torch.ones(1, len(labels), dtype=torch.int64)).item()
    if value != value:
        raise OneClassError("only one class")
    return value
