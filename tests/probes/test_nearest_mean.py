"""Nearest class means against fractions, scikit-learn, and every order of learning."""

import random
from fractions import Fraction

import pytest
import torch

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.probes.nearest_mean import NearestMean


def of_every_size(rows: int, columns: int, seed: int) -> torch.Tensor:
    """float32 values from the smallest to the largest, some of them equal and opposite, or zero."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 276 - 149
    values = (torch.randn(rows, columns, generator=generator) * 2**powers).clamp(-3e38, 3e38)
    values[::7] = -values[1::7][: len(values[::7])]
    values[3, 0], values[4, 0], values[5, 0] = 0, 2.0**-149, torch.finfo(torch.float32).max
    return values.float()


def cut(rows: list[int], generator: random.Random) -> list[list[int]]:
    """Consecutive pieces of random length."""
    ends = sorted(generator.sample(range(1, len(rows)), generator.randint(0, 6)))
    return [rows[a:b] for a, b in zip([0, *ends], [*ends, len(rows)], strict=True)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_any_order_and_any_cut_of_the_samples_give_the_batch_bit_for_bit(metric):
    features, labels = of_every_size(40, 5, 0), torch.arange(40) % 4 * 2  # 1, 3, 5 never seen
    batch = NearestMean(metric=metric).fit(features, labels)
    expected, generator = batch.scores(features), random.Random(0)
    for _ in range(200):
        rows = generator.sample(range(40), 40)
        probe = NearestMean(metric=metric)
        for piece in cut(rows, generator):
            probe.update(features[piece], labels[piece])
        assert torch.equal(probe.sums_, batch.sums_)
        assert torch.equal(probe.counts_, batch.counts_)
        assert torch.equal(probe.scores(features), expected)


def test_any_order_of_the_classes_gives_the_batch_bit_for_bit():
    features, labels = of_every_size(42, 5, 1), torch.arange(42) % 6
    expected = NearestMean().fit(features, labels).scores(features)
    for seed in range(20):
        probe = NearestMean()
        for kind in random.Random(seed).sample(range(6), 6):
            probe.update(features[labels == kind], labels[labels == kind])
        assert torch.equal(probe.scores(features), expected)


def test_sums_of_float64_would_have_depended_on_the_order():
    features = of_every_size(40, 5, 0).double()
    assert not torch.equal(features.cumsum(0)[-1], features.flip(0).cumsum(0)[-1])


def test_means_are_the_fractions_rounded():
    features, labels = of_every_size(40, 5, 2), torch.arange(40) % 3
    means = NearestMean().fit(features, labels).means()
    for kind in range(3):
        inside = features[labels == kind]
        for column in range(5):
            exact = sum(Fraction(value) for value in inside[:, column].tolist()) / len(inside)
            assert means[kind, column].item() == pytest.approx(float(exact), rel=1e-15, abs=0)


def test_what_large_numbers_leave_over_is_not_lost():
    features = torch.tensor([[1e30], [2.0**-149], [-1e30], [-3.0]])
    means = NearestMean().fit(features, torch.tensor([0, 0, 0, 1])).means()
    assert means[:, 0].tolist() == [2.0**-149 / 3, -3]


def test_scores_are_minus_the_distances_to_the_means():
    features = torch.tensor([[0.0, 2.0], [4.0, 4.0], [1.0, 0.0]])
    probe = NearestMean().fit(features, torch.tensor([0, 0, 1]))  # means (2, 3) and (1, 0)
    scores = probe.scores(torch.tensor([[2.0, 0.0], [5.0, 3.0]]))
    expected = torch.tensor([[-3.0, -1.0], [-3.0, -5.0]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)


def test_the_cosine_sees_no_length():
    features = torch.tensor([[0.0, 2.0], [4.0, 4.0], [1.0, 0.0]])
    probe = NearestMean(metric="cosine").fit(features, torch.tensor([0, 0, 1]))
    scores = probe.scores(torch.tensor([[3.0, 0.0], [0.2, 0.3]]))
    first, second = 2 / 13**0.5, 3 / 13**0.5  # of the mean (2, 3) at unit length
    expected = torch.tensor([[first - 1, 0.0], [0.0, first - 1]], dtype=torch.float64)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(
        probe.scores(torch.tensor([[0.0, -1.0]]))[0],
        torch.tensor([-second - 1, -1.0], dtype=torch.float64),
    )


def test_classes_are_named_as_by_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(60, 4, generator=generator), torch.arange(60) % 3
    reference = NearestCentroid().fit(features.numpy(), labels.numpy())
    ours = NearestMean().fit(features, labels)
    assert ours.scores(features).argmax(1).tolist() == reference.predict(features.numpy()).tolist()
    torch.testing.assert_close(ours.means(), torch.from_numpy(reference.centroids_).double())


def test_distances_far_from_the_origin_do_not_cancel():
    generator = torch.Generator().manual_seed(4)
    features = torch.randint(-8, 8, (40, 3), generator=generator).float()
    labels = torch.arange(40) % 2
    near = NearestMean().fit(features, labels).scores(features)
    far = NearestMean().fit(features + 2**20, labels).scores(features + 2**20)
    torch.testing.assert_close(far, near, atol=1e-8, rtol=0)


def test_a_class_not_yet_seen_is_never_the_nearest():
    probe = NearestMean().update(torch.ones(1, 2), torch.tensor([5]))
    scores = probe.scores(torch.zeros(3, 2))
    assert scores.shape == (3, 6)
    assert (scores[:, :5] == -torch.inf).all()
    probe.update(torch.zeros(1, 2), torch.tensor([3]))
    assert probe.scores(torch.zeros(1, 2)).argmax().item() == 3
    assert probe.means().isnan().any(1).tolist() == [True, True, True, False, True, False]


def test_an_update_adds_to_a_fit():
    features, labels = of_every_size(30, 3, 5), torch.arange(30) % 3
    probe = NearestMean().fit(features[:10], labels[:10]).update(features[10:], labels[10:])
    assert torch.equal(probe.sums_, NearestMean().fit(features, labels).sums_)


def test_half_precision_is_taken_as_it_is():
    features, labels = of_every_size(20, 3, 7).clamp(-6e4, 6e4).half(), torch.arange(20) % 2
    expected = NearestMean().fit(features.double(), labels).sums_
    assert torch.equal(NearestMean().fit(features, labels).sums_, expected)


@pytest.mark.parametrize(
    ("features", "labels", "words"),
    [
        (torch.ones(2, 3), torch.tensor([0]), "one label per row"),
        (torch.ones(2, 3), torch.tensor([0, -1]), "count from 0, got -1"),
        (torch.full((2, 3), torch.inf), torch.tensor([0, 1]), "finite"),
        (torch.full((2, 3), 1e39, dtype=torch.float64), torch.tensor([0, 1]), "within float32"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "update"])
def test_what_cannot_be_learnt_is_refused_and_changes_nothing(method, features, labels, words):
    probe = NearestMean().fit(of_every_size(10, 3, 8)[:4], torch.tensor([0, 1, 0, 1]))
    before = probe.sums_.clone()
    with pytest.raises(ValueError, match=words):
        getattr(probe, method)(features, labels)
    assert torch.equal(probe.sums_, before)
    assert probe.counts_.tolist() == [2, 2]


def test_an_update_needs_as_many_columns_as_before_and_a_fit_does_not():
    probe = NearestMean().fit(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected features of 3 numbers as before, got 4"):
        probe.update(torch.ones(2, 4), torch.tensor([0, 1]))
    assert probe.fit(torch.ones(2, 4), torch.tensor([0, 1])).means().shape == (2, 4)


def test_more_rows_than_the_sums_can_hold_are_refused():
    probe = NearestMean().fit(torch.ones(1, 2), torch.tensor([0]))
    probe.counts_ = torch.tensor([2**31 - 2])
    probe.update(torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="a class may have 2147483647 rows"):
        probe.update(torch.ones(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("value", [-3e38, 3e38, -(2.0**-126), 1.5])
def test_as_many_rows_as_are_allowed_fit_the_sums(value):
    """What is added per row, times the most rows, leaves every digit within int64."""
    probe = NearestMean().fit(torch.full((1, 1), value), torch.tensor([0]))
    most = 2**31 - 1
    assert all(abs(digit) * most < 2**63 for digit in probe.sums_.flatten().tolist())
    probe.sums_, probe.counts_ = probe.sums_ * most, probe.counts_ * most
    exact = torch.tensor(value, dtype=torch.float32).item()
    assert probe.means().item() == pytest.approx(exact, rel=1e-15)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="'euclidean' or 'cosine', got 'manhattan'"):
        NearestMean(metric="manhattan")


def test_a_saved_probe_goes_on_learning(tmp_path):
    features, labels = of_every_size(30, 3, 6), torch.arange(30) % 3 * 2
    probe = NearestMean().fit(features[:20], labels[:20])
    save_model(
        tmp_path / "probe",
        probe,
        kind="probe",
        preprocessing=Preprocessing(size=(8, 8), intensity="range", channels=1),
        domain={},
        card="",
        noise=selftest_noise((4, 3)),
    )
    loaded = load_model(tmp_path / "probe", kind="probe").model
    loaded.update(features[20:], labels[20:])
    assert torch.equal(
        loaded.scores(features), NearestMean().fit(features, labels).scores(features)
    )
