"""Matching two graphs over the same items: affinities, a batched solver, and its gradient.

Lawler's quadratic assignment problem with the edges of nearest-neighbour graphs only: N k edges on
each side give (N k)^2 edge affinities, where the usual dense tensor has N^4.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROUNDS = 20  # of the fixed point, and of exchanges; each round gains, or is the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Affinity:
    """How well nodes and edges of G pairs of graphs go together; larger is better.

    nodes: (G, N, N), of node i of the first graph with node a of the second.
    edges: (G, N, k, N, k), of the p-th edge of node i with the q-th edge of node a; None for a
        linear problem.
    first, second: (G, N, k) int64, the node that each edge leads to.
    """

    nodes: Tensor
    edges: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None

    @property
    def ends(self) -> Tensor:
        """(G, N k N k) flat index j N + b of the pair of nodes where each pair of edges ends."""
        assert self.first is not None
        assert self.second is not None
        graphs, size = self.nodes.shape[:2]
        pairs = self.first[:, :, :, None, None] * size + self.second[:, None, None]
        return pairs.reshape(graphs, -1)


def nearest_neighbours(embedding: Tensor, k: int) -> Tensor:
    """The k nearest other nodes by cosine, (G, N, E) -> (G, N, k) int64, nearest first."""
    direction = F.normalize(embedding, dim=-1)
    near = direction @ direction.mT
    own = torch.eye(near.shape[-1], dtype=torch.bool, device=near.device)
    return near.masked_fill(own, -torch.inf).topk(k, dim=-1).indices


def edge_affinity(first: Tensor, second: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
    """Cosines of node differences along the edges of both graphs, (G, N, k, N, k).

    first, second: (G, N, E) nodes. edges: (G, N, k) each (LVM-Med, sec. 3.3).
    """
    sides = []
    for nodes, ends in zip((first, second), edges, strict=True):
        index = ends.flatten(1)[..., None].expand(-1, -1, nodes.shape[-1])
        there = nodes.gather(1, index).unflatten(1, ends.shape[1:])
        sides.append(F.normalize(nodes[:, :, None] - there, dim=-1))
    return torch.einsum("gipe,gaqe->gipaq", *sides)


def value(affinity: Affinity, matching: Tensor) -> Tensor:
    """The objective of (G, N, N) matchings, (G,): affinities of all matched nodes and edges."""
    total = (affinity.nodes * matching).sum((1, 2))
    if affinity.edges is not None:
        there = matching.flatten(1).gather(1, affinity.ends).view_as(affinity.edges)
        total = total + (affinity.edges * there * matching[:, :, None, :, None]).sum((1, 2, 3, 4))
    return total


@torch.no_grad()
def solve(affinity: Affinity) -> Tensor:
    """Permutations (G, N, N) of large value: exact without edges, a good local optimum with them.

    Without edges scipy's assignment. With them the integer-projected fixed point (Leordeanu et al.,
    NIPS 2009, alg. 1) from the linear solution and from the even one, then exchanges of two nodes
    while these gain; the better of the two is taken.
    """
    if affinity.edges is None:
        return _assignment(affinity.nodes)
    graphs, size = affinity.nodes.shape[:2]
    starts = [_assignment(affinity.nodes), torch.full_like(affinity.nodes, 1 / size)]
    double = _repeated(affinity)
    found = _exchanged(double, _fixed_point(double, torch.cat(starts)))
    better = value(double, found).view(2, graphs).argmax(0)
    return found.view(2, graphs, size, size)[better, torch.arange(graphs, device=better.device)]


def identity_wins(affinity: Affinity, weight: float) -> bool:
    """Whether the identity is certainly the only best matching once its nodes gain `weight`.

    With `weight` added to the diagonal of `nodes` and taken off everything else, a permutation
    that moves d nodes loses 2 d weight. It gains at most d times the range of the node affinities,
    and at most the edge affinities that begin or end at a moved node: k edges leave a node and at
    most D arrive, each of a size up to w, and each is lost by the identity and won by the other.
    So the identity wins where 2 weight > range + 2 (k + D) w.
    """
    spread = affinity.nodes.amax((1, 2)) - affinity.nodes.amin((1, 2))
    gain = spread
    if affinity.edges is not None and affinity.first is not None:
        size, k = affinity.first.shape[1:]
        arriving = F.one_hot(affinity.first.flatten(1), size).sum(1).amax(1)
        gain = spread + 2 * (k + arriving) * affinity.edges.abs().amax((1, 2, 3, 4))
    return bool((2 * weight > gain).all())


def matching_loss(affinity: Affinity, *, noise: Tensor | None, weight: float) -> Tensor:
    """Share of nodes that are not matched with themselves, a scalar that can be differentiated.

    The gradient through the solver is that of implicit maximum-likelihood estimation (Niepert et
    al., NeurIPS 2021, alg. 1): solve for affinities plus `noise`, solve again for affinities that
    have moved by `weight` against the gradient of the loss, and take the difference of the two
    matchings, over `weight`, for the nodes and for the products along edges. The second solution
    is the identity for the weights in use, and is then not solved for; see `identity_wins`.

    noise: (G, N, N), added to the node affinities; None for none.
    weight: lambda of LVM-Med, eq. 8.
    """
    edges = affinity.nodes.new_zeros(()) if affinity.edges is None else affinity.edges
    return _Matching.apply(affinity.nodes, edges, affinity, noise, weight)


class _Matching(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, nodes: Tensor, edges: Tensor, affinity: Affinity, noise: Any, weight: float
    ) -> Tensor:
        still = Affinity(
            nodes=(nodes if noise is None else nodes + noise).detach().float(),
            edges=None if affinity.edges is None else edges.detach().float(),
            first=affinity.first,
            second=affinity.second,
        )
        identity = torch.eye(nodes.shape[-1], device=nodes.device).expand_as(still.nodes)
        found, wanted = solve(still), identity
        if not identity_wins(still, weight):
            moved = still.nodes + weight * (2 * identity - 1)
            wanted = solve(
                Affinity(nodes=moved, edges=still.edges, first=still.first, second=still.second)
            )
        scale = 1 / (weight * identity.shape[0] * identity.shape[1])
        ctx.nodes = (found - wanted) * scale
        ctx.edges = None
        if still.edges is not None:
            both = [_products(still, matching) for matching in (found, wanted)]
            ctx.edges = (both[0] - both[1]) * scale
        return 1 - (found * identity).sum() / identity.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        edges = None if ctx.edges is None else gradient * ctx.edges
        return gradient * ctx.nodes, edges, None, None, None


class GraphConvolution(nn.Module):
    """Two rounds of message passing over undirected neighbour graphs (Kipf and Welling, ICLR 2017,
    eq. 2), H' = S H W with S = D^-1/2 (A + I) D^-1/2, added to the nodes: H + S ReLU(S H W1) W2.

    width: E of the nodes, kept by both rounds.

    Differs from the paper: the nodes themselves are added and there is no ReLU at the end. The
    plain form makes neighbours so alike that a matching cannot tell them apart: on pictures of
    shapes it matched .12 of the images after 36,000 samples, this form .74.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """nodes: (G, N, E). edges: (G, N, k) int64. Returns (G, N, E)."""
        size = nodes.shape[1]
        joined = F.one_hot(edges, size).sum(2).clamp(max=1)
        joined = torch.maximum(joined, joined.mT).to(nodes)
        joined = torch.maximum(joined, torch.eye(size, device=nodes.device).to(nodes))
        root = joined.sum(-1).rsqrt()
        spread = root[:, :, None] * joined * root[:, None]
        first, second = self.rounds
        return nodes + spread @ second(F.relu(spread @ first(nodes)))


