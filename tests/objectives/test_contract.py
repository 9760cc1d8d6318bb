"""The contract of every pretraining method; a new file is tested without being listed."""

from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch
from torch import nn

from medssl import objectives
from medssl.models.encoder import Encoder
from medssl.models.folder import describe
from medssl.objectives.base import Objective
from medssl.stream import Stream, batches
from medssl.training import TrainingPlan, train


def methods() -> list[type[Objective]]:
    for module in walk_packages(objectives.__path__, "medssl.objectives."):
        import_module(module.name)
    return Objective.__subclasses__()  # direct ones only: a method never inherits from a method


every_method = pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)


def example(method: type[Objective]):
    torch.manual_seed(0)
    objective, samples = method.example()
    objective.prepare(samples)
    stream = Stream(samples, batch_size=4, one_per=objective.one_per, seed=0)
    size = {"start": 0, "stop": 4, "batch_size": 4, "workers": 0, "pin_memory": False}
    return objective, samples, next(batches(samples, objective.views, stream, **size))[1]


def encoder_of(objective):
    networks = objective.export()
    return networks["points" if "points" in networks else "image"]


@every_method
def test_one_step_moves_the_encoder(method):
    objective, _, views = example(method)
    loss = objective.train().loss(views)["loss"]
    loss.backward()
    assert loss.ndim == 0
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in objective.parameters())


@every_method
def test_every_reported_value_is_a_finite_scalar_without_gradient(method):
    objective, _, views = example(method)
    for name, value in objective.loss(views).items():
        assert value.ndim == 0, name
        assert value.isfinite(), name
        assert name == "loss" or not value.requires_grad, name


@every_method
def test_the_groups_hold_every_parameter_with_a_gradient_once(method):
    objective, _, views = example(method)
    objective.loss(views)["loss"].backward()
    grouped = [p for group in objective.parameter_groups() for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped)
    moved = {id(p) for p in objective.parameters() if p.grad is not None}
    assert moved <= {id(p) for p in grouped}


@every_method
def test_training_moves_what_is_exported_and_says_whether_it_collapsed(method, tmp_path: Path):
    objective, samples, _ = example(method)
    encoder = encoder_of(objective)
    before = [p.detach().clone() for p in encoder.parameters()]
    result = train(
        objective,
        samples,
        TrainingPlan(total_samples=12, batch_size=4),
        workdir=tmp_path,
        device="cpu",
        workers=0,
    )
    assert result["finished"]
    assert result["verdict"] is None or isinstance(result["verdict"], str)
    after = encoder_of(objective).parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_method
def test_the_exported_image_network_is_an_encoder(method):
    objective = method.example()[0]
    assert isinstance(encoder_of(objective), Encoder)
    exported = objective.export()
    assert all(isinstance(network, nn.Module) for network in exported.values())


@every_method
def test_hyperparameters_can_be_put_on_record(method):
    described = describe(method.example()[0])
    assert described["class_path"].endswith(method.__name__)


@every_method
def test_the_state_round_trips(method):
    objective, _, views = example(method)
    twin, _ = method.example()
    twin.load_state_dict(objective.state_dict())
    objective.eval(), twin.eval()
    torch.manual_seed(0)
    first = objective.loss(views)["loss"]
    torch.manual_seed(0)
    assert torch.equal(twin.loss(views)["loss"], first)
