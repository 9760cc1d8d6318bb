"""Multi-label metrics against scikit-learn, cases worked out by hand, and naive loops."""

import math

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
)

from medssl.metrics import OneClassError, bootstrap
from medssl.multilabel import (
    adaptive_calibration_errors,
    average_precisions,
    best_f1_thresholds,
    calibration_errors,
    mean_average_precision,
    real_accuracy,
    subset_accuracy,
    thresholds_for_precision,
    thresholds_for_sensitivity,
)

EVERY = (
    average_precisions,
    real_accuracy,
    best_f1_thresholds,
    calibration_errors,
    lambda scores, labels: subset_accuracy(scores, labels, torch.zeros(scores.shape[-1])),
)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def data(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in steps of 0.1, so that many are equal, and the labels they were drawn for."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(11, (rows, 4), generator=generator) / 10
    return scores, (torch.rand(rows, 4, generator=generator) < scores).long()


def with_unknown(labels: torch.Tensor) -> torch.Tensor:
    """Every third entry is unknown."""
    flat = labels.clone().flatten()
    flat[::3] = -1
    return flat.view_as(labels)


def test_average_precisions_are_those_of_scikit_learn():
    scores, labels = data(60)
    expected = average_precision_score(labels.numpy(), scores.numpy(), average=None)
    torch.testing.assert_close(average_precisions(scores, labels), torch.from_numpy(expected))
    macro = average_precision_score(labels.numpy(), scores.numpy(), average="macro")
    assert mean_average_precision(scores, labels) == pytest.approx(macro)


def test_unknown_entries_count_as_neither_present_nor_absent():
    scores, labels = data(60)
    labels = with_unknown(labels)
    for label, found in enumerate(average_precisions(scores, labels)):
        known = labels[:, label] >= 0
        expected = average_precision_score(labels[known, label], scores[known, label])
        assert found.item() == pytest.approx(expected)


def test_a_label_without_both_classes_is_left_out_of_the_mean():
    scores, labels = data(60)
    labels[:, 1] = 0
    labels[:, 2] = -labels[:, 2]  # present, and never known to be absent or present
    labels[:, 2][labels[:, 2] == 0] = -1
    labels[:, 3] = 1
    found = average_precisions(scores, labels)
    assert found.isnan().tolist() == [False, True, True, True]
    assert mean_average_precision(scores, labels) == found[0].item()
    with pytest.raises(OneClassError, match="no label"):
        mean_average_precision(scores[:, 1:], labels[:, 1:])


def test_the_mean_takes_a_bootstrap_of_groups():
    scores, labels = data(60)
    found = bootstrap(mean_average_precision, scores, labels, groups=[None] * 60, repeats=50)
    assert found.value == mean_average_precision(scores, labels)
    assert found.low < found.value < found.high


def test_any_valid_label_makes_the_best_one_right_and_items_without_one_do_not_count():
    scores = torch.tensor(
        [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.3, 0.3, 0.1], [0.9, 0.0, 0.0], [0.9, 0.0, 0.0]]
    )
    labels = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 0, 0], [-1, 1, 0]])
    # right, wrong, right by the first of two equal scores; nothing valid; the best is unknown
    assert real_accuracy(scores, labels) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="none of the 2 items"):
        real_accuracy(scores[3:], labels[3:])


def test_one_valid_label_per_item_gives_the_ordinary_accuracy():
    scores = torch.rand(80, 5, generator=torch.Generator().manual_seed(3))
    labels = torch.randint(5, (80,), generator=torch.Generator().manual_seed(4))
    found = real_accuracy(scores, torch.nn.functional.one_hot(labels, 5))
    assert found == pytest.approx(accuracy_score(labels, scores.argmax(1)))


def test_subset_accuracy_is_the_exact_match_of_scikit_learn():
    scores, labels = data(60)
    thresholds = torch.tensor([0.3, 0.5, 0.5, 0.7])
    called = torch.stack([scores[:, k] >= thresholds[k] for k in range(4)], 1).long()
    expected = accuracy_score(labels.numpy(), called.numpy())
    assert subset_accuracy(scores, labels, thresholds) == pytest.approx(expected)


