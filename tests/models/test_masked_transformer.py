import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.models.masked_transformer import (
    MaskedTransformer,
    PlainDecoder,
    grid_of,
    patchify,
    shown_patches,
    sincos_positions,
    unpatchify,
)


class Plus(nn.Module):
    """A block that adds a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, tokens):
        return tokens + self.number


class Heard(nn.Module):
    """A decoder that hands on its tokens and keeps what else it was told."""

    def forward(self, tokens, levels):
        self.levels = levels
        return tokens


def see_through(width: int, decoder: nn.Module, **options) -> MaskedTransformer:
    """A network of 2 x 2 patches whose every projection and norm changes nothing."""
    network = MaskedTransformer(
        in_channels=width // 4,
        patch_size=(2, 2),
        embedding_dim=width,
        decoder_dim=width,
        decoder=decoder,
        **options,
    )
    for layer in (network.embed, network.decoder_embed, network.head):
        nn.init.eye_(layer.weight)
    network.norm, network.decoder_norm = nn.Identity(), nn.Identity()
    return network


def small(**options) -> MaskedTransformer:
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    return MaskedTransformer(
        in_channels=1,
        embedding_dim=24,
        decoder_dim=12,
        encoder=[Block(24, 2, qkv_bias=True), Block(24, 2, qkv_bias=True)],
        decoder=PlainDecoder([Block(12, 2)]),
        **options,
    )


def test_patches_of_pictures_are_those_of_unfold():
    images = torch.rand(2, 3, 8, 12)
    expected = F.unfold(images, (4, 6), stride=(4, 6)).mT
    assert patchify(images, (4, 6)).equal(expected)


def test_patches_of_volumes_come_slab_by_slab_and_row_by_row():
    images = torch.rand(2, 2, 4, 6, 9)
    patches = patchify(images, (2, 3, 3))
    assert patches.shape == (2, 2 * 2 * 3, 2 * 18)
    for i, (d, h, w) in enumerate((d, h, w) for d in range(2) for h in range(2) for w in range(3)):
        place = (slice(2 * d, 2 * d + 2), slice(3 * h, 3 * h + 3), slice(3 * w, 3 * w + 3))
        assert patches[:, i].equal(images[(slice(None), slice(None), *place)].flatten(1))


@pytest.mark.parametrize(("size", "patch_size"), [((8, 12), (4, 3)), ((4, 6, 10), (2, 3, 5))])
def test_patches_are_put_back_where_they_were(size, patch_size):
    images = torch.rand(2, 3, *size)
    patches = patchify(images, patch_size)
    assert unpatchify(patches, patch_size, grid_of(size, patch_size)).equal(images)


def test_positions_are_sines_and_cosines_of_each_axis():
    found = sincos_positions((3, 5), 8, torch.empty(0))
    assert found.shape == (15, 8)
    row, column = 2, 4  # the rates of two waves are 1 and 1 / 100
    expected = [
        f(cell * rate) for cell in (row, column) for f in (math.sin, math.cos) for rate in (1, 0.01)
    ]
    torch.testing.assert_close(found[5 * row + column], torch.tensor(expected))


def test_positions_of_volumes_differ_and_do_not_depend_on_the_size_of_the_grid():
    small, large = (sincos_positions(grid, 20, torch.empty(0)) for grid in ((2, 3, 4), (5, 6, 7)))
    assert torch.cdist(large, large).fill_diagonal_(1).min() > 1e-3
    assert large.reshape(5, 6, 7, 20)[:2, :3, :4].equal(small.reshape(2, 3, 4, 20))
    assert not small[:, 18:].any()  # 3 waves of each axis fill 18 channels
    with pytest.raises(ValueError, match="3 axes need 6 channels, got 4"):
        sincos_positions((2, 2, 2), 4, torch.empty(0))


def test_shown_patches_are_in_order():
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    assert shown_patches(hidden).tolist() == [[1, 3], [0, 1]]


def test_rows_must_show_equally_many_patches():
    with pytest.raises(ValueError, match=r"equally many patches, at least one, got \[1, 2\]"):
        shown_patches(torch.tensor([[True, False, False], [True, False, True]]))
    with pytest.raises(ValueError, match=r"at least one, got \[0\]"):
        shown_patches(torch.ones(2, 3, dtype=torch.bool))


def test_shown_patches_come_back_to_their_places_and_the_mask_token_fills_the_others():
    network = see_through(8, Heard(), encoder=[Plus(10.0)])
    images = torch.rand(1, 2, 4, 6)
    hidden = torch.tensor([[True, False, True, True, True, False]])
    position = sincos_positions((2, 3), 8, images)
    expected = network.mask_token.detach() + position
    for shown in (1, 5):
        expected[shown] = (
            patchify(images, (2, 2))[0, shown] + position[shown] + 10 + position[shown]
        )
    torch.testing.assert_close(network(images, hidden)[0], expected)


def test_the_levels_are_the_outputs_of_the_blocks_that_are_named():
    decoder = Heard()
    network = see_through(8, decoder, encoder=[Plus(1.0), Plus(2.0), Plus(4.0)], levels=[0, 1])
    images = torch.rand(1, 2, 4, 4)
    network(images, torch.tensor([[True, True, True, False]]))
    token = (patchify(images, (2, 2)) + sincos_positions((2, 2), 8, images))[:, 3:]
    assert len(decoder.levels) == 2
    torch.testing.assert_close(decoder.levels[0], token + 1)
    torch.testing.assert_close(decoder.levels[1], token + 3)


@pytest.mark.parametrize(("size", "patch_size"), [((8, 12), (2, 3)), ((4, 8, 8), (2, 4, 4))])
def test_nothing_of_a_hidden_patch_is_seen(size, patch_size):
    network = small(patch_size=patch_size)
    images = torch.rand(1, 1, *size)
    count = patchify(images, patch_size).shape[1]
    hidden = (torch.arange(count) % 4 != 1)[None]
    found = network(images, hidden)
    for patch in range(count):
        changed = patchify(images, patch_size).clone()
        changed[:, patch] += 1
        changed = unpatchify(changed, patch_size, grid_of(size, patch_size))
        assert network(changed, hidden).equal(found) == bool(hidden[0, patch])


def test_the_size_may_vary():
    network = small(patch_size=(2, 2))
    for size in ((4, 6), (8, 4)):
        count = size[0] * size[1] // 4
        hidden = (torch.arange(count) > 1).expand(2, -1)
        assert network(torch.rand(2, 1, *size), hidden).shape == (2, count, 4)


def test_images_that_do_not_fit_are_refused():
    network = small(patch_size=(2, 2))
    hidden = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match=r"whole patches of \(2, 2\) pixels, got \(2, 5\); change"):
        network(torch.rand(1, 1, 2, 5), hidden)
    with pytest.raises(ValueError, match=r"whole patches of \(2, 2\) pixels, got \(2, 2, 4\)"):
        network(torch.rand(1, 1, 2, 2, 4), hidden)
    with pytest.raises(ValueError, match="expected 1 channels, got 3"):
        network(torch.rand(1, 3, 2, 4), hidden)
