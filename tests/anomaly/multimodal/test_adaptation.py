import math
from dataclasses import replace

import pytest
import torch
from rgbd_scenes import noise
from torch import Tensor

from anomaly.multimodal.adaptation import (
    MODALITIES,
    Adaptation,
    Adaptor,
    FeatureMemory,
    Terms,
    contrast,
    draw_cells,
    pooled,
)
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample
from medssl.schedule import Clock
from medssl.training import TrainingPlan, train

GRID = (4, 3)
WIDTHS = {"color": 6, "geometry": 4}
TERMS = Terms(head_width=5, num_cells=12, memory_cells=96, memory_items=8)
STEPPED = Clock(samples_seen=1, total_samples=2, step=1)


def everywhere(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def adaptation(terms: Terms = TERMS, *, changed: bool = False, seed: int = 0) -> Adaptation:
    """With adaptors that are the identity, or changed from it."""
    torch.manual_seed(seed)
    made = Adaptation(WIDTHS, num_heads=2, terms=terms)
    if changed:
        for adaptor in made.adaptors.values():
            for last in (adaptor.project, adaptor.mlp[2]):
                torch.nn.init.normal_(last.weight, std=0.3)
    return made


def image(features: Tensor, valid: Tensor) -> Image:
    """Features (h, w, E)."""
    return Image(
        pixels=features.movedim(-1, 0),
        axes="HW",
        modality=Modality.OTHER,
        affine=pixel_affine(),
        frame="pixel",
        valid=valid,
    )


def item(seed: int, **valid: Tensor) -> Sample:
    images = {
        name: image(
            3 + 2 * noise(*GRID, WIDTHS[name], seed=10 * seed + i),
            valid.get(name, everywhere(*GRID)),
        )
        for i, name in enumerate(MODALITIES)
    }
    return Sample(item=f"item{seed}", images=images)


def views_of(made: Adaptation, samples: list[Sample]) -> dict[str, Tensor]:
    rows = [made.views(sample, torch.Generator()) for sample in samples]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def prepared(terms: Terms = TERMS, *, count: int = 4, changed: bool = False) -> Adaptation:
    made = adaptation(terms, changed=changed)
    made.prepare([item(i) for i in range(count)])
    return made


def memory_of(rows: Tensor, owners: list[int], size: int | None = None) -> FeatureMemory:
    memory = FeatureMemory(size or len(rows), rows.shape[1])
    memory.push(rows, torch.tensor(owners))
    return memory


# The memory and the distance to it


def test_a_feature_that_the_memory_holds_of_another_item_is_at_distance_0():
    memory = memory_of(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), [1, 2])
    assert memory.distance(torch.tensor([[3.0, 4.0]]), torch.tensor([7])).item() == 0


def test_the_distance_grows_without_a_limit():
    memory = memory_of(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), [1, 2])
    for y in (1.0, 10.0, 1e4):
        found = memory.distance(torch.tensor([[0.0, -y]]), torch.tensor([7]))
        assert found.item() == pytest.approx(y)


def test_the_rows_of_an_item_are_never_the_answer_to_itself():
    memory = memory_of(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), [1, 2])
    features, owners = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 2])
    assert memory.distance(features, owners).item() == pytest.approx(2.5)  # of 5 and 0
    assert memory_of(torch.zeros(1, 2), [1]).distance(features, owners).item() == 0


def test_the_distance_is_that_of_brute_force_among_the_rows_of_others():
    rows, features = noise(40, 7), noise(30, 7, seed=1)
    owners, asking = torch.arange(40) % 5, torch.arange(30) % 5
    memory = memory_of(rows, owners.tolist())
    total = 0.0
    for feature, owner in zip(features.double(), asking, strict=True):
        total += min((feature - row).norm().item() for row in rows[owners != owner].double())
    assert memory.distance(features, asking).item() == pytest.approx(total / 30, rel=1e-5)


@pytest.mark.parametrize("far", [1e-3, 7.0, 50.0, 1e4])
def test_the_pull_is_as_strong_at_any_distance(far):
    """The published script takes a distance above 7.07 for 7.07, which has no gradient."""
    features = torch.tensor([[0.6 * far, 0.8 * far]], requires_grad=True)
    memory_of(torch.zeros(1, 2), [1]).distance(features, torch.tensor([7])).backward()
    torch.testing.assert_close(features.grad, torch.tensor([[0.6, 0.8]]))


