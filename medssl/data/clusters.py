"""Groups of points that hang together."""

import torch
from torch import Tensor

_NEIGHBORS = 8  # edges per point of a free cloud: enough to link a surface


def grid_clusters(xyz: Tensor, valid: Tensor, distance: float) -> Tensor:
    """Labels (H, W) of an organized cloud (3, H, W): 0, 1, ... by size, -1 where not valid.

    Pixels that touch, corners included, belong together where their points lie within `distance`.
    """
    height, width = valid.shape
    index = torch.arange(height * width).reshape(height, width)
    edges = []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = slice(0, height - down), slice(max(0, -right), width - max(0, right))
        there = slice(down, height), slice(max(0, right), width + min(0, right))
        near = (xyz[:, here[0], here[1]] - xyz[:, there[0], there[1]]).norm(dim=0) <= distance
        near &= valid[here] & valid[there]
        edges.append(torch.stack([index[here][near], index[there][near]]))
    labels = _components(torch.cat(edges, 1), valid.flatten())
    return labels.reshape(height, width)


def cloud_clusters(points: Tensor, distance: float) -> Tensor:
    """Labels (P,) of a free cloud (P, 3): 0, 1, ... by size.

    Each point is tied to its eight nearest within `distance`.
    """
    from scipy.spatial import cKDTree

    count = min(_NEIGHBORS + 1, len(points))
    found = cKDTree(points.double().numpy()).query(
        points.double().numpy(), k=range(1, count + 1), distance_upper_bound=distance
    )[1]
    to = torch.from_numpy(found)
    start = torch.arange(len(points))[:, None].expand_as(to)
    known = to < len(points)
    edges = torch.stack([start[known], to[known]])
    return _components(edges, torch.ones(len(points), dtype=torch.bool))


def _components(edges: Tensor, valid: Tensor) -> Tensor:
    """Labels of nodes, the largest component first; -1 where not valid. edges: (2, E)."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(valid)
    weights = np.ones(edges.shape[1], dtype=np.int8)
    graph = coo_matrix((weights, tuple(edges.numpy())), shape=(count, count))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    labels = torch.where(valid, labels, -1)
    sizes = torch.bincount(labels[valid], minlength=1)
    rank = torch.empty_like(sizes)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(len(sizes))
    return torch.where(valid, rank[labels.clamp_min(0)], -1)
