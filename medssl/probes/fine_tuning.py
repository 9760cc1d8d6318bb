"""Fine-tuning: an encoder trained on, with a classifier, on labelled images.

Layers and their learning rates as in MAE (He et al., CVPR 2022, https://arxiv.org/abs/2111.06377,
appendix A.2); for LoRA see `medssl.models.lora`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.boxes import MultiBox
from medssl.data.geometry import resize
from medssl.data.image import Image
from medssl.data.sample import Sample
from medssl.data.views import MultiCrop
from medssl.models.encoder import Encoder
from medssl.training import Trainable, split_by_decay

_BLOCKS = {  # how timm groups the parameters of its vision transformers; ours have their names
    "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledCrops:
    """The large crops of an image, and its class.

    labels: by item id.
    """

    crop: MultiCrop | MultiBox
    labels: Mapping[str, int] = field(repr=False)

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "images" (V, C, H, W) or (V, C, D, H, W) and "label" () int64."""
        if sample.item not in self.labels:
            raise ValueError(f"item {sample.item} has no class; train on items that have one")
        images = self.crop(sample, generator)["global"]
        return {"images": images, "label": torch.tensor(self.labels[sample.item])}


class FineTuning(Trainable):
    """Cross-entropy of a linear classifier on the embedding of an encoder that learns on.

    What of the encoder has `requires_grad` is trained: all of it as it is built or loaded, the last
    layers after `train_last`, and a low-rank update after `medssl.models.lora.add_lora`. What has
    not stays bit for bit, also its batch norms: layers without anything to train keep evaluating
    (running statistics, no dropout), while batch norms of trained layers normalize by the batch
    and their statistics follow it; so small batches are better trained with those layers frozen.

    encoder: trained in place.
    labels: item id -> class, 0 to K - 1; of the training, and no part of what is saved.
    classes: K.
    crop: the views to train on; the large crops or, where the encoder takes volumes, boxes. They
        have to show what the class is about.
    layer_decay: the learning rate of a layer is this times that of the next, and the classifier's
        is the plan's; 0.75 in MAE, for all of a vision transformer.

    The classifier begins at zero, so that the first step does not disturb the encoder.
    """

    accumulation: Literal["exact", "refused"] = "exact"

    def __init__(
        self,
        encoder: Encoder,
        *,
        labels: Mapping[str, int],
        classes: int,
        crop: MultiCrop | MultiBox,
        layer_decay: float = 1.0,
    ) -> None:
        super().__init__()
        if not labels or min(labels.values()) < 0 or max(labels.values()) >= classes:
            raise ValueError(
                f"labels must be classes 0 to {classes - 1}, got {sorted(set(labels.values()))}"
            )
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
        self.encoder = encoder
        self.classes, self.crop, self.layer_decay = classes, crop, layer_decay
        self.head = nn.Linear(encoder.embedding_dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.views = LabelledCrops(crop=crop, labels=dict(labels))

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "images" (B, V, C, H, W) or (B, V, C, D, H, W) and "label" (B,).

        Returns "loss" and "accuracy".
        """
        images, labels = views["images"], views["label"]
        logits = self.head(self.encoder(images.flatten(0, 1))).float()
        labels = labels.repeat_interleave(images.shape[1])
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": accuracy}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Layer by layer, the earlier the slower; the classifier last."""
        depths = layer_depths(self.encoder)
        by_depth: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.encoder.named_parameters():
            by_depth.setdefault(depths[name], []).append(parameter)
        top = max(depths.values()) + 1
        groups: list[dict[str, Any]] = []
        for depth, parameters in sorted(by_depth.items()):
            rate = self.layer_decay ** (top - depth)
            groups += [{**g, "rate": rate} for g in split_by_decay(nn.ParameterList(parameters))]
        groups += split_by_decay(self.head)
        return [group for group in groups if group["params"]]

    def train(self, mode: bool = True) -> Self:
        """As of every module, but layers without anything to train keep evaluating."""
        super().train(mode)
        _keep_evaluating(self.encoder)
        return self

    @torch.no_grad()
    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """Probabilities (S, K) of whole prepared images, resized as the crops are; rows sum to 1.

        Of a volume that is trained on by slices, the mean over all of them.
        """
        device, training = self.head.weight.device, self.training
        self.eval()
        found = []
        for sample in samples:
            images = self._whole(sample.images["image"]).to(device)
            found.append(self.head(self.encoder(images)).float().softmax(1).mean(0))
        self.train(training)
        return torch.stack(found)

    def _whole(self, image: Image) -> Tensor:
        """(1, C, H, W), slices (D, C, H, W) or (1, C, D, H, W)."""
        image = replace(image, valid=None)  # preprocessing has filled what is not valid
        if isinstance(self.crop, MultiBox):
            return resize(image, self.crop.large.size).pixels[None]
        side = self.crop.large.size
        pixels = resize(image, (side, side)).pixels
        return pixels[None] if image.axes == "HW" else pixels.transpose(0, 1)


def train_last(encoder: Encoder, layers: int) -> Encoder:
    """Freeze all but the last layers of an encoder, in place, for `FineTuning`; see `layer_depths`.

    Returns the encoder. Raises ValueError where it has fewer layers.
    """
    depths = layer_depths(encoder)
    depth = max(depths.values()) + 1
    if not 1 <= layers <= depth:
        raise ValueError(f"expected 1 to {depth} layers to train, as there are, got {layers}")
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(depths[name] >= depth - layers)
    return encoder


def layer_depths(encoder: Encoder) -> dict[str, int]:
    """How deep each parameter lies, by its name: 0 before the first block, and so on by layers.

    Layers are timm's: the blocks of a network, each with what leads to it or, of a transformer, the
    norm behind the last; the last norm of a ConvNeXt is one for itself.
    """
    from timm.models import group_parameters

    network = cast(Any, encoder.network)
    matcher = network.group_matcher() if hasattr(network, "group_matcher") else _BLOCKS
    depths = {name: 0 for name, _ in encoder.named_parameters()}
    for depth, names in group_parameters(network, matcher).items():
        depths |= {f"network.{name}": depth for name in names}
    return depths


def _keep_evaluating(module: nn.Module) -> None:
    """Evaluation mode for the largest parts that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _keep_evaluating(child)
