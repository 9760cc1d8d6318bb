from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from rgbd_scenes import MeanColor, reloaded, scene, without

from anomaly.base import NormalData
from anomaly.multimodal.colored_fpfh import ColoredFPFH
from anomaly.multimodal.crossmodal import CrossmodalMapping
from anomaly.multimodal.double_patchcore import DoublePatchCore
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from medssl.data.sample import collate
from pipelines.fit import fit

ROOT = Path(__file__).parents[3]


def of(*modalities: str, **arguments: object) -> DoublePatchCore:
    names = modalities or ("color", "geometry")
    color = ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)) if "color" in names else None
    geometry = GeometryFeatures(grid=(8, 6)) if "geometry" in names else None
    return DoublePatchCore(color=color, geometry=geometry, **({"sigma": 1.0} | arguments))


def normal(count: int = 8, **arguments: object) -> NormalData:
    return NormalData([scene(i, **arguments) for i in range(count)], batch_size=4)


@pytest.fixture(scope="module")
def detector() -> DoublePatchCore:
    return of().fit(normal())


def test_each_bank_has_its_share_of_its_own_cells():
    """Half of the cells have no geometry; color's bank must not shrink with that of geometry."""
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:16] = False
    fitted = of(coreset_ratio=0.25).fit(normal(xyz_valid=valid))
    assert len(fitted.color_bank_) == int(0.25 * 6 * 48)  # of six items; two are held out
    assert len(fitted.geometry_bank_) == int(0.25 * 6 * 24)


@pytest.mark.parametrize(("top", "count"), [(0.01, 1), (0.25, 12)])
def test_one_modality_alone_is_its_distance_to_the_nearest_normal_cell(top, count):
    """Of 48 cells, the mean of the farthest ones."""
    samples = normal(32)  # a quarter are held out, enough for a spread
    fitted = of("color", coreset_ratio=1.0, sigma=0.0, top=top).fit(samples)
    training, held_out = fitted.fusion.split(samples, seed=0)

    def cells(items: list) -> torch.Tensor:
        return fitted.color(collate(items)).features.flatten(1, 2).double()

    bank = cells([training[i] for i in range(len(training))]).flatten(0, 1)
    apart = torch.cdist(cells([held_out[i] for i in range(len(held_out))]), bank).amin(2)
    normal_scores = apart.topk(count).values.mean(1)
    test = torch.cdist(cells([scene(60), scene(61)]), bank).amin(2).topk(count).values.mean(1)
    expected = (test - normal_scores.mean()) / normal_scores.std()
    found = fitted.predict(collate([scene(60), scene(61)]))
    torch.testing.assert_close(found.score.double(), expected, rtol=1e-3, atol=1e-4)


def test_no_held_out_item_is_in_a_bank():
    samples = normal()
    fitted = of("color", coreset_ratio=1.0).fit(samples)
    training, held_out = fitted.fusion.split(samples, seed=0)
    for part, inside in ((training, True), (held_out, False)):
        cells = fitted.color(collate([part[0]])).features.flatten(0, 2).double()
        apart = torch.cdist(cells, fitted.color_bank_.double()).amin(1)
        assert (apart < 1e-6).all().item() == inside


def test_geometry_alone_says_that_its_score_is_bounded():
    assert [of(*names).unbounded for names in ((), ("color",), ("geometry",))] == [
        True,
        True,
        False,
    ]


def test_normal_items_must_have_the_modalities_of_the_detector():
    bare = NormalData([without(scene(i), "color") for i in range(4)])
    with pytest.raises(ValueError, match="none of the 3 normal items has color"):
        of().fit(bare)


def test_neither_modality_is_refused():
    with pytest.raises(ValueError, match="at least one of them"):
        DoublePatchCore(color=None, geometry=None)


@pytest.mark.parametrize("kind", [DoublePatchCore, ColoredFPFH, CrossmodalMapping])
def test_a_saved_detector_scores_the_same_bits(kind, tmp_path):
    fitted, samples = kind.example()
    fitted.fit(NormalData(samples[:-2]))
    again = reloaded(fitted, tmp_path / "model", (64, 48))
    batch = collate(samples[-2:])
    assert again.predict(batch).score.equal(fitted.predict(batch).score)


@pytest.mark.parametrize(
    ("config", "kind", "side"),
    [
        ("double_patchcore_rgbd", DoublePatchCore, 64),
        ("btf_rgbd", ColoredFPFH, 28),
        ("crossmodal_rgbd", CrossmodalMapping, 64),
    ],
)
def test_the_configs_give_a_detector_of_color_and_geometry(config, kind, side):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    made = parser.instantiate(parser.parse_path(ROOT / f"configs/fit/{config}.yaml"))
    assert type(made.detector) is kind
    assert made.detector.color.grid == made.detector.geometry.grid == [side, side]
    assert made.preprocessing.geometry is not None
