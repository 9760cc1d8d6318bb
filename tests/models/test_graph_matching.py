"""Graph matching against brute force, pygmtools, and a definition written as loops."""

from itertools import permutations

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl.models.graph_matching import (
    Affinity,
    GraphConvolution,
    edge_affinity,
    identity_wins,
    matching_loss,
    nearest_neighbours,
    solve,
    value,
)


def problem(graphs: int, size: int, k: int, *, seed: int = 0, noise: float = 1.0) -> Affinity:
    """Two noisy views of the same nodes."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(graphs, size, 16, generator=generator)
    first, second = (
        nodes + noise * torch.randn(nodes.shape, generator=generator) for _ in range(2)
    )
    return between(first, second, k)


def between(first: torch.Tensor, second: torch.Tensor, k: int) -> Affinity:
    edges = nearest_neighbours(first, k), nearest_neighbours(second, k)
    return Affinity(
        nodes=F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT,
        edges=edge_affinity(first, second, edges),
        first=edges[0],
        second=edges[1],
    )


def dense(affinity: Affinity, graph: int) -> np.ndarray:
    """Lawler's matrix (N^2, N^2), row i N + a, by plain loops over pairs of edges."""
    size, k = affinity.first.shape[1:]
    matrix = np.diag(affinity.nodes[graph].numpy().ravel().astype(np.float64))
    for i in range(size):
        for p in range(k):
            j = int(affinity.first[graph, i, p])
            for a in range(size):
                for q in range(k):
                    b = int(affinity.second[graph, a, q])
                    matrix[i * size + a, j * size + b] += float(affinity.edges[graph, i, p, a, q])
    return matrix


def test_neighbours_are_those_of_largest_cosine_without_oneself():
    nodes = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    found = nearest_neighbours(nodes, 3)
    for graph in range(2):
        for i in range(7):
            cosine = [float(F.cosine_similarity(nodes[graph, i], n, dim=0)) for n in nodes[graph]]
            order = sorted((j for j in range(7) if j != i), key=lambda j: -cosine[j])
            assert found[graph, i].tolist() == order[:3]


def test_edge_affinities_are_cosines_of_differences():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 1, 5, 4, generator=generator)
    edges = nearest_neighbours(first, 2), nearest_neighbours(second, 2)
    found = edge_affinity(first, second, edges)
    for i, p, a, q in np.ndindex(5, 2, 5, 2):
        along = first[0, i] - first[0, edges[0][0, i, p]]
        other = second[0, a] - second[0, edges[1][0, a, q]]
        wanted = F.cosine_similarity(along, other, dim=0)
        assert found[0, i, p, a, q] == pytest.approx(float(wanted), abs=1e-5)


def test_the_value_is_the_quadratic_form():
    affinity = problem(3, 6, 2)
    matching = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2))
    for graph in range(3):
        x = matching[graph].numpy().ravel().astype(np.float64)
        quadratic = dense(affinity, graph) - np.diag(affinity.nodes[graph].numpy().ravel())
        wanted = x @ quadratic @ x + affinity.nodes[graph].numpy().ravel() @ x
        assert float(value(affinity, matching)[graph]) == pytest.approx(wanted, rel=1e-4)


def test_small_problems_are_solved_to_the_optimum():
    affinity = problem(20, 6, 2, noise=2.0)
    found = value(affinity, solve(affinity))
    every = torch.eye(6)[torch.tensor(list(permutations(range(6))))]
    best = torch.stack([value(affinity, one.expand(20, -1, -1)) for one in every]).amax(0)
    assert (found > best - 1e-5).float().mean() >= 0.95
    assert (found > 0.97 * best).all()


def test_without_edges_it_is_the_linear_assignment():
    nodes = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(3))
    found = solve(Affinity(nodes=nodes))
    every = torch.eye(6)[torch.tensor(list(permutations(range(6))))]
    best = torch.stack([(nodes * one).sum((1, 2)) for one in every]).amax(0)
    torch.testing.assert_close((nodes * found).sum((1, 2)), best)


@pytest.mark.parametrize("size", [16, 32])
def test_a_permuted_graph_without_noise_is_recovered(size):
    generator = torch.Generator().manual_seed(size)
    nodes = torch.randn(6, size, 16, generator=generator)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(6)])
    shuffled = nodes.gather(1, order[..., None].expand_as(nodes))
    found = solve(between(nodes, shuffled, 5))
    assert torch.equal(found.argmax(1), order)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_solutions_are_worth_at_least_those_of_pygmtools(seed):
    pygmtools = pytest.importorskip("pygmtools", reason="pygmtools is not installed")
    affinity = problem(2, 10, 3, seed=seed, noise=2.0)
    ours = value(affinity, solve(affinity))
    for graph in range(2):
        matrix = dense(affinity, graph)
        matrix = torch.from_numpy((matrix + matrix.T) / 2)
        theirs = []
        for method in (pygmtools.ipfp, pygmtools.rrwm, pygmtools.sm):
            soft = method(matrix, n1=10, n2=10, backend="pytorch")
            hard = pygmtools.hungarian(soft, backend="pytorch").float().numpy()
            for x in (hard.ravel(), hard.T.ravel()):  # whichever way its vectors run
                theirs.append(float(x @ matrix.numpy() @ x))
        assert float(ours[graph]) >= max(theirs) - 1e-4


