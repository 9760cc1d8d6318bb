"""Ridge regression against scikit-learn, and its leave-out errors against fitting again."""

import pytest
import torch

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.probes.ridge import Ridge, left_out_error


def data(rows: int, seed: int, classes: int = 3, columns: int = 6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, columns, generator=generator)
    features = centres[labels] + 1.5 * torch.randn(rows, columns, generator=generator) + 3
    return features.double(), labels


def centred(features, labels):
    left, lengths, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    targets = torch.nn.functional.one_hot(labels).double()
    return left, lengths, targets - targets.mean(0)


@pytest.mark.parametrize("columns", [6, 80])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 50.0])
def test_scores_are_those_of_scikit_learn(strength, columns):
    from sklearn.linear_model import RidgeClassifier

    features, labels = data(40, 0, columns=columns)
    queries, _ = data(20, 1, columns=columns)
    scores = Ridge(strength=strength).fit(features, labels).scores(queries)
    reference = RidgeClassifier(alpha=strength).fit(features.numpy(), labels.numpy())
    sides = torch.from_numpy(reference.decision_function(queries.numpy()))  # of targets -1 and 1
    torch.testing.assert_close(2 * scores - 1, sides)
    torch.testing.assert_close(scores.sum(1), torch.ones(20, dtype=torch.float64))


def test_of_two_classes_the_second_has_the_side_of_scikit_learn():
    from sklearn.linear_model import RidgeClassifier

    features, labels = data(30, 2, classes=2)
    scores = Ridge(strength=2.0).fit(features, labels).scores(features)
    reference = RidgeClassifier(alpha=2.0).fit(features.numpy(), labels.numpy())
    sides = torch.from_numpy(reference.decision_function(features.numpy()))
    torch.testing.assert_close(scores[:, 1] - scores[:, 0], sides)


@pytest.mark.parametrize("seed", range(5))
def test_the_strength_is_the_one_that_ridge_cv_finds(seed):
    from sklearn.linear_model import RidgeCV

    features, labels = data(40, seed, columns=8)
    targets = torch.nn.functional.one_hot(labels).double()
    largest = torch.linalg.svdvals(features - features.mean(0))[0] ** 2
    grid = (largest * torch.logspace(2, -8, 21, dtype=torch.float64)).tolist()
    reference = RidgeCV(alphas=grid).fit(features.numpy(), targets.numpy())
    probe = Ridge().fit(features, labels)
    assert float(probe.strength_) == pytest.approx(reference.alpha_)
    assert grid[-1] < reference.alpha_ < grid[0]
    expected = torch.from_numpy(reference.predict(features.numpy()))
    torch.testing.assert_close(probe.scores(features), expected)


@pytest.mark.parametrize(("noise", "share"), [(1e9, 1e2), (1e-9, 1e-8)])
def test_noise_is_shrunk_the_most_and_what_is_certain_the_least(noise, share):
    labels = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(9)
    features = torch.nn.functional.one_hot(labels, 5).double()
    features += noise * torch.randn(40, 5, generator=generator)
    largest = torch.linalg.svdvals(features - features.mean(0))[0] ** 2
    strength = Ridge().fit(features, labels).strength_
    assert float(strength / largest) == pytest.approx(share)


@pytest.mark.parametrize("columns", [5, 60])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_errors_of_left_out_groups_are_those_of_fitting_again(strength, columns):
    from sklearn.linear_model import Ridge as Reference

    features, labels = data(30, 3, columns=columns)
    groups = torch.tensor([4, 0, 0, 7, 7, 7, 2, 2, 9, 1] * 3)  # 3, 6 or 9 rows, not in a row
    left, lengths, targets = centred(features, labels)
    hot = torch.nn.functional.one_hot(labels).double()
    total = 0.0
    for group in groups.unique():
        inside = groups == group
        again = Reference(alpha=strength).fit(features[~inside].numpy(), hot[~inside].numpy())
        found = torch.from_numpy(again.predict(features[inside].numpy()))
        total += float(((hot[inside] - found) ** 2).sum())
    error = left_out_error(left, lengths, targets, torch.tensor(strength), groups)
    assert float(error) == pytest.approx(total / hot.numel())


def test_copies_of_one_patient_do_not_vouch_for_each_other():
    """Labels are noise, and only rows of one patient on both sides make them look learnable."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(30, 20, generator=generator).repeat_interleave(2, 0)
    labels = (torch.arange(30) % 2).repeat_interleave(2)
    patients = torch.arange(30).repeat_interleave(2)
    with_groups = Ridge().fit(features, labels, groups=patients).strength_
    assert with_groups > 10 * Ridge().fit(features, labels).strength_


def test_scale_and_origin_of_the_features_do_not_matter():
    features, labels = data(30, 5)
    expected = Ridge().fit(features, labels).scores(features)
    moved = 1e-3 * features + 7
    torch.testing.assert_close(Ridge().fit(moved, labels).scores(moved), expected)


def test_features_that_are_all_alike_leave_the_share_of_each_class():
    labels = torch.tensor([0, 0, 0, 1])
    scores = Ridge().fit(torch.ones(4, 3), labels).scores(torch.ones(1, 3))
    torch.testing.assert_close(scores, torch.tensor([[0.75, 0.25]], dtype=torch.float64))


def test_with_one_group_the_strength_is_one():
    features, labels = data(12, 6)
    assert Ridge().fit(features, labels, groups=torch.zeros(12)).strength_ == 1


def test_a_strength_must_be_positive():
    with pytest.raises(ValueError, match="positive, got 0"):
        Ridge(strength=0)


def test_a_saved_probe_scores_as_before(tmp_path):
    features, labels = data(30, 7)
    probe = Ridge().fit(features, labels)
    save_model(
        tmp_path / "probe",
        probe,
        kind="probe",
        preprocessing=Preprocessing(size=(8, 8), intensity="range", channels=1),
        domain={},
        card="",
        noise=selftest_noise((4, 6)),
    )
    loaded = load_model(tmp_path / "probe", kind="probe").model
    assert torch.equal(loaded.scores(features), probe.scores(features))
