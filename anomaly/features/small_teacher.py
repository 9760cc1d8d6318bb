"""A small network that learns to describe patches as an encoder does, to stand in for it.

After the distillation of EfficientAD (Batzner et al., WACV 2024, https://arxiv.org/abs/2303.14535,
sec. 3.1).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.features.targets import FrozenEncoder
from anomaly.maps import valid_patches
from anomaly.valid import WholeImage, mean_over_valid
from medssl.data.sample import Sample
from medssl.models.alignment import grid_offset
from medssl.models.small_student import PatchNetwork
from medssl.training import Trainable

_AT_ONCE = 8  # pictures per pass that statistics are taken in


class SmallTeacher(Trainable):
    """A `PatchNetwork` that gives what an encoder gives, its channels standardized and projected.

    encoder: what it learns from, of pictures.
    num_features: channels to give; at most those of the encoder's layers together.
    width: channels inside.
    Differs from the paper: it learns from the normals, not from ImageNet; the encoder's channels
    are brought to `num_features` by a random orthogonal projection, not by means of neighbouring
    channels; its maps are laid where their units look.
    """

    views = WholeImage()
    accumulation = "exact"

    def __init__(self, encoder: FrozenEncoder, *, num_features: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        channels = sum(shape[0] for shape in encoder.shapes())
        self.num_features = min(num_features, channels)
        self.network = PatchNetwork(encoder.encoder.in_channels, self.num_features, width=width)
        projection, _ = torch.linalg.qr(torch.randn(channels, self.num_features))
        self.register_buffer("projection", projection)  # (E, features)
        self.projection: Tensor
        self.register_buffer("offset_", torch.empty(0))  # (layers, 2) of the encoder, in pixels
        self.register_buffer("mean_", torch.empty(0))  # (E,) of its channels
        self.register_buffer("std_", torch.empty(0))
        self.offset_: Tensor
        self.mean_: Tensor
        self.std_: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W). Returns (B, features, h, w)."""
        return self.network(images)

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Where the encoder's layers look, and the mean and spread of their channels."""
        device = self.projection.device
        height, width = samples[0].images["image"].spatial_shape
        layers, encoder = self.encoder.layers, self.encoder.encoder
        offsets = [grid_offset(encoder, layer, (height, width)) for layer in layers]
        self.offset_ = torch.stack(offsets).to(device)
        self.mean_, self.std_ = moments(
            chosen(self.described(images), valid) for images, valid in stacked(samples, device)
        )

    def described(self, images: Tensor) -> Tensor:
        """The encoder's maps side by side on the grid of the network: (B, E, h, w)."""
        size = images.shape[2:]
        grid = [side // 4 for side in size]
        maps = []
        for found, offset in zip(self.encoder(images), self.offset_.tolist(), strict=True):
            beside = [o * cells / side for o, cells, side in zip(offset, grid, size, strict=True)]
            maps.append(laid(found, grid, beside))
        return torch.cat(maps, dim=1)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean squared difference to the encoder's projected channels, over valid positions."""
        images = views["image"]
        standard = (self.described(images) - channel(self.mean_)) / channel(self.std_)
        target = torch.einsum("behw,ef->bfhw", standard, self.projection)
        difference = (self(images) - target).square().mean(1)
        valid = valid_patches(views["valid"], difference.shape[1:])
        return {"loss": mean_over_valid(difference, valid).mean()}


def laid(maps: Tensor, grid: Sequence[int], offset: Sequence[float]) -> Tensor:
    """As `anomaly.maps.upsample` of each channel of (B, E, h, w), none of it NaN: (B, E, *grid)."""
    (down, along), (rows, columns) = offset, grid
    theta = maps.new_tensor([[[1.0, 0.0, -2 * along / columns], [0.0, 1.0, -2 * down / rows]]])
    places = F.affine_grid(theta, [1, 1, *grid], align_corners=False)

    def interpolate(values: Tensor) -> Tensor:
        each = places.expand(len(values), *places.shape[1:])
        return F.grid_sample(values, each, padding_mode="border", align_corners=False)

    weight = interpolate(maps.new_ones(1, 1, *maps.shape[2:]))  # 1 but for rounding
    return interpolate(maps) / weight


def stacked(samples: Sequence[Sample], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures (B, C, H, W), 0 where not valid, and where they are, (B, H, W) bool."""
    view, generator = WholeImage(), torch.Generator()
    for start in range(0, len(samples), _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, len(samples)))
        views = [view(samples[i], generator) for i in rows]
        yield (
            torch.stack([one["image"] for one in views]).to(device),
            torch.stack([one["valid"] for one in views]).to(device),
        )


def chosen(maps: Tensor, valid: Tensor) -> Tensor:
    """The features (N, E) of maps (B, E, h, w) that hold a valid pixel of `valid` (B, H, W)."""
    return maps.movedim(1, -1)[valid_patches(valid, maps.shape[2:])]


@torch.no_grad()
def moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (E,) over all rows of (N, E) blocks.

    Raises ValueError where there is no row.
    """
    count, total, squares = 0, torch.zeros(1).double(), torch.zeros(1).double()
    for block in features:
        rows = block.double().cpu()
        count, total = count + len(rows), total + rows.sum(0)
        squares = squares + rows.square().sum(0)
        device = block.device
    if count == 0:
        raise ValueError("none of the normal items has a valid pixel")
    mean = total / count
    spread = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    return mean.float().to(device), spread.float().to(device)


def channel(values: Tensor) -> Tensor:
    """(E,) as it meets maps (B, E, h, w)."""
    return values[:, None, None]
