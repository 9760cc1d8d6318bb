import numpy as np
import pytest
import torch

from anomaly import memory
from anomaly.memory import Shortlist, greedy_coreset, nearest


def naive(features: torch.Tensor, count: int, first: int) -> list[int]:
    """The textbook loop: one pass over every point per pick, in float64."""
    points = features.double().numpy()
    distance = np.full(len(points), np.inf)
    picks = [first]
    while True:
        distance = np.minimum(distance, ((points - points[picks[-1]]) ** 2).sum(1))
        distance[picks[-1]] = -1
        if len(picks) == count:
            return picks
        picks.append(int(distance.argmax()))


def covering(features: torch.Tensor, picks: list[int]) -> torch.Tensor:
    """Distance of every point to its nearest pick, (N,) float64, from differences."""
    points = features.double()
    return torch.cdist(points, points[picks], compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def cloud(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "random":
        return torch.randn(2000, 24, generator=generator)
    if kind == "clustered":  # far from each other and from the origin, each tight
        centers = 1000 + 300 * torch.randn(12, 24, generator=generator)
        owner = torch.randint(12, (2000,), generator=generator)
        return centers[owner] + torch.randn(2000, 24, generator=generator)
    if kind == "duplicates":
        few = torch.randn(150, 24, generator=generator)
        return few[torch.randint(150, (2000,), generator=generator)]
    if kind == "lattice":  # a great many exact ties
        return torch.randint(0, 3, (2000, 5), generator=generator).float()
    return torch.eye(300)  # every distance ties


KINDS = ["random", "clustered", "duplicates", "lattice", "equidistant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("active", "product"), [(7, 1), (64, 1), (64, 1 << 12), (4096, 1 << 12)])
def test_lazy_picks_are_those_of_the_naive_loop(kind, dtype, active, product, monkeypatch):
    monkeypatch.setattr(memory, "_ACTIVE", active)
    monkeypatch.setattr(memory, "_PRODUCT", product)
    features = cloud(kind).to(dtype)
    count = 220

    picks = greedy_coreset(features, count, seed=1).tolist()

    assert picks == naive(features, count, first=picks[0])


def test_each_float32_pick_is_the_farthest_point_and_the_radius_is_the_naive_one():
    features = cloud("clustered")
    picks = greedy_coreset(features, 200).tolist()
    for i in range(1, 200, 13):
        distance = covering(features, picks[:i])
        assert distance[picks[i]] >= (1 - 1e-5) * distance.amax()
    radius = covering(features, picks).amax()
    assert radius == pytest.approx(
        float(covering(features, naive(features, 200, picks[0])).amax()), rel=1e-3
    )


def test_every_point_is_picked_once_when_all_are_asked_for():
    features = cloud("duplicates")[:400]
    assert sorted(greedy_coreset(features, 400).tolist()) == list(range(400))


def test_the_seed_chooses_the_first_pick_only():
    features = cloud("random")
    first = {int(greedy_coreset(features, 1, seed=seed)) for seed in range(20)}
    assert len(first) > 10
    assert (
        greedy_coreset(features, 9, seed=4).tolist() == greedy_coreset(features, 9, seed=4).tolist()
    )


def test_most_products_are_never_computed_on_features_of_low_dimension(monkeypatch):
    computed = 0
    product = memory._proximity

    def counted(x, centers):
        nonlocal computed
        computed += len(x) * len(centers)
        return product(x, centers)

    monkeypatch.setattr(memory, "_proximity", counted)
    monkeypatch.setattr(memory, "_ACTIVE", 256)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8000, 3, generator=generator) @ torch.randn(3, 32, generator=generator)
    greedy_coreset(features, 800)
    assert computed < 0.8 * 8000 * 800


@pytest.mark.parametrize("count", [0, 11])
def test_a_coreset_larger_than_the_data_is_refused(count):
    with pytest.raises(ValueError, match="count from 1 to N"):
        greedy_coreset(torch.zeros(10, 2), count)


def test_features_with_nan_are_refused():
    features = torch.randn(50, 4)
    features[17, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        greedy_coreset(features, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("block_bytes", [1, 1 << 14, 1 << 25])
def test_nearest_agrees_with_brute_force_in_float64(kind, k, block_bytes):
    features = cloud(kind)
    bank, queries = features[:250], features[-50:]

    distances, indices = nearest(queries, bank, k, block_bytes=block_bytes)

    brute = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    torch.testing.assert_close(distances.double(), brute.sort(1).values[:, :k], rtol=1e-5, atol=0)
    torch.testing.assert_close(brute.gather(1, indices), distances.double(), rtol=1e-5, atol=0)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_a_row_of_the_bank_is_at_distance_zero_from_itself():
    bank = 1e4 + torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    distances, indices = nearest(bank, bank)
    assert distances.eq(0).all()
    assert indices[:, 0].tolist() == list(range(300))


def test_nearest_takes_the_whole_bank_and_no_more():
    bank, queries = torch.randn(6, 3), torch.randn(4, 3)
    distances, indices = nearest(queries, bank, 6)
    assert indices.sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert (distances.diff(dim=1) >= 0).all()
    with pytest.raises(ValueError, match="6 rows of the bank, got 7"):
        nearest(queries, bank, 7)


def test_nearest_of_no_query_is_empty():
    distances, indices = nearest(torch.zeros(0, 3), torch.randn(6, 3), 2)
    assert distances.shape == indices.shape == (0, 2)


def test_queries_of_another_width_are_refused():
    with pytest.raises(ValueError, match="must agree in E"):
        nearest(torch.zeros(2, 3), torch.zeros(5, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("block_bytes", "many"), [(1, 64), (1 << 14, 64), (1 << 24, 2)])
def test_a_shortlist_finds_the_nearest_row_of_brute_force(
    kind, dtype, block_bytes, many, monkeypatch
):
    monkeypatch.setattr(memory, "_MANY", many)
    features = cloud(kind)
    bank, queries = features[:250], features[-50:]

    distances, indices = Shortlist(bank, dtype=dtype).nearest(queries, block_bytes=block_bytes)

    brute = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    torch.testing.assert_close(distances[:, 0].double(), brute.amin(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(brute.gather(1, indices), distances.double(), rtol=1e-5, atol=0)


def test_a_shortlist_looks_at_few_rows_of_a_bank():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4200, 64, generator=generator)
    looked, _, many = Shortlist(rows[:4000], dtype=torch.bfloat16)._pairs(rows[4000:])
    assert len(many) == 0
    assert 200 <= len(looked) < 5 * 200
    assert set(looked.tolist()) == set(range(200))


@pytest.mark.parametrize("value", [1e20, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_query_too_large_for_a_product_has_the_distance_that_a_whole_search_gives(value, dtype):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(80, 8, generator=generator), torch.randn(3, 8, generator=generator)
    queries[1, 2] = value
    distances, indices = Shortlist(bank, dtype=dtype).nearest(queries)
    expected = nearest(queries, bank)
    torch.testing.assert_close(distances, expected[0], equal_nan=True)
    assert indices[[0, 2]].equal(expected[1][[0, 2]])
    assert 0 <= indices[1] < 80


def test_a_shortlist_is_not_led_astray_by_rounding_where_rows_lie_close_together():
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(32, generator=generator)
    bank = middle + 1e-3 * torch.randn(500, 32, generator=generator)  # bfloat16 has 3 digits
    bank[0] = -middle  # so that the origin is not in their midst
    queries = middle + 1e-3 * torch.randn(40, 32, generator=generator)
    found = Shortlist(bank, dtype=torch.bfloat16).nearest(queries)[1][:, 0]
    brute = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert found.equal(brute.argmin(1))


@pytest.mark.parametrize(
    "search", [nearest, lambda queries, bank: Shortlist(bank).nearest(queries)]
)
def test_a_half_precision_bank_counts_as_what_it_holds(search):
    generator = torch.Generator().manual_seed(0)
    rows = 100 + torch.randn(600, 48, generator=generator)
    bank, queries = rows[:500].half(), rows[500:]
    distances, indices = search(queries, bank)
    brute = torch.cdist(
        queries.double(), bank.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    assert indices[:, 0].equal(brute.argmin(1))  # all of them: a recall of 1
    torch.testing.assert_close(distances[:, 0].double(), brute.amin(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [7, 100, 1000])
def test_a_bank_that_is_searched_in_parts_is_searched_whole(rows, monkeypatch):
    features = cloud("duplicates")
    expected = nearest(features[-50:], features[:250], 4)
    monkeypatch.setattr(memory, "_ROWS", rows)
    distances, indices = nearest(features[-50:], features[:250], 4)
    assert distances.equal(expected[0])
    brute = torch.cdist(features[-50:].double(), features[:250].double())
    torch.testing.assert_close(brute.gather(1, indices), distances.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_picks_go_on_from_a_bank_as_the_naive_loop_does(kind, monkeypatch):
    monkeypatch.setattr(memory, "_ACTIVE", 64)
    features = cloud(kind)
    bank, new = features[:40], features[40:300]
    points = new.double().numpy()
    others = bank.double().numpy()
    distance = ((points[:, None] - others[None]) ** 2).sum(2).min(1)
    expected = []
    for _ in range(60):
        expected.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[expected[-1]]) ** 2).sum(1))
        distance[expected] = -1
    assert greedy_coreset(new, 60, bank=bank).tolist() == expected
