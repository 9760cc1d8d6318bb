"""2D networks of timm (https://github.com/huggingface/pytorch-image-models) as encoders."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor

from medssl.models.encoder import Encoder
from medssl.models.weights import load_weights


class TimmEncoder(Encoder):
    """Any timm network without its classifier.

    name: timm's name of the network.
    in_channels: channels of the pictures it takes.
    weights: a local state dict (.safetensors, or a .pth read without unpickling), "hub" for the
        weights timm would download, None for a random initialization.
    options: further arguments of timm.create_model, such as {"pad_type": "same"}.
    """

    born_from: ClassVar[frozenset[str]] = frozenset({"weights"})

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        weights: Literal["hub"] | Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import timm

        self.name = name
        self.in_channels = in_channels
        self.options = options or {}
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
            raise ValueError(f"timm has no network {name!r}; near names: {near or 'none'}")
        arguments = {"num_classes": 0, "in_chans": in_channels, **self.options}
        if weights == "hub":
            self.network = _from_hub(name, arguments)
        else:
            self.network = timm.create_model(name, pretrained=False, **arguments)
        self.embedding_dim = int(cast(int, self.network.num_features))
        if isinstance(weights, Path):
            load_weights(self.network, weights, ignore=("classifier.", "fc.", "head.fc."))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W), preprocessed. Returns the pooled embedding (B, E)."""
        return self.network(images)

    def embed_with_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Encoder`; for a transformer the map is that of its normalized patch tokens."""
        network = cast(Any, self.network)
        features = network.forward_features(images)
        embedding = network.forward_head(features, pre_logits=True)
        return embedding, self._as_grid(features, images)

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """timm's smallest residual network on one-channel noise."""
        return cls("test_resnet", in_channels=1), torch.randn(2, 1, 64, 64)


def _from_hub(name: str, arguments: dict[str, Any]) -> torch.nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights of {name} could not be fetched from the model hub; on a machine without "
            "a network, give a local state dict: --detector.encoder.weights FILE"
        ) from error
