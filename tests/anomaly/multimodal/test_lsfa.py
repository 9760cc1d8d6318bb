from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from rgbd_scenes import (
    Heights,
    MeanColor,
    color_image,
    damaged,
    noise,
    scene,
    without,
    xyz_image,
)
from torch import Tensor, nn

from anomaly.base import NormalData
from anomaly.multimodal.adaptation import Adaptation, Terms, contrast
from anomaly.multimodal.double_patchcore import DoublePatchCore
from anomaly.multimodal.lsfa import LSFA
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from anomaly.multimodal.relief import ReliefFeatures
from anomaly.selection import Selection
from medssl.data.sample import Sample, collate
from medssl.training import TrainingPlan
from pipelines.fit import fit

ROOT = Path(__file__).parents[3]
PLAN = TrainingPlan(total_samples=40, batch_size=4, learning_rate=1e-3)
STILL = replace(PLAN, total_samples=4, learning_rate=1e-12, final_learning_rate=1e-12)
TERMS = Terms(head_width=8, num_cells=16, memory_cells=256, memory_items=16)


def of(descriptor: nn.Module | None = None, **arguments: object) -> LSFA:
    settings = {"num_heads": 2, "plan": PLAN, "terms": TERMS, "sigma": 1.0}
    return LSFA(
        color=ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)),
        geometry=GeometryFeatures(grid=(8, 6), descriptor=descriptor),
        **(settings | arguments),
    )


def normal(count: int = 8, **arguments: object) -> NormalData:
    return NormalData([scene(i, **arguments) for i in range(count)], batch_size=4)


@pytest.fixture(scope="module")
def detector() -> LSFA:
    return of().fit(normal())


def test_with_adaptors_that_stay_the_identity_it_is_double_patchcore():
    """Own banks of own sizes, own scales: what the published code mixes up shows here."""
    samples, batch = normal(), collate([scene(50), damaged(scene(51), (3, 3), "image", "xyz")])
    plain = of(plan=STILL, top=0.1).fit(samples)
    double = DoublePatchCore(color=plain.color, geometry=plain.geometry, sigma=1.0, top=0.1)
    double.fit(samples)
    found, expected = plain.predict(batch), double.predict(batch)
    torch.testing.assert_close(found.score, expected.score, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(found.maps["image"], expected.maps["image"], rtol=2e-3, atol=1e-2)


def test_each_bank_has_its_share_of_its_own_cells():
    """In the published code the bank of color is a share of the reduced bank of the points."""
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:16] = False
    fitted = of(coreset_ratio=0.25, plan=STILL).fit(normal(xyz_valid=valid))
    assert len(fitted.color_bank_) == int(0.25 * 6 * 48)  # of six items; two are held out
    assert len(fitted.geometry_bank_) == int(0.25 * 6 * 24)


def test_the_banks_hold_adapted_features_of_the_training_items_alone():
    samples = normal()
    fitted = of(coreset_ratio=1.0).fit(samples)
    training, held_out = fitted.fusion.split(samples, seed=0)
    for name in ("color", "geometry"):
        bank = fitted.get_buffer(f"{name}_bank_").double()
        for part, inside in ((training, True), (held_out, False)):
            grid = getattr(fitted, name)(collate([part[0]]))
            adapted = fitted.trainable.adapted(name, grid.features, grid.valid)
            apart = torch.cdist(adapted.detach().flatten(0, 2).double(), bank).amin(1)
            assert (apart < 1e-4).all().item() == inside


def test_each_modality_is_standardized_by_its_own_held_out_maps(detector):
    """The published code takes the spread of one modality and the mean of the other."""
    _, held_out = detector.fusion.split(normal(), seed=0)
    found = detector.fusion.standardized(detector._found(next(held_out.batches())))
    for own in found.values():
        assert own.maps.mean().item() == pytest.approx(0, abs=1e-3)
        assert own.maps.std(correction=0).item() == pytest.approx(1, rel=1e-2)


def test_maps_have_more_values_than_8_bits_can_tell():
    """The published code rounds a map to 256 levels before it smooths it."""
    found = of(plan=STILL, sigma=4.0).fit(normal()).predict(collate([scene(50)]))
    assert len(found.maps["image"].unique()) > 600  # of 768 pixels


def test_a_cell_with_a_channel_that_is_0_is_in_the_bank_and_is_scored():
    """The published code drops it."""
    samples = []
    for i in range(8):
        item = scene(i)
        pixels = item.images["image"].pixels.clone()
        pixels[1] = 0.0
        samples.append(item.with_image(replace(item.images["image"], pixels=pixels)))
    fitted = of(coreset_ratio=1.0, plan=STILL).fit(NormalData(samples))
    assert len(fitted.color_bank_) == 6 * 48
    assert not fitted.predict(collate(samples[:1])).maps["image"].isnan().any()


def test_the_seed_decides_everything(detector):
    batch = collate([scene(50)])
    scores = [of(seed=seed).fit(normal()).predict(batch).score for seed in (0, 1)]
    assert detector.predict(batch).score.equal(scores[0])
    assert not scores[0].equal(scores[1])


def test_the_encoder_stays_as_it_is():
    fitted = of()
    before = fitted.color.encoder.network[0].weight.clone()
    fitted.fit(normal())
    assert fitted.color.encoder.network[0].weight.equal(before)
    trained = {id(p) for p in fitted.parameters() if p.requires_grad}
    assert trained == {id(p) for p in fitted.trainable.parameters()}


