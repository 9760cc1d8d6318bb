"""LVM-Med (Nguyen et al., NeurIPS 2023, https://arxiv.org/abs/2306.11925)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.data.augment import Augmentation
from medssl.data.boxes import MultiBox
from medssl.data.sample import Sample
from medssl.data.synthetic.shapes import shape_samples
from medssl.data.views import Crops, MultiCrop
from medssl.models.correspondence import by_feature, by_location, grid_positions
from medssl.models.encoder import Encoder
from medssl.models.folder import load_encoder
from medssl.models.graph_matching import (
    Affinity,
    GraphConvolution,
    edge_affinity,
    matching_loss,
    nearest_neighbours,
)
from medssl.models.precision import full_precision
from medssl.objectives.base import Objective
from medssl.training import Clock, Unit, cosine

_AUGMENTATION = Augmentation()
_CONSTANT = 0.02  # spread of embeddings of unit length; 1 where they point everywhere evenly
_CHANCE = 1.5  # times 1 / N: matching this well is guessing


class LVMMed(Objective):
    """Two graphs over the same images, one per view, are matched, and wrong matches are corrected.

    A batch is cut into groups of N images. Nodes are the images' embeddings, edges lead to nearest
    neighbours, message passing mixes them. Nodes go together by their embedding and by what their
    places show, edges by the difference of their nodes; a solver finds the best assignment under
    noise, and the loss is the share of images that are not matched with themselves (eq. 6 to 9).

    encoder: the network to train, or an encoder folder to go on from.
    graph_size: N, images per graph; the batch is a multiple of it.
    neighbours: k, edges of each node.
    projection_dim: of the nodes.
    alpha: weight of the embeddings' cosine against that of local features.
    local_grid: side of the grid that feature maps are averaged to before places are compared.
    local_pairs: how many of the closest pairs of places count.
    noise: scale of the Gumbel noise on node affinities at the start and at the end, joined by a
        cosine. It works as a margin: affinities are cosines, so a match must win by about as much.
    perturbation: lambda; see `medssl.models.graph_matching.matching_loss`.
    second_order: match edges too; otherwise nodes alone, by a linear assignment.
    one_per: what a graph holds at most one of, so that no image is told apart from another of the
        same patient ("patient", "study"), or nothing ("item").
    size, scale, flip: of the two crops.
    augmentation: changes of exposure, contrast, sharpness and noise, drawn per crop.
    neighbours_mm: the second crop may come from a slice of the volume so near.
    views: the views themselves, instead of those that the arguments from size on describe: a
        `medssl.data.views.MultiCrop`, for crops in mm too, or, where the encoder takes volumes, a
        `medssl.data.boxes.MultiBox`.

    Differs from the paper, whose training code is not public: the linear and quadratic problems
    are solved by scipy and by a batched fixed point with exchanges, not by Lagrange decomposition;
    the noise is on node affinities only, and anneals; the second solution of the gradient is left
    out where it provably is the identity; the local affinity is the mean of its location and
    feature terms in both directions, so that it lies in [-1, 1] as the other cosine does; AdamW.
    """

    accumulation: Literal["exact", "refused"] = "exact"

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        graph_size: int = 16,
        neighbours: int = 5,
        projection_dim: int = 128,
        alpha: float = 0.8,
        local_grid: int = 7,
        local_pairs: int = 20,
        noise: tuple[float, float] = (1.0, 1.0),
        perturbation: float = 80.0,
        second_order: bool = True,
        one_per: Unit = "patient",
        size: int = 224,
        scale: tuple[float, float] = (0.4, 1.0),
        flip: float = 0.5,
        augmentation: Augmentation = _AUGMENTATION,
        neighbours_mm: float = 0.0,
        views: MultiCrop | MultiBox | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= neighbours < graph_size:
            raise ValueError(
                f"each of {graph_size} nodes can have 1 to {graph_size - 1} neighbours, "
                f"got {neighbours}"
            )
        if min(noise) < 0 or not 0 <= alpha <= 1 or perturbation <= 0:
            raise ValueError(
                "noise must not be negative, alpha lies in [0, 1] and perturbation above 0: got "
                f"{noise}, {alpha} and {perturbation}"
            )
        self.graph_size, self.neighbours = graph_size, neighbours
        self.projection_dim, self.alpha = projection_dim, alpha
        self.local_grid, self.local_pairs = local_grid, local_pairs
        self.noise, self.perturbation = noise, perturbation
        self.second_order, self.one_per = second_order, one_per
        self.size, self.scale, self.flip = size, scale, flip
        self.augmentation, self.neighbours_mm = augmentation, neighbours_mm
        self.views: MultiCrop | MultiBox = views or MultiCrop(
            large=Crops(count=2, size=size, scale=scale, flip=flip),
            small=Crops(count=0, size=1, scale=scale),
            augmentation=augmentation,
            neighbours_mm=neighbours_mm,
        )
        self.encoder = load_encoder(encoder) if isinstance(encoder, Path) else encoder
        self.encoder.requires_grad_(True)
        width = self.encoder.embedding_dim
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection_dim)
        )
        self.messages = GraphConvolution(projection_dim)
        self.register_buffer("noise_scale", torch.tensor(float(noise[0])))
        self.register_buffer("steps", torch.tensor(0))
        self.noise_scale: Tensor
        self.steps: Tensor

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: "global" (B, 2, C, H, W) with "global_place" (B, 2, 2, 3), or (B, 2, C, D, H, W)
        with (B, 2, 3, 4), and "item" (B,).

        Returns "loss", and "matched": the share of images that are matched with themselves without
        noise, by embeddings alone.
        """
        crops = views["global"]
        if len(crops) % self.graph_size:
            raise ValueError(
                f"a batch of {len(crops)} is no multiple of graph_size {self.graph_size}"
            )
        side_by_side = crops.transpose(0, 1).flatten(0, 1)  # (2 B, C, [D,] H, W), first views first
        embedding, features = self.encoder.embed_with_map(side_by_side)
        nodes = self._in_graphs(self.projector(embedding).float())  # (2, G, N, E)
        places = views["global_place"].transpose(0, 1).flatten(0, 1)  # (2 B, 2, 3)
        with full_precision(nodes):
            local = self._local(features.float(), places, crops.shape[3:])
            together, affinity = self._affinity(nodes, local)
            noise = self._drawn(affinity.nodes, views["item"])
            loss = matching_loss(affinity, noise=noise, weight=self.perturbation)
        return {"loss": loss, **_statistics(together.detach(), embedding.detach().float())}

    def after_step(self, clock: Clock) -> None:
        """Anneal the noise."""
        self.steps.fill_(clock.step)
        self.noise_scale.fill_(cosine(*self.noise, clock.progress))

    def collapsed(self, statistics: Mapping[str, float]) -> str | None:
        """Names an encoder that gives every image the same, or one that does not match yet."""
        if not statistics:
            return None
        if statistics["feature_spread"] < _CONSTANT:
            return (
                "collapsed: the encoder gives nearly the same embedding to every image (spread "
                f"{statistics['feature_spread']:.3f}, 1 is even). Lower the learning rate, and "
                "check that the images differ"
            )
        if statistics["matched"] < _CHANCE / self.graph_size:
            return (
                f"not learning yet: {statistics['matched']:.2f} of the images are matched with "
                f"themselves, {1 / self.graph_size:.2f} is chance. Lower the noise or the strength "
                "of the augmentation, raise the learning rate, or train longer"
            )
        return None

    def export(self) -> dict[str, nn.Module]:
        """The encoder, without projector and message passing."""
        return {"image": self.encoder}

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A tiny network without batch statistics, and shapes to match."""
        from medssl.models.timm_encoder import TimmEncoder

        objective = cls(
            TimmEncoder("test_convnext", in_channels=1),
            graph_size=4,
            neighbours=2,
            projection_dim=16,
            local_grid=2,
            local_pairs=2,
            size=32,
        )
        return objective, shape_samples(8, seed=1)

    def _in_graphs(self, both: Tensor) -> Tensor:
        """(2 B, ...) -> (2, G, N, ...), the first views first."""
        return both.unflatten(0, (2, -1, self.graph_size))

    def _affinity(self, nodes: Tensor, local: Tensor) -> tuple[Tensor, Affinity]:
        """Cosines of the embeddings (G, N, N), and what goes together by all that counts.

        nodes: (2, G, N, E). local: (G, N, N), how alike the images' places are.
        """
        edges = [nearest_neighbours(side.detach(), self.neighbours) for side in nodes]
        first, second = (self.messages(one, near) for one, near in zip(nodes, edges, strict=True))
        together = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT
        mixed = self.alpha * together + (1 - self.alpha) * local
        if not self.second_order:
            return together, Affinity(nodes=mixed)
        return together, Affinity(
            nodes=mixed,
            edges=edge_affinity(first, second, (edges[0], edges[1])),
            first=edges[0],
            second=edges[1],
        )

    def _local(self, features: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
        """How alike the places of two images are, (G, N, N) in [-1, 1] (eq. 2 and 3).

        features: (2 B, E, h, w) or (2 B, E, d, h, w). places: (2 B, 2, 3) or (2 B, 3, 4) of the
        crops, which have `size` pixels.
        """
        grid = [min(self.local_grid, side) for side in features.shape[2:]]
        pool = nn.AdaptiveAvgPool2d if len(grid) == 2 else nn.AdaptiveAvgPool3d
        direction = F.normalize(pool(tuple(grid))(features).flatten(2), dim=1)
        first, second = self._in_graphs(direction)  # (G, N, E, P)
        cosine = torch.einsum("giep,gaeq->giapq", first, second)
        positions = grid_positions(places, size, grid)
        here, there = self._in_graphs(positions)  # (G, N, P, 2 or 3)
        here, there = here[:, :, None], there[:, None]  # every pair of images
        count = self.local_pairs
        terms = [
            by_feature(cosine, count),
            by_feature(cosine.mT, count),
            by_location(cosine, here, there, count),
            by_location(cosine.mT, there, here, count),
        ]
        return torch.stack(terms).mean(0)

    def _drawn(self, like: Tensor, items: Tensor) -> Tensor | None:
        """Gumbel noise of the present scale, like (G, N, N).

        Seeded by step and first item of each graph, so that it is the same however a batch is
        split into passes and processes.
        """
        if self.noise == (0, 0):
            return None
        step = self.steps.item()
        seeds = [(item + step) & (2**63 - 1) for item in items[:: self.graph_size].tolist()]
        uniform = torch.stack(
            [
                torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        ).clamp(1e-9, 1 - 1e-7)
        return (-torch.log(-torch.log(uniform))).to(like) * self.noise_scale


@torch.no_grad()
def _statistics(together: Tensor, embedding: Tensor) -> dict[str, Tensor]:
    """together: (G, N, N) cosines; embedding: (R, E). Scalars for the collapse watch."""
    best = together.argmax(-1) == torch.arange(together.shape[-1], device=together.device)
    spread = F.normalize(embedding, dim=-1).std(0, correction=0).square().sum().sqrt()
    return {"matched": best.float().mean(), "feature_spread": spread}
