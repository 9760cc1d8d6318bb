from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures
from anomaly.reconstruction.masked_autoencoder import MaskedAutoencoder
from anomaly.reconstruction.passes import StructureError
from medssl.data.sample import collate
from medssl.models.masked_transformer import patchify, sincos_positions
from medssl.schedule import TrainingPlan
from pipelines.fit import fit

ROOT = Path(__file__).parents[3]


def test_it_is_the_masked_autoencoder_of_the_transformers_of_torch():
    """Its blocks against torch's encoder layers, its tokens put together by hand."""
    detector = MaskedAutoencoder(
        patch_size=(4, 4), embedding_dim=16, depth=2, num_heads=2, decoder_dim=8, decoder_depth=1
    )
    network = detector.trainable.network
    images = torch.rand(1, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    hidden = torch.tensor([[True, False, True, True, True, False]])

    tokens = network.embed(patchify(images, (4, 4)))[0] + sincos_positions((2, 3), 16, images)
    shown = tokens[[1, 5]][None]
    for block in network.encoder:
        shown = torch_layer(block, 16)(shown)
    latents = network.decoder_embed(network.norm(shown))[0]
    every = network.mask_token.repeat(6, 1)
    every[1], every[5] = latents[0], latents[1]
    every = (every + sincos_positions((2, 3), 8, images))[None]
    for block in network.decoder.blocks:
        every = torch_layer(block, 8)(every)
    expected = network.head(network.decoder_norm(every))
    torch.testing.assert_close(network(images, hidden), expected, atol=1e-5, rtol=1e-5)


def torch_layer(block: nn.Module, width: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, 2, 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    state = {
        f"{ours}.{kind}": getattr(block.get_submodule(theirs), kind)
        for theirs, ours in {
            "attn.proj": "self_attn.out_proj",
            "norm1": "norm1",
            "norm2": "norm2",
            "mlp.fc1": "linear1",
            "mlp.fc2": "linear2",
        }.items()
        for kind in ("weight", "bias")
    }
    state |= {
        "self_attn.in_proj_weight": block.attn.qkv.weight,
        "self_attn.in_proj_bias": block.attn.qkv.bias,
    }
    layer.load_state_dict(state)
    return layer


def test_it_learns_to_rebuild_normal_pictures():
    plan = TrainingPlan(total_samples=1500, batch_size=8, learning_rate=5e-3)
    detector = MaskedAutoencoder(
        patch_size=(8, 8),
        embedding_dim=32,
        depth=2,
        num_heads=2,
        decoder_dim=16,
        decoder_depth=1,
        plan=plan,
    )
    samples = [vertical(sample, i) for i, sample in enumerate(smooth_pictures(20))]
    detector.fit(NormalData(samples[:-4]))
    images = collate(samples[-4:]).images["image"]
    scaled = detector.trainable.scaled(images.pixels, images.valid)
    with torch.no_grad():
        rebuilt = detector.trainable.rebuilt(scaled, num_partitions=1, seed=0)
    assert (rebuilt - scaled).square().mean() < 0.2 * scaled.var()


def vertical(sample, i):
    """A picture whose brightness of each half, drawn for the picture, is seen in any patch."""
    pixels = sample.images["image"].pixels
    level = 0.2 + 0.6 * np.random.default_rng(i).random()
    pixels[:] = level
    pixels[:, 32:] += 0.5
    return sample


def test_the_absolute_error_grows_without_a_limit():
    detector, samples = MaskedAutoencoder.example()
    detector.error = StructureError(weight=0.0, sigma=0.0)
    detector.fit(NormalData(samples[:-3]))
    batch = collate(samples[-3:])
    batch.images["image"].pixels[:, :, 8:16, 8:16] = 1000.0
    found = detector.predict(batch).maps["image"][:, 8:16, 8:16]
    # those pixels were hidden, so that only they differ, by about 1000 in units of the range
    expected = 1000 / detector.trainable.data_range_
    np.testing.assert_allclose(found.numpy(), float(expected), rtol=0.05)


def test_the_config_gives_a_detector_for_pictures_of_its_size():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    config = ROOT / "configs/fit/masked_autoencoder_cxr.yaml"
    made = parser.instantiate(parser.parse_path(config))
    assert isinstance(made.detector, MaskedAutoencoder)
    made.detector.trainable.network.grid(made.preprocessing.size)


def test_predicting_needs_whole_patches():
    detector, samples = MaskedAutoencoder.example()
    detector.fit(NormalData(samples))
    with pytest.raises(ValueError, match=r"whole patches of \(8, 8\) pixels, got \(60, 48\)"):
        detector.predict(collate(smooth_pictures(2, size=(60, 48))))
