"""Shared losses against closed forms and naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from medssl.objectives.losses import distillation_loss, entropy


def test_entropy_of_uniform_and_certain_answers():
    answers = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    assert entropy(answers).tolist() == pytest.approx([math.log(4), 0.0])


def test_the_loss_is_the_mean_over_pairs_of_different_views():
    generator = torch.Generator().manual_seed(0)
    student = F.log_softmax(torch.randn(5, 3, 7, generator=generator), dim=-1)
    teacher = F.softmax(torch.randn(2, 3, 7, generator=generator), dim=-1)
    total, pairs = 0.0, 0
    for i in range(2):
        for j in range(5):
            if i == j:
                continue
            pairs += 1
            for b in range(3):
                for k in range(7):
                    total -= teacher[i, b, k].item() * student[j, b, k].item() / 3
    assert pairs == 8
    assert distillation_loss(student, teacher).item() == pytest.approx(total / pairs, rel=1e-5)


def test_uniform_answers_cost_the_log_of_their_number():
    student = F.log_softmax(torch.zeros(2, 4, 64), dim=-1)
    teacher = torch.full((2, 4, 64), 1 / 64)
    assert distillation_loss(student, teacher).item() == pytest.approx(math.log(64), rel=1e-5)


def test_a_view_is_not_compared_with_itself():
    """Two views that contradict each other: only the crossed pairs count."""
    certain = torch.eye(2)[:, None] * 60  # view i is sure of class i
    student = F.log_softmax(certain, dim=-1)
    teacher = F.softmax(certain, dim=-1)
    assert distillation_loss(student, teacher).item() == pytest.approx(60, rel=1e-5)


@pytest.mark.parametrize("shapes", [((1, 2, 3), (1, 2, 3)), ((2, 2, 3), (2, 4, 3))])
def test_views_that_cannot_be_paired_are_refused(shapes):
    with pytest.raises(ValueError, match="must begin with the teacher's views"):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))
