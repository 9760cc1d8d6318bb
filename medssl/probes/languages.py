"""Classes by their names in several languages, after Babel-ImageNet (Geigle et al., ACL 2024,
https://arxiv.org/abs/2306.08658), with one's own translations.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.metrics import Interval, auroc, bootstrap
from medssl.models.text import SharedSpace
from medssl.probes.retrieval import recall_at
from medssl.probes.zero_shot import zero_shot

Translations = dict[str, dict[int, list[str]]]  # language -> class -> its prompts
_Metric = Callable[[Tensor, Tensor], float]  # of answers (s, 2) and labels (s,)
_COLUMNS = ("class", "language", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageReport:
    """How well the names of one language tell the classes apart.

    metrics: accuracy, balanced_accuracy, and auroc of the later class where there are two.
    reference: the same of the reference language, on the same images and classes.
    gap: metrics - reference, below 0 where the language is worse, with its paired interval.
    classes: how many have a translation. images: how many are of them.
    """

    metrics: dict[str, Interval]
    reference: dict[str, Interval]
    gap: dict[str, Interval]
    classes: int
    images: int


def read_translations(file: Path, classes: Sequence[str]) -> Translations:
    """A CSV table of columns class, language and text; several rows are several prompts.

    classes: names of the classes in the order of the labels.
    Raises ValueError for a class that is none of these, an empty cell, a row that is there twice,
    or a language with one class only.
    """
    number = {name: label for label, name in enumerate(classes)}
    found: Translations = {}
    with file.open(newline="", encoding="utf-8-sig") as stream:
        lines = csv.DictReader(stream)
        missing = [column for column in _COLUMNS if column not in (lines.fieldnames or ())]
        if missing:
            raise ValueError(f"the translations need columns {list(_COLUMNS)}; without {missing}")
        for line in lines:
            name, language, text = ((line[column] or "").strip() for column in _COLUMNS)
            where = f"translations, line {lines.line_num}"
            if not (language and text):
                raise ValueError(f"{where}: language and text must not be empty; drop the row")
            if name not in number:
                raise ValueError(f"{where}: the class {name!r} is none of {list(classes)}")
            prompts = found.setdefault(language, {}).setdefault(number[name], [])
            if text in prompts:
                raise ValueError(f"{where}: {text!r} is there twice for {name!r} in {language}")
            prompts.append(text)
    _check_two_classes(found)
    return found


def run(
    images: Tensor,
    labels: Tensor,
    translations: Mapping[str, Mapping[int, Sequence[str]]],
    space: SharedSpace,
    *,
    groups: Sequence[str | None],
    reference: str = "en",
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, LanguageReport]:
    """Zero-shot classification with the names of each language, compared with the reference's.

    A language is measured on the classes that it has names for, and on the images of these; so is
    the reference each time, because fewer classes are easier to tell apart. Across languages
    compare the gaps, not the accuracies, which are of different classes.

    images: (S, d) unit vectors, `space.images(embeddings)`. labels: (S,) int64 class.
    translations: language -> class -> prompts, of `read_translations`.
    groups: patient of each image; intervals draw patients.
    Differs from the paper: a tie between classes is an error, so that a text encoder that does not
    know a script, and gives all its words one place, is not right about the first class.
    """
    known = set().union(*translations.values())
    lacking = sorted(known - set(translations.get(reference, ())))
    if lacking or reference not in translations:
        raise ValueError(
            f"the reference language {reference!r} must name every class, and lacks {lacking}; "
            f"there are the languages {sorted(translations)}"
        )
    if not len(images) == len(labels) == len(groups):
        raise ValueError(
            f"one label and group per image: got {len(images)} images, {len(labels)} labels and "
            f"{len(groups)} groups"
        )
    _check_two_classes(translations)
    reports = {}
    for language, named in translations.items():
        classes = torch.tensor(sorted(named))
        asked = torch.isin(labels.cpu(), classes)
        if not asked.any():
            raise ValueError(f"no image is of a class that is named in {language!r}")
        owners = [group for group, is_asked in zip(groups, asked.tolist(), strict=True) if is_asked]
        places = torch.searchsorted(classes, labels.cpu()[asked])
        found, other = (
            _answers(images[asked], places, [of[label] for label in classes.tolist()], space)
            for of in (named, translations[reference])
        )
        draw = partial(bootstrap, groups=owners, repeats=repeats, seed=seed)
        reports[language] = _compared(found, other, places, draw, len(classes))
    return reports


def _check_two_classes(translations: Mapping[str, Mapping[int, Sequence[str]]]) -> None:
    few = [language for language, named in translations.items() if len(named) < 2]
    if few:
        raise ValueError(f"a language needs names of two classes at least; {few} have fewer")


def _compared(
    found: Tensor, other: Tensor, labels: Tensor, draw: Callable[..., Interval], classes: int
) -> LanguageReport:
    """found, other: answers (s, 2) in the language and in the reference."""
    metrics: dict[str, _Metric] = {"accuracy": _accuracy, "balanced_accuracy": _balanced_accuracy}
    if classes == 2 and len(labels.unique()) == 2:
        metrics["auroc"] = _auroc
    return LanguageReport(
        metrics={name: draw(metric, found, labels) for name, metric in metrics.items()},
        reference={name: draw(metric, other, labels) for name, metric in metrics.items()},
        gap={
            name: draw(partial(_gap, metric), found, other, labels)
            for name, metric in metrics.items()
        },
        classes=classes,
        images=len(labels),
    )


def _answers(
    images: Tensor, labels: Tensor, prompts: Sequence[Sequence[str]], space: SharedSpace
) -> Tensor:
    """Whether the own class is the nearest, and the score of the second: (s, 2).

    labels: (s,) places in `prompts`.
    """
    scores = zero_shot(images, prompts, space, temperature=1.0).cpu()  # (s, K), none near 0 or 1
    if not scores.isfinite().all():
        raise ValueError("some similarities of images and names are NaN; look at the embeddings")
    right = recall_at(1, scores, F.one_hot(labels, len(prompts)).bool())
    return torch.stack([right, scores[:, 1]], 1)


def _accuracy(answers: Tensor, labels: Tensor) -> float:
    return float(answers[:, 0].mean())


def _balanced_accuracy(answers: Tensor, labels: Tensor) -> float:
    """Mean over the classes that are there."""
    count = labels.bincount()
    right = labels.bincount(weights=answers[:, 0].double())
    return float((right / count)[count > 0].mean())


def _auroc(answers: Tensor, labels: Tensor) -> float:
    return auroc(answers[:, 1], labels)


def _gap(metric: _Metric, answers: Tensor, other: Tensor, labels: Tensor) -> float:
    return metric(answers, labels) - metric(other, labels)
