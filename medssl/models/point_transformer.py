"""A transformer over groups of points: the encoder of Point-MAE.

Pang et al., ECCV 2022, https://arxiv.org/abs/2203.06604; as a descriptor of points in M3DM (Wang et
al., CVPR 2023, https://arxiv.org/abs/2303.00601) and LSFA (Tu et al., ECCV 2024,
https://arxiv.org/abs/2401.03145).
"""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from medssl.models.encoder import Encoder
from medssl.models.points import farthest_point_sampling, interpolate, nearest_points


class PointTransformer(Encoder):
    """Tokens of groups of neighboring points; their features are those of several blocks together.

    A group is the nearest points of a center that farthest-point sampling has found, relative to
    it; a mini-PointNet makes a token of it, and a perceptron a position of its center (sec. 3.1).
    Each cloud is first centered on its centroid and divided by the largest distance from it, so
    that neither place nor unit nor size matters: a part that is too large as a whole looks right,
    and a single stray point makes all the rest small (clean the cloud with
    `medssl.data.geometry_steps.Geometry`).

    num_groups, group_size: G centers and K points of each group; the paper's are for 1,024 points.
    width, depth, num_heads: of the transformer.
    layers: blocks, counted from 0, whose tokens are normalized and put side by side as features.
    drop_path: largest rate of stochastic depth, reached in the last block.
    describe_groups, describe_size: G and K of `describe`, as in M3DM and LSFA. The network has
        learnt what groups of its training look like: for groups of the same extent, describe_size
        is to group_size as the points of the clouds to describe are to those of the training's.

    Differs from the paper: LayerNorm takes the place of BatchNorm in the mini-PointNet, so that a
    cloud's features do not depend on the rest of the batch, also in training. Left open there: the
    first center is the point farthest from the centroid, so that the order of the points does not
    matter; the mean over the groups is the embedding of a cloud. Differs from M3DM: no class token;
    the weights of `describe` are those of PointNet++.
    """

    axes: ClassVar[str] = "points"
    network: "_GroupTransformer"

    def __init__(
        self,
        *,
        num_groups: int = 64,
        group_size: int = 32,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        layers: Sequence[int] = (3, 7, 11),
        drop_path: float = 0.1,
        describe_groups: int = 1024,
        describe_size: int = 128,
    ) -> None:
        super().__init__()
        if not layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(
                f"layers must number at least one of {depth} blocks from 0, got {list(layers)}"
            )
        if min(num_groups, group_size, describe_groups, describe_size) < 1:
            raise ValueError(
                "numbers and sizes of groups must be at least 1, got "
                f"{num_groups} of {group_size} and {describe_groups} of {describe_size}"
            )
        self.num_groups, self.group_size = num_groups, group_size
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.layers, self.drop_path = list(layers), drop_path
        self.describe_groups, self.describe_size = describe_groups, describe_size
        self.in_channels, self.embedding_dim = 3, width * len(self.layers)
        self.network = _GroupTransformer(
            blocks=transformer_blocks(width, num_heads, depth, drop_path=drop_path),
            width=width,
            num_groups=num_groups,
            group_size=group_size,
        )

    def forward(self, points: Tensor) -> Tensor:
        """points: (B, P, 3), finite. Returns the mean of the groups' features (B, E)."""
        return self.groups(points)[0].mean(1)

    def groups(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points: (B, P, 3), finite. Returns features (B, G, E) and centers (B, G, 3).

        The centers are among the given points. A cloud of fewer points has as many groups.
        """
        features, index = self._features(unit_sphere(points), self.num_groups, self.group_size)
        return features, _gathered(points, index)

    @torch.no_grad()
    def describe(self, points: Tensor, normals: Tensor) -> Tensor:
        """points: (P, 3), finite, on the network's device. Returns (P, E): the features of the
        three nearest centers, weighted by 1 / distance^2.

        normals are not looked at.
        """
        cloud = unit_sphere(points[None])
        features, index = self._features(cloud, self.describe_groups, self.describe_size)
        return interpolate(features, _gathered(cloud, index), cloud)[0]

    def grouped(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points: (B, P, 3). Returns patches (B, G, K, 3), relative to their centers, and the
        centers (B, G, 3), both in units of the cloud's extent."""
        patches, centers, _ = cut(unit_sphere(points), self.num_groups, self.group_size)
        return patches, centers

    def tokens(self, patches: Tensor, centers: Tensor) -> Tensor:
        """What the last block says, normalized, of some of the groups and no others.

        patches: (B, n, K, 3), centers: (B, n, 3), as of `grouped`. Returns (B, n, width).
        """
        return self.network.levels(patches, centers, [self.depth - 1])[0]

    def embed_with_map(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Encoder`; the map is (B, E, G), without the centers."""
        features = self.groups(points)[0]
        return features.mean(1), features.mT

    def selftest_shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """As of `Encoder`; clouds of half as many points as the groups hold, as in the paper."""
        return (2, max(1, self.num_groups * self.group_size // 2), 3)

    def _features(self, cloud: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor]:
        """Features (B, G, E) of clouds (B, P, 3) of unit extent, and the numbers (B, G) of the
        centers among their points."""
        patches, centers, index = cut(cloud, num_groups, group_size)
        return torch.cat(self.network.levels(patches, centers, self.layers), dim=-1), index

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output.mT  # (B, width, G)

    @classmethod
    def example(cls) -> tuple[Self, Tensor]:
        """Two narrow blocks on noise."""
        encoder = cls(num_groups=8, group_size=8, width=24, depth=2, num_heads=2, layers=(0, 1))
        return encoder, torch.randn(2, 40, 3)


class PositionEmbedding(nn.Sequential):
    """Centers (..., 3) to positions (..., width): a perceptron of two layers."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))


def transformer_blocks(
    width: int, num_heads: int, depth: int, *, drop_path: float = 0.0
) -> nn.ModuleList:
    """Pre-norm blocks of self-attention without biases of queries, keys and values.

    drop_path: the rate of stochastic depth rises to this, block by block.
    """
    from timm.models.vision_transformer import Block

    rates = torch.linspace(0, drop_path, depth).tolist()
    blocks = nn.ModuleList(Block(width, num_heads, drop_path=rate) for rate in rates)
    return blocks.apply(_small)


def placed(blocks: nn.ModuleList, tokens: Tensor, positions: Tensor) -> list[Tensor]:
    """What each block makes of tokens (B, n, E); the positions are added before every one."""
    found = []
    for block in blocks:
        tokens = block(tokens + positions)
        found.append(tokens)
    return found


def unit_sphere(points: Tensor) -> Tensor:
    """Clouds (B, P, 3) with the centroid at 0 and the farthest point at a distance of 1, float32.

    A cloud whose points are all the same becomes 0. Raises ValueError for an empty one and where a
    point is not finite.
    """
    if points.ndim != 3 or points.shape[-1] != 3 or points.shape[1] == 0:
        raise ValueError(
            f"expected clouds (B, P, 3) of at least one point, got {tuple(points.shape)}"
        )
    if not points.isfinite().all():
        raise ValueError("the points of a cloud must be finite; leave out those that are not")
    cloud = points.double()  # far from the origin float32 would leave little of a small part
    cloud = cloud - cloud.mean(1, keepdim=True)
    extent = torch.linalg.vector_norm(cloud, dim=-1).amax(1)[:, None, None]
    rounding = torch.finfo(points.dtype).eps * points.abs().amax((1, 2))[:, None, None]
    flat = extent <= rounding
    return torch.where(flat, 0.0, cloud / extent.masked_fill(flat, 1)).float()


def cut(cloud: Tensor, num_groups: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clouds (B, P, 3) cut into groups that overlap.

    Returns patches (B, G, K, 3) relative to their centers, centers (B, G, 3) and their numbers
    (B, G) among the points. With fewer points than groups each is a center; with fewer than
    group_size the center fills the group.
    """
    index = farthest_point_sampling(cloud, min(num_groups, cloud.shape[1]))
    centers = _gathered(cloud, index)
    near = nearest_points(centers, cloud, group_size)[1]  # (B, G, K)
    patches = _gathered(cloud, near.flatten(1)).unflatten(1, near.shape[1:])
    return patches - centers[:, :, None], centers, index


class _GroupTransformer(nn.Module):
    """The network itself; its input is clouds, so that a block can be asked for by name."""

    def __init__(
        self, *, blocks: nn.ModuleList, width: int, num_groups: int, group_size: int
    ) -> None:
        super().__init__()
        self.num_groups, self.group_size = num_groups, group_size
        self.patch_embed = _MiniPointNet(width)
        self.position = PositionEmbedding(width)
        self.blocks = blocks
        self.norm = nn.LayerNorm(width)

    def forward(self, points: Tensor) -> Tensor:
        patches, centers, _ = cut(unit_sphere(points), self.num_groups, self.group_size)
        return self.levels(patches, centers, [len(self.blocks) - 1])[0]

    def levels(self, patches: Tensor, centers: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Normalized tokens (B, n, width) after each of the layers."""
        found = placed(self.blocks, self.patch_embed(patches), self.position(centers))
        return [self.norm(found[layer]) for layer in layers]


class _MiniPointNet(nn.Module):
    """Patches (B, n, K, 3) to tokens (B, n, width), in whatever order their points come.

    Each point is told what is largest in its group, and the token is what is largest then. The
    layers keep biases that are not 0 from the start: without, LayerNorm would not tell a large
    patch from a small one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Linear(3, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 256)
        )
        self.own, self.whole = nn.Linear(256, 512), nn.Linear(256, 512, bias=False)
        self.second = nn.Sequential(nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, width))

    def forward(self, patches: Tensor) -> Tensor:
        each = self.first(patches)  # (B, n, K, 256)
        # as one layer on both side by side, without doing the second part for each point
        joined = self.own(each) + self.whole(each.amax(2, keepdim=True))
        return self.second(joined).amax(2)


def _gathered(points: Tensor, index: Tensor) -> Tensor:
    """Rows `index`, (B, n), of points (B, P, 3)."""
    return points.gather(1, index[..., None].expand(-1, -1, 3))


def _small(module: nn.Module) -> None:
    """The weights that the paper's code begins with."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