def _assignment(affinity: Tensor) -> Tensor:
    """The permutations (G, N, N) of the largest sum."""
    from scipy.optimize import linear_sum_assignment

    columns = [linear_sum_assignment(one, maximize=True)[1] for one in affinity.cpu().numpy()]
    chosen = torch.from_numpy(np.stack(columns)).to(affinity.device)
    return F.one_hot(chosen, affinity.shape[-1]).to(affinity)


def _repeated(affinity: Affinity) -> Affinity:
    """Every problem twice, one copy after the other."""
    parts = (affinity.nodes, affinity.edges, affinity.first, affinity.second)
    nodes, edges, first, second = (
        None if part is None else torch.cat([part] * 2) for part in parts
    )
    assert nodes is not None
    return Affinity(nodes=nodes, edges=edges, first=first, second=second)


def _fixed_point(affinity: Affinity, matching: Tensor) -> Tensor:
    """Permutations that a fixed point of the relaxed problem passes through, the best of each."""
    best = _assignment(matching)
    score = value(affinity, best)
    for _ in range(_ROUNDS):
        gradient = _gradient(affinity, matching)
        corner = _assignment(gradient)
        reached = value(affinity, corner)
        gained = reached > score
        best = torch.where(gained[:, None, None], corner, best)
        score = torch.maximum(score, reached)
        slope = (gradient * (corner - matching)).sum((1, 2))
        bend = reached - value(affinity, matching) - slope  # the objective is quadratic on the way
        step = torch.where(bend < 0, (-slope / (2 * bend)).clamp(0, 1), torch.ones_like(slope))
        moved = matching + step[:, None, None] * (corner - matching)
        if torch.equal(moved, matching):
            break
        matching = moved
    return best


