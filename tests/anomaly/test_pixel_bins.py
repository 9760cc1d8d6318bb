import numpy as np
import pytest
import torch

from anomaly.pixel_bins import ItemPixels, find_bins, keys_of, scores_of


def test_keys_have_the_order_of_the_scores_and_lead_back_to_them():
    edges = [-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, np.inf]
    scores = np.array(edges, np.float32)
    keys = keys_of(scores)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert (scores_of(keys) == scores).all()
    assert keys_of(np.array([-0.0], np.float32)) == keys_of(np.array([0.0], np.float32))


def items_of(normal: np.ndarray, defect: np.ndarray) -> list[ItemPixels]:
    values = torch.tensor(np.concatenate([normal, defect])[None], dtype=torch.float32)
    return [ItemPixels.of(values, torch.arange(values.numel())[None] >= len(normal))]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("num_defect", [3, 20_000])
def test_few_share_a_bin_but_for_true_ties(scale, num_defect):
    rng = np.random.default_rng(0)
    normal, defect = rng.normal(size=200_000), rng.normal(1, 1, num_defect)
    normal, defect = 5 + scale * normal, 5 + scale * defect  # scaled down, they fill few buckets
    normal[:40_000] = defect[: 1 + num_defect // 5] = 5
    [item] = items = items_of(normal, defect)
    bins = find_bins(lambda: items)
    in_bin, marked = bins.normal(item), bins.defect(item, np.ones(num_defect))
    assert in_bin.sum() == len(normal)
    assert marked.sum() == num_defect
    mixed = ~bins.single & (in_bin > 0) & (marked > 0)
    assert (in_bin[mixed] <= 0.002 * in_bin.cumsum()[mixed]).all()
    assert (marked[mixed] <= max(1, num_defect / 2000)).all()
    assert in_bin[bins.single].max() >= 40_000  # the tie has a bin to itself
    assert len(bins.starts) < 25_000


def test_a_bin_called_single_holds_one_score():
    rng = np.random.default_rng(0)
    normal = rng.integers(0, 30, 5000).astype(float)
    defect = rng.integers(10, 40, 900).astype(float)
    items = items_of(normal, defect)
    bins = find_bins(lambda: items)
    place = len(bins.starts) - bins.starts[::-1].searchsorted(keys_of(defect), "right")
    for one in np.unique(place):
        if bins.single[one]:
            assert len(np.unique(defect[place == one])) == 1
    shared = np.isin(defect, normal)
    assert bins.single[place[shared]].all()


def test_missed_pixels_have_the_last_bin_to_themselves():
    values = torch.tensor([[3.0, torch.nan, 1, 2]])
    item = ItemPixels.of(values, torch.tensor([[1, 1, 0, 0]]))
    bins = find_bins(lambda: [item])
    assert bins.defect(item, np.ones(2))[-1] == 1
    assert bins.normal(item)[-1] == 0
    assert bins.normal(item).sum() == 2


def test_the_pixels_are_asked_for_once_where_no_score_decides_alone():
    asked = []
    item = items_of(np.arange(1, 200.0), np.zeros(0))[0]

    def passes():
        asked.append(1)
        return [item]

    find_bins(passes)
    assert len(asked) == 1


def test_no_pixels_at_all_have_the_bin_of_the_missed_ones():
    item = ItemPixels.of(torch.full((2, 3), torch.nan), None)
    bins = find_bins(lambda: [item])
    assert (bins.starts.tolist(), bins.normal(item).tolist()) == ([0], [0])
