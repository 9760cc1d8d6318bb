"""Made-up defects: what changes, where, and by how much."""

from dataclasses import replace

import pytest
import torch

from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.discriminative import MadeUp
from anomaly.synthetic import (
    Blob,
    CutPaste,
    Defects,
    Interpolation,
    Poisson,
    Scar,
    Texture,
    has_valid_pixel,
)
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample, collate

KINDS = (CutPaste, Scar, Texture, Interpolation, Poisson, Blob)
SAMPLES = {"HW": smooth_pictures(4, (64, 48)), "DHW": smooth_volumes(4, (16, 40, 32))}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
either_axes = pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())


def drawn(seed):
    return torch.Generator().manual_seed(seed)


def sample_of(pixels, **settings):
    axes = "HW" if pixels.ndim == 3 else "DHW"
    image = Image(
        pixels=pixels,
        axes=axes,
        modality=Modality.UNKNOWN,
        affine=pixel_affine(),
        frame="pixel",
        **settings,
    )
    return Sample(item="made", images={"image": image}, label=0)


@every_kind
@either_axes
def test_the_mask_is_where_pixels_changed_and_the_rest_is_bit_identical(kind, samples):
    for seed in range(12):
        sample, donor = samples[seed % 4], samples[(seed + 1) % 4]
        before = sample.images["image"].pixels.clone()
        found = kind()(sample, donor, drawn(seed))
        image, mask = found.images["image"], found.mask.pixels[0]
        assert mask.unique().tolist() == [0.0, 1.0]
        assert (image.pixels != before).any(0).equal(mask == 1)
        visible = 0.01 * before[:, image.valid].std(correction=0)
        assert ((image.pixels - before).abs().amax(0)[mask == 1] > 0.999 * visible).all()
        assert image.valid[mask == 1].all()
        assert found.mask.affine.equal(image.affine)
        assert (found.label, sample.label, sample.mask) == (1, 0, None)
        assert sample.images["image"].pixels.equal(before)
        assert image.pixels.dtype == torch.float32
        assert collate([found]).masks is not None


@every_kind
@either_axes
def test_equal_generators_give_equal_defects_and_others_do_not(kind, samples):
    first, again, other = (kind()(samples[1], samples[2], drawn(seed)) for seed in (3, 3, 4))
    assert first.images["image"].pixels.equal(again.images["image"].pixels)
    assert not first.images["image"].pixels.equal(other.images["image"].pixels)


@every_kind
def test_nan_where_nothing_is_valid_reaches_no_pixel(kind):
    samples = smooth_pictures(2, (64, 48))
    for sample in samples:
        image = sample.images["image"]
        image.valid[:, :30] = False
        image.pixels[:, ~image.valid] = torch.nan
    for seed in range(12):
        found = kind()(samples[0], samples[1], drawn(seed))
        pixels = found.images["image"].pixels
        assert pixels[:, :, 30:].isfinite().all()
        assert pixels[:, :, :30].isnan().all()
        assert not found.mask.pixels[:, :, :30].any()


@every_kind
@either_axes
def test_no_defect_is_larger_than_asked(kind, samples):
    for seed in range(20):
        mask = kind(size=(0.1, 0.2), aspect=1.0)(samples[1], samples[2], drawn(seed)).mask
        shares = [
            (axis.max() - axis.min() + 1) / side
            for axis, side in zip(
                mask.pixels[0].nonzero(as_tuple=True), mask.spatial_shape, strict=True
            )
        ]
        room = 1 / min(mask.spatial_shape)  # rounding to whole pixels
        assert max(shares) <= 0.2 + room


def test_a_pasted_box_holds_pixels_of_the_donor():
    host, donor = sample_of(torch.zeros(1, 40, 50)), sample_of(1 + torch.rand(1, 40, 50))
    found = CutPaste(jitter=0.0)(host, donor, drawn(0))
    rows, columns = found.mask.pixels[0].nonzero(as_tuple=True)
    box = found.images["image"].pixels[
        0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
    ]
    assert box.numel() == len(rows)  # a whole box
    places = donor.images["image"].pixels[0].unfold(0, len(box), 1).unfold(1, box.shape[1], 1)
    assert (places - box).abs().amax((2, 3)).min() < 1e-6


