"""DINO: the loss against a naive one, the teacher and centre in closed form, the collapse watch."""

import math
from pathlib import Path

import pytest
import torch

from medssl.data.augment import Augmentation
from medssl.models.encoder import Encoder
from medssl.objectives.joint_embedding.dino import DINO
from medssl.training import Clock, TrainingPlan, cosine, train

STILL = Augmentation(intensity_probability=0, noise_probability=0, blur_probability=0)


class Flat(Encoder):
    """The four mean pixels of each quarter of a picture: no batch normalization, any size."""

    in_channels, embedding_dim = 1, 4

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(4, 4)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)


def objective(**changes) -> DINO:
    torch.manual_seed(0)
    options = {
        "prototypes": 8,
        "hidden_dim": 16,
        "bottleneck_dim": 4,
        "global_size": 8,
        "local_crops": 2,
        "local_size": 4,
    }
    return DINO(Flat(), **{**options, **changes})


def views(batch: int = 3, local: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {"global": torch.randn(batch, 2, 1, 8, 8, generator=generator)}
    if local:
        found["local"] = torch.randn(batch, local, 1, 4, 4, generator=generator)
    return found


def clock(step: int) -> Clock:
    return Clock(samples_seen=step, total_samples=100, step=step)


@pytest.mark.parametrize("local", [0, 2])
def test_the_loss_is_that_of_naive_loops_over_views_and_items(local):
    dino, batch = objective(local_crops=local), views(local=local)
    dino.center.copy_(torch.linspace(-0.2, 0.2, 8))
    total, terms = 0.0, 0
    for item in range(3):
        crops = [batch["global"][item, 0], batch["global"][item, 1]]
        crops += [batch["local"][item, v] for v in range(local)]
        for i in range(2):
            logit = dino.teacher_head(dino.teacher(crops[i][None]))[0].tolist()
            weight = [
                math.exp((t - c) / 0.04) for t, c in zip(logit, dino.center.tolist(), strict=True)
            ]
            for j, crop in enumerate(crops):
                if i == j:
                    continue
                answer = [
                    math.exp(s / 0.1) for s in dino.head(dino.encoder(crop[None]))[0].tolist()
                ]
                total -= sum(
                    w / sum(weight) * math.log(a / sum(answer))
                    for w, a in zip(weight, answer, strict=True)
                )
                terms += 1
    assert dino.loss(batch)["loss"].item() == pytest.approx(total / terms, rel=1e-4)


def test_only_the_student_gets_a_gradient():
    dino = objective()
    dino.loss(views())["loss"].backward()
    student = [*dino.encoder.parameters(), *dino.head.parameters()]
    teacher = [*dino.teacher.parameters(), *dino.teacher_head.parameters()]
    assert all(p.grad is not None and p.grad.any() for p in student)
    assert all(p.grad is None and not p.requires_grad for p in teacher)


def test_the_teacher_follows_by_the_momentum_of_the_clock():
    dino = objective(momentum=0.9)
    before = dino.teacher.network[2].weight.clone()
    with torch.no_grad():
        dino.encoder.network[2].weight.add_(1)
    dino.loss(views())
    dino.after_step(clock(30))
    expected = before + (1 - cosine(0.9, 1.0, 0.3))
    torch.testing.assert_close(dino.teacher.network[2].weight, expected)


def test_the_centre_follows_the_teachers_mean_logit():
    dino, first, second = objective(center_momentum=0.8), views(seed=1), views(seed=2)
    means = []
    for batch in (first, second):
        with torch.no_grad():
            crops = batch["global"].flatten(0, 1)
            means.append(dino.teacher_head(dino.teacher(crops)).mean(0))
        dino.loss(batch)
        dino.after_step(clock(100))  # momentum 1: the teacher stays
    expected = 0.2 * 0.8 * means[0] + 0.2 * means[1]
    torch.testing.assert_close(dino.center, expected)


def test_a_split_batch_has_the_gradient_and_the_centre_of_the_whole():
    whole, parts, batch = objective(), objective(), views(batch=4)
    whole.loss(batch)["loss"].backward()
    for rows in (slice(0, 2), slice(2, 4)):
        (parts.loss({name: view[rows] for name, view in batch.items()})["loss"] / 2).backward()
    for one, other in zip(whole.encoder.parameters(), parts.encoder.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for dino in (whole, parts):
        dino.after_step(clock(1))
    torch.testing.assert_close(whole.center, parts.center)


def test_the_prototypes_wait_for_their_share_of_the_training(tmp_path: Path):
    dino, samples = DINO.example()
    dino.frozen_prototypes = 0.5
    start = dino.head.prototypes.weight.detach().clone()
    moved = []
    train(
        dino,
        samples,
        TrainingPlan(total_samples=12, batch_size=3),
        workdir=tmp_path,
        device="cpu",
        workers=0,
        on_step=lambda _: moved.append(not torch.equal(dino.head.prototypes.weight, start)),
    )
    assert moved == [False, False, True, True]


def test_the_teacher_is_what_is_given_away():
    dino = objective()
    assert dino.export()["image"] is dino.teacher


def test_a_teacher_less_sharp_than_its_student_is_refused():
    with pytest.raises(ValueError, match=r"0\.2 \(teacher\) and 0\.1 \(student\)"):
        objective(teacher_temperature=0.2)


def statistics(**changes: float) -> dict[str, float]:
    healthy = {
        "loss": 4.8,
        "teacher_entropy": 4.0,
        "entropy_of_mean": 5.2,
        "teacher_rows": 256.0,
        "feature_spread": 0.5,
    }
    return {**healthy, **changes}


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({}, None),
        ({"loss": 0.0, "teacher_entropy": 0.0, "entropy_of_mean": 0.0}, "collapsed: the teacher"),
        ({"loss": 0.5, "teacher_entropy": 0.4, "entropy_of_mean": 0.5}, "collapsed: the teacher"),
        ({"loss": 1.2, "teacher_entropy": 1.0, "entropy_of_mean": 1.1}, None),
        ({"feature_spread": 0.001}, "collapsed: the encoder"),
        (
            {"loss": math.log(256), "teacher_entropy": 5.54, "entropy_of_mean": 5.545},
            "not learning yet: the teacher is uniform",
        ),
        ({"teacher_rows": 8.0, "teacher_entropy": 0.5, "entropy_of_mean": 1.9}, None),
    ],
    ids=[
        "healthy",
        "one answer",
        "few answers",
        "early on",
        "one embedding",
        "uniform",
        "small batch",
    ],
)
def test_the_collapse_watch_tells_the_ways_to_fail_apart(changes, beginning):
    verdict = objective(prototypes=256).collapsed(statistics(**changes))
    if beginning is None:
        assert verdict is None
    else:
        assert verdict is not None
        assert verdict.startswith(beginning)


