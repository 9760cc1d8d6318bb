"""k nearest neighbours against naive loops and scikit-learn."""

import math

import pytest
import torch

from medssl.probes import knn
from medssl.probes.knn import KNN


def data(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 5, generator=generator)
    return features, torch.randint(3, (rows,), generator=generator)


def test_votes_are_the_naive_weighted_sum():
    features, labels = data(40, 0)
    queries, _ = data(6, 1)
    scores = KNN(neighbours=7, temperature=0.2).fit(features, labels).scores(queries)
    for query, found in zip(queries, scores, strict=True):
        ranked = sorted(
            (
                (torch.dot(query, row) / (query.norm() * row.norm())).item(),
                int(label),
            )
            for row, label in zip(features, labels, strict=True)
        )[-7:]
        weights = [math.exp(cosine / 0.2) for cosine, _ in ranked]
        for kind in range(3):
            share = sum(w for w, (_, label) in zip(weights, ranked, strict=True) if label == kind)
            assert found[kind].item() == pytest.approx(share / sum(weights), abs=1e-5)


def test_a_hot_temperature_is_the_unweighted_vote_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = data(60, 2)
    queries, _ = data(20, 3)
    reference = KNeighborsClassifier(9, metric="cosine").fit(features.numpy(), labels.numpy())
    ours = KNN(neighbours=9, temperature=1e6).fit(features, labels).scores(queries)
    expected = torch.from_numpy(reference.predict_proba(queries.numpy())).float()
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_blocks_do_not_change_the_answer(monkeypatch):
    features, labels = data(40, 4)
    probe = KNN(neighbours=5).fit(features, labels)
    whole = probe.scores(features)
    monkeypatch.setattr(knn, "_BLOCK", 7)
    torch.testing.assert_close(probe.scores(features), whole)


def test_one_label_per_row_is_required():
    with pytest.raises(ValueError, match="one label per row"):
        KNN().fit(torch.zeros(4, 3), torch.zeros(5))
