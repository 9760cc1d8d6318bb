"""Vision transformers: hidden patches, sizes, and weights as others name them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from medssl.models.folder import build, describe
from medssl.models.vit import ViTEncoder, as_timm, with_channels

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 1.0}


def reference(**changes) -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=70,
        patch_size=14,
        mlp_ratio=4,
        **changes,
    )
    model = Dinov2Model(config).eval()
    for name, parameter in model.named_parameters():  # nothing is 0 or 1 as initialized
        if "lambda1" in name or "norm" in name or "mask" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    return model


def ours(file: Path, **changes) -> ViTEncoder:
    settings = {"in_channels": 3, "image_size": 70, "weights": file, "options": dict(TINY)}
    return ViTEncoder("vit_small_patch14_dinov2", **{**settings, **changes}).eval()


@pytest.mark.parametrize("size", [(70, 70), (42, 42), (98, 56)])
@torch.no_grad()
def test_features_are_those_of_transformers_at_any_size(tmp_path: Path, size: tuple[int, int]):
    model = reference()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(2, 3, *size)
    token, patches = ours(tmp_path / "model.safetensors").tokens(images)
    wanted = model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(token, wanted[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches, wanted[:, 1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_file_that_transformers_saves_and_hidden_patches_agree(tmp_path: Path):
    model = reference()
    model.save_pretrained(tmp_path)
    encoder = ours(tmp_path / "model.safetensors")
    images, hidden = torch.randn(2, 3, 70, 70), torch.rand(2, 25) < 0.4
    wanted = model(pixel_values=images, bool_masked_pos=hidden).last_hidden_state
    token, patches = encoder.tokens(images, hidden)
    torch.testing.assert_close(token, wanted[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches, wanted[:, 1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(patches, encoder.tokens(images)[1], atol=1e-2)


def test_published_names_and_those_of_version_5_mean_the_same():
    state = reference().state_dict()
    published = {
        name.replace("attention.q_proj", "attention.attention.query")
        .replace("attention.k_proj", "attention.attention.key")
        .replace("attention.v_proj", "attention.attention.value")
        .replace("attention.o_proj", "attention.output.dense"): tensor
        for name, tensor in state.items()
    }
    first, second = as_timm(state), as_timm(published)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    del published["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"only \['query', 'value'\] of blocks\.1\.attn\.qkv"):
        as_timm(published)


@torch.no_grad()
def test_timms_own_state_comes_back_and_so_do_registers(tmp_path: Path):
    import timm

    torch.manual_seed(0)
    settings = {"num_classes": 0, "img_size": 70, "dynamic_img_size": True, **TINY}
    network = timm.create_model("vit_small_patch14_reg4_dinov2", **settings).eval()
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    encoder = ViTEncoder(
        "vit_small_patch14_reg4_dinov2",
        in_channels=3,
        image_size=70,
        weights=tmp_path / "timm.pth",
        options=dict(TINY),
    ).eval()
    images = torch.randn(2, 3, 70, 70)
    features = network.forward_features(images)
    torch.testing.assert_close(encoder(images), features[:, 0])
    _, grid = encoder.embed_with_map(images)
    torch.testing.assert_close(grid.flatten(2).mT, features[:, 5:])


@torch.no_grad()
def test_weights_of_color_give_a_repeated_grey_what_the_colors_gave(tmp_path: Path):
    save_file(reference().state_dict(), tmp_path / "model.safetensors")
    grey = torch.randn(2, 1, 70, 70)
    wanted = ours(tmp_path / "model.safetensors")(grey.repeat(1, 3, 1, 1))
    for channels in (1, 4):
        encoder = ours(tmp_path / "model.safetensors", in_channels=channels)
        torch.testing.assert_close(
            encoder(grey.repeat(1, channels, 1, 1)), wanted, atol=1e-4, rtol=1e-4
        )
    weight = torch.randn(5, 3, 2, 2)
    assert with_channels(weight, 3) is weight


def test_hidden_patches_are_not_seen_and_shown_ones_are():
    encoder, _ = ViTEncoder.example()
    encoder.eval()
    images = torch.randn(1, 1, 64, 64)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, 5] = True  # the second row, the second column
    changed = images.clone()
    changed[:, :, 16:32, 16:32] += 1
    assert torch.equal(encoder.tokens(images, hidden)[0], encoder.tokens(changed, hidden)[0])
    assert not torch.allclose(encoder.tokens(images)[0], encoder.tokens(changed)[0])


def test_a_size_that_is_not_whole_patches_is_refused():
    encoder, _ = ViTEncoder.example()
    with pytest.raises(ValueError, match=r"multiples of 16 pixels, got \(64, 70\)"):
        encoder(torch.zeros(1, 1, 64, 70))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "no_such"])
def test_what_is_no_plain_transformer_is_refused(name: str):
    with pytest.raises((ValueError, TypeError)):
        ViTEncoder(name)


def test_it_can_be_built_from_its_description_without_the_weight_file(tmp_path: Path):
    save_file(reference().state_dict(), tmp_path / "model.safetensors")
    described = describe(ours(tmp_path / "model.safetensors"))
    assert "weights" not in described["init_args"]
    assert isinstance(build(described), ViTEncoder)


def test_feature_maps_of_blocks_leave_class_and_register_tokens_out():
    encoder, images = ViTEncoder.example()
    (found,) = encoder.feature_maps(images, ["blocks.1"])
    assert found.shape == (2, 64, 4, 4)
