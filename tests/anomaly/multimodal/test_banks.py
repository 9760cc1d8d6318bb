"""What all detectors with banks of color and geometry have to do."""

from typing import Any

import pytest
import torch
from rgbd_scenes import MeanColor, damaged, noise, peak, scene, spoiled, without

from anomaly.base import NormalData
from anomaly.multimodal.adaptation import Terms
from anomaly.multimodal.colored_fpfh import ColoredFPFH
from anomaly.multimodal.double_patchcore import DoublePatchCore
from anomaly.multimodal.lsfa import LSFA
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from medssl.data.sample import collate
from medssl.training import TrainingPlan

KINDS: list[Any] = [ColoredFPFH, DoublePatchCore, LSFA]
OWN: dict[Any, dict[str, Any]] = {
    ColoredFPFH: {"coreset_ratio": 1.0},
    DoublePatchCore: {},
    LSFA: {
        "num_heads": 2,
        "plan": TrainingPlan(total_samples=40, batch_size=4, learning_rate=1e-3),
        "terms": Terms(head_width=8, num_cells=16, memory_cells=256, memory_items=16),
    },
}


def of(kind: Any, **arguments: object) -> Any:
    return kind(
        color=ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)),
        geometry=GeometryFeatures(grid=(8, 6)),
        **({"sigma": 1.0} | OWN[kind] | arguments),
    )


@pytest.fixture(scope="module", params=KINDS)
def detector(request: pytest.FixtureRequest) -> Any:
    return of(request.param).fit(NormalData([scene(i) for i in range(8)], batch_size=4))


@pytest.mark.parametrize("roles", [("image",), ("xyz",), ("image", "xyz")])
@pytest.mark.parametrize("cell", [(1, 4), (5, 2)])
def test_a_damaged_cell_has_the_largest_value_in_whatever_modality_it_is_seen(
    detector, roles, cell
):
    plain = [scene(i) for i in range(50, 58)]
    found = detector.predict(collate([*plain, damaged(plain[0], cell, *roles)]))
    assert peak(found.maps["image"][-1]) == cell
    assert found.score[-1] > found.score[:-1].max() + 3 * found.score[:-1].std()
    assert found.missing == ()


def test_a_hole_in_the_depth_is_judged_by_its_color(detector):
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[8:20, 4:16] = False
    found = detector.predict(collate([damaged(scene(50, xyz_valid=valid), (3, 2), "image")]))
    assert not found.maps["image"].isnan().any()
    assert peak(found.maps["image"][0]) == (3, 2)
    assert found.missing == ()


def test_an_item_without_a_valid_pixel_scores_nan(detector):
    nowhere = torch.zeros(32, 24, dtype=torch.bool)
    found = detector.predict(collate([scene(50, color_valid=nowhere, xyz_valid=nowhere)]))
    assert found.score.isnan().all()
    assert found.maps["image"].isnan().all()
    assert found.missing == (("color", "geometry"),)


@pytest.mark.parametrize("rubbish", [torch.nan, 1e6])
def test_invalid_pixels_influence_no_score(detector, rubbish):
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:13, :9] = False
    item = scene(50, color_valid=valid, xyz_valid=valid)
    clean, found = (detector.predict(collate([one])) for one in (item, spoiled(item, rubbish)))
    assert found.score.equal(clean.score)
    assert found.maps["image"].isnan().equal(~valid[None])
    assert found.maps["image"][:, valid].equal(clean.maps["image"][:, valid])


@pytest.mark.parametrize("kind", [DoublePatchCore, LSFA])
@pytest.mark.parametrize(("gone", "left"), [("geometry", "color"), ("color", "geometry")])
def test_without_a_modality_the_other_alone_counts_and_the_answer_says_so(kind, gone, left):
    fitted = of(kind).fit(NormalData([scene(i) for i in range(8)], batch_size=4))
    items = [scene(50), damaged(scene(51), (3, 3), "image", "xyz")]
    whole = fitted.fusion.standardized(fitted._found(collate(items)))[left]
    found = fitted.predict(collate([without(item, gone) for item in items]))
    torch.testing.assert_close(found.score, whole.score)
    torch.testing.assert_close(found.maps["image"], whole.maps)
    assert found.missing == ((gone,), (gone,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_a_coreset_ratio_outside_0_to_1_is_refused(kind, ratio):
    with pytest.raises(ValueError, match=r"coreset_ratio must lie in \(0, 1\]"):
        of(kind, coreset_ratio=ratio)


@pytest.mark.parametrize("kind", [DoublePatchCore, LSFA])
@pytest.mark.parametrize("top", [0.0, 1.5])
def test_a_share_of_cells_outside_0_to_1_is_refused(kind, top):
    with pytest.raises(ValueError, match=r"top must lie in \(0, 1\]"):
        of(kind, top=top)


def test_the_selftest_shows_noise_in_both_modalities(detector):
    shape = detector.selftest_shape((3, 32, 24))
    assert shape == (2, 4, 32, 24)
    plain = detector.selftest(noise(*shape))
    for channel in (0, 3):
        changed = noise(*shape)
        changed[:, channel] += noise(2, 32, 24, seed=1)
        assert not detector.selftest(changed).allclose(plain)
