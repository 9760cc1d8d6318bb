"""Logistic regression and the linear SVM against scikit-learn and direct minimization."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.probes import linear
from medssl.probes.linear import (
    LinearSVM,
    Logistic,
    average_copies,
    grouped_folds,
    spread_copies,
)


def data(rows: int, seed: int, classes: int = 3, columns: int = 6):
    """Overlapping classes, columns of very different mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, columns, generator=generator)
    features = centres[labels] + 1.5 * torch.randn(rows, columns, generator=generator)
    spread = torch.logspace(-1, 1, columns)
    return features * spread + torch.randn(columns, generator=generator), labels


def of_scikit_learn(scaling: str, strength: float):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    scaler = Normalizer() if scaling == "unit" else StandardScaler()
    solver = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    return make_pipeline(scaler, solver)


@pytest.mark.parametrize("strength", [100.0, 1.0, 1e-3])
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_probabilities_are_those_of_scikit_learn(scaling, classes, strength):
    features, labels = data(60, 0, classes)
    queries, _ = data(40, 1, classes)
    ours = Logistic(scaling=scaling, strength=strength).fit(features, labels).scores(queries)
    reference = of_scikit_learn(scaling, strength).fit(features.double().numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(queries.double().numpy()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.sum(1), torch.ones(40, dtype=torch.float64))


def test_more_columns_than_rows_have_the_solution_of_scikit_learn():
    features, labels = data(20, 2, columns=90)
    ours = Logistic(strength=0.1).fit(features, labels).scores(features)
    reference = of_scikit_learn("standard", 0.1).fit(features.double().numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(features.double().numpy()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_heavy_tails_have_the_solution_of_scikit_learn():
    """Steps of full length, as Newton's method takes them, do not converge here."""
    generator = torch.Generator().manual_seed(80)
    features = torch.randn(107, 29, generator=generator, dtype=torch.float64) ** 9
    labels = torch.randint(8, (107,), generator=generator)
    ours = Logistic(strength=0.01).fit(features, labels).scores(features)
    reference = of_scikit_learn("standard", 0.01).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(features.numpy()))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_column_that_is_constant_but_for_rounding_says_nothing():
    features, labels = data(30, 3)
    column = torch.full((30, 1), 1000.0)
    column[::3] = torch.nextafter(column[::3], torch.tensor(torch.inf))  # where the label is 0
    wider = torch.cat([features, column], 1)
    expected = Logistic(strength=1.0).fit(features, labels).scores(features)
    wider_scores = Logistic(strength=1.0).fit(wider, labels).scores(wider)
    torch.testing.assert_close(wider_scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lone", [-1, 0])  # a class of one patient; -1: none
@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_the_strength_is_the_best_of_scikit_learn_on_the_same_folds(scaling, lone):
    from sklearn.metrics import log_loss

    features, labels = data(60, 16)
    groups = torch.arange(60) // 2 % 20
    groups[labels == lone] = 20
    grid, losses = [10.0**power for power in range(4, -5, -1)], []
    for strength in grid:
        reference, total = of_scikit_learn(scaling, strength), 0.0
        for train, held_out in grouped_folds(labels, groups):
            reference.fit(features[train].double().numpy(), labels[train].numpy())
            found = reference.predict_proba(features[held_out].double().numpy())
            known = labels[train].unique().numpy()
            total += log_loss(labels[held_out].numpy(), found, normalize=False, labels=known)
        losses.append(total)
    best = grid[int(np.argmin(losses))]
    assert grid[-1] < best < grid[0]
    fitted = Logistic(scaling=scaling).fit(features, labels, groups=groups)
    assert fitted.strength_ == best
    again = Logistic(scaling=scaling, strength=best).fit(features, labels)
    assert torch.equal(fitted.scores(features), again.scores(features))


def test_copies_of_one_patient_do_not_vouch_for_each_other():
    """Labels are noise, and only rows of one patient on both sides make them look learnable."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(30, 20, generator=generator).repeat_interleave(6, 0)
    labels = (torch.arange(30) % 2).repeat_interleave(6)
    patients = torch.arange(30).repeat_interleave(6)
    within = torch.randperm(len(labels), generator=generator)  # folds without groups mix them
    features, labels, patients = features[within], labels[within], patients[within]
    assert Logistic().fit(features, labels, groups=patients).strength_ >= 100
    assert Logistic().fit(features, labels).strength_ <= 1


def test_without_folds_the_strength_is_one():
    features, labels = data(12, 6)
    assert Logistic().fit(features, labels, groups=labels).strength_ == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=50))
def test_folds_part_no_group_and_ask_only_for_classes_shown(rows):
    labels, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    labels = labels.unique(return_inverse=True)[1]
    folds = list(grouped_folds(labels, groups))
    assert len(folds) <= 5
    asked = torch.cat([held_out for _, held_out in folds] or [torch.empty(0)])
    assert len(asked.unique()) == len(asked)
    for train, held_out in folds:
        assert not set(groups[train].tolist()) & set(groups[held_out].tolist())
        assert set(labels[held_out].tolist()) <= set(labels[train].tolist())
        assert len(labels[train].unique()) > 1


def test_every_fold_has_its_share_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    groups = torch.arange(80) // 2  # patients of one class and two rows
    folds = list(grouped_folds(labels, groups))
    counts = [torch.bincount(labels[held_out], minlength=3).tolist() for _, held_out in folds]
    assert counts == [[10, 4, 2]] * 5
    alone = [
        torch.bincount(labels[rows], minlength=3).tolist()
        for _, rows in grouped_folds(labels, None)
    ]
    assert alone == [[10, 4, 2]] * 5


def test_patients_are_dealt_by_their_rarest_class():
    """Of the second class there are two patients, the largest and the sixth largest of all."""
    labels = torch.tensor([kind for size in range(19, 9, -1) for kind in [0] * size])
    groups = torch.tensor([number for number in range(10) for _ in range(19 - number)])
    first = [int((groups < number).sum()) for number in (0, 5)]
    labels[first] = 1
    assert [int(labels[rows].sum()) for _, rows in grouped_folds(labels, groups)].count(1) == 2


def test_the_largest_patients_are_dealt_first():
    sizes = [9, 1, 1, 1, 1, 9, 1, 1, 1, 1] + [1] * 5
    groups = torch.arange(15).repeat_interleave(torch.tensor(sizes))
    held_out = [len(rows) for _, rows in grouped_folds((groups >= 10).long(), groups)]
    assert sorted(held_out) == [3, 3, 3, 11, 11]


def test_a_class_of_two_patients_is_held_out_once_each():
    labels = torch.tensor([0] * 9 + [1] * 6)
    groups = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 10, 11, 11, 11])
    held_out = [set(groups[rows].tolist()) & {10, 11} for _, rows in grouped_folds(labels, groups)]
    assert sorted(map(len, held_out)) == [0, 0, 0, 1, 1]


def test_a_search_that_stops_early_is_an_error(monkeypatch):
    features, labels = data(30, 7)
    monkeypatch.setattr(linear, "_MAX_STEPS", 1)
    with pytest.raises(RuntimeError, match="did not converge"):
        Logistic(strength=1e-3).fit(features, labels)


def test_features_with_a_gradient_are_fitted_and_leave_none():
    features, labels = data(30, 8)
    features.requires_grad_()
    for probe in (Logistic(strength=1.0), LinearSVM()):
        assert not probe.fit(features, labels).scores(features).requires_grad


@pytest.mark.parametrize(
    ("features", "labels", "groups", "words"),
    [
        (torch.zeros(4, 2), torch.tensor([0, 1, 0]), None, "one label per row"),
        (torch.zeros(4, 2, 2), torch.tensor([0, 1, 0, 1]), None, "one label per row"),
        (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), torch.zeros(3), "one group per row"),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]), None, "4 of 4 rows"),
        (torch.zeros(4, 2), torch.tensor([0, 2, 0, 2]), None, r"got \[0, 2\]; number"),
        (torch.zeros(4, 2), torch.tensor([-1, 0, 1, 1]), None, r"got \[-1, 0, 1\]"),
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), None, "at least two"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(features, labels, groups, words):
    with pytest.raises(ValueError, match=words):
        Logistic().fit(features, labels, groups=groups)


@pytest.mark.parametrize("kind", [Logistic, LinearSVM])
def test_a_strength_must_be_positive(kind):
    with pytest.raises(ValueError, match="positive, got 0"):
        kind(strength=0)


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match="'unit' or 'standard', got 'none'"):
        Logistic(scaling="none")


def minimized(rows: np.ndarray, sides: np.ndarray, strength: float) -> np.ndarray:
    """Weights and bias with the least squared hinge loss, the bias penalized like a weight."""
    from scipy.optimize import minimize

    wide = np.c_[rows, np.ones(len(rows))]

    def loss(weights):
        slack = np.maximum(0, 1 - sides * (wide @ weights))
        gradient = strength * weights - 2 * wide.T @ (sides * slack)
        return strength / 2 * weights @ weights + (slack**2).sum(), gradient

    exact = {"gtol": 1e-10, "ftol": 1e-16, "maxiter": 10_000}
    return minimize(loss, np.zeros(wide.shape[1]), jac=True, method="L-BFGS-B", options=exact).x


@pytest.mark.parametrize("classes", [2, 3])
def test_each_class_has_the_least_squared_hinge_loss_against_the_rest(classes):
    features, labels = data(50, 9, classes)
    rows = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    scores = LinearSVM(strength=0.3).fit(features, labels).scores(features)
    for kind in range(classes):
        weights = minimized(rows, np.where(labels.numpy() == kind, 1.0, -1.0), 0.3)
        expected = torch.from_numpy(rows @ weights[:-1] + weights[-1])
        torch.testing.assert_close(scores[:, kind], expected, atol=1e-4, rtol=0)


def test_the_svm_does_not_see_the_length_of_a_feature():
    features, labels = data(30, 10)
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = LinearSVM().fit(features, labels).scores(features)
    found = LinearSVM().fit(features * lengths, labels).scores(features * 3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_copies_become_rows_and_their_scores_come_back_to_the_item():
    copies = torch.arange(24.0).reshape(4, 3, 2)  # (S, V, E)
    labels = torch.tensor([0, 1, 2, 1])
    features, spread, groups = spread_copies(copies, labels)
    assert torch.equal(features[5], copies[1, 2])
    assert spread.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 1, 1, 1]
    assert groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert spread_copies(copies, labels, torch.tensor([7, 7, 8, 9]))[2].tolist() == [7] * 6 + [
        *[8] * 3,
        *[9] * 3,
    ]
    assert torch.equal(average_copies(features, 3), copies.mean(1))


def test_copies_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a label per item"):
        spread_copies(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="7 rows of scores are not 3 copies"):
        average_copies(torch.zeros(7, 2), 3)


@pytest.mark.parametrize("probe", [Logistic(), Logistic(scaling="unit"), LinearSVM()])
def test_a_saved_probe_scores_as_before(probe, tmp_path):
    features, labels = data(30, 11)
    expected = probe.fit(features, labels).scores(features)
    prepared = Preprocessing(size=(8, 8), intensity="range", channels=1)
    save_model(
        tmp_path / "probe",
        probe,
        kind="probe",
        preprocessing=prepared,
        domain={},
        card="",
        noise=selftest_noise((4, 6)),
    )
    loaded = load_model(tmp_path / "probe", kind="probe").model
    assert torch.equal(loaded.scores(features), expected)