def test_only_known_labels_have_to_match():
    scores = torch.tensor([[0.9, 0.9], [0.9, 0.9], [0.9, 0.5], [0.1, 0.1]])
    labels = torch.tensor([[1, -1], [1, 0], [1, 1], [-1, -1]])
    found = subset_accuracy(scores, labels, torch.tensor([0.5, 0.5]))
    assert found == pytest.approx(2 / 3)  # the last item has nothing to match
    with pytest.raises(ValueError, match="known"):
        subset_accuracy(scores[3:], labels[3:], torch.tensor([0.5, 0.5]))


def test_calibration_error_is_the_gap_of_two_bins_worked_out_by_hand():
    probabilities, labels = column(0.1, 0.3, 0.5, 0.9, 0.8), column(0, 0, 1, 1, 0)
    # up to 0.5: mean 0.3, a third present; above: mean 0.85, half present
    expected = 3 / 5 * (1 / 3 - 0.3) + 2 / 5 * (0.85 - 0.5)
    assert calibration_errors(probabilities, labels, bins=2).item() == pytest.approx(expected)


def naive_error(probabilities, labels, bins):
    """Weighted gaps of the bins (low, high], 0 going to the first, by a loop."""
    total = 0.0
    for n in range(bins):
        inside = (probabilities > n / bins) & (probabilities <= (n + 1) / bins)
        inside |= (probabilities == 0) & (n == 0)
        if inside.any():
            gap = probabilities[inside].mean() - labels[inside].double().mean()
            total += inside.double().mean().item() * abs(gap.item())
    return total


def test_calibration_errors_are_the_naive_loop_over_fifteen_bins():
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.rand(200, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 2, (200, 3), generator=generator)
    labels[:, 2] = -1
    found = calibration_errors(probabilities, labels)
    for label in range(2):
        known = labels[:, label] >= 0
        expected = naive_error(probabilities[known, label], labels[known, label], 15)
        assert found[label].item() == pytest.approx(expected)
    assert found[2].isnan()


def test_probabilities_that_are_the_frequencies_have_no_error():
    probabilities = column(*[0.25] * 4, *[0.5] * 4)
    labels = column(1, 0, 0, 0, 1, 1, 0, 0)
    assert calibration_errors(probabilities, labels).item() == pytest.approx(0)
    assert adaptive_calibration_errors(probabilities, labels, bins=2).item() == pytest.approx(0)


def test_adaptive_bins_hold_equally_many_items():
    generator = torch.Generator().manual_seed(6)
    probabilities = torch.rand(23, 1, generator=generator, dtype=torch.float64) ** 6
    labels = torch.randint(2, (23, 1), generator=generator)
    order = probabilities[:, 0].argsort()
    parts = [order[math.ceil(23 * n / 4) : math.ceil(23 * (n + 1) / 4)] for n in range(4)]
    gaps = [(probabilities[part].sum() - labels[part].sum()).abs().item() for part in parts]
    assert {len(part) for part in parts} == {5, 6}
    found = adaptive_calibration_errors(probabilities, labels, bins=4)
    assert found.item() == pytest.approx(sum(gaps) / 23)


def test_equal_probabilities_share_an_adaptive_bin_in_any_order():
    probabilities, labels = column(0.4, 0.4, 0.4, 0.4, 0.9), column(1, 0, 1, 0, 1)
    expected = (abs(4 * 0.4 - 2) + 0.1) / 5
    for order in (torch.arange(5), torch.tensor([4, 3, 1, 2, 0])):
        found = adaptive_calibration_errors(probabilities[order], labels[order], bins=3)
        assert found.item() == pytest.approx(expected)


def test_more_adaptive_bins_than_items_give_each_its_own():
    probabilities, labels = column(0.2, 0.6, 0.9), column(1, 0, 1)
    found = adaptive_calibration_errors(probabilities, labels).item()
    assert found == pytest.approx((0.8 + 0.6 + 0.1) / 3)