def test_at_distance_0_the_gradient_is_0():
    features = torch.zeros(1, 2, requires_grad=True)
    memory_of(torch.zeros(1, 2), [1]).distance(features, torch.tensor([7])).backward()
    assert features.grad.equal(torch.zeros(1, 2))


def test_an_empty_memory_pulls_nothing():
    features = torch.ones(1, 2, requires_grad=True)
    found = FeatureMemory(4, 2).distance(features, torch.tensor([7]))
    found.backward()
    assert found.item() == 0
    assert features.grad.equal(torch.zeros(1, 2))


@pytest.mark.parametrize("parts", [[7], [2, 3, 2], [1] * 7])
def test_the_memory_keeps_the_newest_rows_and_their_owners(parts):
    memory, rows = FeatureMemory(4, 1), torch.arange(7.0)[:, None]
    for part, owners in zip(rows.split(parts), torch.arange(7).split(parts), strict=True):
        memory.push(part, owners)
    assert sorted(memory.rows[:, 0].tolist()) == [3, 4, 5, 6]
    assert memory.owners.equal(memory.rows[:, 0].long())


def test_what_is_in_the_memory_does_not_follow_what_was_put_in():
    rows = torch.ones(2, 3, requires_grad=True)
    memory = memory_of(rows, [1, 1])
    with torch.no_grad():
        rows.add_(5)
    assert memory.rows.equal(torch.ones(2, 3))
    assert not memory.rows.requires_grad


# InfoNCE


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_aligned_orthogonal_pairs_have_the_closed_form_loss(count, temperature):
    first = torch.eye(5)[:count]
    expected = math.log(math.exp(1 / temperature) + count - 1) - 1 / temperature
    found = contrast(first, 3 * first, temperature).item()  # length must not matter
    assert found == pytest.approx(expected, abs=1e-5)


def test_infonce_is_the_cross_entropy_of_cosines_by_hand():
    first, second = noise(6, 4).double(), noise(6, 4, seed=1).double()
    total = 0.0
    for one, other in ((first, second), (second, first)):
        for i in range(6):
            logits = [(one[i] @ row / one[i].norm() / row.norm()).item() / 0.5 for row in other]
            total += math.log(sum(math.exp(logit) for logit in logits)) - logits[i]
    found = contrast(first.float(), second.float(), 0.5).item()
    assert found == pytest.approx(total / 12, rel=1e-5)


def test_pairs_that_are_mixed_up_cost_more():
    first = noise(6, 4)
    assert contrast(first, first, 0.1) < contrast(first, first.roll(1, 0), 0.1) - 1


def test_no_pair_costs_nothing():
    first = torch.zeros(0, 4, requires_grad=True)
    found = contrast(first, torch.zeros(0, 4), 1.0)
    found.backward()
    assert found.item() == 0


# Which cells count


def test_cells_are_drawn_among_the_valid_ones_only():
    """The published script draws rows 0 to the number of valid cells, of all cells."""
    valid = torch.zeros(2, 40, dtype=torch.bool)
    valid[0, 30:], valid[1, 37:] = True, True
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        items, cells = draw_cells(valid, 5)
        assert items.tolist() == [0] * 5 + [1] * 3
        assert valid[items, cells].all()
        assert len(set(zip(items.tolist(), cells.tolist(), strict=True))) == 8
        drawn |= set(cells[items == 0].tolist())
    assert drawn == set(range(30, 40))


def test_no_valid_cell_gives_none():
    items, cells = draw_cells(torch.zeros(2, 3, dtype=torch.bool), 5)
    assert len(items) == len(cells) == 0


def test_an_item_is_the_mean_of_its_valid_cells():
    features = torch.arange(12.0).reshape(2, 3, 1, 2)
    valid = torch.tensor([[[True], [False], [True]], [[False], [False], [False]]])
    expected = torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    torch.testing.assert_close(pooled(features, valid), expected)


# The adaptors


def test_an_adaptor_is_at_first_the_identity():
    tokens = noise(2, 5, 7)
    torch.testing.assert_close(Adaptor(7, num_heads=3)(tokens, everywhere(2, 5)), tokens)