def test_a_scar_is_thin_and_long():
    host, donor = sample_of(torch.zeros(1, 200, 200)), sample_of(torch.ones(1, 200, 200))
    for seed in range(5):
        mask = Scar(size=(0.4, 0.4), width=0.1)(host, donor, drawn(seed)).mask
        places = mask.pixels[0].nonzero().double()
        deviation = torch.linalg.eigvalsh(torch.cov(places.T)).sqrt() * 12**0.5  # of a bar's sides
        assert deviation[0] == pytest.approx(0.1 * 0.4 * 200, rel=0.3)
        if 80 < places[:, 0].mean() < 120 and 80 < places[:, 1].mean() < 120:
            assert deviation[1] == pytest.approx(0.4 * 200, rel=0.1)


def test_interpolation_lies_in_between_by_one_share():
    host, donor = sample_of(torch.zeros(1, 30, 30)), sample_of(torch.full((1, 30, 30), 5.0))
    values = [
        Interpolation()(host, donor, drawn(seed)).images["image"].pixels.unique()
        for seed in range(30)
    ]
    shares = torch.stack([value[-1] for value in values]) / 5
    assert all(len(value) == 2 for value in values)  # 0 outside, one value inside
    assert 0.05 <= shares.min() < 0.2
    assert 0.8 < shares.max() <= 0.95


def test_a_blob_in_hu_has_its_contrast_in_hu_and_a_soft_border():
    host = sample_of(torch.randn(1, 64, 64, 64) + 40, units="HU")
    for seed in range(10):
        kind = Blob(contrast_hu=(30.0, 60.0), size=(0.3, 0.3), aspect=1.0)
        found = kind(host, host, drawn(seed))
        change = (found.images["image"].pixels - host.images["image"].pixels)[0]
        assert 29.9 <= change.max() <= 60.1
        assert change.min() >= 0
        inside = change[found.mask.pixels[0] == 1]
        assert 0.1 < (inside < 0.5 * change.max()).float().mean() < 0.9


def test_a_blob_without_a_unit_has_its_contrast_in_deviations_of_the_valid_pixels():
    pixels = 7 * torch.randn(1, 64, 64)
    valid = torch.ones(64, 64, dtype=torch.bool)
    valid[:, :8] = False
    pixels[:, :, :8] = 1e6  # not valid: counts nowhere
    host = sample_of(pixels, valid=valid)
    for seed in range(5):
        found = Blob(contrast=(2.0, 2.0), size=(0.2, 0.2))(host, host, drawn(seed))
        change = (found.images["image"].pixels - pixels).max()
        assert float(change) == pytest.approx(
            2 * float(pixels[0, :, 8:].std(correction=0)), rel=1e-4
        )


def test_pixels_stay_within_what_the_source_can_hold():
    host = sample_of(torch.full((1, 32, 32), 250.0), value_range=(0.0, 255.0))
    for seed in range(8):
        found = Blob(contrast=(20.0, 40.0))(host, host, drawn(seed))
        assert found.images["image"].pixels.max() == 255


def test_the_texture_without_a_donor_has_the_host_s_mean_and_not_its_unit():
    host = sample_of(1000 + 5 * torch.randn(1, 64, 64))
    for seed in range(20):
        found = Texture()(host, host, drawn(seed)).images["image"].pixels
        assert found.min() > 940
        assert found.max() < 1060