def _gradient(affinity: Affinity, matching: Tensor) -> Tensor:
    """Of `value`, (G, N, N)."""
    assert affinity.edges is not None
    flat = matching.flatten(1)
    there = flat.gather(1, affinity.ends).view_as(affinity.edges)
    leaving = (affinity.edges * there).sum((2, 4))
    here = (affinity.edges * matching[:, :, None, :, None]).flatten(1)
    arriving = torch.zeros_like(flat).scatter_add_(1, affinity.ends, here)
    return affinity.nodes + leaving + arriving.view_as(matching)


def _exchanged(affinity: Affinity, matching: Tensor) -> Tensor:
    """Permutations that no exchange of two nodes makes better."""
    size = matching.shape[-1]
    left, right = torch.triu_indices(size, size, 1, device=matching.device)
    order = torch.arange(size, device=matching.device).repeat(len(left), 1)  # (X, N)
    rows = torch.arange(len(left), device=matching.device)
    order[rows, left], order[rows, right] = right, left
    chosen = matching.argmax(-1)  # (G, N)
    score = _values(affinity, chosen[:, None])[:, 0]
    for _ in range(_ROUNDS):
        others = chosen[:, order]  # (G, X, N)
        reached, which = _values(affinity, others).max(1)
        gained = reached > score + 1e-6
        if not gained.any():
            break
        taken = others[torch.arange(len(chosen), device=chosen.device), which]
        chosen = torch.where(gained[:, None], taken, chosen)
        score = torch.maximum(score, reached)
    return F.one_hot(chosen, size).to(matching)


def _values(affinity: Affinity, chosen: Tensor) -> Tensor:
    """The objective of permutations (G, X, N) given as the partner of each node, (G, X)."""
    assert affinity.edges is not None
    assert affinity.first is not None
    assert affinity.second is not None
    graphs, many, size = chosen.shape
    nodes = affinity.nodes[:, None].expand(-1, many, -1, -1).gather(3, chosen[..., None])[..., 0]
    graph = torch.arange(graphs, device=chosen.device)[:, None, None]
    node = torch.arange(size, device=chosen.device)
    edges = affinity.edges.permute(0, 1, 3, 2, 4)[graph, node, chosen]  # (G, X, N, k, k)
    ends = affinity.second[graph, chosen]  # (G, X, N, k), where the partners' edges lead
    index = affinity.first.flatten(1)[:, None].expand(-1, many, -1)
    wanted = chosen.gather(2, index).unflatten(2, affinity.first.shape[1:])  # and where they should
    kept = wanted[..., :, None] == ends[..., None, :]
    return nodes.sum(-1) + (edges * kept).sum((2, 3, 4))


def _products(affinity: Affinity, matching: Tensor) -> Tensor:
    """1 where both ends of a pair of edges are matched, (G, N, k, N, k)."""
    assert affinity.edges is not None
    there = matching.flatten(1).gather(1, affinity.ends).view_as(affinity.edges)
    return there * matching[:, :, None, :, None]
