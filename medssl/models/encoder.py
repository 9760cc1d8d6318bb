"""What objectives train and detectors, probes and explanations stand on."""

import math
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from medssl.data.preprocess import Preprocessing
from medssl.data.seen import Seen
from medssl.models.layout import channels_last


class _ReachedError(Exception):
    """Stops a forward pass once the last wanted layer has answered."""


class Encoder(nn.Module):
    """Images to embeddings, and to feature maps of named layers.

    A subclass sets `network`, `in_channels` and `embedding_dim` and gives `forward`.
    `preprocessing` is what the encoder was trained with, None where nobody said; `seen` is what it
    was pretrained on, as far as its folder tells.
    """

    born_from: ClassVar[frozenset[str]] = frozenset()
    """Constructor arguments that only matter at birth (a weight file) and are never saved."""

    axes: ClassVar[str] = "HW"
    """Axes of the images it takes; "DHW" where they are volumes."""

    network: nn.Module
    in_channels: int
    embedding_dim: int
    preprocessing: Preprocessing | None = None
    seen: Seen = Seen()

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W), preprocessed. Returns the pooled embedding (B, E)."""
        raise NotImplementedError

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled embedding (B, E) and the last feature map (B, E, h, w), in one pass."""
        raise NotImplementedError

    def feature_maps(self, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Outputs of the named modules of `network`, each (B, E, h, w), in the order of `layers`.

        Nothing after the deepest named layer is computed. A transformer block's tokens
        (B, N, E) become its grid, without class and register tokens.
        Raises ValueError for a layer that does not exist, naming near ones.
        """
        found: dict[str, Tensor] = {}
        handles = [
            self._module(name).register_forward_hook(_keep(found, name, len(set(layers))))
            for name in dict.fromkeys(layers)
        ]
        try:
            self.network(images)
        except _ReachedError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [self._as_grid(found[name], images) for name in layers]

    def selftest_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Of the noise of the self-test, for pictures of `size` (H, W) or slices of (D, H, W)."""
        return (2, self.in_channels, *size[-2:])

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: the embeddings (B, E) of a noise batch."""
        return self(noise)

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """A tiny encoder and a batch (B, C, H, W) for it, for the contract tests."""
        raise NotImplementedError

    def _module(self, name: str) -> nn.Module:
        modules = dict(self.network.named_modules())
        if name not in modules:
            near = [known for known in modules if known and known.count(".") <= 1]
            raise ValueError(
                f"{type(self.network).__name__} has no layer {name!r}; it has {', '.join(near)}"
            )
        return modules[name]

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        if output.ndim == 4:
            return output
        prefix = int(getattr(self.network, "num_prefix_tokens", 0))
        tokens = output[:, prefix:]  # (B, N, E)
        height, width = images.shape[-2:]
        patch = math.sqrt(height * width / tokens.shape[1])
        h, w = round(height / patch), round(width / patch)
        return tokens.mT.unflatten(2, (h, w))


def _keep(found: dict[str, Tensor], name: str, wanted: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = output
        if len(found) == wanted:
            raise _ReachedError

    return hook


def frozen(encoder: Encoder) -> Encoder:
    """The encoder in evaluation mode, without gradients, its convolutions laid out for speed."""
    channels_last(encoder)
    return encoder.eval().requires_grad_(False)


def seen_by_encoders(model: nn.Module) -> Seen:
    """What the encoders inside a model were pretrained on, as far as their folders told."""
    seen = Seen()
    for module in model.modules():
        if isinstance(module, Encoder):
            seen |= module.seen
    return seen


@torch.no_grad()
def output_channels(encoder: Encoder, layers: Sequence[str], size: tuple[int, int]) -> list[int]:
    """Channels E of each layer's feature map for pictures of `size` pixels."""
    device = next(encoder.parameters()).device
    images = torch.zeros(1, encoder.in_channels, *size, device=device)
    return [features.shape[1] for features in encoder.feature_maps(images, layers)]