@either_axes
def test_every_kind_named_is_drawn_and_no_other(samples):
    defects = Defects(kinds=("blob", "cut_paste"), size=(0.2, 0.4))
    expected = {kind: kind(size=(0.2, 0.4)) for kind in (Blob, CutPaste)}
    seen = set()
    for seed in range(12):
        found = defects(samples[1], samples[2], drawn(seed)).images["image"].pixels
        for kind, alone in expected.items():
            generator = drawn(seed)
            torch.randint(2, (1,), generator=generator)  # the draw of the kind
            other = alone(samples[1], samples[2], generator).images["image"].pixels
            if found.equal(other):
                seen.add(kind)
                break
        else:
            pytest.fail("neither a blob nor a pasted box")
    assert seen == {Blob, CutPaste}


def plain_with(value=0.5, shape=(1, 20, 24), **settings):
    return sample_of(torch.full(shape, value), **settings)


@pytest.mark.parametrize("shape", [(1, 20, 24), (2, 1, 1), (1, 6, 20, 24)])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_a_plain_item_gets_a_defect_of_a_kind_that_changes_it(value, shape):
    plain = plain_with(value, shape, value_range=(0.0, 1.0))
    for seed in range(8):
        found = Defects()(plain, plain, drawn(seed))
        changed = found.images["image"].pixels != value
        assert found.label == 1
        assert changed.any(0).equal(found.mask.pixels[0] == 1)
        assert changed.any()


def test_the_kind_that_was_drawn_goes_before_the_others():
    plain, donor = plain_with(0.0), plain_with(100.0)
    same = Defects(kinds=("interpolation", "poisson"))
    assert same(plain, plain, drawn(0)) is plain
    defects = Defects(kinds=("interpolation", "cut_paste", "poisson"))
    seen = set()
    for seed in range(20):
        pixels = defects(plain, donor, drawn(seed)).images["image"].pixels
        first = int(torch.randint(3, (1,), generator=drawn(seed)))
        seen.add((first, "blended" if pixels.max() < 96 else "pasted"))
    # part of the way, or all of it but for the jitter; no gradient, so the next in turn
    assert seen == {(0, "blended"), (1, "pasted"), (2, "blended")}


def test_a_training_view_of_an_item_that_nothing_changes_is_the_item_with_nothing_marked():
    host = smooth_pictures(2, (64, 48))[1]
    valid = torch.zeros(64, 48, dtype=torch.bool)
    valid[5:7, 5:7] = True
    tiny = host.with_image(replace(host.images["image"], valid=valid))
    views = MadeUp(Defects(kinds=("poisson",)), [host])
    whole = []
    for seed in range(20):
        view = views(tiny, drawn(seed))
        assert view["image"][:, valid].equal(host.images["image"].pixels[:, valid])
        assert view["changed"].dtype == torch.bool
        assert not view["changed"].any()
        whole.append(bool(views(host, drawn(seed))["changed"].any()))
    assert {True, False} == set(whole)


def test_another_donor_is_drawn_where_one_will_not_do():
    plain, donor = plain_with(0.0), plain_with(1.0)
    defects = Defects(kinds=("interpolation",))
    for seed in range(10):
        found = defects.with_any(plain, [plain, donor, donor], drawn(seed))
        assert found.mask.pixels.any()
        alone = defects.with_any(plain, [donor], drawn(seed))
        assert alone.mask.pixels.any()
    assert defects.with_any(plain, [plain, plain], drawn(0)) is plain


def test_an_item_that_differs_by_rounding_alone_is_plain():
    pixels = torch.full((1, 32, 32), 0.5)
    pixels[0, 7, 9] = torch.nextafter(pixels[0, 7, 9], torch.tensor(1.0))
    almost = sample_of(pixels)
    for seed in range(10):
        change = Blob()(almost, almost, drawn(seed)).images["image"].pixels - pixels
        assert change.abs().max() > 0.01
    with pytest.raises(ValueError, match="Interpolation changed nothing"):
        Interpolation()(almost, almost, drawn(0))


