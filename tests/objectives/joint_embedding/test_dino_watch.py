"""What the collapse watch says of real trainings on pictures of shapes, step by step."""

from pathlib import Path

import pytest
import torch

from benchmarks.learning_shapes import SmallNet, dino
from medssl.data.synthetic.shapes import shape_samples
from medssl.training import TrainingPlan, train

WARM_UP, BATCH = 8, 128  # steps; pictures


def warnings(folder: Path, steps: int, seed: int, **changes) -> list[tuple[int, str]]:
    """(steps since the warm-up, what was said) of one training."""
    torch.manual_seed(seed)
    found = []
    plan = TrainingPlan(
        total_samples=BATCH * (WARM_UP + steps),
        batch_size=BATCH,
        learning_rate=2e-3,
        warmup_samples=BATCH * WARM_UP,
        weight_decay=(0.04, 0.04),
    )
    train(
        dino(SmallNet(), **changes),
        shape_samples(3000, seed=100),
        plan,
        workdir=folder,
        device="cpu",
        workers=1,
        seed=seed,
        on_step=lambda report: found.append((report.clock.step - WARM_UP, report.warning)),
    )
    return [(step, warning) for step, warning in found if warning]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"center_momentum": 1.0}, "collapsed"),
        ({"teacher_temperature": 0.1}, "not learning yet"),
    ],
    ids=["no centring", "hot teacher"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_failing_training_is_named_within_200_steps_of_its_warm_up(
    tmp_path: Path, changes, beginning: str, seed: int
):
    said = warnings(tmp_path, 200, seed, prototypes=64, momentum=0.95, **changes)
    assert said
    assert 0 < said[0][0] <= 200
    assert said[-1][1].startswith(beginning)


@pytest.mark.slow
@pytest.mark.parametrize(("prototypes", "momentum"), [(64, 0.95), (256, 0.99)])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_training_is_never_called_collapsed(
    tmp_path: Path, prototypes: int, momentum: float, seed: int
):
    said = warnings(tmp_path, 300, seed, prototypes=prototypes, momentum=momentum)
    assert not [step for step, warning in said if warning.startswith("collapsed")]
