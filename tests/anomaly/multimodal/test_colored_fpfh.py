import pytest
import torch
from rgbd_scenes import MeanColor, damaged, scene, without
from torch import Tensor

from anomaly.base import NormalData
from anomaly.multimodal.colored_fpfh import ColoredFPFH
from anomaly.multimodal.modalities import ColorFeatures, GeometryFeatures
from medssl.data.sample import Sample, collate


def of(**arguments: object) -> ColoredFPFH:
    return ColoredFPFH(
        color=ColorFeatures(MeanColor(), layers=["0"], grid=(8, 6)),
        geometry=GeometryFeatures(grid=(8, 6)),
        **({"sigma": 1.0} | arguments),
    )


def normal(count: int = 6, **arguments: object) -> NormalData:
    return NormalData([scene(i, **arguments) for i in range(count)], batch_size=4)


@pytest.fixture(scope="module")
def detector() -> ColoredFPFH:
    return of(coreset_ratio=1.0).fit(normal())


def rows(detector: ColoredFPFH, samples: list[Sample]) -> Tensor:
    """Color and FPFH of all cells, (N, 36) float64."""
    batch = collate(samples)
    parts = [detector.color(batch).features, detector.geometry(batch).features]
    return torch.cat(parts, dim=3).flatten(0, 2).double()


def expected(detector: ColoredFPFH, test: Sample, columns: slice) -> Tensor:
    """(48,) distances by brute force, each part scaled to a mean square of one."""
    cells, asked = rows(detector, [scene(i) for i in range(6)]), rows(detector, [test])
    scaled = []
    for part in (slice(3), slice(3, 36)):
        mean = cells[:, part].mean(0)
        size = (cells[:, part] - mean).square().sum(1).mean().sqrt()
        scaled.append([(values[:, part] - mean) / size for values in (asked, cells)])
    asked, cells = (torch.cat(both, dim=1) for both in zip(*scaled, strict=True))
    return torch.cdist(asked[:, columns], cells[:, columns]).amin(1)


def test_the_score_is_the_distance_in_both_parts_scaled_alike(detector):
    test = damaged(scene(50), (2, 2), "image")
    distances = expected(detector, test, slice(36))
    found = detector.predict(collate([test]))
    torch.testing.assert_close(found.score.double(), distances.max()[None], rtol=1e-4, atol=0)
    squares = detector.bank_.split([3, 33], dim=1)
    assert [part.square().sum(1).mean().item() for part in squares] == pytest.approx([1, 1])


@pytest.mark.parametrize(("gone", "columns"), [("geometry", slice(3)), ("color", slice(3, 36))])
def test_without_a_part_the_other_stands_for_both(detector, gone, columns):
    test = damaged(scene(50), (2, 2), "image", "xyz")
    distances = 2**0.5 * expected(detector, test, columns)
    found = detector.predict(collate([without(test, gone)]))
    torch.testing.assert_close(found.score.double(), distances.max()[None], rtol=1e-4, atol=0)
    assert found.missing == ((gone,),)
    assert not found.maps["image"].isnan().any()


def test_the_bank_has_its_share_of_the_cells_with_both():
    valid = torch.ones(32, 24, dtype=torch.bool)
    valid[:16] = False
    fitted = of(coreset_ratio=0.25).fit(normal(xyz_valid=valid))
    assert fitted.bank_.shape == (int(0.25 * 6 * 24), 36)


def test_normal_items_without_both_at_one_place_are_refused():
    left = torch.arange(24).expand(32, 24) < 12
    with pytest.raises(ValueError, match="none of the 6 normal items has color and geometry"):
        of().fit(normal(color_valid=left, xyz_valid=~left))