@every_kind
@either_axes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_not_finite_are_neither_changed_nor_cut_from(kind, samples, value):
    wrong = []
    for sample in samples[:2]:
        pixels = sample.images["image"].pixels.clone()
        pixels[:, ::5, ::7] = value
        valid = sample.images["image"].valid.clone()
        valid[..., :12] = False  # mostly finite
        wrong.append(sample.with_image(replace(sample.images["image"], pixels=pixels, valid=valid)))
    before = wrong[0].images["image"].pixels
    for seed in range(6):
        found = kind(size=(0.2, 0.4))(wrong[0], wrong[1], drawn(seed))
        pixels, mask = found.images["image"].pixels, found.mask.pixels[0] == 1
        assert pixels.isfinite().equal(before.isfinite())
        assert mask.any()
        assert before.isfinite().all(0)[mask].all()
        assert not mask[..., :12].any()
        assert found.images["image"].valid.equal(wrong[0].images["image"].valid)


def test_an_item_of_nan_alone_is_no_place_for_a_defect():
    nothing = plain_with(torch.nan)
    assert not has_valid_pixel(nothing)
    assert has_valid_pixel(plain_with(0.0))
    with pytest.raises(ValueError, match="item made has no valid pixel that is finite"):
        Blob()(nothing, plain_with(0.0), drawn(0))


def test_a_blend_that_is_not_found_counts_as_a_kind_that_does_not_fit(monkeypatch):
    sample, donor = smooth_pictures(3, (64, 48))[1:]
    monkeypatch.setattr("scipy.sparse.linalg.cg", lambda matrix, wanted, x0, rtol: (x0, 1))
    with pytest.raises(ValueError, match="Poisson changed nothing"):
        Poisson()(sample, donor, drawn(0))
    assert Defects(kinds=("poisson",))(sample, donor, drawn(0)) is sample
    assert Defects(kinds=("poisson", "blob"))(sample, donor, drawn(0)).mask.pixels.any()


def test_lists_from_a_file_mean_the_same():
    assert Defects(kinds=["blob"], size=[0.1, 0.2]) == Defects(kinds=("blob",), size=(0.1, 0.2))


def test_what_cannot_be_made_is_refused_and_says_why():
    with pytest.raises(ValueError, match="cut_paste, scar, .*got hole"):
        Defects(kinds=("blob", "hole"))
    with pytest.raises(ValueError, match="got none"):
        Defects(kinds=())
    with pytest.raises(ValueError, match="two rising shares"):
        Defects(size=(0.5, 0.2))
    blank = smooth_pictures(1)[0]
    blank.images["image"].valid.zero_()
    picture, volume = smooth_pictures(2)[1], smooth_volumes(1)[0]
    with pytest.raises(ValueError, match="item normal0 has no valid pixel"):
        Blob()(blank, picture, drawn(0))
    with pytest.raises(ValueError, match="item normal0 has no valid pixel"):
        Blob()(picture, blank, drawn(0))
    with pytest.raises(ValueError, match="axes HW and 1 channels, donor normal0 DHW and 1"):
        Blob()(picture, volume, drawn(0))
    plain = sample_of(torch.ones(1, 20, 20))
    with pytest.raises(ValueError, match="Interpolation changed nothing"):
        Interpolation()(plain, plain, drawn(0))


def test_a_donor_of_another_size_will_do():
    host, donor = smooth_pictures(2, (64, 48))[1], smooth_pictures(2, (24, 90))[1]
    for seed in range(10):
        assert CutPaste()(host, donor, drawn(seed)).mask.pixels.any()


@pytest.mark.parametrize("place", [(0, 0), (5, 7), (63, 47)])
def test_a_single_valid_pixel_is_a_place_for_a_defect(place):
    host = smooth_pictures(2, (64, 48))[1]
    valid = torch.zeros(64, 48, dtype=torch.bool)
    valid[place] = True
    lonely = host.with_image(replace(host.images["image"], valid=valid))
    for seed in range(5):
        found = Blob(contrast=(1.0, 1.0))(lonely, host, drawn(seed))
        assert found.mask.pixels[0].nonzero().tolist() == [list(place)]
