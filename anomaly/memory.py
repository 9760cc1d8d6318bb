"""Memory banks: which normal features to keep, and which of them is nearest."""

import numpy as np
import torch
from torch import Tensor

_ACTIVE = 4096  # points among which picks are made at a time
_PRODUCT = 1 << 21  # entries of a matrix product, which should stay in the processor's cache
_ROWS = 1 << 16  # rows of a bank that are brought to the queries' precision at a time
_MANY = 64  # candidates of a query, beyond which a whole search is cheaper than looking at each


def greedy_coreset(
    features: Tensor, count: int, *, seed: int = 0, bank: Tensor | None = None
) -> Tensor:
    """Exact greedy k-centre: each pick is the point farthest from all picks so far.

    Gonzalez, Theoretical Computer Science 1985, https://doi.org/10.1016/0304-3975(85)90224-5.

    A point's distance to the picks only falls, so an old one bounds it from above. Only the
    points with the largest bounds are brought up to date, by one matrix product with the picks
    they have not seen, and picks are made among them for as long as no other bound is larger.
    The result is that of the naive loop with float64 distances, whatever the dtype stored: the
    products are float64 and only name the nearest pick, and the distance to it is taken from the
    differences, so that equal points tie and the lowest index wins.

    features: (N, E), on any device; may be memory-mapped, and is never copied whole.
    count: how many to pick, 1 to N.
    seed: of the first pick.
    bank: (M, E) points that count as picked before, which leave nothing to the seed.
    Returns (count,) int64 indices in the order of picking, on the features' device.
    """
    if features.ndim != 2 or not 1 <= count <= len(features):
        raise ValueError(
            f"features must be (N, E) with count from 1 to N, got {tuple(features.shape)} "
            f"and count {count}"
        )
    cover = _Cover(features, count)
    if bank is None:
        generator = torch.Generator().manual_seed(seed)
        cover.add(torch.randint(len(features), (1,), generator=generator).to(features.device))
        cover.refresh(torch.arange(len(features), device=features.device))
    else:
        cover.begin(bank)
    if not cover.bound.isfinite().all():
        raise ValueError("features must be finite; leave rows with NaN or infinity out")
    while cover.num_picks < count:
        cover.round()
    return cover.picks