@pytest.mark.parametrize(("center_momentum", "collapses"), [(1.0, True), (0.9, False)])
def test_without_centring_a_real_run_collapses_and_is_named(
    tmp_path: Path, center_momentum, collapses
):
    """center_momentum 1 leaves the centre at 0, which is no centring."""
    _, samples = DINO.example()
    dino = objective(
        prototypes=64,
        center_momentum=center_momentum,
        momentum=0.9,
        frozen_prototypes=0.0,
        hidden_dim=64,
        bottleneck_dim=16,
    )
    result = train(
        dino,
        samples,
        TrainingPlan(total_samples=6 * 200, batch_size=6, learning_rate=3e-3),
        workdir=tmp_path,
        device="cpu",
        workers=0,
    )
    verdict = result["verdict"] or ""
    assert verdict.startswith("collapsed") == collapses, (verdict, result["statistics"])


def test_a_random_window_reaches_every_crop_and_is_off_by_default():
    _, samples = DINO.example()
    options = {"flip": 0.0, "augmentation": STILL}
    wide, narrow = objective(**options), objective(**options, window_share=(0.25, 0.25))
    before, after = (
        dino.views(samples[3], torch.Generator().manual_seed(1)) for dino in (wide, narrow)
    )
    low, high = torch.aminmax(samples[3].images["image"].pixels)
    for name in ("global", "local"):
        views = after[name]
        ends = torch.isclose(views, low, atol=1e-5) | torch.isclose(views, high, atol=1e-5)
        assert ends.float().mean() > 0.2  # what lies outside of the window
        assert not torch.isclose(before[name], low, atol=1e-5).any()
