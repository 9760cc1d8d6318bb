"""The teacher: an exponential moving average, closed form."""

import pytest
import torch
from torch import nn

from medssl.models.momentum import follow, teacher_of


def test_the_teacher_is_the_closed_form_average_of_its_students():
    student = nn.Linear(3, 2)
    teacher = teacher_of(student)
    start = teacher.weight.clone()
    history = []
    for step in range(5):
        with torch.no_grad():
            student.weight.copy_(torch.full((2, 3), float(step)))
        follow(teacher, student, 0.9)
        history.append(student.weight.detach().clone())
    expected = 0.9**5 * start
    expected = expected + sum(0.1 * 0.9 ** (4 - i) * weight for i, weight in enumerate(history))
    torch.testing.assert_close(teacher.weight, expected)


@pytest.mark.parametrize(("momentum", "moves"), [(1.0, False), (0.0, True)])
def test_momentum_one_stays_and_momentum_zero_copies(momentum, moves):
    student = nn.Linear(3, 2)
    teacher = teacher_of(student)
    with torch.no_grad():
        student.weight.add_(1)
    follow(teacher, student, momentum)
    assert torch.equal(teacher.weight, student.weight) == moves


def test_the_teacher_has_no_gradient_and_no_dropout():
    student = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    teacher = teacher_of(student).train()
    pixels = torch.randn(8, 4)
    assert torch.equal(teacher(pixels), teacher(pixels))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student[1].p == 0.5


def test_the_teachers_stochastic_depth_is_off():
    from medssl.models.timm_encoder import TimmEncoder

    student = TimmEncoder("test_resnet", in_channels=1, options={"drop_path_rate": 0.9})
    teacher = teacher_of(student).train()
    rates = {m.drop_prob for m in teacher.modules() if hasattr(m, "drop_prob")}
    assert rates <= {0.0}
    assert any(m.drop_prob > 0 for m in student.modules() if hasattr(m, "drop_prob"))