def test_an_adaptor_is_the_transformer_block_of_timm():
    from timm.models.vision_transformer import Block

    torch.manual_seed(0)
    adaptor, block = Adaptor(12, num_heads=3).double(), Block(12, 3, qkv_bias=True).double()
    names = {"project": "attn.proj", "qkv": "attn.qkv", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    for own, other in (names | {"norm1": "norm1", "norm2": "norm2"}).items():
        adaptor.get_submodule(own).load_state_dict(block.get_submodule(other).state_dict())
    tokens = noise(2, 5, 12).double()
    torch.testing.assert_close(adaptor(tokens, everywhere(2, 5)), block(tokens))


def test_adapted_features_stay_at_their_cells():
    """The published script lays (B, E, h, w) out as tokens without turning it around."""
    made = adaptation(changed=True)
    features, valid = noise(2, *GRID, 6), everywhere(2, *GRID)
    plain = made.adapted("color", features, valid)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    turned = features.flatten(1, 2)[:, order].unflatten(1, GRID)
    found = made.adapted("color", turned, valid).flatten(1, 2)
    torch.testing.assert_close(found, plain.flatten(1, 2)[:, order])


def test_a_cell_that_stands_out_stands_out_where_it_is():
    made = adaptation(changed=True)
    features, valid = torch.zeros(1, *GRID, 6), everywhere(1, *GRID)
    valid[0, 0, 1] = False
    features[0, 2, 1, 3] = 50.0
    found = made.adapted("color", features, valid)
    assert found.norm(dim=-1)[0].argmax().item() == 2 * GRID[1] + 1
    assert found[0, 0, 1].equal(torch.zeros(6))


def test_invalid_cells_and_other_items_influence_nothing():
    made = adaptation(changed=True)
    features, valid = noise(3, *GRID, 6), noise(3, *GRID, seed=1) > 0
    valid[2] = False
    plain = made.adapted("color", features, valid)
    spoilt = torch.where(valid[..., None], features, 1e6)
    assert made.adapted("color", spoilt, valid).equal(plain)
    for i in range(3):
        alone = made.adapted("color", features[i : i + 1], valid[i : i + 1])
        torch.testing.assert_close(alone[0], plain[i])
    assert plain[2].equal(torch.zeros(*GRID, 6))


def test_the_neighbors_of_a_cell_in_its_item_are_looked_at():
    made = adaptation(changed=True)
    features, valid = noise(1, *GRID, 6), everywhere(1, *GRID)
    changed = features.clone()
    changed[0, 0, 0] += noise(6, seed=5)
    found = made.adapted("color", changed, valid) - made.adapted("color", features, valid)
    assert (found.abs().amax(-1) > 1e-4).all()


# What is learnt before the first step


def test_features_are_centered_and_scaled_over_valid_normal_cells():
    valid = noise(*GRID, seed=3) > 0
    samples = [item(0, color=valid), item(1), item(2)]
    made = adaptation()
    made.prepare(samples)
    views = views_of(made, samples)
    for name in MODALITIES:
        known = views[f"{name}_valid"]
        cells = made.adapted(name, views[name], known)[known].detach()
        torch.testing.assert_close(cells.mean(0), torch.zeros(WIDTHS[name]), atol=1e-5, rtol=0)
        assert cells.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_the_memories_are_full_of_normal_features_before_the_first_step():
    made = prepared(count=3)
    views = views_of(made, [item(i) for i in range(3)])
    for name in MODALITIES:
        adapted = made.adapted(name, views[name], views[f"{name}_valid"]).detach()
        cells, items = made.cells[name], made.items[name]
        assert (cells.pushed.item(), items.pushed.item()) == (36, 3)
        apart = torch.cdist(adapted.flatten(0, 2).double(), cells.rows[:36].double())
        assert apart.amin(1).max() < 1e-5
        torch.testing.assert_close(items.rows[:3], adapted.mean((1, 2)))
        assert items.owners[:3].equal(views["owner"])


def test_pictures_of_one_part_are_no_normal_features_for_each_other():
    made = adaptation()
    one, other = (made.views(replace(item(i), group="part"), torch.Generator()) for i in range(2))
    assert one["owner"] == other["owner"] != made.views(item(0), torch.Generator())["owner"]


def test_items_without_a_cell_of_both_modalities_are_refused():
    left = torch.zeros(*GRID, dtype=torch.bool)
    left[:, 0] = True
    with pytest.raises(ValueError, match="none of the 2 normal items has color and geometry"):
        adaptation().prepare([item(i, color=left, geometry=~left) for i in range(2)])


@pytest.mark.parametrize("name", ["temperature", "head_width", "num_cells", "memory_cells"])
def test_terms_that_mean_nothing_are_refused(name):
    with pytest.raises(ValueError, match=name):
        Terms(**{name: 0})


# The loss


def test_the_loss_is_the_weighted_sum_of_its_terms():
    terms = replace(TERMS, global_compactness=0.3, local_alignment=2.0, global_alignment=0.7)
    made = prepared(terms, changed=True)
    found = made.loss(views_of(made, [item(i) for i in range(3)]))
    expected = (
        found["local_compactness"]
        + 0.3 * found["global_compactness"]
        + 2.0 * found["local_alignment"]
        + 0.7 * found["global_alignment"]
    )
    torch.testing.assert_close(found["loss"], expected)


def test_the_global_compactness_works_at_the_first_step():
    """The published script stops there, with an empty list."""
    made = prepared(count=4)
    views = views_of(made, [item(i) for i in range(4)])
    expected = 0.0
    for name in MODALITIES:
        whole = made.adapted(name, views[name], views[f"{name}_valid"]).mean((1, 2))
        apart = torch.cdist(whole, whole) + 1e9 * torch.eye(4)
        expected += apart.amin(1).mean().item()
    assert expected > 0.1
    assert made.loss(views)["global_compactness"].item() == pytest.approx(expected, rel=1e-4)


def test_the_local_compactness_is_the_distance_to_cells_of_other_items_in_both_modalities():
    made = prepared(count=3)  # the memory holds every cell
    views = views_of(made, [item(i) for i in range(3)])
    expected = 0.0
    for name in MODALITIES:
        cells = made.adapted(name, views[name], views[f"{name}_valid"]).flatten(1, 2)
        for i in range(3):
            others = torch.cat([cells[j] for j in range(3) if j != i])
            expected += torch.cdist(cells[i], others).amin(1).mean().item() / 3
    assert made.loss(views)["local_compactness"].item() == pytest.approx(expected, rel=1e-4)


def test_each_modality_goes_through_its_own_head_item_by_item():
    """The published script sends other features through the head of the points, or none."""
    made = prepared(changed=True)
    views = views_of(made, [item(i) for i in range(3)])
    whole = [
        made.heads[name](made.adapted(name, views[name], views[f"{name}_valid"]).mean((1, 2)))
        for name in MODALITIES
    ]
    cosines = torch.cosine_similarity(whole[0][:, None], whole[1][None], dim=2)
    both = (cosines.log_softmax(1).diag() + cosines.log_softmax(0).diag()) / 2
    assert made.loss(views)["global_alignment"].item() == pytest.approx(-both.mean().item())


@pytest.mark.parametrize("name", MODALITIES)
def test_both_modalities_enter_both_alignments(name):
    made = prepared()
    views = views_of(made, [item(i) for i in range(3)])
    plain = made.loss(views)
    views[name] = views[name] + noise(3, *GRID, WIDTHS[name], seed=9)
    found = made.loss(views)
    for term in ("local_alignment", "global_alignment"):
        assert abs(found[term] - plain[term]) > 1e-4


def test_local_alignment_sets_a_cell_against_all_others_of_the_batch():
    made = prepared(changed=True)  # all cells of each item are drawn
    views = views_of(made, [item(i) for i in range(3)])
    sides = [
        made.heads[name](made.adapted(name, views[name], views[f"{name}_valid"])).flatten(0, 2)
        for name in MODALITIES
    ]
    expected = contrast(sides[0], sides[1], TERMS.temperature).item()
    assert made.loss(views)["local_alignment"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "other"), [MODALITIES, MODALITIES[::-1]])