def test_the_memories_are_refreshed_with_every_batch(detector):
    cells = detector.trainable.cells["color"]
    assert cells.pushed.item() == (6 + 40) * 16  # six items before the first step, ten batches of 4


def two_sided(seed: int) -> Sample:
    """Blocks of 3 x 3 cells of three heights, each in a color of its own."""
    kind = (3 * torch.rand(3, 2, generator=torch.Generator().manual_seed(seed))).long()
    kind = kind.repeat_interleave(12, 0).repeat_interleave(12, 1)[:32]
    color = nn.functional.one_hot(kind, 3).movedim(-1, 0).float()
    z = 100 + 2.0 * kind
    images = {"image": color_image(color + 0.1 * noise(3, 32, 24, seed=seed)), "xyz": xyz_image(z)}
    return Sample(item=f"two{seed}", images=images, label=0)


class Levels(nn.Module):
    """Describes a point by which of three heights it has."""

    embedding_dim = 3

    def __init__(self) -> None:
        super().__init__()

    def describe(self, points: Tensor, normals: Tensor) -> Tensor:
        return nn.functional.one_hot(((points[:, 2] - 100) / 2).round().long(), 3).float()


def aligned(fitted: LSFA) -> float:
    """InfoNCE of the cells of an item that was not seen."""
    batch, sides = collate([two_sided(77)]), []
    for name in ("color", "geometry"):
        grid = getattr(fitted, name)(batch)
        adapted = fitted.trainable.adapted(name, grid.features, grid.valid)
        sides.append(fitted.trainable.heads[name](adapted[grid.valid]))
    return contrast(sides[0], sides[1], 0.1).item()


def test_training_aligns_cells_of_items_that_were_not_seen():
    samples = NormalData([two_sided(i) for i in range(8)], batch_size=4)
    terms = replace(TERMS, temperature=0.1)
    still = of(Levels(), plan=STILL, terms=terms).fit(samples)
    plan = replace(PLAN, total_samples=160, learning_rate=3e-3)
    fitted = of(Levels(), plan=plan, terms=terms).fit(samples)
    assert aligned(fitted) < aligned(still) - 0.5


def test_training_brings_the_cells_of_normal_items_together():
    """In units of the adapted features' own spread: to shrink them all is nothing."""
    spreads = []
    for plan in (STILL, replace(PLAN, total_samples=160, learning_rate=3e-3)):
        fitted = of(coreset_ratio=1.0, plan=plan).fit(normal())
        grid = fitted.color(collate([scene(50), scene(51)]))
        adapted = fitted.trainable.adapted("color", grid.features, grid.valid)[grid.valid].detach()
        apart = torch.cdist(adapted, fitted.color_bank_).amin(1).mean()
        spreads.append((apart / fitted.color_bank_.std(0).norm()).item())
    assert spreads[1] < 0.9 * spreads[0]


def test_normal_items_without_a_modality_are_allowed_among_others():
    samples = [scene(i) for i in range(8)]
    samples[1], samples[2] = without(samples[1], "geometry"), without(samples[2], "color")
    found = of(plan=STILL).fit(NormalData(samples, batch_size=1)).predict(collate([scene(50)]))
    assert found.score.isfinite().all()


def test_a_training_item_is_described_once_however_long_the_training():
    descriptor = Heights()
    fitted = of(descriptor, plan=replace(PLAN, total_samples=80)).fit(normal())
    assert len(descriptor.shown) == 6 + 2  # and each held-out item once
    assert fitted._described == []


def test_checkpoints_can_be_chosen_without_labels():
    fitted = of(plan=replace(PLAN, total_samples=8), selection=Selection(checkpoints=2)).fit(
        normal()
    )
    assert fitted.notes["num_select"] >= 1
    assert fitted.predict(collate([scene(50)])).score.isfinite().all()


def test_a_killed_training_goes_on_with_the_memories_that_it_had(tmp_path, monkeypatch):
    plan = replace(PLAN, total_samples=28, checkpoint_every_samples=4)
    whole = of(plan=plan).fit(normal())
    after_step = Adaptation.after_step

    def killed(self: Adaptation, clock: object) -> None:
        if clock.step == 5:
            raise KeyboardInterrupt
        after_step(self, clock)

    with monkeypatch.context() as patch:
        patch.setattr(Adaptation, "after_step", killed)
        with pytest.raises(KeyboardInterrupt):
            of(plan=plan).fit(normal(), workdir=tmp_path)
    again = of(plan=plan).fit(normal(), workdir=tmp_path)
    state = whole.state_dict()
    assert all(value.equal(state[name]) for name, value in again.state_dict().items())


def test_items_of_one_part_are_refused():
    with pytest.raises(ValueError, match="at least two parts or groups are needed"):
        of().fit(normal(group="part"))


def test_the_config_gives_a_detector_of_color_and_geometry():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    made = parser.instantiate(parser.parse_path(ROOT / "configs/fit/lsfa_rgbd.yaml"))
    assert type(made.detector) is LSFA
    assert made.detector.color.grid == made.detector.geometry.grid == [64, 64]
    assert type(made.detector.geometry) is ReliefFeatures
    assert made.detector.terms == Terms(local_alignment=10.0, global_alignment=1.0, temperature=0.2)
    assert made.detector.plan == of(plan=None).plan
    assert made.preprocessing.geometry is not None
