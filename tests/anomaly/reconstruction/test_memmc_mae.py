from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures
from anomaly.reconstruction.masked_autoencoder import MaskedAutoencoder
from anomaly.reconstruction.memmc_mae import MemMCMAE
from anomaly.reconstruction.passes import StructureError
from medssl.data.sample import collate
from medssl.models.folder import describe
from medssl.schedule import TrainingPlan
from pipelines.fit import fit

ROOT = Path(__file__).parents[3]
SMALL = {
    "embedding_dim": 24,
    "depth": 4,
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_depth": 2,
    "plan": TrainingPlan(total_samples=16, batch_size=4),
}


def everything_drawn(detector: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """A state of the network in which no bias is 0 and no scale is 1."""
    generator = torch.Generator().manual_seed(1)
    state = detector.trainable.network.state_dict()
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


@pytest.mark.parametrize(("size", "patch_size"), [((32, 24), (8, 8)), ((8, 16, 24), (4, 8, 8))])
def test_without_memory_and_with_one_level_it_is_a_plain_masked_autoencoder(size, patch_size):
    plain = MaskedAutoencoder(patch_size=patch_size, **SMALL)
    memory = MemMCMAE(patch_size=patch_size, num_memory=0, num_levels=1, **SMALL)
    state = everything_drawn(plain)
    plain.trainable.network.load_state_dict(state)
    missing, unexpected = memory.trainable.network.load_state_dict(state, strict=False)
    assert unexpected == []
    own = memory.trainable.network.state_dict()
    assert all(own[name].numel() == 0 for name in missing)

    images = torch.rand(3, 1, *size, generator=torch.Generator().manual_seed(0))
    count = plain.trainable.network.grid(size)
    total = int(torch.tensor(count).prod())
    hidden = torch.stack([torch.randperm(total) % 4 != 0 for _ in range(3)])
    expected = plain.trainable.network(images, hidden)
    found = memory.trainable.network(images, hidden)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("num_levels", "levels"), [(1, []), (2, [1]), (3, [0, 2]), (4, [0, 1, 2])])
def test_levels_are_spread_evenly_and_end_at_the_last_block(num_levels, levels):
    network = MemMCMAE(num_levels=num_levels, **SMALL).trainable.network
    assert network.levels == levels
    assert len(network.encoder) == 4


def test_every_parameter_is_trained():
    detector = MemMCMAE(patch_size=(8, 8), num_memory=3, num_levels=3, **SMALL)
    trainable = detector.trainable
    samples = smooth_pictures(4)
    trainable.prepare(samples)
    generator = torch.Generator().manual_seed(0)
    views = [trainable.views(sample, generator) for sample in samples]
    stacked = {name: torch.stack([view[name] for view in views]) for name in views[0]}
    trainable.loss(stacked)["loss"].backward()
    parameters = {name: p for name, p in trainable.named_parameters() if p.numel()}
    idle = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_memory_and_levels_change_what_is_rebuilt():
    detector, samples = MemMCMAE.example()
    detector.fit(NormalData(samples[:-3]))
    batch = collate(samples[-3:])
    found = detector.predict(batch).score
    block = detector.trainable.network.encoder[0]
    values = block.attn.memory_values.detach().clone()
    with torch.no_grad():
        block.attn.memory_values.zero_()
    assert not detector.predict(batch).score.equal(found)
    with torch.no_grad():
        block.attn.memory_values.copy_(values)
        detector.trainable.network.decoder.blocks[0].levels.proj.weight.zero_()
    assert not detector.predict(batch).score.equal(found)


def test_a_strange_patch_is_where_the_map_is_large():
    plan = TrainingPlan(total_samples=1200, batch_size=8, learning_rate=5e-3)
    detector = MemMCMAE(
        patch_size=(8, 8),
        num_memory=4,
        num_levels=2,
        num_partitions=2,
        error=StructureError(window=7, sigma=1.0),
        **{**SMALL, "plan": plan},
    )
    samples = smooth_pictures(24)
    detector.fit(NormalData(samples[:-4]))
    batch = collate(samples[-4:])
    before = detector.predict(batch)
    stripes = (torch.arange(16) % 4 < 2).float()
    batch.images["image"].pixels[:, :, 24:40, 16:32] += 3 * stripes
    after = detector.predict(batch)
    assert (after.score > before.score).all()
    change = (after.maps["image"] - before.maps["image"]).mean(0)
    assert change[24:40, 16:32].mean() > 3 * change.abs().mean()


def test_only_the_structural_error_is_bounded():
    assert not MemMCMAE(**SMALL).unbounded
    assert MemMCMAE(error=StructureError(weight=0.5), **SMALL).unbounded


def test_images_of_parts_of_patches_are_refused():
    detector, _ = MemMCMAE.example()
    with pytest.raises(ValueError, match=r"whole patches of \(8, 8\) .* size of preprocessing"):
        detector.fit(NormalData(smooth_pictures(4, size=(36, 40))))


@pytest.mark.parametrize("num_levels", [0, 5])
def test_more_levels_than_blocks_are_refused(num_levels):
    with pytest.raises(ValueError, match=r"num_levels must lie in 1 to depth \(4\)"):
        MemMCMAE(num_levels=num_levels, **SMALL)


@pytest.mark.parametrize(("config", "axes"), [("memmc_mae_cxr", "HW"), ("memmc_mae_ct", "DHW")])
def test_the_configs_give_a_detector_for_images_of_their_size(config, axes):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    made = parser.instantiate(parser.parse_path(ROOT / f"configs/fit/{config}.yaml"))
    assert made.detector.axes == axes
    assert describe(made.detector)["class_path"].endswith("MemMCMAE")
    made.detector.trainable.network.grid(made.preprocessing.size)
