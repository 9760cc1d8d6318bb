"""Networks that give an image back, against scipy and by what they may not depend on."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import correlate2d
from torch import nn

from medssl.models.conv_autoencoder import AutoencoderShape, ConvDecoder, ConvEncoder, UNet

SIZES = {2: (21, 14), 3: (9, 14, 6)}


def images(dims: int, count: int = 2, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, *SIZES[dims], generator=generator)


def shaken(module: nn.Module) -> nn.Module:
    """No norm or bias is 0 or 1, as they are when initialized."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def activated(levels: list[np.ndarray], norm: nn.GroupNorm) -> list[np.ndarray]:
    """Normalized over all channels and pixels, scaled, and through the leaky rectifier."""
    every = np.stack(levels)
    every = (every - every.mean()) / np.sqrt(every.var() + 1e-5)
    weight, bias = (value.detach().double().numpy()[:, None, None] for value in norm.parameters())
    every = every * weight + bias
    return list(np.where(every > 0, every, 0.2 * every))


def correlated(maps: list[np.ndarray], convolution: nn.Module) -> list[np.ndarray]:
    """Each output channel of a convolution of stride 1 with padding 1."""
    kernels = convolution.weight.detach().double().numpy()
    bias = np.zeros(len(kernels))
    if convolution.bias is not None:
        bias = convolution.bias.detach().double().numpy()
    return [
        sum(correlate2d(np.pad(m, 1), k, mode="valid") for m, k in zip(maps, kernel, strict=True))
        + b
        for kernel, b in zip(kernels, bias, strict=True)
    ]


def test_one_level_down_is_what_scipy_makes_of_it():
    encoder = shaken(ConvEncoder(AutoencoderShape(channels=(3,), latent_dim=2)))
    picture = images(2, 1)[:, :, :20]
    convolution, norm, _ = encoder.levels[0]
    padded = [one[::2, ::2] for one in correlated([picture[0, 0].double().numpy()], convolution)]
    level = np.stack(activated(padded, norm))
    weight = encoder.to_latent.weight.detach().double().numpy()[:, :, 0, 0]
    bias = encoder.to_latent.bias.detach().double().numpy()[:, None, None]
    expected = np.einsum("ec,chw->ehw", weight, level) + bias
    np.testing.assert_allclose(encoder(picture)[0].detach(), expected, rtol=1e-4, atol=1e-5)


def test_one_level_up_is_what_scipy_makes_of_it():
    decoder = shaken(ConvDecoder(AutoencoderShape(channels=(3,), latent_dim=2)))
    latent = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(2))
    weight = decoder.from_latent.weight.detach().double().numpy()[:, :, 0, 0]
    bias = decoder.from_latent.bias.detach().double().numpy()[:, None, None]
    level = np.einsum("ec,chw->ehw", weight, latent[0].double().numpy()) + bias
    _, convolution, norm, _ = decoder.levels[0]
    repeated = [np.kron(one, np.ones((2, 2))) for one in level]
    (expected,) = correlated(activated(correlated(repeated, convolution), norm), decoder.out)
    found = decoder(latent, (10, 8))[0, 0].detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_level_halves_every_axis_rounding_up(dims):
    encoder = ConvEncoder(AutoencoderShape(channels=(4, 8), latent_dim=5, dims=dims))
    grid = tuple(-(-side // 4) for side in SIZES[dims])
    assert encoder(images(dims)).shape == (2, 5, *grid)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_size_makes_one_vector_of_the_whole_image(dims):
    shape = AutoencoderShape(channels=(4, 8), latent_dim=5, size=SIZES[dims], dims=dims)
    latent = ConvEncoder(shape, outputs=7)(images(dims))
    assert latent.shape == (2, 7)
    assert ConvDecoder(shape)(latent[:, :5], SIZES[dims]).shape == images(dims).shape


@pytest.mark.parametrize("dims", [2, 3])
def test_any_size_is_seen_as_if_zeros_followed_it(dims):
    shape = AutoencoderShape(channels=(4, 8), latent_dim=5, dims=dims)
    encoder, decoder, unet = ConvEncoder(shape), ConvDecoder(shape), UNet(1, channels=(4, 8, 8))
    if dims == 3:
        unet = UNet(1, channels=(4, 8, 8), dims=3)
    odd = images(dims)
    missing = [amount for side in reversed(SIZES[dims]) for amount in (0, -side % 4)]
    whole = F.pad(odd, missing)
    inside = (..., *(slice(side) for side in SIZES[dims]))
    expected = decoder(encoder(whole), whole.shape[2:])[inside]
    torch.testing.assert_close(decoder(encoder(odd), odd.shape[2:]), expected)
    assert unet(odd).shape == odd.shape
    torch.testing.assert_close(unet(odd), unet(whole)[inside])


@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_is_rebuilt_alike_beside_any_other(dims):
    shape = AutoencoderShape(channels=(8, 16), latent_dim=5, dims=dims)
    encoder, decoder = ConvEncoder(shape).train(), ConvDecoder(shape).train()
    unet = UNet(1, channels=(8, 16), dims=dims).train()
    first, other = images(dims).split(1)
    pair = torch.cat([first, 100 * other + 7])
    size = SIZES[dims]
    alone, beside = decoder(encoder(first), size), decoder(encoder(pair), size)[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unet(first), unet(pair)[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (16, 2), (12, 1), (4, 1)])
def test_about_eight_channels_are_normalized_together(channels, groups):
    norm = ConvEncoder(AutoencoderShape(channels=(channels,))).levels[0][1]
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_a_unet_carries_detail_past_its_coarse_levels_and_context_through_them():
    unet = UNet(1, channels=(8, 16))
    picture = images(2, 1).requires_grad_()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):  # it lets every pixel hear from every other
            module.forward = lambda values: values
    weight = unet.up[0][0].weight.data
    whole = weight.clone()

    def reach() -> int:
        """Pixels that one pixel of the output hears from."""
        (gradient,) = torch.autograd.grad(unet(picture)[0, 0, 10, 7], picture)
        return int((gradient != 0).sum())

    everything = reach()
    weight[:, :8] = 0  # what comes from the coarse level
    detail = reach()
    weight.copy_(whole)
    weight[:, 8:] = 0  # what comes past it
    context = reach()
    assert detail == 9 * 9  # four convolutions of 3 x 3
    assert context > detail
    assert everything >= context


def test_what_does_not_fit_the_network_is_refused():
    encoder = ConvEncoder(AutoencoderShape(size=(32, 32)))
    with pytest.raises(ValueError, match=r"1 channels and 2 axes, got \(2, 3, 21, 14\)"):
        encoder(images(2, channels=3))
    with pytest.raises(ValueError, match=r"images of \(32, 32\) pixels, got \(21, 14\); set size"):
        encoder(images(2))
    with pytest.raises(ValueError, match=r"1 channels and 2 axes"):
        UNet(1, channels=(4, 8))(images(3))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dims": 4}, "dims must be 2"),
        ({"channels": ()}, "a positive width per level"),
        ({"latent_dim": 0}, "at least 1"),
        ({"size": (8, 8), "dims": 3}, "size must hold 3 sides"),
    ],
)
def test_a_shape_that_means_nothing_is_refused(given, told):
    with pytest.raises(ValueError, match=told):
        AutoencoderShape(**given)