def test_cells_with_one_modality_are_compact_but_not_aligned(name, other):
    valid = everywhere(*GRID)
    valid[1:3, 1] = False  # of the other
    samples = [item(i, **{other: valid}) for i in range(3)]
    made = adaptation()
    made.prepare(samples)
    views = views_of(made, samples)
    plain = made.loss(views)
    views[name] = torch.where(valid[..., None], views[name], 40.0)
    found = made.loss(views)
    for term in ("local_alignment", "global_alignment"):
        torch.testing.assert_close(found[term], plain[term])
    for term in ("local_compactness", "global_compactness"):
        assert found[term] > plain[term] + 0.1


def test_an_item_with_one_modality_is_aligned_with_nothing():
    nowhere = torch.zeros(*GRID, dtype=torch.bool)
    made = prepared()
    two = made.loss(views_of(made, [item(0), item(1)]))
    three = made.loss(views_of(made, [item(0), item(1), item(2, geometry=nowhere)]))
    for term in ("local_alignment", "global_alignment"):
        torch.testing.assert_close(three[term], two[term])


@pytest.mark.parametrize("column", [0, 2])
def test_a_cell_with_a_channel_that_is_0_counts(column):
    """The published script drops a cell one channel of which is exactly 0."""
    samples = [item(i) for i in range(3)]
    samples[0].images["geometry"].pixels[column] = 0.0
    made = adaptation()
    made.prepare(samples)
    assert made.cells["geometry"].pushed.item() == 3 * 12


