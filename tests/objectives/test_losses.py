"""Shared losses against closed forms and naive loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from medssl.objectives.losses import (
    distillation_loss,
    entropy,
    info_nce,
    koleo,
    masked_distillation_loss,
    sinkhorn,
)


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


@pytest.mark.parametrize("same", [None, [0, 1, 2, 0]])
def test_info_nce_is_minus_the_log_share_of_the_partner_among_all_candidates(same):
    first, second = (torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    ids = None if same is None else torch.tensor([same, [4, 5, 6, 7]]).T
    found = info_nce(first, second, temperature=0.2, same=ids)
    for (rows, others), loss in zip(((first, second), (second, first)), found, strict=True):
        total = 0.0
        for i in range(4):
            terms = []
            for j in range(4):
                if same is not None and i != j and same[i] == same[j]:
                    continue
                cosine = rows[i] @ others[j] / (rows[i].norm() * others[j].norm())
                terms.append((math.exp(cosine.item() / 0.2), i == j))
            total -= math.log(sum(t for t, own in terms if own) / sum(t for t, _ in terms))
        assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_info_nce_of_equal_rows_is_the_log_of_their_number():
    rows = torch.ones(8, 3)
    losses = info_nce(rows, rows, temperature=0.1)
    assert [loss.item() for loss in losses] == pytest.approx([math.log(8)] * 2, rel=1e-6)


def test_the_distillation_loss_is_lightlys():
    from lightly.loss import DINOLoss

    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(v, 4, 9, generator=generator) for v in (5, 2))
    reference = DINOLoss(output_dim=9, teacher_temp=0.05, student_temp=0.1)
    wanted = reference(list(teacher), list(student))  # its centre is still 0
    found = distillation_loss(
        F.log_softmax(student / 0.1, dim=-1), F.softmax(teacher / 0.05, dim=-1)
    )
    torch.testing.assert_close(found, wanted)


def test_the_masked_loss_is_lightlys_for_images_that_all_have_hidden_places():
    from lightly.loss import IBOTPatchLoss

    generator = torch.Generator().manual_seed(4)
    masked = torch.zeros(3, 2, 4, dtype=torch.bool)
    masked[0, 0, :3] = masked[1, 1, 1] = masked[2, :, 2] = True
    student, teacher = (torch.randn(6, 11, generator=generator) for _ in range(2))
    reference = IBOTPatchLoss(output_dim=11, teacher_temp=0.06, student_temp=0.1)
    found = masked_distillation_loss(
        F.log_softmax(student / 0.1, dim=-1), F.softmax(teacher / 0.06, dim=-1), masked.flatten(1)
    )
    torch.testing.assert_close(found, reference(teacher, student, masked))


def test_images_without_hidden_places_do_not_count():
    masked = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    student = F.log_softmax(torch.randn(3, 5, generator=torch.Generator().manual_seed(5)), dim=-1)
    teacher = torch.full((3, 5), 0.2)
    each = -(teacher * student).sum(-1)
    wanted = ((each[0] + each[1]) / 2 + each[2]) / 2
    torch.testing.assert_close(masked_distillation_loss(student, teacher, masked), wanted)
    nothing = masked_distillation_loss(student[:0], teacher[:0], torch.zeros(2, 3).bool())
    assert nothing == 0


def test_sinkhorn_is_lightlys():
    from lightly.loss.swav_loss import sinkhorn as reference

    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(6))
    for iterations in (1, 3):
        wanted = reference(logits, iterations=iterations, epsilon=0.3)
        torch.testing.assert_close(sinkhorn(logits, 0.3, iterations=iterations), wanted)


def test_sinkhorn_uses_every_prototype_equally_and_never_overflows():
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(7)) * 0.2
    logits[:, 0] += 1  # all rows like the first best
    answers = sinkhorn(logits, 0.05, iterations=200)
    torch.testing.assert_close(answers.sum(1), torch.ones(24))
    torch.testing.assert_close(answers.sum(0), torch.full((4,), 6.0), rtol=1e-3, atol=1e-3)
    assert sinkhorn(1000 * logits, 0.05).isfinite().all()


def test_koleo_is_lightlys():
    from lightly.loss import KoLeoLoss

    embedding = torch.randn(10, 4, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(koleo(embedding), KoLeoLoss()(embedding), rtol=1e-4, atol=1e-5)


def test_koleo_of_opposite_points_and_of_a_square():
    assert koleo(torch.tensor([[3.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-math.log(2))
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert koleo(square).item() == pytest.approx(-math.log(math.sqrt(2)))


def test_duplicates_neither_make_koleo_infinite_nor_move():
    point = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = koleo(point)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(math.sqrt(2)), rel=1e-5)
    assert point.grad is not None
    assert point.grad.isfinite().all()
    alone = torch.ones(4, 3, requires_grad=True)
    koleo(alone).backward()
    assert koleo(alone) == 0
    assert not alone.grad.any()


@pytest.mark.parametrize(
    "loss",
    [
        lambda rows: koleo(torch.cat([rows, *(rows + x * rows.flip(0) for x in (0.06, 0.04))])),
        lambda rows: info_nce(rows, rows.flip(1), temperature=0.05)[0],
        lambda rows: distillation_loss(
            F.log_softmax(rows.view(4, 8, 32), -1), F.softmax(rows.view(4, 8, 32)[:2] * 9, -1)
        ),
    ],
    ids=["koleo", "info_nce", "distillation"],
)
def test_losses_are_not_rounded_where_networks_compute_in_bf16(loss):
    rows = torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(rows)
    torch.testing.assert_close(rounded, loss(rows), rtol=1e-6, atol=1e-6)
