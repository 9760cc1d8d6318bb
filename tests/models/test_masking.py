"""Which patches are hidden: how many, in blocks, and the same whoever asks."""

import torch

from medssl.models.masking import block_mask, stratified_masks

EVEN = {"ratio": (0.1, 0.5), "probability": 0.5, "seed": 3}


def test_exactly_so_many_patches_are_hidden():
    for count in (1, 3, 4, 17, 60, 99):
        mask = block_mask(10, 10, count, torch.Generator().manual_seed(count))
        assert int(mask.sum()) == count


def test_they_lie_in_blocks():
    """A hidden patch has far more hidden neighbours than scattered ones would have."""
    share, total = 0.0, 0
    for seed in range(50):
        mask = block_mask(14, 14, 49, torch.Generator().manual_seed(seed))
        beside = mask[:, 1:] & mask[:, :-1]
        share += beside.sum().item() / mask[:, :-1].sum().item()
        total += 1
    assert share / total > 0.6  # scattered: 0.25


def test_half_of_the_rows_are_hidden_in_part_and_each_in_a_range_of_its_own():
    masks = stratified_masks(slice(0, 40), 40, (20, 20), **EVEN)
    shares = sorted(mask.float().mean().item() for mask in masks)
    assert shares[:20] == [0.0] * 20
    edges = torch.linspace(0.1, 0.5, 21).tolist()
    for share, low, high in zip(shares[20:], edges, edges[1:], strict=False):
        assert low - 1 / 400 <= share <= high


def test_a_part_of_the_rows_is_a_part_of_the_whole_and_steps_differ():
    whole = stratified_masks(slice(0, 12), 12, (6, 6), **EVEN)
    parts = [stratified_masks(slice(i, i + 4), 12, (6, 6), **EVEN) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    other = stratified_masks(slice(0, 12), 12, (6, 6), **{**EVEN, "seed": 4})
    assert not torch.equal(other, whole)


def test_nothing_or_everything_can_be_hidden_in_part():
    none = stratified_masks(slice(0, 6), 6, (4, 4), **{**EVEN, "probability": 0.0})
    assert not none.any()
    each = stratified_masks(slice(0, 6), 6, (4, 4), **{**EVEN, "probability": 1.0})
    assert each.flatten(1).any(1).all()


def test_a_patch_of_a_volume_is_hidden_at_all_depths_or_at_none():
    masks = stratified_masks(
        slice(0, 8), 8, (3, 6, 7), ratio=(0.2, 0.4), probability=1.0, seed=1
    )  # fmt: skip
    flat = stratified_masks(slice(0, 8), 8, (6, 7), ratio=(0.2, 0.4), probability=1.0, seed=1)
    assert masks.shape == (8, 3, 6, 7)
    assert torch.equal(masks, flat[:, None].expand_as(masks))
