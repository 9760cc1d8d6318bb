"""Schedules in samples seen, in closed form."""

import math

import pytest

from medssl.schedule import TrainingPlan, cosine


def test_the_learning_rate_rises_and_falls_in_samples_seen():
    plan = TrainingPlan(
        total_samples=1000,
        batch_size=10,
        learning_rate=1.0,
        final_learning_rate=0.1,
        warmup_samples=200,
    )
    expected = {0: 0.0, 5: 0.25, 20: 1.0, 60: 0.55, 100: 0.1}  # 60: half of the cosine
    for step, rate in expected.items():
        assert plan.learning_rate_at(plan.clock(step)) == pytest.approx(rate), step


def test_the_schedule_of_a_larger_batch_is_the_same_in_samples():
    small = TrainingPlan(total_samples=960, batch_size=8, warmup_samples=100)
    large = TrainingPlan(total_samples=960, batch_size=48, warmup_samples=100)
    for seen in (48, 480, 912):
        assert small.learning_rate_at(small.clock(seen // 8)) == pytest.approx(
            large.learning_rate_at(large.clock(seen // 48))
        )


def test_a_cosine_is_half_way_at_half_time():
    assert cosine(0.04, 0.4, 0.5) == pytest.approx(0.22)
    assert cosine(0.996, 1.0, 1.0) == 1.0
    assert cosine(2.0, 0.0, 0.25) == pytest.approx(1 + math.cos(math.pi / 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_samples": 0}, "total_samples must be at least 1, got 0"),
        ({"batch_size": 10, "accumulation": 3}, "cannot be split evenly"),
        ({"warmup_samples": 200}, "longer than the training"),
    ],
)
def test_a_plan_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingPlan(**{"total_samples": 100, **changes})
