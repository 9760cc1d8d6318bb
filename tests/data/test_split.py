from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medssl.data.manifest import Item
from medssl.data.split import folds_by_group, split_by_group

SHARES = st.floats(0.05, 0.95)
GROUPS = st.lists(st.sampled_from([None, *"abcdefgh"]), min_size=1, max_size=60)
unhurried = settings(deadline=None)


def items_of(groups):
    return [
        Item(item=f"i{number}", path="/x", kind="picture", group=group)
        for number, group in enumerate(groups)
    ]


def groups_of(items):
    return {item.group or item.item for item in items}


@unhurried
@given(GROUPS, SHARES, st.integers(0, 9))
def test_every_item_is_on_one_side_and_no_group_on_both(groups, share, seed):
    items = items_of(groups)
    rest, held_out = split_by_group(items, share, seed)
    assert Counter(rest + held_out) == Counter(items)
    assert not groups_of(rest) & groups_of(held_out)


@unhurried
@given(GROUPS, SHARES, st.integers(0, 9))
def test_both_sides_get_something_wherever_there_are_two_groups(groups, share, seed):
    items = items_of(groups)
    rest, held_out = split_by_group(items, share, seed)
    assert rest
    assert bool(held_out) == (len(groups_of(items)) > 1)


@unhurried
@given(st.integers(2, 80), SHARES, st.integers(0, 9))
def test_without_groups_the_share_is_met_to_half_an_item(count, share, seed):
    _, held_out = split_by_group(items_of([None] * count), share, seed)
    wanted = min(max(share * count, 1), count - 1)
    assert abs(len(held_out) - wanted) <= 0.5 + 1e-9


@unhurried
@given(GROUPS, SHARES, st.integers(0, 9))
def test_the_share_is_missed_by_less_than_the_largest_group(groups, share, seed):
    items = items_of(groups)
    _, held_out = split_by_group(items, share, seed)
    largest = max(Counter(item.group or item.item for item in items).values())
    assert abs(len(held_out) - share * len(items)) <= largest


def test_the_second_list_is_the_held_out_share():
    rest, held_out = split_by_group(items_of([None] * 100), 0.2, seed=0)
    assert (len(rest), len(held_out)) == (80, 20)


def test_one_giant_group_does_not_swallow_a_small_share():
    items = items_of(["giant"] * 80 + [None] * 20)
    for seed in range(10):
        _, held_out = split_by_group(items, 0.2, seed)
        assert len(held_out) == 20
        assert "giant" not in groups_of(held_out)


def test_the_seed_decides():
    items = items_of([None] * 50)
    assert split_by_group(items, 0.3, 1) == split_by_group(items, 0.3, 1)
    assert split_by_group(items, 0.3, 1) != split_by_group(items, 0.3, 2)


def test_the_split_is_the_same_under_another_key():
    """Names are salted, so their order must not matter."""
    first = items_of(["a", "a", "b", "c", "c", "d", "e"])
    second = items_of(["q", "q", "k", "z", "z", "m", "b"])
    chosen = [{one.item for one in split_by_group(items, 0.4, 3)[1]} for items in (first, second)]
    assert chosen[0] == chosen[1]


def test_each_item_is_held_out_equally_often():
    """A calibration set must be exchangeable with the rest."""
    items = items_of(["a", "a", "a", "b", "c", "d", "e", "f", "g", "h"])
    times = Counter(one.item for seed in range(2000) for one in split_by_group(items, 0.5, seed)[1])
    singles = [times[f"i{number}"] for number in range(3, 10)]
    assert max(singles) - min(singles) < 150  # six standard deviations of one count


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_a_share_outside_the_open_interval_is_refused(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_group(items_of([None] * 4), share, 0)


@unhurried
@given(GROUPS, st.integers(2, 5), st.integers(0, 9))
def test_folds_hold_every_item_once_and_tear_no_group(groups, k, seed):
    items = items_of(groups)
    if len(groups_of(items)) < k:
        with pytest.raises(ValueError, match="as many groups"):
            folds_by_group(items, k, seed)
        return
    folds = folds_by_group(items, k, seed)
    assert len(folds) == k
    assert all(folds)
    assert Counter(item for fold in folds for item in fold) == Counter(items)
    assert sum(len(groups_of(fold)) for fold in folds) == len(groups_of(items))


@unhurried
@given(GROUPS, st.integers(2, 5), st.integers(0, 9))
def test_folds_differ_by_at_most_the_largest_group(groups, k, seed):
    items = items_of(groups)
    if len(groups_of(items)) >= k:
        sizes = [len(fold) for fold in folds_by_group(items, k, seed)]
        largest = max(Counter(item.group or item.item for item in items).values())
        assert max(sizes) - min(sizes) <= largest


def test_groups_of_unequal_size_are_balanced():
    folds = folds_by_group(items_of("aaaaaabbbbcccdde"), 2, seed=0)
    assert sorted(map(len, folds)) == [8, 8]


def test_a_fold_needs_two():
    with pytest.raises(ValueError, match="at least 2"):
        folds_by_group(items_of([None] * 4), 1, 0)