def test_every_weight_of_an_adaptor_and_a_head_learns():
    made = prepared(changed=True)
    made.loss(views_of(made, [item(i) for i in range(3)]))["loss"].backward()
    for name, parameter in made.named_parameters():
        if not name.endswith("qkv.bias"):  # of the keys it changes nothing
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("term", ["compactness", "alignment"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_each_term_teaches_both_adaptors(scope, term):
    made = prepared(changed=True)
    found = made.loss(views_of(made, [item(i) for i in range(3)]))[f"{scope}_{term}"]
    weights = [adaptor.qkv.weight for adaptor in made.adaptors.values()]
    assert all(gradient.any() for gradient in torch.autograd.grad(found, weights))


def test_the_first_step_moves_both_adaptors_from_the_identity():
    made = prepared()
    made.loss(views_of(made, [item(i) for i in range(3)]))["loss"].backward()
    for adaptor in made.adaptors.values():
        assert adaptor.project.weight.grad.any()
        assert adaptor.mlp[2].weight.grad.any()


def test_a_batch_without_a_valid_cell_teaches_nothing():
    nowhere = torch.zeros(*GRID, dtype=torch.bool)
    made = prepared(changed=True)
    empty = [item(i, color=nowhere, geometry=nowhere) for i in range(2)]
    found = made.loss(views_of(made, empty))["loss"]
    found.backward()
    assert found.item() == 0
    assert not any(p.grad is not None and p.grad.any() for p in made.parameters())


def test_after_a_step_the_memories_hold_what_the_batch_was_then():
    made = prepared(count=8)  # the memories are full
    oldest = made.cells["color"].rows[:24].clone()
    with torch.no_grad():
        made.adaptors["color"].mlp[2].bias.fill_(0.5)
    batch = [item(2), item(3)]
    views = views_of(made, batch)
    made.loss(views)
    assert made.cells["color"].rows[:24].equal(oldest)
    made.after_step(STEPPED)
    adapted = made.adapted("color", views["color"], views["color_valid"]).detach()
    memory = made.cells["color"]
    apart = torch.cdist(memory.rows[:24].double(), adapted.flatten(0, 2).double())
    assert apart.amin(1).max() < 1e-5
    assert memory.owners[:24].equal(views["owner"].repeat_interleave(12))
    torch.testing.assert_close(made.items["color"].rows[:2], adapted.mean((1, 2)))


# The loop


def test_a_batch_cannot_be_split_and_is_refused(tmp_path):
    """The published script takes a step on the last of 16 parts alone."""
    plan = TrainingPlan(total_samples=4, batch_size=4, accumulation=2)
    with pytest.raises(ValueError, match="sets the rows of a batch against each other"):
        train(adaptation(), [item(i) for i in range(4)], plan, workdir=tmp_path)


def test_the_order_of_the_items_is_another_in_each_epoch(tmp_path, monkeypatch):
    """The published script goes through the items in one order twice."""
    seen: list[int] = []
    loss = Adaptation.loss

    def watched(self: Adaptation, views: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(views["owner"].tolist())
        return loss(self, views)

    monkeypatch.setattr(Adaptation, "loss", watched)
    samples = [item(i) for i in range(8)]
    plan = TrainingPlan(total_samples=16, batch_size=4)
    train(adaptation(), samples, plan, workdir=tmp_path, device="cpu", workers=0)
    assert sorted(seen[:8]) == sorted(seen[8:])
    assert seen[:8] != seen[8:]
