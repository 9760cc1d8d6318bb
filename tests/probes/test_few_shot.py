"""Few-shot draws: whole patients, enough of every class, and nothing nearer within one exchange."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.probes.few_shot import draws

ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([None, *"abcdefghij"])), min_size=1, max_size=60
)
SHARES = st.floats(0.01, 1.0)
unhurried = settings(deadline=None)


def enough(rows, least: int = 2):
    """Labels 0 to K - 1 and groups, with `least` rows of each class added."""
    kinds = sorted({kind for kind, _ in rows})
    rows = rows + [(kind, None) for kind in kinds for _ in range(least)]
    return torch.tensor([kinds.index(kind) for kind, _ in rows]), [group for _, group in rows]


def names_of(groups):
    return [f"row {row}" if group is None else group for row, group in enumerate(groups)]


def distance(labels, rows, wanted):
    """Rows too many or missing, per class and of all together."""
    counts = Counter(labels[list(rows)].tolist())
    per_class = sum(abs(counts[kind] - number) for kind, number in wanted.items())
    return per_class + abs(len(rows) - sum(wanted.values()))


@unhurried
@given(ROWS, SHARES, st.integers(0, 9))
def test_no_patient_is_split_and_no_row_comes_twice(rows, share, seed):
    labels, groups = enough(rows)
    names = names_of(groups)
    for drawn in draws(labels, groups, share=share, repeats=2, seed=seed):
        inside = {names[row] for row in drawn.tolist()}
        assert drawn.tolist() == [row for row, name in enumerate(names) if name in inside]


@unhurried
@given(ROWS, SHARES, st.integers(1, 4), st.integers(0, 9))
def test_every_class_has_the_least_number_of_rows(rows, share, minimum, seed):
    labels, groups = enough(rows, minimum)
    for drawn in draws(labels, groups, share=share, repeats=2, seed=seed, minimum=minimum):
        assert labels[drawn].bincount(minlength=int(labels.max()) + 1).min() >= minimum


@unhurried
@given(ROWS, SHARES, st.integers(0, 9))
def test_no_exchange_of_one_patient_brings_a_draw_nearer(rows, share, seed):
    labels, groups = enough(rows)
    names, counts = names_of(groups), Counter(labels.tolist())
    wanted = {kind: max(share * count, 2) for kind, count in counts.items()}
    (drawn,) = draws(labels, groups, share=share, repeats=1, seed=seed)
    inside = {names[row] for row in drawn.tolist()}
    found = distance(labels, drawn.tolist(), wanted)
    for gone in [None, *inside]:
        for come in [None, *(set(names) - inside)]:
            other = [n for n, name in enumerate(names) if name in (inside - {gone}) | {come}]
            if min(Counter(labels[other].tolist())[kind] for kind in counts) >= 2:
                assert distance(labels, other, wanted) > found - 1e-6


@unhurried
@given(st.integers(4, 90), st.integers(4, 90), SHARES, st.integers(0, 9))
def test_without_groups_the_share_of_each_class_is_met_to_a_row(first, second, share, seed):
    labels = torch.tensor([0] * first + [1] * second)
    (drawn,) = draws(labels, [None] * len(labels), share=share, repeats=1, seed=seed)
    for kind, count in enumerate((first, second)):
        assert abs(int((labels[drawn] == kind).sum()) - max(share * count, 2)) < 1


def test_round_shares_without_groups_are_exact():
    labels = torch.tensor([0] * 300 + [1] * 100)
    for drawn in draws(labels, [None] * 400, share=0.29, repeats=5, seed=0):
        assert labels[drawn].bincount().tolist() == [87, 29]


def test_shots_are_rows_of_each_class():
    labels = torch.tensor([0] * 300 + [1] * 10)
    for shots in (1, 5, 10):
        (drawn,) = draws(labels, [None] * 310, shots=shots, repeats=1, seed=0)
        assert labels[drawn].bincount().tolist() == [shots, shots]


def test_one_giant_patient_does_not_stand_for_a_class():
    labels = torch.tensor([0] * 80 + [1] * 80)
    groups = ["giant"] * 40 + [f"p{row // 2}" for row in range(120)]
    for drawn in draws(labels, groups, share=0.25, repeats=20, seed=0):
        assert labels[drawn].bincount().tolist() == [20, 20]
        assert drawn.min() >= 40


def test_a_class_that_only_a_giant_patient_has_is_drawn_with_the_patient():
    labels = torch.tensor([0] * 40 + [1] * 2 + [0] * 60)
    groups = ["giant"] * 42 + [None] * 60
    for drawn in draws(labels, groups, share=0.05, repeats=5, seed=0):
        assert drawn.tolist() == list(range(42))


def test_the_whole_is_everything():
    labels = torch.arange(30) % 3
    (drawn,) = draws(labels, [f"p{row % 7}" for row in range(30)], share=1, repeats=1, seed=3)
    assert drawn.tolist() == list(range(30))


def test_the_seed_decides_and_more_repeats_begin_alike():
    labels, groups = torch.arange(60) % 3, [f"p{row // 2}" for row in range(60)]
    few = list(draws(labels, groups, share=0.3, repeats=2, seed=1))
    many = list(draws(labels, groups, share=0.3, repeats=4, seed=1))
    other = list(draws(labels, groups, share=0.3, repeats=2, seed=2))
    assert all(torch.equal(one, two) for one, two in zip(few, many, strict=False))
    assert len(many) == 4
    assert len({tuple(one.tolist()) for one in many + other}) == 6


def test_the_draws_are_the_same_under_another_key():
    """Names are salted, so their order must not matter."""
    labels, numbers = torch.arange(60) % 3, [row // 2 for row in range(60)]
    first = draws(labels, [f"p{n}" for n in numbers], share=0.3, repeats=3, seed=1)
    second = draws(labels, [f"p{99 - n}" for n in numbers], share=0.3, repeats=3, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_patients_alike_are_drawn_equally_often():
    labels = torch.tensor([0, 0, 1, 1] * 6)
    groups = [f"p{row // 2}" for row in range(24)]
    times = Counter(
        row
        for drawn in draws(labels, groups, share=0.5, repeats=1000, seed=0)
        for row in drawn.tolist()
    )
    assert max(times.values()) - min(times.values()) < 100  # six standard deviations of a count
    assert len(times) == 24


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"share": 0}, "above 0 and be at most 1, got 0"),
        ({"share": 1.5}, "at most 1, got 1.5"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"shots": 4}, "needs 4 rows of each class, and class 1 has 3"),
        ({"share": 0.1, "minimum": 4}, "needs 4 rows of each class, and class 1 has 3"),
        ({"share": 0.1, "minimum": 0}, "minimum must be at least 1"),
        ({}, "either share or shots, got None and None"),
        ({"share": 0.1, "shots": 2}, "either share or shots, got 0.1 and 2"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_at_once(asked, words):
    labels = torch.tensor([0] * 9 + [1] * 3)
    with pytest.raises(ValueError, match=words):
        draws(labels, [None] * 12, repeats=1, seed=0, **asked)


def test_one_group_per_label_is_required():
    with pytest.raises(ValueError, match=r"got \(3,\) labels and 2 groups"):
        draws(torch.tensor([0, 1, 0]), ["a", "b"], share=0.5, repeats=1, seed=0)
