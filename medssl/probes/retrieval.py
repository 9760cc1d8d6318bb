"""How often a search finds what belongs to the query."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.metrics import Interval, bootstrap

_BLOCK = 1024  # queries at a time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """One side of a search: images, or reports of which each study has one.

    embeddings: (S, d) unit vectors of the shared space. labels: (S,) class.
    studies, groups: study and patient of each row; where the patient is unknown, the study again.
    """

    embeddings: Tensor
    labels: Tensor
    studies: Sequence[str]
    groups: Sequence[str]

    def __post_init__(self) -> None:
        lengths = [len(self.embeddings), len(self.labels), len(self.studies), len(self.groups)]
        if len(set(lengths)) != 1 or self.embeddings.ndim != 2 or self.labels.ndim != 1:
            raise ValueError(
                "one label, study and group per row of embeddings (S, d): got "
                f"{tuple(self.embeddings.shape)}, {tuple(self.labels.shape)}, "
                f"{len(self.studies)} studies and {len(self.groups)} groups"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    metrics: recall_at_k, precision_at_k and mean_average_precision, larger is better; median_rank
        of the first right candidate, 1 is best.
    queries: how many were asked. left_out: queries to which no candidate belongs.
    """

    metrics: dict[str, Interval]
    queries: int
    left_out: int


def recall_at(k: int, similarity: Tensor, relevant: Tensor) -> Tensor:
    """Whether one of the k most similar candidates belongs to the query, (S,) float 0 or 1.

    A tie is broken against the query: a relevant candidate ranks after every other of the same
    similarity, so that a model that gives all candidates one similarity finds nothing.

    similarity: (S, T), larger is nearer. relevant: (S, T) bool, at least one in every row.
    """
    if similarity.shape != relevant.shape or k < 1:
        raise ValueError(
            "similarity and relevant need one shape (S, T) and k at least 1: got "
            f"{tuple(similarity.shape)}, {tuple(relevant.shape)} and {k}"
        )
    if not relevant.any(1).all():
        raise ValueError("some queries have no relevant candidate; leave them out")
    if similarity.isnan().any():
        raise ValueError("some similarities are NaN; look at the embeddings")
    best = similarity.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    before = ((similarity >= best) & ~relevant).sum(1)  # others that come no later
    return (before < k).float()


def ranked(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Whether the n-th most similar candidate belongs to the query, (S, T) bool.

    Arguments and ties as in `recall_at`.
    """
    if similarity.shape != relevant.shape:
        raise ValueError(
            "similarity and relevant need one shape (S, T): got "
            f"{tuple(similarity.shape)} and {tuple(relevant.shape)}"
        )
    if similarity.isnan().any():
        raise ValueError(f"{int(similarity.isnan().sum())} similarities are NaN")
    blocks = []
    for near, right in zip(similarity.split(_BLOCK), relevant.split(_BLOCK), strict=True):
        wrong_first = right.int().argsort(dim=1, stable=True)
        by_similarity = near.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)
        blocks.append(right.gather(1, wrong_first.gather(1, by_similarity)))
    return torch.cat(blocks)


def precision_at(k: int, found: Tensor) -> Tensor:
    """Share of right ones among the first k, (S,); where there are fewer, the missing are wrong.

    found: (S, T) bool, of `ranked`.
    """
    return found[:, :k].sum(1) / k


def average_precision(found: Tensor) -> Tensor:
    """Mean, over the right candidates, of the precision where each was found, (S,).

    found: (S, T) bool, of `ranked`, with at least one right candidate in every row.
    """
    rank = torch.arange(1, found.shape[1] + 1, device=found.device)
    precision = found.cumsum(1) / rank
    return (precision * found).sum(1) / found.sum(1)


def first_rank(found: Tensor) -> Tensor:
    """Rank of the first right candidate, from 1, (S,) float; `found` as in `average_precision`."""
    return found.int().argmax(1).float() + 1


def matching(queries: Sequence[Hashable], candidates: Sequence[Hashable]) -> Tensor:
    """Where query i and candidate j have the same name (class, study, patient), (S, T) bool."""
    number = {name: n for n, name in enumerate(dict.fromkeys((*queries, *candidates)))}
    rows, columns = (torch.tensor([number[name] for name in of]) for of in (queries, candidates))
    return rows[:, None] == columns[None]


def composed(images: Tensor, texts: Tensor, *, weight: float = 0.5) -> Tensor:
    """A query of pictures and words: their weighted mean in the shared space, (S, d) unit vectors.

    images, texts: (S, d). weight: share of the words; 0 is the image alone, 1 the words alone.
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"one text per image: got {tuple(images.shape)} image and {tuple(texts.shape)} text "
            "embeddings"
        )
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie within 0 and 1, got {weight}")
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    return F.normalize((1 - weight) * images + weight * texts, dim=-1)


