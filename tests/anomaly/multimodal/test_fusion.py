import pytest
import torch
from rgbd_scenes import noise, scene
from torch import Tensor

from anomaly.base import NormalData
from anomaly.multimodal.fusion import ModalityScores, ScoreFusion, missing


def said(maps: Tensor, score: Tensor) -> ModalityScores:
    return ModalityScores(maps=maps, score=score)


def both(seed: int = 0, count: int = 20) -> dict[str, ModalityScores]:
    """Color around 100 with a spread of 10, geometry around 0.5 with one of 0.01; scores higher."""
    return {
        "color": said(
            100 + 10 * noise(count, 6, 5, seed=seed), 140 + 4 * noise(count, seed=seed + 1)
        ),
        "geometry": said(
            0.5 + 0.01 * noise(count, 6, 5, seed=seed + 2),
            0.6 + 0.002 * noise(count, seed=seed + 3),
        ),
    }


def fitted(*batches: dict[str, ModalityScores]) -> ScoreFusion:
    return ScoreFusion(["color", "geometry"]).fit(batches or [both()])


def test_each_modality_is_standardized_by_its_own_normal_values():
    """Crossed statistics would put one of them thousands of spreads away."""
    scaled = fitted().standardized(both())
    for own in scaled.values():
        assert own.maps.mean().item() == pytest.approx(0, abs=1e-3)
        assert own.maps.std(correction=0).item() == pytest.approx(1, rel=1e-3)
        assert own.score.mean().item() == pytest.approx(0, abs=1e-3)
        assert own.score.std().item() == pytest.approx(1, rel=1e-3)


def test_the_order_of_the_modalities_does_not_matter():
    found = both()
    turned = ScoreFusion(["geometry", "color"]).fit(
        [{name: found[name] for name in reversed(found)}]
    )
    torch.testing.assert_close(turned(found).score, fitted()(found).score)


def test_the_statistics_are_those_of_all_batches_together():
    first, second = both(count=3), both(seed=10, count=4)
    whole = {
        name: said(
            torch.cat([first[name].maps, second[name].maps]),
            torch.cat([first[name].score, second[name].score]),
        )
        for name in first
    }
    parts, once = fitted(first, second), fitted(whole)
    for name, buffer in once.named_buffers():
        torch.testing.assert_close(parts.get_buffer(name), buffer)


def test_the_answer_is_the_sum_of_the_standardized_modalities():
    fusion = fitted(
        {
            "color": said(torch.tensor([[[1.0, 3.0]]] * 8), torch.tensor([4.0, 8.0] * 4)),
            "geometry": said(torch.tensor([[[10.0, 30.0]]] * 8), torch.tensor([40.0, 80.0] * 4)),
        }
    )  # maps: 2 and 20 with spreads 1 and 10; scores: 6 and 60, squares of the spreads 32/7, 3200/7
    found = fusion(
        {
            "color": said(torch.tensor([[[5.0, 2.0]]]), torch.tensor([14.0])),
            "geometry": said(torch.tensor([[[20.0, 0.0]]]), torch.tensor([40.0])),
        }
    )
    torch.testing.assert_close(found.maps["image"], torch.tensor([[[3.0, -2.0]]]))
    torch.testing.assert_close(
        found.score, torch.tensor([8 / (32 / 7) ** 0.5 - 20 / (3200 / 7) ** 0.5])
    )
    assert found.missing == ()


def test_where_a_modality_says_nothing_the_other_alone_counts():
    fusion, found = fitted(), both(seed=7, count=3)
    scaled = fusion.standardized(found)
    found["color"].maps[0, 1] = torch.nan
    found["geometry"].maps[0, 2] = torch.nan
    found["color"].score[1] = torch.nan
    found["geometry"].score[2] = torch.nan
    fused = fusion(found)
    color, geometry = scaled["color"], scaled["geometry"]
    torch.testing.assert_close(fused.maps["image"][0, 1], geometry.maps[0, 1])
    torch.testing.assert_close(fused.maps["image"][0, 2], color.maps[0, 2])
    expected = [color.score[0] + geometry.score[0], geometry.score[1], color.score[2]]
    torch.testing.assert_close(fused.score, torch.stack(expected))
    assert fused.missing == ((), ("color",), ("geometry",))


def test_where_no_modality_says_anything_the_answer_is_nan():
    found = both(count=2)
    for own in found.values():
        own.maps[1, 3] = torch.nan
        own.score[1] = torch.nan
    fused = fitted()(found)
    assert fused.maps["image"].isnan().sum() == 5
    assert fused.score.isnan().tolist() == [False, True]
    assert fused.missing == ((), ("color", "geometry"))


def test_what_is_nan_counts_in_no_statistic():
    found = both()
    padded = {
        name: said(
            torch.cat([own.maps, torch.full_like(own.maps, torch.nan)]),
            torch.cat([own.score, torch.full_like(own.score, torch.nan)]),
        )
        for name, own in found.items()
    }
    torch.testing.assert_close(fitted(padded)(found).score, fitted()(found).score)


@pytest.mark.parametrize(("count", "few"), [(1, True), (7, True), (8, False)])
def test_few_held_out_items_have_the_spread_of_their_map(count, few):
    fusion = fitted(both(count=count))
    assert fusion.score_spread_.equal(fusion.map_spread_) == few


def test_all_modalities_are_scaled_alike_where_one_has_few_items():
    found = both(count=10)
    found["geometry"].score[:3] = torch.nan
    fusion = fitted(found)
    assert fusion.score_spread_.equal(fusion.map_spread_)


def test_a_modality_that_no_held_out_item_has_is_refused():
    found = both(count=2)
    found["geometry"].score.fill_(torch.nan)
    with pytest.raises(ValueError, match="no held-out normal item has geometry"):
        fitted(found)


def test_whole_groups_are_held_out_about_a_quarter_of_the_items():
    normal = NormalData([scene(i, size=(4, 4), group=f"part{i // 3}") for i in range(24)])
    for seed in range(5):
        training, held_out = ScoreFusion(["color"]).split(normal, seed=seed)
        groups = [{part[i].group for i in range(len(part))} for part in (training, held_out)]
        assert not groups[0] & groups[1]
        assert len(held_out) == 6
        assert len(training) == 18


def test_without_groups_items_are_held_out():
    normal = NormalData([scene(i, size=(4, 4)) for i in range(8)])
    training, held_out = ScoreFusion(["color"]).split(normal, seed=0)
    items = [part[i].item for part in (training, held_out) for i in range(len(part))]
    assert len(held_out) == 2
    assert sorted(items) == [f"scene{i}" for i in range(8)]


def test_items_of_one_group_cannot_be_split():
    normal = NormalData([scene(i, size=(4, 4), group="one") for i in range(3)])
    with pytest.raises(ValueError, match="at least two parts .* got 3 items of one"):
        ScoreFusion(["color"]).split(normal, seed=0)


def test_missing_is_empty_where_nothing_is():
    assert missing({"color": torch.zeros(3, dtype=torch.bool)}) == ()
