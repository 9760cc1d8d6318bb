"""ConVIRT: its loss, who is whose negative, and that both networks learn."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from medssl.data.sentences import sentences
from medssl.data.synthetic.shapes import shape_samples
from medssl.models.text import TextEncoder
from medssl.models.timm_encoder import TimmEncoder
from medssl.objectives.image_text.convirt import ConVIRT
from medssl.training import TrainingPlan, train


def prepared(**changes) -> ConVIRT:
    torch.manual_seed(0)
    text = TextEncoder(vocabulary_size=300, width=16, depth=1, heads=2, length=16, dropout=0.0)
    encoder = TimmEncoder("test_convnext", in_channels=1)
    objective = ConVIRT(encoder, text=text, dim=8, size=32, **changes)
    objective.prepare(shape_samples(8, seed=1))
    return objective


def batch(objective: ConVIRT, **changes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [objective.views(sample, generator) for sample in shape_samples(6, seed=2)]
    views = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**views, "wording": torch.arange(6), "group": torch.arange(6), **changes}


def naive(objective: ConVIRT, views, same=lambda i, j: False) -> float:
    """Eq. 2 to 4 of the paper, one term after the other."""
    with torch.no_grad():
        v = objective.space.image_projection(objective.encoder(views["image"]))
        u = objective.space.text_projection(objective.text(views["tokens"]))
    cosine = [[F.cosine_similarity(a, b, dim=0).item() for b in u] for a in v]
    e = [[math.exp(entry / objective.temperature) for entry in row] for row in cosine]
    total, size = 0.0, len(v)
    for i in range(size):
        others = [k for k in range(size) if k == i or not same(i, k)]
        found = -math.log(e[i][i] / sum(e[i][k] for k in others))
        asked = -math.log(e[i][i] / sum(e[k][i] for k in others))
        total += (objective.weight * found + (1 - objective.weight) * asked) / size
    return total


@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 0.75), (0.5, 0.2)])
def test_the_loss_is_the_papers(temperature: float, weight: float):
    objective = prepared(temperature=temperature, weight=weight)
    views = batch(objective)
    assert objective.loss(views)["loss"].item() == pytest.approx(naive(objective, views), rel=1e-4)


def test_neither_one_patient_nor_one_wording_is_a_negative():
    objective = prepared()
    patients = batch(objective, group=torch.tensor([0, 0, 1, 2, 3, 3]))
    one_patient = {(0, 1), (1, 0), (4, 5), (5, 4)}
    wanted = naive(objective, patients, lambda i, j: (i, j) in one_patient)
    assert objective.loss(patients)["loss"].item() == pytest.approx(wanted, rel=1e-4)
    words = batch(objective, wording=torch.tensor([7, 1, 7, 2, 3, 4]))
    wanted = naive(objective, words, lambda i, j: {i, j} == {0, 2})
    assert objective.loss(words)["loss"].item() == pytest.approx(wanted, rel=1e-4)
    objective.spare_same_wording = False
    assert objective.loss(words)["loss"].item() == pytest.approx(naive(objective, words), rel=1e-4)


def test_both_networks_get_a_gradient():
    objective = prepared()
    objective.loss(batch(objective))["loss"].backward()
    for network in (objective.encoder, objective.text, objective.space.text_projection):
        assert any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_every_sentence_of_a_report_is_drawn_and_equal_wordings_have_one_number():
    objective = prepared()
    sample = shape_samples(1, seed=3)[0]
    two = replace(sample, report="A ring. It is dark.")
    seen = [objective.views(two, torch.Generator().manual_seed(seed)) for seed in range(20)]
    tokens = {tuple(view["tokens"].tolist()) for view in seen}
    assert len(tokens) == 2
    assert len({int(view["wording"]) for view in seen}) == 2


def test_an_image_without_a_report_is_named_or_counted():
    objective = prepared()
    silent = replace(shape_samples(1, seed=3)[0], report=" \n1. ")
    with pytest.raises(ValueError, match="item shape0 has no report; select only images"):
        objective.views(silent, torch.Generator())
    with pytest.raises(ValueError, match="1 of 3 images have no report; give a table reports.csv"):
        objective.prepare([*shape_samples(2, seed=1), silent])


def test_it_learns_which_sentence_belongs_to_which_picture(tmp_path: Path):
    """Twelve pictures by heart: if a tower did not learn, guessing would be all."""
    objective = prepared(scale=(1.0, 1.0))
    samples = [
        replace(sample, report=sentences(sample.report or "")[0])
        for sample in shape_samples(12, seed=4)
    ]
    plan = TrainingPlan(total_samples=12 * 120, batch_size=12, learning_rate=3e-3)
    result = train(objective, samples, plan, workdir=tmp_path, device="cpu", workers=0)
    assert result["statistics"]["loss"] < 0.7 * math.log(12)
    assert result["verdict"] is None


def test_the_watch_tells_a_constant_place_from_guessing():
    objective = prepared()
    healthy = {"feature_spread": 0.6, "loss": 1.0, "guessing": 3.0}
    assert objective.collapsed(healthy) is None
    assert objective.collapsed({}) is None
    said = objective.collapsed({**healthy, "feature_spread": 0.001})
    assert said is not None
    assert said.startswith("collapsed")
    said = objective.collapsed({**healthy, "loss": 2.99})
    assert said is not None
    assert said.startswith("not learning yet")


def test_arguments_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="temperature is above 0 and weight within"):
        prepared(temperature=0.0)
    with pytest.raises(ValueError, match="temperature is above 0 and weight within"):
        prepared(weight=1.5)
