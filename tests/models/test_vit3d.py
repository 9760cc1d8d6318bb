"""Volumes: what 2D networks say of a repeated slice, hidden patches, positions, and sizes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import describe, load_encoder, save_model, selftest_noise
from medssl.models.vit import ViTEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.objectives.masked.dinov2 import _depth_of

WIDTH = {"embedding_dim": 48, "depth": 2, "num_heads": 4, "layer_scale": 1.0}
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 1.0}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Nothing is 0, 1 or too small to matter, as it is when initialized."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def flat(tmp_path: Path) -> tuple[ViTEncoder, Path]:
    """A 2D network for pictures of 5 x 5 patches of 14 pixels, and its file."""
    name = "vit_small_patch14_dinov2"
    encoder = shaken(ViTEncoder(name, image_size=70, options=dict(TINY)))
    state = {**encoder.network.state_dict(), "mask_token": encoder.mask_token.detach()}
    save_file(state, tmp_path / "flat.safetensors")
    return encoder, tmp_path / "flat.safetensors"


def deep(file: Path, image_size=(4, 70, 70), patch_size=(4, 14, 14), **changes) -> ViT3DEncoder:
    settings = {**WIDTH, "patch_size": patch_size, "weights": file, **changes}
    return ViT3DEncoder(image_size, **settings).eval()


def thick(images: torch.Tensor, depth: int) -> torch.Tensor:
    """Pictures (B, C, H, W) as volumes that repeat them, (B, C, depth, H, W)."""
    return images[:, :, None].expand(-1, -1, depth, -1, -1)


def fresh(image_size=(12, 16, 32), **changes) -> ViT3DEncoder:
    """Of 3 x 2 x 4 patches."""
    settings = {"embedding_dim": 32, "depth": 2, "num_heads": 2, **changes}
    return ViT3DEncoder(image_size, patch_size=(4, 8, 8), **settings)


def small(**changes) -> ViT3DEncoder:
    return shaken(fresh(**changes))


@pytest.mark.parametrize("size", [(70, 70), (42, 98)])  # native, and positions in between
@torch.no_grad()
def test_a_repeated_slice_has_the_tokens_of_the_2d_network(flat, size: tuple[int, int]):
    encoder, file = flat
    images, hidden = torch.randn(2, 1, *size), torch.rand(2, size[0] * size[1] // 196) < 0.4
    volume = deep(file, image_size=(4, *size))
    for covered in (None, hidden):
        token, patches = volume.tokens(thick(images, 4), covered)
        wanted, wanted_patches = encoder.tokens(images, covered)
        torch.testing.assert_close(token, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(patches, wanted_patches, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_the_files_of_transformers_give_what_transformers_give(tmp_path: Path, registers: int):
    settings = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"image_size": 70, "patch_size": 14}
    if registers:
        config = Dinov2WithRegistersConfig(**settings, num_register_tokens=registers)
        model = shaken(Dinov2WithRegistersModel(config))
    else:
        model = shaken(Dinov2Model(Dinov2Config(**settings)))
    model.save_pretrained(tmp_path)
    volume = deep(tmp_path / "model.safetensors", registers=registers)
    grey = torch.randn(2, 1, 70, 70)
    wanted = model(pixel_values=grey.repeat(1, 3, 1, 1)).last_hidden_state
    token, patches = volume.tokens(thick(grey, 4))
    torch.testing.assert_close(token, wanted[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(patches, wanted[:, 1 + registers :], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_slab_of_a_repeated_slice_has_its_patch_embeddings_and_its_positions(flat):
    encoder, file = flat
    volume = deep(file, image_size=(12, 70, 70))
    images = torch.randn(2, 1, 70, 70)
    wanted = encoder.network.patch_embed(images).movedim(-1, 1)  # (B, E, 5, 5)
    found = volume.network.patch_embed(thick(images, 12))
    torch.testing.assert_close(found, thick(wanted, 3), atol=1e-5, rtol=1e-5)
    positions = volume.network.pos_embed.unflatten(1, (3, 25))
    assert torch.equal(positions, encoder.network.pos_embed[:, None, 1:].expand(-1, 3, -1, -1))


@torch.no_grad()
def test_patches_that_are_resized_with_the_kernel_keep_their_tokens(flat):
    encoder, file = flat
    patches = torch.randn(25, 1, 14, 14)
    larger = F.interpolate(patches, (16, 20), mode="bicubic", antialias=True)
    images, resized = (
        p.reshape(5, 5, *p.shape[2:]).transpose(1, 2).reshape(1, 1, 5 * p.shape[2], -1)
        for p in (patches, larger)
    )
    volume = deep(file, image_size=(4, 80, 100), patch_size=(4, 16, 20))
    found = volume.tokens(thick(resized, 4))
    for ours, wanted in zip(found, encoder.tokens(images), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_hidden_patch_is_the_mask_token():
    encoder = small()
    images, hidden = torch.randn(2, 1, 12, 16, 32), torch.zeros(2, 24, dtype=torch.bool)
    hidden[1, 2 * 8 + 1 * 4 + 2] = True  # of the second volume: slab 2, row 1, column 2
    patches = encoder.network.patch_embed(images)
    patches[1, :, 2, 1, 2] = encoder.mask_token[0, 0]
    wanted = encoder.network.transform(patches)
    token, tokens = encoder.tokens(images, hidden)
    assert torch.equal(token, wanted[:, 0])
    assert torch.equal(tokens, wanted[:, 1:])
    changed = images.clone()
    changed[1, :, 8:12, 8:16, 16:24] += 1
    assert torch.equal(encoder.tokens(changed, hidden)[1], tokens)
    assert not torch.allclose(encoder.tokens(changed)[1], encoder.tokens(images)[1])


@pytest.mark.parametrize("grid", [(3, 2, 4), (5, 2, 4), (2, 4, 3)])
@torch.no_grad()
def test_positions_are_interpolated_as_by_hand(grid: tuple[int, int, int]):
    network = small().network
    learnt = network.pos_embed.reshape(3, 2, 4, 32)
    found = network._positions(grid).reshape(*grid, 32)
    for place in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        torch.testing.assert_close(found[tuple(place)], by_hand(learnt, place, grid))
    if grid == (3, 2, 4):
        assert torch.equal(found, learnt)


def by_hand(learnt: torch.Tensor, place: list[int], grid: tuple[int, int, int]) -> torch.Tensor:
    """Trilinear between cell centres, the edge held, one axis after the other."""
    for index, new in zip(place, grid, strict=True):
        old = len(learnt)
        at = min(max((index + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(at), old - 2)
        learnt = torch.lerp(learnt[low], learnt[low + 1], at - low)
    return learnt


@torch.no_grad()
def test_the_order_of_slabs_matters_by_their_positions_alone():
    encoder = small()
    slabs = torch.randn(2, 1, 3, 4, 16, 32)
    turned = slabs[:, :, [2, 0, 1]].flatten(2, 3)
    volume = slabs.flatten(2, 3)
    assert not torch.allclose(encoder(turned), encoder(volume), atol=1e-3)
    encoder.network.pos_embed.copy_(encoder.network.pos_embed[:, :8].repeat(1, 3, 1))
    torch.testing.assert_close(encoder(turned), encoder(volume), atol=1e-5, rtol=1e-5)
    moved = encoder.embed_with_map(turned)[1]
    torch.testing.assert_close(moved, encoder.embed_with_map(volume)[1][:, :, [2, 0, 1]])


@pytest.mark.parametrize("size", [(12, 16, 32), (8, 32, 24)])
@torch.no_grad()
def test_the_normalized_feature_map_of_the_last_block_is_the_embedded_map(size):
    encoder = small(registers=2)
    images = torch.randn(2, 1, *size)
    token, wanted = encoder.embed_with_map(images)
    first, last, normalized = encoder.feature_maps(images, ["blocks.0", "blocks.1", "norm"])
    d, h, w = encoder.grid(size)
    assert (d, h, w) == (size[0] // 4, size[1] // 8, size[2] // 8)
    assert first.shape == last.shape == wanted.shape == (2, 32, d, h, w)
    assert torch.equal(normalized, wanted)
    assert torch.equal(encoder.network.norm(last.movedim(1, -1)).movedim(-1, 1), wanted)
    assert torch.equal(token, encoder(images))


@torch.no_grad()
def test_maps_lie_where_their_patches_do():
    encoder = small()
    images, slab, row, column = torch.zeros(1, 1, 12, 16, 32), 2, 1, 3
    images[:, :, slab * 4 : slab * 4 + 4, row * 8 : row * 8 + 8, column * 8 :] = 1
    (found,) = encoder.feature_maps(images, ["patch_embed"])
    lit = (found != found[:, :, :1, :1, :1]).any(1)[0]
    assert lit.nonzero().tolist() == [[slab, row, column]]
    encoder.network.blocks = torch.nn.Sequential()  # no patch sees another
    before, after = (encoder.embed_with_map(x)[1] for x in (torch.zeros_like(images), images))
    assert (before != after).any(1)[0].nonzero().tolist() == [[slab, row, column]]


def test_a_saved_encoder_comes_back_without_its_weight_file(flat, tmp_path: Path):
    _, file = flat
    encoder = deep(file, image_size=(8, 28, 42), patch_size=[4, 14, 14], drop_path=0.1)
    file.unlink()
    out = save_model(
        tmp_path / "encoder",
        encoder,
        kind="encoder",
        preprocessing=Preprocessing(size=(28, 42), intensity="range", channels=1),
        domain={},
        card="",
        noise=selftest_noise((2, 1, 8, 28, 42)),
    )
    loaded, images = load_encoder(out), torch.randn(1, 1, 4, 28, 28)
    assert describe(loaded) == describe(encoder)
    assert (loaded.image_size, loaded.patch_size) == ((8, 28, 42), (4, 14, 14))
    assert torch.equal(loaded(images), encoder(images))


def test_its_own_state_is_taken_as_it_is(tmp_path: Path):
    state = small(registers=2).state_dict()
    save_file(state, tmp_path / "own.safetensors")
    again = fresh(registers=2, weights=tmp_path / "own.safetensors").state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_parameters_are_as_deep_as_dinov2_looks_for():
    encoder = small(registers=1)
    depths = {name: _depth_of(name, 2) for name, _ in encoder.named_parameters()}
    assert {name.split(".")[1] for name, depth in depths.items() if depth == 3} == {"norm"}
    assert {name.split(".")[2] for name, depth in depths.items() if depth == 1} == {"0"}
    assert {name for name, depth in depths.items() if depth == 0} == {
        "mask_token",
        "network.cls_token",
        "network.reg_token",
        "network.pos_embed",
        "network.patch_embed.proj.weight",
        "network.patch_embed.proj.bias",
    }


def test_stochastic_depth_grows_to_its_largest_rate_in_training_only():
    torch.manual_seed(0)
    encoder = small(depth=3, drop_path=0.4)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in encoder.network.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4])
    images = torch.randn(4, 1, 12, 16, 32)
    assert torch.equal(encoder(images), encoder(images))
    encoder.train()
    assert not torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("size", [(10, 16, 32), (12, 20, 32), (12, 16, 33)])
def test_a_volume_that_is_not_whole_patches_is_refused(size):
    encoder = small()
    for look in (encoder, encoder.embed_with_map, lambda x: encoder.feature_maps(x, ["norm"])):
        with pytest.raises(ValueError, match=r"whole patches of \(4, 8, 8\) voxels, got \(\d\d, "):
            look(torch.zeros(1, 1, *size))
    with pytest.raises(ValueError, match="whole patches"):
        fresh(size)


def test_a_picture_is_refused():
    with pytest.raises(ValueError, match=r"a volume is \(D, H, W\), three sides .* got \(16, 32\)"):
        small()(torch.zeros(1, 1, 16, 32))
    with pytest.raises(ValueError, match=r"patch_size is \(D, H, W\), three sides"):
        ViT3DEncoder((12, 16, 32), patch_size=(8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 32}, "flat.safetensors does not fit .*of another shape .*48"),
        ({"depth": 3}, r"missing \['blocks\.2"),
        ({"depth": 1}, r"unknown \['blocks\.1"),
        ({"layer_scale": None}, r"unknown \['blocks\.0\.ls1\.gamma'"),
        ({"registers": 4}, r"missing \['reg_token'"),
    ],
)
def test_weights_of_another_network_are_refused(flat, changes, message: str):
    with pytest.raises(ValueError, match=message):
        deep(flat[1], **changes)


def test_weights_of_another_kind_are_refused(flat, tmp_path: Path):
    state = flat[0].network.state_dict()
    oblong = {**state, "pos_embed": torch.zeros(1, 1 + 4 * 5, 48)}
    bare = {name: tensor for name, tensor in state.items() if name != "cls_token"}
    for kept, message in ((oblong, "a square of patches.* got 21"), (bare, "missing .*cls_token")):
        save_file(kept, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message):
            deep(tmp_path / "other.safetensors")
    save_file(small().state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"pos_embed \(1, 24, 32\) for \(1, 12, 32\)"):
        fresh((12, 16, 16), weights=tmp_path / "own.safetensors")
