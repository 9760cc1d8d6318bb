"""torch.compile as an option, and what it does where nothing can be compiled."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.data.synthetic.shapes import shape_samples
from medssl.training import Trainable, TrainingPlan, train


def flat(sample, generator) -> dict[str, torch.Tensor]:
    return {"x": sample.images["image"].pixels.flatten()}


class Autoencoder(Trainable):
    views = staticmethod(flat)

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(1024, 8), nn.GELU(), nn.Linear(8, 1024))

    def loss(self, views):
        return {"loss": F.mse_loss(self.network(views["x"]), views["x"])}


def losses(folder: Path, *, compiled: bool) -> list[float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = []
    train(
        Autoencoder(),
        shape_samples(8, seed=1),
        TrainingPlan(total_samples=24, batch_size=4),
        workdir=folder,
        device="cpu",
        workers=0,
        compiled=compiled,
        on_step=lambda report: found.append(report.loss),
    )
    return found


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_networks_train_as_the_others(tmp_path: Path):
    plain = losses(tmp_path / "a", compiled=False)
    torch._dynamo.utils.counters.clear()
    assert losses(tmp_path / "b", compiled=True) == pytest.approx(plain, rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_what_cannot_be_compiled_runs_as_it_is(tmp_path: Path, monkeypatch):
    def broken(*_, **__):
        tried.append(True)
        raise RuntimeError("no compiler here")

    tried: list[bool] = []
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    plain = losses(tmp_path / "a", compiled=False)
    assert losses(tmp_path / "b", compiled=True) == pytest.approx(plain, rel=1e-5)
    assert tried
