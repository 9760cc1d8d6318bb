"""Recall of a search, against cases done by hand."""

import pytest
import torch

from medssl.probes.retrieval import recall_at

SIMILARITY = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.8], [0.4, 0.4, 0.4]])


def test_the_own_partner_counts():
    own = torch.eye(3, dtype=torch.bool)
    assert recall_at(1, SIMILARITY, own).tolist() == [1, 0, 0]
    assert recall_at(2, SIMILARITY, own).tolist() == [1, 1, 0]  # a tie is lost
    assert recall_at(3, SIMILARITY, own).tolist() == [1, 1, 1]


def test_any_relevant_candidate_will_do():
    relevant = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    assert recall_at(1, SIMILARITY, relevant).tolist() == [0, 1, 1]


def test_one_similarity_for_all_finds_nothing():
    same = torch.ones(4, 4)
    assert recall_at(1, same, torch.eye(4, dtype=torch.bool)).sum() == 0


@pytest.mark.parametrize(
    ("k", "relevant"), [(0, torch.eye(3) > 0), (1, torch.eye(4) > 0), (1, torch.zeros(3, 3) > 0)]
)
def test_what_cannot_be_asked_is_refused(k, relevant):
    with pytest.raises(ValueError, match="similarity and relevant need|no relevant candidate"):
        recall_at(k, SIMILARITY, relevant)