def search(
    similarity: Tensor,
    *,
    relevant: Tensor,
    excluded: Tensor,
    groups: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
    repeats: int = 1000,
    seed: int = 0,
) -> Found:
    """Measure one search, with intervals by the patients of the queries.

    similarity: (S, T), larger is nearer.
    relevant: (S, T) bool, what belongs to the query.
    excluded: (S, T) bool, what is out of the query's gallery, neither right nor wrong: the image
        itself and whatever else there is of its patient.
    groups: patient of each query.
    Raises ValueError where nothing belongs to any query, or a similarity is not finite.
    """
    if not similarity.isfinite().all():
        raise ValueError(
            f"{int((~similarity.isfinite()).sum())} similarities are NaN or infinite; look for "
            "the embeddings that are"
        )
    excluded = excluded.to(similarity.device)
    relevant = relevant.to(similarity.device) & ~excluded
    asked = relevant.any(1)
    if not asked.any():
        raise ValueError(
            f"to none of {len(asked)} queries belongs a candidate that is not excluded; there "
            "must be right candidates of other patients"
        )
    similarity = similarity.masked_fill(excluded, -torch.inf)[asked]
    relevant = relevant[asked]
    found = ranked(similarity, relevant)
    values = {f"recall_at_{k}": recall_at(k, similarity, relevant) for k in ks}
    values |= {f"precision_at_{k}": precision_at(k, found) for k in ks}
    values |= {"mean_average_precision": average_precision(found)}
    owners = [group for group, is_asked in zip(groups, asked.tolist(), strict=True) if is_asked]
    metrics = {
        name: bootstrap(_mean, value.cpu(), groups=owners, repeats=repeats, seed=seed)
        for name, value in values.items()
    }
    metrics["median_rank"] = bootstrap(
        _median, first_rank(found).cpu(), groups=owners, repeats=repeats, seed=seed
    )
    return Found(metrics=metrics, queries=len(owners), left_out=len(asked) - len(owners))


def by_class(
    queries: Items,
    candidates: Items,
    *,
    ks: Sequence[int] = (1, 5, 10),
    repeats: int = 1000,
    seed: int = 0,
) -> Found:
    """Search for the query's class; everything of the query's own patient is excluded."""
    return search(
        queries.embeddings @ candidates.embeddings.mT,
        relevant=matching(queries.labels.tolist(), candidates.labels.tolist()),
        excluded=matching(queries.groups, candidates.groups),
        groups=queries.groups,
        ks=ks,
        repeats=repeats,
        seed=seed,
    )


def by_study(
    queries: Items,
    candidates: Items,
    *,
    ks: Sequence[int] = (1, 5, 10),
    repeats: int = 1000,
    seed: int = 0,
) -> Found:
    """Search for the query's own study; other studies of the patient are excluded."""
    own = matching(queries.studies, candidates.studies)
    return search(
        queries.embeddings @ candidates.embeddings.mT,
        relevant=own,
        excluded=matching(queries.groups, candidates.groups) & ~own,
        groups=queries.groups,
        ks=ks,
        repeats=repeats,
        seed=seed,
    )


def run(
    images: Items,
    reports: Items,
    *,
    weight: float = 0.5,
    ks: Sequence[int] = (1, 5, 10),
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, Found]:
    """Every search of a set of images and their reports, by its name.

    Four searches are for the query's class, two for the other half of its own study. A query of
    image and report has the image and the report of one study.

    images: (S, d). reports: (R, d), one for every study of the images.
    weight: share of the report in the query of both, see `composed`.
    """
    row = {study: n for n, study in enumerate(reports.studies)}
    missing = set(images.studies) - set(row)
    if missing or len(row) < len(reports.studies):
        raise ValueError(
            f"one report per study: {len(missing)} studies have none and "
            f"{len(reports.studies) - len(row)} reports are of a study that has another"
        )
    texts = reports.embeddings[[row[study] for study in images.studies]]
    both = replace(images, embeddings=composed(images.embeddings, texts, weight=weight))
    find = partial(by_class, ks=ks, repeats=repeats, seed=seed)
    find_own = partial(by_study, ks=ks, repeats=repeats, seed=seed)
    return {
        "image -> image": find(images, images),
        "image -> report": find(images, reports),
        "report -> image": find(reports, images),
        "image + report -> image": find(both, images),
        "image -> own report": find_own(images, reports),
        "report -> own image": find_own(reports, images),
    }


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _median(values: Tensor) -> float:
    return float(values.quantile(0.5))
