"""Point-MAE (Pang et al., ECCV 2022, https://arxiv.org/abs/2203.06604)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.sample import Sample
from medssl.data.synthetic.point_part import point_part
from medssl.models.folder import load_encoder
from medssl.models.masked_transformer import shown_patches
from medssl.models.point_transformer import (
    PointTransformer,
    PositionEmbedding,
    placed,
    transformer_blocks,
)
from medssl.objectives.base import Objective

Rotation = Literal["none", "x", "y", "z", "full"]


class PointMAE(Objective):
    """Most groups of a cloud are hidden, and their points are told from the groups that are left.

    The encoder sees the shown groups alone; a light decoder gets their tokens and, for each hidden
    group, the position of its center and a learnt token. The loss is the Chamfer distance of
    squared lengths between the points that it tells and those of the group, both relative to the
    center; coordinates are in units of the cloud's extent (see `PointTransformer`).

    encoder: what is trained, or an encoder folder to go on from.
    mask_ratio: share of the groups that are hidden, at random.
    num_points: points of a view, drawn from the cloud without replacement where it has enough.
    scale: smallest and largest factor, drawn for each axis on its own; one factor for all axes
        would change nothing, since a cloud is divided by its extent.
    rotation: "full" turns by any rotation, "x", "y" or "z" by any angle about that axis.
    decoder_depth, decoder_num_heads: of the decoder, which is as wide as the encoder and has its
        stochastic depth.

    Differs from the paper: no random shift, which would change nothing, as clouds are centered;
    rotations may be added. The authors' code makes tokens of the hidden groups too, before it takes
    them out; here nothing is computed of them. Left open: mask_ratio of the groups is rounded.
    """

    accumulation: Literal["exact", "refused"] = "exact"
    views: "CloudViews"

    def __init__(
        self,
        encoder: PointTransformer | Path,
        *,
        mask_ratio: float = 0.6,
        num_points: int = 1024,
        scale: tuple[float, float] = (2 / 3, 3 / 2),
        rotation: Rotation = "none",
        decoder_depth: int = 4,
        decoder_num_heads: int = 6,
    ) -> None:
        super().__init__()
        given = load_encoder(encoder) if isinstance(encoder, Path) else encoder
        if not isinstance(given, PointTransformer):
            raise ValueError(
                f"groups of points can be hidden in a PointTransformer only, got "
                f"{type(given).__name__}"
            )
        self.encoder = given.requires_grad_(True)
        self.mask_ratio, self.num_points = mask_ratio, num_points
        self.scale, self.rotation = scale, rotation
        self.decoder_depth, self.decoder_num_heads = decoder_depth, decoder_num_heads
        num_groups, width = min(given.num_groups, num_points), given.width
        self.views = CloudViews(
            num_points=num_points,
            num_groups=num_groups,
            num_hidden=_hidden_groups(mask_ratio, num_groups),
            scale=scale,
            rotation=rotation,
        )
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.position = PositionEmbedding(width)
        self.decoder = transformer_blocks(
            width, decoder_num_heads, decoder_depth, drop_path=given.drop_path
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * given.group_size)

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "points" (B, P, 3) and "hidden" (B, G) bool, equally many True in each row.

        Returns "loss", in squared extents of a cloud.
        """
        hidden = views["hidden"]
        patches, centers = self.encoder.grouped(views["points"])
        tokens = self.shown_tokens(patches, centers, hidden)
        told = self.told(tokens, centers, hidden)
        true = _picked(patches, shown_patches(~hidden))
        return {"loss": chamfer(told.flatten(0, 1), true.flatten(0, 1)).mean()}

    def shown_tokens(self, patches: Tensor, centers: Tensor, hidden: Tensor) -> Tensor:
        """The encoder's tokens (B, n, E) of the n groups that are not hidden, in order.

        patches: (B, G, K, 3), centers: (B, G, 3), hidden: (B, G) bool.
        """
        shown = shown_patches(hidden)
        return self.encoder.tokens(_picked(patches, shown), _picked(centers, shown))

    def told(self, tokens: Tensor, centers: Tensor, hidden: Tensor) -> Tensor:
        """Points (B, G - n, K, 3) of the hidden groups, relative to their centers, in order."""
        missing = shown_patches(~hidden)  # (B, G - n)
        order = torch.cat([shown_patches(hidden), missing], dim=1)
        unknown = self.mask_token.to(tokens.dtype).expand(*missing.shape, -1)
        positions = self.position(_picked(centers, order))
        decoded = placed(self.decoder, torch.cat([tokens, unknown], dim=1), positions)[-1]
        told = self.head(self.norm(decoded[:, tokens.shape[1] :]))
        return told.unflatten(-1, (-1, 3))

    def export(self) -> dict[str, nn.Module]:
        """The encoder; the decoder is left behind."""
        return {"points": self.encoder}

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """Two narrow blocks, and made-up parts."""
        parts = [point_part("bracket", seed, count=200) for seed in range(8)]
        return cls(
            PointTransformer.example()[0],
            num_points=64,
            decoder_depth=1,
            decoder_num_heads=2,
        ), [replace(part, point_labels=None) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudViews:
    """A cloud of a fixed number of points, stretched and turned, and which groups to hide.

    Takes free clouds and, of images, the organized points (role "xyz", or the image itself).
    Points that are not valid are left out.
    """

    num_points: int
    num_groups: int
    num_hidden: int
    scale: tuple[float, float]
    rotation: Rotation

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale is a (smallest, largest) positive factor, got {self.scale}")
        if self.rotation not in get_args(Rotation):
            raise ValueError(
                f"rotation is one of {', '.join(get_args(Rotation))}, got {self.rotation!r}"
            )

    def __call__(self, sample: Sample, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "points" (P, 3) and "hidden" (G,) bool."""
        cloud = _cloud(sample)
        rounds = math.ceil(self.num_points / len(cloud))
        draws = [torch.randperm(len(cloud), generator=generator) for _ in range(rounds)]
        points = cloud[torch.cat(draws)[: self.num_points]]
        points = points - points.mean(0)  # far from the origin the stretch would round it away
        low, high = self.scale
        points = points * (low + (high - low) * torch.rand(3, generator=generator))
        points = points @ _turn(self.rotation, generator).mT
        hidden = torch.randperm(self.num_groups, generator=generator) < self.num_hidden
        return {"points": points, "hidden": hidden}


def chamfer(first: Tensor, second: Tensor) -> Tensor:
    """Squared distance to the nearest point of the other set, its mean over either set, summed.

    first: (N, P, 3), second: (N, Q, 3). Returns (N,), float32 or better; 0 where the sets are
    equal, smaller is more alike.
    """
    first, second = first.to(_at_least_float32(first)), second.to(_at_least_float32(second))
    with torch.no_grad():
        apart = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
        to_second, to_first = apart.argmin(2), apart.argmin(1)  # (N, P), (N, Q)
    ahead = (first - _picked(second, to_second)).square().sum(-1)
    back = (second - _picked(first, to_first)).square().sum(-1)
    return ahead.mean(1) + back.mean(1)


def _hidden_groups(mask_ratio: float, num_groups: int) -> int:
    count = round(mask_ratio * num_groups)
    if not 0 < count < num_groups:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides {count} of {num_groups} groups; it must hide at least "
            "one and leave one"
        )
    return count


def _cloud(sample: Sample) -> Tensor:
    """Valid points (n, 3) of a sample."""
    if sample.points is not None:
        points, valid = sample.points.points, sample.points.looked_at
    else:
        image = sample.images.get("xyz", sample.images["image"])
        if image.channels != ("x", "y", "z"):
            raise ValueError(
                f"item {sample.item}: expected a cloud or an xyz image, got a picture of channels "
                f"{image.channels}"
            )
        points, valid = image.pixels.flatten(1).mT, image.pixels.isfinite().all(0).flatten()
        if image.valid is not None:
            valid = valid & image.valid.flatten()
    points = points[valid & points.isfinite().all(1)]
    if not len(points):
        raise ValueError(f"item {sample.item}: none of its points is valid")
    return points


def _turn(rotation: Rotation, generator: torch.Generator) -> Tensor:
    """A random rotation (3, 3); an even one of all for "full"."""
    if rotation == "none":
        return torch.eye(3)
    if rotation == "full":
        w, x, y, z = F.normalize(torch.randn(4, generator=generator), dim=0).tolist()
    else:
        half = math.pi * torch.rand(1, generator=generator).item()
        w = math.cos(half)
        x, y, z = (math.sin(half) * (rotation == axis) for axis in ("x", "y", "z"))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rows)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index`, (B, n), of values (B, N, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
