"""Maps come home, regions are boxed, items outside the domain are refused."""

import math

import pytest
import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector
from anomaly.calibration import Calibration
from medssl.data.domain import learn_domain
from medssl.data.geometry import corners
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch, Sample
from pipelines.scoring import OutsideDomainError, Scorer, map_to_source, regions

AS_IS = {"intensity": "range", "mean": (0.0,), "std": (1.0,)}


class Brightness(Detector):
    """The map is the picture: every answer is known beforehand."""

    def predict(self, batch: Batch) -> AnomalyMap:
        images = batch.images["image"]
        maps = torch.where(images.valid, images.pixels[:, 0], torch.nan)
        return AnomalyMap(score=maps.nan_to_num(-1).flatten(1).amax(1), maps={"image": maps})


class BrightVolume(Brightness):
    axes = "DHW"


def picture(pixels: Tensor, *, count: int = 1, **changes: object) -> Image:
    """pixels: (H, W), repeated for `count` channels."""
    values = {
        "pixels": pixels.repeat(count, 1, 1),
        "axes": "HW",
        "modality": Modality.PICTURE,
        "affine": pixel_affine(),
        "frame": "pixel",
        "value_range": (0, 255),
    }
    return Image(**{**values, **changes})


def oblique_ct(pixels: Tensor, spacing: tuple[float, float, float]) -> Image:
    """A volume (D, H, W) turned about two patient axes, off centre."""
    a, b = math.radians(20), math.radians(-35)
    turn = (
        torch.tensor(
            [[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]
        ).double()
        @ torch.tensor(
            [[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]]
        ).double()
    )
    columns = turn[:, [2, 1, 0]] * torch.tensor([1.0, -1.0, -1.0]).double()  # D up, H back, W right
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = columns * torch.tensor(spacing, dtype=torch.float64)
    affine[:3, 3] = torch.tensor([12.5, -40.25, 101.0])
    return Image(
        pixels=pixels[None],
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=spacing,
        units="HU",
    )


def calibrated(map_threshold: float) -> Calibration:
    """A rate of one half needs one held-out normal."""
    return Calibration.from_scores([map_threshold], [map_threshold], rate=0.5, method="split")


def test_a_picture_of_its_own_size_comes_home_unchanged():
    pixels = torch.rand(12, 20) * 255
    scorer = Scorer.from_parts(Brightness(), Preprocessing(size=(12, 20), **AS_IS))
    (scored,) = scorer.score([Sample(item="a", images={"image": picture(pixels)})])
    torch.testing.assert_close(scored.map.pixels[0], pixels / 255)
    assert scored.score == pytest.approx(float(pixels.max()) / 255)
    assert (scored.p_value, scored.threshold, scored.anomalous, scored.boxes) == (None,) * 4


def test_a_linear_ramp_comes_home_from_a_smaller_grid_where_it_was():
    ramp = torch.arange(40.0)[:, None] * 2 + torch.arange(64.0)[None] * 3
    scorer = Scorer.from_parts(Brightness(), Preprocessing(size=(20, 16), **AS_IS))
    (scored,) = scorer.score([Sample(item="a", images={"image": picture(ramp)})])
    home = scored.map.pixels[0] * 255
    inside = (slice(4, 36), slice(8, 56))  # antialiasing bends the ramp at the border
    torch.testing.assert_close(home[inside], ramp[inside], atol=0.05, rtol=0)
    assert home.shape == ramp.shape
    assert home.isfinite().all()


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_bright_voxel_of_an_oblique_volume_comes_home_to_its_own_place(plane):
    pixels = torch.zeros(10, 14, 18)
    pixels[3, 11, 5] = 100.0
    source = oblique_ct(pixels, (5.0, 0.8, 0.7))
    size = {"axial": (14, 18), "coronal": (10, 18), "sagittal": (10, 14)}[plane]
    preprocessing = Preprocessing(
        size=size, intensity="window", window_hu=(50, 100), mean=(0,), std=(1,), plane=plane
    )
    scorer = Scorer.from_parts(BrightVolume(), preprocessing, calibration=calibrated(0.5))
    (scored,) = scorer.score([Sample(item="a", images={"image": source})])
    assert scored.boxes == ((3, 11, 5, 4, 12, 6),)
    assert scored.volume_mm3 == pytest.approx(5.0 * 0.8 * 0.7)
    assert scored.anomalous is True
    torch.testing.assert_close(corners(scored.map), corners(source), atol=1e-9, rtol=0)


def test_padding_and_what_the_source_calls_invalid_are_nan():
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[:, 5:] = False
    source = picture(torch.ones(6, 8), valid=valid)
    padded = torch.full((9, 11), 7.0)  # three more rows and columns than the image
    home = map_to_source(padded, source, source)
    assert torch.equal(home.pixels[0].isnan(), ~valid)
    assert (home.pixels[0][valid] == 7).all()


def test_what_the_source_calls_invalid_is_nan_even_where_the_map_has_a_value():
    valid = torch.ones(6, 8, dtype=torch.bool)
    valid[2, 3] = False
    whole = picture(torch.ones(6, 8))
    home = map_to_source(torch.ones(6, 8), whole, picture(torch.ones(6, 8), valid=valid))
    assert torch.equal(home.pixels[0].isnan(), ~valid)


def test_a_map_that_does_not_cover_its_image_is_an_error():
    source = picture(torch.ones(6, 8))
    with pytest.raises(ValueError, match="does not cover"):
        map_to_source(torch.ones(6, 7), source, source)


def test_regions_join_over_corners_and_come_largest_first():
    values = torch.zeros(10, 10)
    values[1, 1] = values[2, 2] = 1  # one region over a corner
    values[5:8, 4:9] = 2
    values[0, 9] = torch.nan
    boxes, volume = regions(picture(values), 0.5)
    assert boxes == ((5, 4, 8, 9), (1, 1, 3, 3))
    assert volume is None


def test_a_value_at_the_threshold_is_no_region():
    assert regions(picture(torch.full((4, 4), 0.5)), 0.5) == ((), None)


def test_volume_is_voxels_times_their_size_in_mm3():
    values = torch.zeros(4, 5, 6)
    values[0, 0, :2] = values[3, 4, 5] = 1
    _, volume = regions(oblique_ct(values, (2.0, 0.5, 0.25)), 0.5)
    assert volume == pytest.approx(3 * 2.0 * 0.5 * 0.25)


def test_an_mr_is_refused_by_a_detector_of_ct():
    ct = oblique_ct(torch.zeros(4, 8, 8), (5, 1, 1))
    preprocessing = Preprocessing(size=(8, 8), intensity="percentile")
    scorer = Scorer.from_parts(BrightVolume(), preprocessing, domain=learn_domain([ct]))
    mr = Image(
        pixels=ct.pixels,
        axes="DHW",
        modality=Modality.MR,
        affine=ct.affine,
        frame="patient",
        spacing=ct.spacing,
    )
    scorer.check(Sample(item="a", images={"image": ct}))
    with pytest.raises(OutsideDomainError, match="MR"):
        scorer.score([Sample(item="b", images={"image": mr})])


def test_pictures_of_all_sizes_get_their_own_score_and_grid_in_order():
    shapes = [(10, 12), (30, 8), (10, 12)]
    channels = [1, 3, 1]  # which cannot share a batch
    samples = [
        Sample(
            item=str(row),
            images={"image": picture(torch.full(shape, 51.0 * (row + 1)), count=channels[row])},
        )
        for row, shape in enumerate(shapes)
    ]
    scorer = Scorer.from_parts(Brightness(), Preprocessing(size=(16, 16), **AS_IS))
    scored = scorer.score(samples)
    assert [one.score for one in scored] == pytest.approx([0.2, 0.4, 0.6])
    assert [one.map.spatial_shape for one in scored] == shapes


def test_a_score_that_is_not_finite_is_an_error_with_the_item():
    class Broken(Brightness):
        def predict(self, batch: Batch) -> AnomalyMap:
            answer = super().predict(batch)
            return AnomalyMap(score=answer.score * torch.nan, maps=answer.maps)

    scorer = Scorer.from_parts(Broken(), Preprocessing(size=(8, 8), **AS_IS))
    with pytest.raises(ValueError, match="item a1.*nan"):
        scorer.score([Sample(item="a1", images={"image": picture(torch.ones(8, 8))})])


def by_site(**maxima: float) -> Calibration:
    """At a rate of one half each site's threshold, of score and map, is its one held-out normal."""
    values = list(maxima.values())
    return Calibration.from_scores(
        values, values, rate=0.5, method="split", sites=list(maxima), by="scanner"
    )


def grey(item: str, value: float) -> Sample:
    return Sample(item=item, images={"image": picture(torch.full((6, 8), value))})


def test_each_item_is_judged_by_its_own_site_whatever_batch_it_is_in():
    scorer = Scorer.from_parts(
        Brightness(), Preprocessing(size=(6, 8), **AS_IS), calibration=by_site(a=0.3, b=0.7)
    )
    samples = [grey(item, 127.5) for item in "pqrs"]
    sites = {"p": "b", "q": "a", "r": "unheard of"}
    scored = scorer.score(samples, sites=sites)
    assert [one.anomalous for one in scored] == [False, True, None, None]
    assert [one.threshold for one in scored] == [0.7, 0.3, None, None]
    assert [one.p_value for one in scored] == [1.0, 0.5, None, None]
    assert [one.boxes for one in scored] == [(), ((0, 0, 6, 8),), None, None]
    reasons = [one.no_verdict for one in scored]
    assert reasons[:2] == [None, None]
    assert "its scanner has no held-out normal" in reasons[2]
    assert "no scanner is known" in reasons[3]
    assert not any("unheard" in reason for reason in reasons[2:])


def test_a_site_with_too_few_normals_gives_no_verdict_and_says_how_many_it_takes():
    calibration = Calibration.from_scores(
        [0.3] * 4, [0.3] * 4, rate=0.25, method="split", sites=list("aaab"), by="scanner"
    )
    scorer = Scorer.from_parts(
        Brightness(), Preprocessing(size=(6, 8), **AS_IS), calibration=calibration
    )
    big, small = scorer.score([grey("p", 127.5), grey("q", 127.5)], sites={"p": "a", "q": "b"})
    assert big.anomalous is True
    assert (small.anomalous, small.boxes) == (None, None)
    assert "1 held-out normal items, and the rate takes 3" in small.no_verdict


def test_sites_must_be_given_exactly_where_the_model_was_calibrated_by_site():
    parts = (Brightness(), Preprocessing(size=(6, 8), **AS_IS))
    scorer = Scorer.from_parts(*parts, calibration=by_site(a=0.3))
    with pytest.raises(ValueError, match="each scanner by itself; .* --site FILE:scanner"):
        scorer.score([grey("p", 127.5)])
    for plain in (calibrated(0.5), None):
        scorer = Scorer.from_parts(*parts, calibration=plain)
        assert scorer.score([grey("p", 127.5)])[0].no_verdict is None
        with pytest.raises(ValueError, match="not calibrated by site"):
            scorer.score([grey("p", 127.5)], sites={"p": "a"})


def test_sites_salted_with_another_key_are_an_error_not_unknown_ones(tmp_path, monkeypatch):
    scorer = Scorer.from_parts(
        Brightness(), Preprocessing(size=(6, 8), **AS_IS), calibration=by_site(a=0.3)
    )
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path / "another"))
    with pytest.raises(ValueError, match="salted with the key"):
        scorer.score([grey("p", 127.5)], sites={"p": "a"})
