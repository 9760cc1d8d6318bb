"""Low-rank updates of transformers, against the weights they stand for."""

import copy

import pytest
import torch
from torch import nn

from medssl.data.preprocess import Preprocessing
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder, save_model, selftest_noise
from medssl.models.lora import LoRALinear, add_lora, merge_lora
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit import ViTEncoder
from medssl.models.vit3d import ViT3DEncoder


def beit() -> tuple[Encoder, torch.Tensor]:
    """Its attention takes the weight of qkv and never calls the layer."""
    options = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = TimmEncoder("beit_base_patch16_224", in_channels=1, options=options)
    return encoder, torch.randn(2, 1, 32, 32)


KINDS = {"2D": ViTEncoder.example, "3D": ViT3DEncoder.example, "BEiT": beit}


def adapted(kind: str) -> tuple[Encoder, torch.Tensor, torch.Tensor, list[nn.Parameter]]:
    """An encoder with untrained updates, images, and how it answered without them."""
    torch.manual_seed(0)
    encoder, images = KINDS[kind]()
    encoder.eval()
    before = encoder(images).detach()
    return encoder, images, before, add_lora(encoder, rank=4)


def trained(learnt: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in learnt:
            parameter.normal_(std=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_update_changes_nothing(kind):
    encoder, images, before, _ = adapted(kind)
    assert torch.equal(encoder(images), before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_updates_are_left_to_train_and_the_gradient_reaches_them(kind):
    encoder, images, _, learnt = adapted(kind)
    assert {p for p in encoder.parameters() if p.requires_grad} == set(learnt)
    assert len(learnt) == 2 * 2 * len(encoder.network.blocks)  # A and B of qkv and proj
    trained(learnt)
    encoder(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in learnt)


def test_the_update_is_alpha_over_r_times_b_a():
    torch.manual_seed(0)
    linear = nn.Linear(6, 3)
    layer = LoRALinear(copy.deepcopy(linear), rank=2, alpha=5)
    trained([layer.down, layer.up])
    images = torch.randn(4, 6)
    expected = linear.weight + 5 / 2 * torch.einsum("or,ri->oi", layer.up, layer.down)
    torch.testing.assert_close(layer(images), images @ expected.T + linear.bias)
    torch.testing.assert_close(layer.weight, expected)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"down", "up"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_network_is_a_plain_one_that_answers_the_same(kind, tmp_path):
    encoder, images, before, learnt = adapted(kind)
    plain = {name: tensor.shape for name, tensor in KINDS[kind]()[0].state_dict().items()}
    trained(learnt)
    answer = encoder(images).detach()
    assert (answer - before).abs().max() > 0.01
    merge_lora(encoder)
    assert {name: tensor.shape for name, tensor in encoder.state_dict().items()} == plain
    torch.testing.assert_close(encoder(images), answer, atol=1e-5, rtol=1e-5)
    prepared = Preprocessing(size=(64, 64), intensity="range")
    about = {"preprocessing": prepared, "domain": {}, "card": ""}
    noise = selftest_noise(images.shape)
    folder = save_model(tmp_path / "encoder", encoder, kind="encoder", noise=noise, **about)
    torch.testing.assert_close(load_encoder(folder)(images), answer, atol=1e-5, rtol=1e-5)


def test_a_convolutional_network_is_refused_and_stays_as_it_was():
    encoder, _ = TimmEncoder.example()
    with pytest.raises(ValueError, match=r"attn.qkv or attn.proj, and TimmEncoder has none"):
        add_lora(encoder)
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRALinear(nn.Linear(3, 3), rank=0, alpha=1)
