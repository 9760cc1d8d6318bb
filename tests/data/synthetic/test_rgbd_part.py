import hashlib

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from medssl.data.layouts.mvtec_3d import is_mvtec_3d, place_mvtec_3d
from medssl.data.layouts.plain import find_images
from medssl.data.modality import Modality
from medssl.data.readers.organized import as_organized
from medssl.data.readers.picture import read_picture
from medssl.data.sample import Sample, collate
from medssl.data.synthetic.rgbd_defects import (
    DENT_MM,
    MISSING_MM,
    SCRATCH_LEVELS,
    SCRATCH_MM,
    SEEN_IN,
    STAIN_LEVELS,
)
from medssl.data.synthetic.rgbd_part import (
    MASK_LEVELS,
    MASK_MM,
    NOISE_MM,
    rgbd_part,
    write_mvtec_3d,
)

SEEDS = range(24)
KINDS = [(defect, seen_in) for defect, ways in SEEN_IN.items() for seen_in in ways]
FLOAT_MM = 1e-4  # of float32 at 300 mm


@pytest.fixture(scope="module")
def normals() -> list[Sample]:
    return [rgbd_part(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def defective() -> dict[tuple[str, str], list[Sample]]:
    """The same parts with a defect."""
    return {
        kind: [rgbd_part(seed, defect=kind[0], seen_in=kind[1]) for seed in SEEDS] for kind in KINDS
    }


def color(sample: Sample) -> np.ndarray:
    return sample.images["image"].pixels.double().numpy()


def depth(sample: Sample) -> np.ndarray:
    return sample.images["xyz"].pixels[2].double().numpy()


def measured(sample: Sample) -> np.ndarray:
    return sample.images["xyz"].valid.numpy()


def mask(sample: Sample) -> np.ndarray:
    return sample.mask.pixels[0].numpy() > 0


def peaks(samples: list[Sample], normals: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Largest signed change of depth where measured, mm, and of color, levels, of each part."""
    nearer, levels = [], []
    for sample, normal in zip(samples, normals, strict=True):
        change = (depth(normal) - depth(sample)) * (measured(sample) & measured(normal))
        nearer.append(change.flat[np.abs(change).argmax()])
        levels.append(np.abs(color(sample) - color(normal)).max())
    return np.array(nearer), np.array(levels)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_mask_nothing_differs(normals, defective, kind):
    for sample, normal in zip(defective[kind], normals, strict=True):
        outside = torch.from_numpy(~mask(sample))
        for role in ("image", "xyz"):
            with_defect, without = sample.images[role].pixels, normal.images[role].pixels
            assert torch.equal(with_defect[:, outside], without[:, outside])
        assert (measured(sample) == measured(normal))[~mask(sample)].all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_pixel_of_the_mask_has_changed_by_more_than_the_limits(normals, defective, kind):
    for sample, normal in zip(defective[kind], normals, strict=True):
        known = measured(sample) & measured(normal)
        height = np.abs(depth(sample) - depth(normal)) > MASK_MM - FLOAT_MM
        levels = np.abs(color(sample) - color(normal)).max(0) >= MASK_LEVELS - 1  # both are rounded
        assert (height | levels)[mask(sample) & known].all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_defect_is_not_seen_in_is_exactly_as_without(normals, defective, kind):
    for sample, normal in zip(defective[kind], normals, strict=True):
        same = {
            r: torch.equal(sample.images[r].pixels, normal.images[r].pixels) for r in sample.images
        }
        assert same == {"image": kind[1] == "depth", "xyz": kind[1] == "color"}


def test_contrasts_cover_their_stated_limits(normals, defective):
    for kind, sign in (("dent", -1), ("bump", 1)):
        nearer = sign * peaks(defective[kind, "depth"], normals)[0]
        assert nearer.min() > 0.8 * DENT_MM[0]  # the deepest point may not be measured
        assert nearer.max() < DENT_MM[1] + FLOAT_MM
        assert np.quantile(nearer, 0.2) < 0.35 < 0.6 < np.quantile(nearer, 0.8)
    for kind, limits in (("scratch", SCRATCH_MM), ("missing", MISSING_MM)):
        deeper = -peaks(defective[kind, "both"], normals)[0]
        assert limits[0] * 0.5 < deeper.min() < deeper.max() < limits[1] + FLOAT_MM
    for kind, (low, high) in (("scratch", SCRATCH_LEVELS), ("stain", STAIN_LEVELS)):
        levels = peaks(defective[kind, "color"], normals)[1]
        assert low - 1 <= levels.min() < 1.5 * low < 0.6 * high < levels.max() <= high + 1


def test_a_scratch_is_the_same_whatever_it_is_seen_in(defective):
    for alone, lit, both in zip(
        *(defective["scratch", way] for way in SEEN_IN["scratch"]), strict=True
    ):
        assert np.array_equal(depth(lit)[mask(lit)], depth(both)[mask(lit)])
        assert (mask(alone) & mask(lit)).sum() > 0.5 * mask(lit).sum()
        assert (mask(both) >= mask(lit)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_defects_lie_on_the_part_and_cover_between_a_tenth_of_a_percent_and_three(defective, kind):
    shares = [mask(sample).mean() for sample in defective[kind]]
    assert 0.001 < min(shares) < max(shares) < 0.03
    for sample in defective[kind]:
        assert on_part(sample)[mask(sample) & measured(sample)].mean() > 0.9


def on_part(sample: Sample) -> np.ndarray:
    """More than 1 mm over the plane through the border; pixels that are not measured are not."""
    known = measured(sample)
    border = known.copy()
    border[12:-12, 12:-12] = False
    x, y, z = sample.images["xyz"].pixels.double().numpy()
    equations = np.stack([x, y, np.ones_like(x)], -1)
    plane = np.linalg.lstsq(equations[border], z[border], rcond=None)[0]
    return (equations @ plane - z > 1) & known


def test_a_measured_point_projects_back_to_its_pixel():
    for size in ((128, 128), (96, 144)):
        xyz = rgbd_part(3, size=size).images["xyz"]
        x, y, z = xyz.pixels.double()
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        focal = 3 * min(size)
        column, row = focal * x / z + (size[1] - 1) / 2, focal * y / z + (size[0] - 1) / 2
        assert torch.allclose(column[xyz.valid], columns[xyz.valid].double(), atol=1e-4)
        assert torch.allclose(row[xyz.valid], rows[xyz.valid].double(), atol=1e-4)


def test_the_sensor_noise_is_within_its_limits(normals):
    """On the table, which is a plane: differences between diagonal neighbors cancel it."""
    for sample in normals:
        strip, known = depth(sample)[:12], measured(sample)[:12]
        second = strip[:-1, :-1] - strip[1:, :-1] - strip[:-1, 1:] + strip[1:, 1:]
        good = known[:-1, :-1] & known[1:, :-1] & known[:-1, 1:] & known[1:, 1:]
        noise = second[good].std() / 2  # four independent values
        assert 0.9 * NOISE_MM[0] < noise < 1.1 * NOISE_MM[1]


def test_depth_is_missing_at_walls_and_little_elsewhere(normals):
    for sample in normals:
        missing = ~measured(sample)
        assert 0.01 < missing.mean() < 0.12
        assert missing[:12].mean() < 0.04
        assert (sample.images["xyz"].pixels[:, torch.from_numpy(missing)] == 0).all()


def test_pictures_hold_whole_grey_levels_that_are_hardly_ever_clipped(normals):
    for sample in normals:
        pixels = sample.images["image"].pixels
        assert torch.equal(pixels, pixels.round())
        assert pixels.min() >= 0
        assert pixels.max() <= 255
        assert ((pixels == 0) | (pixels == 255)).float().mean() < 1e-3


def test_records_are_those_of_a_read_picture_and_its_xyz(defective):
    sample = defective["missing", "both"][0]
    image, xyz = sample.images["image"], sample.images["xyz"]
    assert (image.modality, image.frame, image.value_range) == (Modality.PICTURE, "pixel", (0, 255))
    assert (xyz.modality, xyz.frame, xyz.units, xyz.channels) == (
        Modality.DEPTH, "sensor", "mm", ("x", "y", "z"),
    )  # fmt: skip
    assert (sample.label, sample.group) == (1, "part0")
    assert sample.mask.frame == "pixel"
    assert torch.equal(sample.mask.affine, image.affine)


def test_normal_and_defective_parts_of_a_seed_share_the_group_and_not_the_item(normals, defective):
    assert normals[0].label == 0
    assert normals[0].mask is None
    assert {normals[0].group} == {samples[0].group for samples in defective.values()}
    assert len({normals[0].item, *(s[0].item for s in defective.values())}) == 1 + len(KINDS)


def test_parts_make_a_batch_with_masks(normals, defective):
    batch = collate([normals[0], defective["dent", "depth"][1]])
    assert batch.labels.tolist() == [0, 1]
    assert not batch.masks[0].any()
    assert torch.equal(batch.masks[1], torch.from_numpy(mask(defective["dent", "depth"][1])))


def test_no_two_parts_are_alike_and_the_order_does_not_matter(normals):
    assert len({color(sample).tobytes() for sample in normals}) == len(normals)
    again = rgbd_part(SEEDS[-1])
    assert np.array_equal(color(again), color(normals[-1]))
    assert np.array_equal(depth(again), depth(normals[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_no_threshold_on_depth_or_grey_level_finds_the_pixels(defective, kind):
    on = np.stack([on_part(sample) for sample in defective[kind]])
    inside = np.stack([mask(sample) for sample in defective[kind]])[on]
    for values in (depth, lambda sample: color(sample).mean(0)):
        found = roc_auc_score(inside, np.stack([values(sample) for sample in defective[kind]])[on])
        assert max(found, 1 - found) < 0.8


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "missing"])
def test_neither_extremes_nor_local_contrast_tell_the_items(normals, defective, kind):
    """The largest and smallest value of an item, raw and against a blurred neighborhood."""
    for score in (extremes_of_depth, extremes_of_color):
        values = np.array([score(sample) for sample in [*normals, *defective[kind]]])
        labels = [0] * len(normals) + [1] * len(normals)
        for column in values.T:
            found = roc_auc_score(labels, column)
            assert max(found, 1 - found) < 0.8


def extremes_of_depth(sample: Sample) -> list[float]:
    known = measured(sample)
    weight = gaussian_filter(known.astype(float), 2) + 1e-9
    local = depth(sample) - gaussian_filter(depth(sample), 2) / weight
    return [f(v[known]) for v in (depth(sample), local) for f in (np.min, np.max)]


def extremes_of_color(sample: Sample) -> list[float]:
    grey = color(sample).mean(0)
    local = grey - gaussian_filter(grey, 2)
    return [f(v) for v in (grey, local) for f in (np.min, np.max)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_observer_who_knows_the_defect_could_see_it(normals, defective, kind):
    """Index sqrt(sum((change / noise)^2)) in the better modality; at 2 he errs in 8 % of pairs."""
    for sample, normal in zip(defective[kind], normals, strict=True):
        known = measured(sample) & measured(normal)
        height = np.sqrt(((depth(sample) - depth(normal))[known] ** 2).sum()) / NOISE_MM[1]
        levels = np.sqrt(((color(sample) - color(normal)).mean(0) ** 2).sum()) / 10
        assert max(height, levels) > 2


def test_a_set_on_disk_is_read_as_it_was_made(tmp_path, normals, defective):
    root = tmp_path / "casting"
    anomalous = {
        "dent": defective["dent", "depth"][:2],
        "missing": defective["missing", "both"][:1],
    }
    write_mvtec_3d(
        root, train=normals[:3], validation=normals[3:4], test=normals[4:6], anomalous=anomalous
    )
    assert is_mvtec_3d(root)
    listing = place_mvtec_3d(root, find_images(root))
    assert listing.skipped == 0
    roles = [entry.role for entry in listing.entries]
    assert [roles.count(role) for role in ("image", "xyz", "mask")] == [9, 9, 3]

    sample, place = defective["dent", "depth"][1], root / "test" / "dent"
    picture = read_picture(place / "rgb" / "001.png")
    xyz = as_organized(read_picture(place / "xyz" / "001.tiff"), unit="mm")
    gt = read_picture(place / "gt" / "001.png")
    assert torch.equal(picture.pixels, sample.images["image"].pixels)
    assert picture.value_range == sample.images["image"].value_range
    assert torch.equal(xyz.pixels, sample.images["xyz"].pixels)
    assert torch.equal(xyz.valid, sample.images["xyz"].valid)
    assert (xyz.frame, xyz.channels) == ("sensor", ("x", "y", "z"))
    assert torch.equal(gt.pixels, 255 * sample.mask.pixels)


@pytest.mark.parametrize(
    ("defect", "seen_in", "message"),
    [
        ("dent", None, "dent is seen in depth or both, got seen_in=None"),
        ("stain", "depth", "stain is seen in color, got"),
        (None, "both", "a part without a defect is seen in None"),
        ("rust", "color", "defect is one of dent, bump"),
    ],
)
def test_what_cannot_be_seen_is_refused(defect, seen_in, message):
    with pytest.raises(ValueError, match=message):
        rgbd_part(0, defect=defect, seen_in=seen_in)


@pytest.mark.parametrize(
    ("seed", "defect", "seen_in", "expected"),
    [
        (710_000, None, None, "1ded80ad80c3e827"),
        (743_019, "scratch", "depth", "0fefc5aa26aa510e"),
        (746_007, "missing", "both", "b08d1ee0aced6f27"),
    ],
)
def test_the_generator_is_frozen(seed, defect, seen_in, expected):
    sample = rgbd_part(seed, defect=defect, seen_in=seen_in)
    arrays = [color(sample), (100 * depth(sample)).round()]
    arrays += [mask(sample)] if defect else []
    content = b"".join(array.astype("<i4").tobytes() for array in arrays)
    assert hashlib.sha256(content).hexdigest()[:16] == expected
