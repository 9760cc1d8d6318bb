"""The nearest points of a cloud: a k-d tree on the CPU, all distances in blocks on a GPU.

Both find the same points: distances are compared in float64, where the square of a difference of
two float32 numbers is all but exact, and of equally distant points the lowest index comes first.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 2**24  # float64 distances held at a time: 128 MB
_SMALL = 2**15  # distances up to which comparing all is faster than a tree


def checked(points: Tensor, valid: Tensor | None) -> Tensor:
    """Which points count: `valid`, or all. points: (B, P, 3). Returns (B, P) bool.

    Raises a ValueError for other shapes and where a point that counts is not finite.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(
            f"points must be (B, P, 3), got {tuple(points.shape)}; add the batch axis with [None]"
        )
    finite = points.isfinite().all(-1)
    if valid is None:
        valid = torch.ones_like(finite)
    if valid.shape != finite.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be bool of shape {tuple(finite.shape)}, one per point, "
            f"got {valid.dtype} of shape {tuple(valid.shape)}"
        )
    broken = valid & ~finite
    if broken.any():
        raise ValueError(
            f"{int(broken.sum())} of {int(valid.sum())} points are not finite; "
            "leave them out with valid=points.isfinite().all(-1)"
        )
    return valid


@contextmanager
def one_thread() -> Iterator[int]:
    """Keep torch from sharing each operation among threads; gives how many there would be.

    For loops of thousands of small steps: sharing one takes longer than doing it, many times longer
    where other programs hold the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_threads(work: Callable[..., Tensor], *pieces: Iterable) -> Tensor:
    """`torch.cat` of what `work` makes of each piece, with pieces instead of operations shared."""
    with one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(work, *pieces)))


def search(
    queries: Tensor, points: Tensor, count: int, *, radius: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """The `count` nearest points closer than `radius` of one cloud, nearest first.

    queries: (Q, 3), points: (P, 3), P > 0, all finite. Returns distance (Q, count) float64 and
    index (Q, count); where fewer points are found, the distance is infinite and the index repeats
    the nearest one (0 where there is none). No gradient.
    """
    queries, points = queries.detach().double(), points.detach().double()
    most = min(count, len(points))
    if points.is_cuda or len(queries) * len(points) <= _SMALL:
        distance, index = in_blocks(queries, points, most)
    else:
        distance, index = in_tree(queries, points, most, radius)
    if most < count:
        distance = F.pad(distance, (0, count - most), value=torch.inf)
        index = F.pad(index, (0, count - most))
    found = distance < radius
    if found.all():
        return distance, index
    first = index[:, :1] * found[:, :1]
    return distance.masked_fill(~found, torch.inf), torch.where(found, index, first)


def in_blocks(queries: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`search` without a radius by all distances; count <= P. Batches of `queries` bound memory."""
    distances, indices = [], []
    for block in queries.split(max(1, _CELLS // len(points))):
        apart = torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist")  # (q, P)
        limit = apart.topk(count, largest=False).values[:, -1:]
        closer, tied = apart < limit, apart == limit
        spare = count - closer.sum(1, keepdim=True)
        chosen = closer | (tied & (tied.cumsum(1) <= spare))  # `count` in each row
        index = chosen.nonzero()[:, 1].view(len(block), count)  # ascending
        distance, order = apart.gather(1, index).sort(dim=1, stable=True)
        distances.append(distance)
        indices.append(index.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def in_tree(
    queries: Tensor, points: Tensor, count: int, radius: float = float("inf")
) -> tuple[Tensor, Tensor]:
    """`search` by SciPy's k-d tree, on as many threads as torch has; float64 on the CPU.

    A tree gives equally distant points in no order, and drops any of them behind the last place.
    So it is asked for one more, rows with a tie at the end are asked for more until it ends, and
    rows with ties are sorted. A place that thousands of points share makes that slow.
    Beyond `radius` distances are infinite and indices P.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(points.numpy())

    def ask(asked: Tensor, most: int) -> tuple[Tensor, Tensor]:
        distance, index = tree.query(
            asked.numpy(), k=most, distance_upper_bound=radius, workers=torch.get_num_threads()
        )
        return torch.from_numpy(distance), torch.from_numpy(index)

    more = count + 1  # with two columns or more the answer keeps its shape
    distance, index = ask(queries, more)
    found = distance < torch.inf
    open_ended = (distance[:, -2] == distance[:, -1]) & found[:, -1]
    tied = ((distance[:, 1:] == distance[:, :-1]) & found[:, 1:]).any(1)
    distance, index = distance[:, :count].contiguous(), index[:, :count].contiguous()
    rows = tied.nonzero()[:, 0]
    distance[rows], index[rows] = _by_index(distance[rows], index[rows], count)
    rows = open_ended.nonzero()[:, 0]
    while len(rows):
        more = min(2 * more, len(points) + 1)
        left = []
        for part in rows.split(max(1, _CELLS // more)):
            far, which = ask(queries[part], more)
            distance[part], index[part] = _by_index(far, which, count)
            unended = (far[:, -1] == far[:, count - 1]) & (far[:, -1] < torch.inf)
            left.append(part[unended])
        rows = torch.cat(left)
    return distance, index


def _by_index(distance: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` of each row by distance, then by index."""
    index, order = index.sort(dim=1)
    distance, nearest = distance.gather(1, order).sort(dim=1, stable=True)
    return distance[:, :count], index.gather(1, nearest)[:, :count]
