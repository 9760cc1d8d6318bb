"""Memory banks: which normal features to keep, and which of them is nearest."""

import numpy as np
import torch
from torch import Tensor

_ACTIVE = 4096  # points among which picks are made at a time
_PRODUCT = 1 << 21  # entries of a matrix product, which should stay in the processor's cache


def greedy_coreset(features: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Exact greedy k-centre (Gonzalez 1985): each pick is the point farthest from all picks so far.

    A point's distance to the picks only falls, so an old one bounds it from above. Only the
    points with the largest bounds are brought up to date, by one matrix product with the picks
    they have not seen, and picks are made among them for as long as no other bound is larger.
    The result is that of the naive loop with float64 distances, whatever the dtype stored: the
    products are float64 and only name the nearest pick, and the distance to it is taken from the
    differences, so that equal points tie and the lowest index wins.

    features: (N, E), on any device; may be memory-mapped, and is never copied whole.
    count: how many to pick, 1 to N.
    seed: of the first pick.
    Returns (count,) int64 indices in the order of picking, on the features' device.
    """
    if features.ndim != 2 or not 1 <= count <= len(features):
        raise ValueError(
            f"features must be (N, E) with count from 1 to N, got {tuple(features.shape)} "
            f"and count {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    cover = _Cover(features, count)
    cover.add(torch.randint(len(features), (1,), generator=generator).to(features.device))
    cover.refresh(torch.arange(len(features), device=features.device))
    if not cover.bound.isfinite().all():
        raise ValueError("features must be finite; leave rows with NaN or infinity out")
    while cover.num_picks < count:
        cover.round()
    return cover.picks


def nearest(
    queries: Tensor, bank: Tensor, k: int = 1, *, block_bytes: int = 1 << 25
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank for each query, nearest first.

    Candidates come from matrix products in the given dtype; the distances to them are taken from
    the differences. Where rounding could have chosen the wrong candidates, float64 chooses again.

    queries: (Q, E); bank: (M, E), of one device and dtype.
    block_bytes: memory for the products, beside one block of queries.
    Returns distances (Q, k), and indices (Q, k) into the bank.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries (Q, E) and bank (M, E) must agree in E, got {tuple(queries.shape)} "
            f"and {tuple(bank.shape)}"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be from 1 to the {len(bank)} rows of the bank, got {k}")
    origin = bank.mean(0)
    centers = bank - origin
    rows = max(1, block_bytes // (centers.element_size() * max(bank.shape)))
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        chosen = _choose(block - origin, centers, k)
        distance = (block[:, None] - bank[chosen]).square_().sum(2).sqrt_()
        distance, order = distance.sort(1)
        distances[start : start + rows] = distance
        indices[start : start + rows] = chosen.gather(1, order)
    return distances, indices


def _choose(x: Tensor, centers: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k nearest centers, in no order."""
    if k == len(centers):
        return torch.arange(k, device=x.device).expand(len(x), k)
    found = _proximity(x, centers).topk(k + 1, dim=1, largest=False)
    chosen = found.indices[:, :k].clone()
    reach = x.norm(dim=1) + centers.norm(dim=1).amax()
    rounding = (x.shape[1] ** 0.5 + 8) * _precision(x) * reach.square()
    gap = found.values[:, k] - found.values[:, k - 1]
    doubtful = (gap <= 2 * rounding).nonzero()[:, 0]
    if len(doubtful) == 0 or x.dtype == torch.float64:
        return chosen
    wide = centers.double()
    for some in doubtful.split(max(1, len(x) // 4)):  # keeps to the memory of one block
        proximity = _proximity(x[some].double(), wide)
        chosen[some] = proximity.topk(k, dim=1, largest=False).indices
    return chosen


def _precision(x: Tensor) -> float:
    """Relative rounding of a matrix product, which torch may be allowed to make coarser."""
    exact = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return torch.finfo(x.dtype if exact else torch.bfloat16).eps


class _Cover:
    """Picks so far, and for each point an upper bound of its distance to the nearest.

    bound: (N,) float64 squared distances, exact after the first `seen[i]` picks; -1 once picked.
    """

    def __init__(self, features: Tensor, count: int) -> None:
        device = features.device
        self.features = features
        some = features[:: max(1, len(features) // _ACTIVE)]
        self.origin = some.double().mean(0)  # products of short vectors cancel less
        self.picks = torch.zeros(count, dtype=torch.int64, device=device)
        self.centers = torch.zeros(count, features.shape[1], dtype=torch.float64, device=device)
        self.num_picks = 0
        self.bound = torch.full((len(features),), torch.inf, dtype=torch.float64, device=device)
        self.seen = torch.zeros(len(features), dtype=torch.int64, device=device)

    def rows(self, indices: Tensor) -> Tensor:
        """Features as float64, (n, E)."""
        return self.features[indices].double()

    def add(self, new: Tensor) -> None:
        """Append picks (n,); their own bound becomes -1, so that none is picked twice."""
        span = slice(self.num_picks, self.num_picks + len(new))
        self.picks[span] = new
        self.centers[span] = self.rows(new) - self.origin
        self.num_picks += len(new)
        self.bound[new] = -1.0

    def refresh(self, indices: Tensor) -> None:
        """Bring the bounds of these points up to date with every pick."""
        indices = indices[self.seen[indices].argsort()]  # a block needs what its stalest row missed
        seen = self.seen[indices].tolist()
        start = 0
        while start < len(indices) and seen[start] < self.num_picks:
            unseen = self.centers[seen[start] : self.num_picks]
            block = indices[start : start + max(1, _PRODUCT // max(unseen.shape))]
            start += len(block)
            x = self.rows(block)
            found = self.num_picks - len(unseen) + _proximity(x - self.origin, unseen).argmin(1)
            distance = _squared_distance(x, self.rows(self.picks[found]))
            self.bound[block] = torch.minimum(self.bound[block], distance)
        self.seen[indices] = self.num_picks

    def round(self) -> None:
        """Pick among the points with the largest bounds until another could be farther."""
        indices, limit, first_outside = self.candidates()
        self.refresh(indices)
        active = indices[self.bound[indices] >= limit]  # in order
        x = self.rows(active)
        around = x - self.origin
        proximity = _proximity(around, around) + around.square().sum(1, keepdim=True)
        picked, bound = _pick(
            x.cpu(),
            proximity.cpu(),
            self.bound[active].cpu(),
            limit=limit,
            last=int((active < first_outside).sum()),
            count=len(self.picks) - self.num_picks,
        )
        self.bound[active] = bound.to(x.device)
        self.add(active[picked])
        self.seen[active] = self.num_picks

    def candidates(self) -> tuple[Tensor, float, int]:
        """The points with the largest bounds, in order; and what no other point exceeds.

        The lowest index wins ties; the last value is the first tied index that was left out.
        """
        count = min(_ACTIVE, len(self.bound))
        limit = self.bound.topk(count).values[-1]
        above = (self.bound > limit).nonzero()[:, 0]
        tied = (self.bound == limit).nonzero()[:, 0]
        room = count - len(above)
        chosen = torch.cat([above, tied[:room]]).sort().values
        first_outside = int(tied[room]) if len(tied) > room else len(self.bound)
        return chosen, float(limit), first_outside


def _proximity(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances (n, M) less the squared length of each row of `x`."""
    return torch.addmm(centers.square().sum(1), x, centers.mT, alpha=-2)


def _pick(
    x: Tensor, proximity: Tensor, bound: Tensor, *, limit: float, last: int, count: int
) -> tuple[list[int], Tensor]:
    """The naive loop among a few points, for as long as the largest bound exceeds `limit`.

    x: (A, E) float64; proximity: (A, A), their squared distances but for rounding.
    last: how many points may be picked at `limit` itself, as no equal one comes before them.
    Returns positions in order of picking, at most `count`, and the bounds (A,) after them.
    """
    picked: list[int] = []
    values, near = bound.numpy(), proximity.numpy()
    while len(values) and len(picked) < count:
        j = int(values.argmax())  # the lowest position of equals
        if values[j] < limit or (values[j] == limit and j >= last):
            break
        picked.append(j)
        values[j] = -1.0
        closer = torch.from_numpy(np.flatnonzero(near[j] < values))
        distance = _squared_distance(x[closer], x[j])
        bound[closer] = torch.minimum(bound[closer], distance)
    return picked, bound


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Row by row (n,), from the differences: equal rows have equal distances, whatever n is."""
    return (x - y).square_().sum(1)
