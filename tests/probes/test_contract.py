"""The contract of every probe; a new file is tested without being listed."""

from importlib import import_module
from pkgutil import walk_packages

import pytest
import torch

from medssl import probes
from medssl.models.folder import build, describe
from medssl.probes.base import Probe


def kinds() -> list[type[Probe]]:
    for module in walk_packages(probes.__path__, "medssl.probes."):
        import_module(module.name)
    return Probe.__subclasses__()


every_probe = pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)


@every_probe
def test_a_probe_without_data_says_what_to_do(kind):
    probe, features, _ = kind.example()
    with pytest.raises(RuntimeError, match="call fit"):
        probe.scores(features)


@every_probe
def test_fit_returns_the_probe_which_then_names_its_own_training_data(kind):
    probe, features, labels = kind.example()
    assert probe.fit(features, labels) is probe
    scores = probe.scores(features)
    assert scores.shape == (len(labels), int(labels.max()) + 1)
    assert (scores.argmax(1) == labels).float().mean() > 0.9


@every_probe
def test_fitting_again_forgets_the_first_fit(kind):
    probe, features, labels = kind.example()
    first = probe.fit(features, labels).scores(features)
    probe.fit(features.flip(1), 1 - labels)
    assert torch.equal(probe.fit(features, labels).scores(features), first)


@every_probe
def test_a_probe_can_be_built_from_its_description(kind):
    probe, _, _ = kind.example()
    again = build(describe(probe))
    assert type(again) is kind
    assert describe(again) == describe(probe)
