import numpy as np
import torch
from scipy import ndimage
from sklearn.cluster import DBSCAN

from medssl.data.clusters import cloud_clusters, grid_clusters


def same_groups(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Whether two labelings part the points alike, whatever the groups are called."""
    pairs = set(zip(ours.flatten().tolist(), theirs.ravel().tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def flat_grid(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros(height, width)]).float()


def test_a_flat_grid_falls_into_the_connected_parts_that_scipy_finds():
    valid = torch.rand(40, 60, generator=torch.Generator().manual_seed(0)) < 0.35
    labels = grid_clusters(flat_grid(40, 60), valid, distance=2.0)
    theirs, count = ndimage.label(valid.numpy(), structure=np.ones((3, 3)))
    assert count > 20
    assert same_groups(labels[valid], theirs[valid.numpy()])
    assert labels[~valid].eq(-1).all()


def test_a_step_in_depth_parts_what_touches_in_the_picture():
    xyz = flat_grid(10, 10)
    xyz[2, :, 5:] += 8
    valid = torch.ones(10, 10, dtype=torch.bool)
    assert grid_clusters(xyz, valid, distance=2.0).unique().tolist() == [0, 1]
    assert grid_clusters(xyz, valid, distance=20.0).unique().tolist() == [0]


def test_labels_are_in_the_order_of_size():
    valid = torch.zeros(5, 20, dtype=torch.bool)
    valid[:, :2], valid[:, 5:12], valid[:, 15:18] = True, True, True
    labels = grid_clusters(flat_grid(5, 20), valid, distance=2.0)
    assert labels[0, [0, 5, 15]].tolist() == [2, 0, 1]


def test_a_free_cloud_falls_into_the_groups_that_dbscan_finds():
    generator = torch.Generator().manual_seed(1)
    balls = [
        10 * torch.randn(3, generator=generator) + torch.rand(n, 3, generator=generator)
        for n in (400, 200, 50)
    ]
    points = torch.cat(balls)
    labels = cloud_clusters(points, distance=0.8)
    theirs = DBSCAN(eps=0.8, min_samples=1).fit(points.numpy()).labels_
    assert len(set(theirs)) == 3
    assert same_groups(labels, theirs)
    assert labels.bincount().tolist() == [400, 200, 50]


def test_one_point_is_a_group():
    assert cloud_clusters(torch.zeros(1, 3), distance=1.0).tolist() == [0]
