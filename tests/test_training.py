"""The loop: schedules, exact resume, clean stops, clear errors."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.failure import replay
from medssl.training import (
    Clock,
    Trainable,
    TrainingPlan,
    split_by_decay,
    train,
)


def sample(number: int, value: float | None = None) -> Sample:
    pixels = torch.full((1, 2, 2), float(number) if value is None else value)
    image = Image(
        pixels=pixels,
        axes="HW",
        modality=Modality.PICTURE,
        affine=pixel_affine(),
        frame="pixel",
    )
    return Sample(item=f"item{number}", images={"image": image})


def noisy(one: Sample, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = one.images["image"].pixels.flatten()
    return {"x": pixels + 0.1 * torch.randn(4, generator=generator)}


class Regression(Trainable):
    """Predicts the mean pixel through dropout, so that the global random state matters."""

    views = staticmethod(noisy)
    accumulation = "exact"

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("follower", torch.zeros(1, 4))
        self.clocks: list[Clock] = []

    def loss(self, views):
        predicted = self.layer(self.dropout(views["x"]))
        return {"loss": F.mse_loss(predicted[:, 0], views["x"].mean(1))}

    def after_step(self, clock):
        self.clocks.append(clock)
        self.follower.lerp_(self.layer.weight.detach(), 0.1)


SAMPLES = [sample(number) for number in range(6)]


def run(folder: Path, plan: TrainingPlan, *, dropout: float = 0.5, **changes):
    torch.manual_seed(0)
    trainable = changes.pop("trainable", None) or Regression(dropout)
    samples = changes.pop("samples", SAMPLES)
    options = {"workdir": folder, "device": "cpu", "workers": 0, **changes}
    return trainable, train(trainable, samples, plan, **options)


def test_the_clock_counts_whole_batches(tmp_path: Path):
    trainable, result = run(tmp_path, TrainingPlan(total_samples=14, batch_size=4))
    assert [clock.samples_seen for clock in trainable.clocks] == [4, 8, 12, 16]
    assert trainable.clocks[-1].progress == 1
    assert result["finished"]


def test_biases_and_norms_do_not_decay():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, kept = split_by_decay(network)
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 1, 3, 3)]
    assert len(kept["params"]) == 3
    assert kept["decay"] is False


def test_one_step_is_adamw_as_torch_has_it(tmp_path: Path):
    plan = TrainingPlan(
        total_samples=6, batch_size=6, learning_rate=0.1, weight_decay=(0.5, 0.5), gradient_clip=0.2
    )
    ours, _ = run(tmp_path, plan, dropout=0.0)
    torch.manual_seed(0)
    reference = Regression(0.0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [reference.layer.weight], "weight_decay": 0.5},
            {"params": [reference.layer.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
    )
    from medssl.stream import generator_for

    x = torch.stack([noisy(one, generator_for(0, 0, n))["x"] for n, one in enumerate(SAMPLES)])
    reference.loss({"x": x})["loss"].backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.2)
    optimizer.step()
    torch.testing.assert_close(ours.layer.weight, reference.layer.weight)
    torch.testing.assert_close(ours.layer.bias, reference.layer.bias)


def test_a_split_batch_takes_the_same_step_and_is_refused_where_rows_meet(tmp_path: Path):
    whole, _ = run(tmp_path / "a", TrainingPlan(total_samples=24, batch_size=6), dropout=0.0)
    plan = TrainingPlan(total_samples=24, batch_size=6, accumulation=3)
    parts, _ = run(tmp_path / "b", plan, dropout=0.0)
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight)
    refusing = Regression()
    refusing.accumulation = "refused"
    with pytest.raises(ValueError, match="Regression sets the rows of a batch against each other"):
        run(tmp_path / "c", plan, trainable=refusing)


def test_frozen_parameters_stay_for_their_share_of_the_training(tmp_path: Path):
    class HalfFrozen(Regression):
        def parameter_groups(self):
            return [
                {"params": [self.layer.weight]},
                {"params": [self.layer.bias], "frozen_until": 0.5},
            ]

        def after_step(self, clock):
            history.append(self.layer.bias.item())

    history: list[float] = []
    trainable = HalfFrozen()
    start = trainable.layer.bias.item()
    run(tmp_path, TrainingPlan(total_samples=24, batch_size=6), trainable=trainable)
    assert history[:2] == [start, start]
    assert history[2] != start
    assert history[3] != history[2]


def test_workers_do_not_change_the_weights(tmp_path: Path):
    plan = TrainingPlan(total_samples=24, batch_size=4)
    alone, _ = run(tmp_path / "a", plan)
    helped, _ = run(tmp_path / "b", plan, workers=2)
    assert torch.equal(alone.layer.weight, helped.layer.weight)


def test_a_loss_that_is_no_number_names_the_items_and_can_be_replayed(tmp_path: Path):
    samples = [*SAMPLES[:3], sample(9, math.nan)]
    plan = TrainingPlan(total_samples=8, batch_size=2, accumulation=2)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step \d on the items .*item9"):
        run(tmp_path, plan, samples=samples)
    (file,) = tmp_path.glob("not_finite_*.pt")
    again = replay(Regression(), file)
    assert sorted(math.isnan(part["loss"]) for part in again) == [False, True]


def test_a_gradient_that_is_no_number_stops_before_the_weights_take_it(tmp_path: Path):
    class Steep(Regression):
        def loss(self, views):
            predicted = self.layer(self.dropout(views["x"]))  # dropout draws: replay must as well
            reached.append(predicted.detach().clone())
            return {"loss": (predicted - predicted.detach()).abs().sqrt().sum()}  # 0 and slope inf

    reached: list[torch.Tensor] = []
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is nan at step 0 on the"):
        run(tmp_path, TrainingPlan(total_samples=8, batch_size=4), trainable=Steep())
    (file,) = tmp_path.glob("not_finite_0_*.pt")
    (again,) = replay(Steep(), file)
    assert again["loss"] == 0
    assert math.isnan(again["gradient of layer.weight"])
    assert torch.equal(reached[0], reached[1])


def test_a_verdict_reaches_the_callback_and_the_result(tmp_path: Path):
    class Watched(Regression):
        def collapsed(self, statistics):
            return f"collapsed: loss {statistics['loss']:.1f}"

    warnings = []
    _, result = run(
        tmp_path,
        TrainingPlan(total_samples=480, batch_size=4, warmup_samples=60),
        trainable=Watched(),
        on_step=lambda report: warnings.append(report.warning),
    )
    assert result["verdict"].startswith("collapsed: loss")
    assert [step for step, warning in enumerate(warnings, 1) if warning] == [65, 115]


def test_nothing_is_said_to_have_collapsed_before_the_warm_up_ends(tmp_path: Path):
    class Watched(Regression):
        def collapsed(self, statistics):
            return "collapsed"

    plan = TrainingPlan(total_samples=80, batch_size=4, warmup_samples=80)
    assert run(tmp_path, plan, trainable=Watched())[1]["verdict"] is None


def test_sigterm_saves_and_resuming_ends_in_the_same_weights(tmp_path: Path):
    plan = TrainingPlan(total_samples=80, batch_size=4)
    undisturbed, _ = run(tmp_path / "a", plan)

    def stop(report):
        if report.clock.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    _, stopped = run(tmp_path / "b", plan, on_step=stop)
    assert not stopped["finished"]
    resumed, result = run(tmp_path / "b", plan, resume=True)
    assert result["finished"]
    assert len(resumed.clocks) == 13
    assert torch.equal(resumed.layer.weight, undisturbed.layer.weight)
    assert torch.equal(resumed.follower, undisturbed.follower)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_resuming_with_other_arguments_is_refused(tmp_path: Path):
    run(tmp_path, TrainingPlan(total_samples=8, batch_size=4))
    with pytest.raises(ValueError, match=r"plan\.learning_rate was 0\.0005 and is 0\.1"):
        run(tmp_path, TrainingPlan(total_samples=8, batch_size=4, learning_rate=0.1), resume=True)


CHILD = """
import sys, torch
from pathlib import Path
from medssl.objectives.joint_embedding.dino import DINO
from medssl.training import TrainingPlan, train
torch.set_num_threads(1)
torch.manual_seed(0)
objective, samples = DINO.example()
train(
    objective, samples, TrainingPlan(total_samples=60, batch_size=3, checkpoint_every_samples=6),
    workdir=Path(sys.argv[1]), resume=True, device="cpu", workers=1,
    on_step=lambda report: print(report.clock.step, flush=True),
)
torch.save(objective.state_dict(), Path(sys.argv[1]) / "final.pt")
"""


def child(folder: Path, kill_at: int | None) -> None:
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == str(kill_at):
                time.sleep(random.random() * 0.1)
                process.kill()
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL)


def test_a_training_killed_at_any_moment_ends_bit_for_bit_as_an_undisturbed_one(tmp_path: Path):
    with ThreadPoolExecutor() as pool:
        undisturbed = pool.submit(child, tmp_path / "whole", None)
        child(tmp_path / "killed", random.randint(1, 12))
        child(tmp_path / "killed", None)
        undisturbed.result()
    whole, killed = (
        torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


class Recorder(Regression):
    def loss(self, views):
        self.seen = self.layer(views["x"]).dtype
        return super().loss(views)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float)])
def test_layers_compute_in_the_precision_asked_for(tmp_path: Path, precision: str, dtype):
    plan = TrainingPlan(total_samples=4, batch_size=4)
    trainable, _ = run(tmp_path, plan, trainable=Recorder(), precision=precision)
    assert trainable.seen == dtype
    assert trainable.layer.weight.dtype == torch.float32