def test_a_heavy_diagonal_is_known_to_win_and_does():
    affinity = problem(50, 16, 5, noise=3.0)
    assert identity_wins(affinity, 80.0)
    assert not identity_wins(affinity, 0.1)
    moved = affinity.nodes + 80 * (2 * torch.eye(16) - 1)
    found = solve(
        Affinity(nodes=moved, edges=affinity.edges, first=affinity.first, second=affinity.second)
    )
    assert torch.equal(found, torch.eye(16).expand(50, -1, -1))


def test_what_is_known_to_win_is_never_beaten():
    """The bound against every permutation, at the smallest weight it lets pass."""
    every = torch.eye(5)[torch.tensor(list(permutations(range(5))))]
    for seed in range(30):
        affinity = problem(1, 5, 2, seed=seed, noise=3.0)
        weight = next(w for w in np.linspace(0, 20, 400) if identity_wins(affinity, w))
        moved = Affinity(
            nodes=affinity.nodes + weight * (2 * torch.eye(5) - 1),
            edges=affinity.edges,
            first=affinity.first,
            second=affinity.second,
        )
        values = torch.cat([value(moved, one[None]) for one in every])
        assert int(values.argmax()) == 0  # the first permutation is the identity


def test_the_loss_counts_wrong_nodes_and_its_gradient_is_the_difference_of_matchings():
    nodes = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]], requires_grad=True)
    loss = matching_loss(Affinity(nodes=nodes), noise=None, weight=80.0)
    assert loss.item() == pytest.approx(2 / 3)
    loss.backward()
    wanted = torch.tensor([[[-1.0, 1, 0], [1, -1, 0], [0, 0, 0]]]) / 80 / 3
    torch.testing.assert_close(nodes.grad[0], wanted[0])


def test_a_small_weight_solves_a_second_time():
    """Where the identity is not certain to win: the moved problem's own solution counts."""
    nodes = torch.tensor([[[0.0, 5.0], [5.0, 0.0]]], requires_grad=True)
    loss = matching_loss(Affinity(nodes=nodes), noise=None, weight=1.0)
    loss.backward()
    assert loss.item() == 1
    assert not nodes.grad.any()  # 2 on the diagonal do not outweigh 10 beside it


def test_the_gradient_leads_to_less_expected_loss():
    """Against finite differences of the loss under noise, along the gradient's own direction."""
    generator = torch.Generator().manual_seed(4)
    first = torch.randn(1, 8, 16, generator=generator)
    second = first + 1.5 * torch.randn(first.shape, generator=generator)
    gumbel = -torch.log(-torch.log(torch.rand(400, 1, 8, 8, generator=generator)))

    def expected(nodes: torch.Tensor) -> torch.Tensor:
        edges = between(first, second, 3)
        affinity = Affinity(nodes=nodes, edges=edges.edges, first=edges.first, second=edges.second)
        losses = [matching_loss(affinity, noise=one, weight=80.0) for one in gumbel]
        return torch.stack(losses).mean()

    nodes = between(first, second, 3).nodes.clone().requires_grad_()
    before = expected(nodes)
    before.backward()
    direction = nodes.grad / nodes.grad.norm()
    after = expected((nodes - 1.0 * direction).detach())
    assert after < before - 0.03


def test_message_passing_is_the_normalized_sum_over_neighbours():
    torch.manual_seed(0)
    layer = GraphConvolution(4)
    nodes = torch.randn(1, 6, 4)
    edges = nearest_neighbours(nodes, 2)
    graph = networkx.Graph([(i, int(j)) for i in range(6) for j in edges[0, i]])
    adjacency = networkx.to_numpy_array(graph, nodelist=range(6)) + np.eye(6)
    root = np.diag(adjacency.sum(1) ** -0.5)
    spread = root @ adjacency @ root
    first, second = (linear.weight.detach().numpy() for linear in layer.rounds)
    wanted = nodes[0].numpy()
    wanted = wanted + spread @ np.maximum(spread @ wanted @ first.T, 0) @ second.T
    found = layer(nodes, edges)[0].detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