def nearest(
    queries: Tensor, bank: Tensor, k: int = 1, *, block_bytes: int = 1 << 25
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of the bank for each query, nearest first.

    Candidates come from matrix products in the queries' dtype; the distances to them are taken
    from the differences. Where rounding could have chosen the wrong candidates, float64 chooses
    again. For the one nearest row of the same bank again and again, see `Shortlist`.

    queries: (Q, E) float32 or float64; bank: (M, E), of one device; of lower precision it counts
        as what it holds.
    block_bytes: memory for the products, beside one block of queries.
    Returns distances (Q, k), and indices (Q, k) into the bank.
    """
    _check_widths(queries, bank)
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be from 1 to the {len(bank)} rows of the bank, got {k}")
    origin = bank.mean(0, dtype=queries.dtype)
    rows = max(1, block_bytes // (queries.element_size() * max(bank.shape)))
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        chosen = _choose(block, bank, origin, k)
        found = bank[chosen].to(block.dtype)  # (n, k, E)
        distance = (block[:, None] - found).square_().sum(2).sqrt_()
        distance, order = distance.sort(1)
        distances[start : start + rows] = distance
        indices[start : start + rows] = chosen.gather(1, order)
    return distances, indices


class Shortlist:
    """A bank on the CPU, prepared for finding the one nearest row of many queries fast.

    Rows and queries are rounded to `dtype`, and one matrix product gives the squared distances
    between the rounded ones. By the triangle inequality a true distance lies within the lengths of
    what the two lost in rounding; every row that could be the nearest is then compared exactly.
    The squared lengths are columns of the product, in three parts that together have the digits of
    float32, so that it ends in a distance and loses digits of that only.

    It holds the bank a second time, in `dtype`.

    bank: (M, E) float32 or float16.
    dtype: what products are fast in: bfloat16 where the processor has instructions for it.
    """

    def __init__(self, bank: Tensor, *, dtype: torch.dtype | None = None) -> None:
        self.bank, self.version = bank, _version(bank)
        self.dtype = dtype or (torch.bfloat16 if _has_bfloat16() else torch.float32)
        self.origin = bank.mean(0, dtype=torch.float32)
        parts, self.lost, self.reach = [], 0.0, 0.0
        for rows in bank.split(_ROWS):
            rounded, length, lost = self._rounded(rows)
            parts.append(torch.cat([rounded, torch.ones_like(length), length], dim=1))
            self.lost = max(self.lost, float(lost.amax()))
            self.reach = max(self.reach, float((-2 * length.float().sum(1)).amax()) ** 0.5)
        self.rows = torch.cat(parts)  # (M, E + 6)

    def is_of(self, bank: Tensor) -> bool:
        """Whether it was prepared from this tensor, as it is now."""
        return bank is self.bank and _version(bank) == self.version

    def nearest(self, queries: Tensor, *, block_bytes: int = 1 << 24) -> tuple[Tensor, Tensor]:
        """Distances (Q, 1) and indices (Q, 1) into the bank, as of `nearest` with k = 1.

        queries: (Q, E) float32, finite.
        block_bytes: memory for the products, and again for the rows that are looked at.
        """
        _check_widths(queries, self.bank)
        rows = max(1, block_bytes // (self.rows.element_size() * max(self.rows.shape)))
        pairs = max(1, block_bytes // (8 * self.bank.shape[1]))
        distances, indices = queries.new_empty(len(queries)), torch.empty(len(queries)).long()
        for start in range(0, len(queries), rows):
            block = queries[start : start + rows]
            here = slice(start, start + len(block))
            query, row, whole = self._pairs(block)
            parts = zip(query.split(pairs), row.split(pairs), strict=True)
            squares = [(block[q] - self.bank[r].float()).square_().sum(1) for q, r in parts]
            first = _first_smallest(query, torch.cat(squares))
            distances[here][query[first]] = torch.cat(squares)[first].sqrt_()
            indices[here][query[first]] = row[first]
            if len(whole):
                found = nearest(block[whole], self.bank)
                distances[here][whole], indices[here][whole] = found[0][:, 0], found[1][:, 0]
        return distances[:, None], indices[:, None]

    def _pairs(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and the rows that may be nearest to them, (P,) each, sorted; and the queries that
        are in no pair, as these would be too many, or as their products are not finite."""
        rounded, length, lost = self._rounded(queries)
        product = torch.cat([rounded, length, torch.ones_like(length)], dim=1) @ self.rows.mT
        own = (-2 * length.float().sum(1)).sqrt()
        slack = _rounding(queries, own + self.reach)
        unit = torch.finfo(self.dtype).eps
        smallest = (-2 * product.amax(1).float() * (1 + unit)).clamp_min(0) + slack
        limit = (smallest.sqrt() + 2 * (lost + self.lost)).square() + slack
        lowest = (-0.5 * limit * (1 + 4 * unit)).to(self.dtype)  # low enough when rounded up
        near = product >= lowest[:, None]  # (n, M)
        place = torch.from_numpy(np.flatnonzero(near.numpy()))  # seven times as fast as torch's
        query, row = place // len(self.bank), place % len(self.bank)
        count = query.bincount(minlength=len(queries))
        whole = (count > _MANY) | (count == 0)
        few = ~whole[query]
        return query[few], row[few], whole.nonzero()[:, 0]

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (n, E) about the origin in `dtype`; minus half its squared length in three parts
        (n, 3); and the length of what was lost in rounding (n,)."""
        x = x.float() - self.origin
        rounded = x.to(self.dtype)
        back = rounded.float()
        rest, parts = back.square().sum(1) / -2, []
        for _ in range(3):
            parts.append(rest.to(self.dtype))
            rest = rest - parts[-1].float()
        return rounded, torch.stack(parts, dim=1), (x - back).norm(dim=1)


class RepeatedSearch:
    """The one nearest row, query after query, of a bank that seldom changes.

    What a `Shortlist` prepares is kept from call to call, and made anew when the bank has changed.
    """

    def __init__(self) -> None:
        self._shortlist: Shortlist | None = None

    def nearest(self, queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (Q, 1) and indices (Q, 1) into the bank (M, E), as of `nearest` with k = 1."""
        if queries.device.type != "cpu":
            return nearest(queries, bank)
        if self._shortlist is None or not self._shortlist.is_of(bank):
            self._shortlist = Shortlist(bank)
        return self._shortlist.nearest(queries)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where torch counts that."""
    return 0 if tensor.is_inference() else tensor._version


def _has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _check_widths(queries: Tensor, bank: Tensor) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"queries (Q, E) and bank (M, E) must agree in E, got {tuple(queries.shape)} "
            f"and {tuple(bank.shape)}"
        )


def _first_smallest(owner: Tensor, values: Tensor) -> Tensor:
    """Where each owner's smallest value is, the first of equals. owner: (P,), sorted."""
    order = values.sort(stable=True).indices
    order = order[owner[order].sort(stable=True).indices]
    counts = owner.unique_consecutive(return_counts=True)[1]
    return order[counts.cumsum(0) - counts]


def _choose(x: Tensor, bank: Tensor, origin: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the k nearest rows of the bank, in no order."""
    if k == len(bank):
        return torch.arange(k, device=x.device).expand(len(x), k)
    values, indices, reach = _closest(x, bank, origin, k + 1)
    chosen = indices[:, :k].clone()
    rounding = _rounding(x, (x - origin).norm(dim=1) + reach)
    doubtful = (values[:, k] - values[:, k - 1] <= 2 * rounding).nonzero()[:, 0]
    if len(doubtful) == 0 or x.dtype == torch.float64:
        return chosen
    for some in doubtful.split(max(1, len(x) // 4)):  # keeps to the memory of one block
        chosen[some] = _closest(x[some].double(), bank, origin.double(), k)[1]
    return chosen


def _closest(x: Tensor, bank: Tensor, origin: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Proximities (n, k) and indices (n, k) of the k nearest rows, ascending, and the largest
    distance of a row to the origin; some of the bank at a time."""
    values, indices = x.new_empty(len(x), 0), torch.empty(len(x), 0).long().to(x.device)
    reach = x.new_zeros(())
    for start in range(0, len(bank), _ROWS):
        centers = bank[start : start + _ROWS].to(x.dtype) - origin
        reach = torch.maximum(reach, centers.norm(dim=1).amax())
        proximity = _proximity(x - origin, centers)
        near = proximity.topk(min(k, len(centers)), dim=1, largest=False)
        values = torch.cat([values, near.values], dim=1)
        indices = torch.cat([indices, near.indices + start], dim=1)
        values, best = values.topk(min(k, values.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, best)
    return values, indices, reach


def _rounding(x: Tensor, reach: Tensor) -> Tensor:
    """What a squared distance (n,) from a matrix product may be off, where the lengths of the two
    vectors (n, E) add up to `reach` (n,)."""
    return (x.shape[1] ** 0.5 + 8) * _precision(x) * reach.square()


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

    def begin(self, bank: Tensor) -> None:
        """Take the rows of a bank (M, E) for picks that every point has seen."""
        every = torch.arange(len(self.features), device=self.features.device)
        for block in every.split(_ACTIVE):
            x = self.rows(block)
            found = nearest(x, bank)[1][:, 0]
            self.bound[block] = _squared_distance(x, bank[found].double())

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