def test_logits_are_not_taken_for_probabilities():
    with pytest.raises(ValueError, match="sigmoid"):
        calibration_errors(column(-1.5, 0.5), column(0, 1))


def test_no_threshold_has_a_higher_f1_and_of_equal_ones_the_highest_is_taken():
    for seed in range(20):
        scores, labels = data(15, seed)
        found = best_f1_thresholds(scores, labels)
        for label in range(4):
            f1 = {
                value: f1_score(labels[:, label], scores[:, label] >= value)
                for value in scores[:, label].unique().tolist()
            }
            best = max(value for value in f1 if f1[value] == max(f1.values()))
            assert found[label].item() == best


def test_an_f1_tie_goes_to_the_highest_threshold():
    scores, labels = column(0.9, 0.6, 0.5, 0.4), column(1, 0, 0, 1)
    # calling one item: 2 / (1 + 2); calling all four: 4 / (4 + 2)
    assert best_f1_thresholds(scores, labels).item() == pytest.approx(0.9)


@pytest.mark.parametrize("wanted", [0.5, 0.75, 0.9, 1.0])
def test_wanted_rates_are_kept_as_closely_as_scikit_learns_curve_allows(wanted):
    for seed in range(20):
        scores, labels = data(15, seed)
        precise = thresholds_for_precision(scores, labels, wanted)
        sensitive = thresholds_for_sensitivity(scores, labels, wanted)
        for label in range(4):
            truth, values = labels[:, label].numpy(), scores[:, label].numpy()
            precision, recall, steps = precision_recall_curve(truth, values)
            reached = [
                (recall[n], step)
                for n, step in enumerate(steps)
                if precision[n] >= wanted and recall[n] > 0
            ]
            expected = max(reached)[1] if reached else math.inf
            assert precise[label].item() == pytest.approx(expected)
            expected = max(step for n, step in enumerate(steps) if recall[n] >= wanted)
            assert sensitive[label].item() == pytest.approx(expected)


def test_chosen_thresholds_keep_what_was_wanted_when_they_are_used():
    scores, labels = data(200)
    unknown = with_unknown(labels)
    precise = thresholds_for_precision(scores, unknown, 0.8)
    sensitive = thresholds_for_sensitivity(scores, unknown, 0.8)
    for label in range(4):
        known = unknown[:, label] >= 0
        truth, values = labels[known, label], scores[known, label]
        assert precision_score(truth, values >= precise[label]) >= 0.8
        assert recall_score(truth, values >= sensitive[label]) >= 0.8


def test_a_label_that_is_never_present_is_never_called():
    scores = torch.tensor([[0.9, 0.9], [0.2, 0.8]])
    labels = torch.tensor([[0, 0], [-1, 1]])
    for found in (
        best_f1_thresholds(scores, labels),
        thresholds_for_precision(scores, labels, 0.1),
        thresholds_for_sensitivity(scores, labels, 0.1),
    ):
        assert found[0].item() == math.inf
        assert found[1].item() == pytest.approx(0.8)
    assert thresholds_for_precision(scores, labels, 0.9)[1].item() == math.inf


@pytest.mark.parametrize("choose", [thresholds_for_precision, thresholds_for_sensitivity])
@pytest.mark.parametrize("wanted", [0.0, 1.1])
def test_a_wanted_rate_is_a_share(choose, wanted):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        choose(*data(5), wanted)


@pytest.mark.parametrize("metric", EVERY)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), r"one shape \(S, L\)"),
        (torch.zeros(3), torch.zeros(3), r"one shape \(S, L\)"),
        (torch.zeros(2, 1), column(0, 2), "1 present, 0 absent or -1 unknown"),
        (torch.zeros(2, 1), column(0, math.nan), "1 present, 0 absent or -1 unknown"),
        (column(0.0, math.nan), column(0, 1), "1 of 2 scores are NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)
