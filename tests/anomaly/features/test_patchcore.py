import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features import patchcore, patches
from anomaly.features.patchcore import PatchCore
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Sample, collate
from medssl.models.encoder import Encoder


class Pixels(Encoder):
    """A network whose layers are the picture itself, and its means over 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = self.embedding_dim = 1
        self.network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.AvgPool2d(2))
        nn.init.ones_(self.network[0].weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).mean((2, 3))


def of_pixels(**arguments: object) -> PatchCore:
    """A detector whose patches are means of 3 x 3 pixels, with every one of them in the bank."""
    defaults = {"layers": ["0"], "coreset_ratio": 1.0, "num_neighbors": 1, "sigma": 0.0}
    return PatchCore(Pixels(), **(defaults | arguments))


def fitted(detector: PatchCore, pixels: Tensor) -> PatchCore:
    """Fitted on pictures (S, H, W)."""
    batch = noise_batch(pixels[:, None], "HW")
    normal = NormalData([object()] * len(pixels))  # only counted
    normal.batches = lambda **_: iter([batch])
    return detector.fit(normal)


def with_bank(detector: PatchCore, bank: Tensor) -> None:
    """A bank (M, 1) of its own, as if one item had given it."""
    fitted(detector, torch.zeros(1, 8, 8))
    detector.bank_, detector.owner_ = bank, torch.zeros(len(bank), dtype=torch.int64)


def test_a_score_is_the_distance_of_the_farthest_patch_mean_to_the_normal_ones():
    detector = fitted(of_pixels(), torch.zeros(1, 8, 8))
    picture = torch.zeros(1, 8, 8)
    picture[0, 4, 4] = 9.0

    found = detector.predict(noise_batch(picture[:, None], "HW"))

    expected = torch.zeros(1, 8, 8)
    expected[0, 3:6, 3:6] = 1.0  # a ninth of the pixel, wherever the 3 x 3 patch holds it
    torch.testing.assert_close(found.maps["image"], expected)
    torch.testing.assert_close(found.score, torch.tensor([1.0]))


def test_the_image_score_is_weighed_as_in_equation_7():
    detector = of_pixels(num_neighbors=3)
    with_bank(detector, torch.tensor([[10.0], [9.5], [9.0], [7.3], [4.9]]))

    found = detector.predict(noise_batch(torch.full((1, 1, 8, 8), 11.0), "HW")).score

    # The inside, 11, is farthest: borders see zeros and are 22/3 and 44/9, close to a normal. Its
    # nearest normal is 10, and the nearest normals to that are 10, 9.5 and 9.
    reach = torch.tensor([11.0 - 10, 11 - 9.5, 11 - 9])
    weight = 1 - reach[0].exp() / reach.exp().sum()
    torch.testing.assert_close(found, (weight * 1.0)[None])


def test_one_normal_patch_leaves_the_score_unweighted():
    detector = of_pixels(num_neighbors=9)
    with_bank(detector, torch.zeros(1, 1))
    found = detector.predict(noise_batch(torch.full((1, 1, 8, 8), 4.0), "HW")).score
    torch.testing.assert_close(found, torch.tensor([4.0]))


def test_the_picture_is_surrounded_by_zeros():
    grid = of_pixels().patches(torch.full((1, 1, 5, 6), 9.0))[0, :, :, 0]
    torch.testing.assert_close(grid[0, :2], torch.tensor([4.0, 6.0]))
    torch.testing.assert_close(grid[1:-1, 1:-1], torch.full((3, 4), 9.0))


def test_layers_are_brought_to_the_grid_of_the_first():
    detector = of_pixels(layers=["0", "1"])
    images = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    grid = detector.patches(images)
    fine = F.avg_pool2d(images, 3, 1, 1)
    coarse = F.avg_pool2d(F.avg_pool2d(images, 2), 3, 1, 1)
    assert grid.shape == (2, 8, 12, 2)
    torch.testing.assert_close(grid[..., 0], fine[:, 0])
    up = F.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(grid[..., 1], up[:, 0])


def test_patches_that_are_not_valid_are_neither_learnt_nor_scored():
    pixels = torch.zeros(1, 1, 8, 8)
    pixels[..., 4:] = 100.0
    batch = noise_batch(pixels, "HW")
    batch.images["image"].valid[..., 3:] = False
    normal = NormalData([object()])
    normal.batches = lambda **_: iter([batch])

    detector = of_pixels().fit(normal)
    found = detector.predict(batch)

    assert len(detector.bank_) == 8 * 3
    assert detector.bank_.max() == 0  # the first three columns see none of the 100
    assert found.score.tolist() == [0.0]
    assert found.maps["image"][..., :3].eq(0).all()
    assert found.maps["image"][..., 3:].isnan().all()


def test_what_pixels_held_that_are_not_valid_changes_nothing():
    batch = noise_batch(torch.rand(2, 1, 8, 8), "HW")
    images = batch.images["image"]
    images.valid[:, :, 4:] = False
    normal = NormalData([object()] * 2)
    normal.batches = lambda **_: iter([batch])
    found = []
    for value in (0.0, 100.0, torch.nan):
        images.pixels[..., 4:] = value
        detector = of_pixels(num_neighbors=3).fit(normal)
        found.append((detector.bank_, detector.predict(batch).score))
    assert all(one[0].equal(found[0][0]) and one[1].equal(found[0][1]) for one in found)


@pytest.mark.parametrize("layers", [["layer1"], ["layer1", "layer2"]])
def test_a_picture_scores_the_same_beside_a_larger_one(layers):
    detector, samples = PatchCore.example()
    detector.layers = layers
    detector.eval().fit(NormalData(samples[1:5]))
    smaller, larger = samples[6], smooth_pictures(2, (80, 72))[1]
    alone, beside = (detector.predict(collate(s)) for s in ([smaller], [larger, smaller]))
    torch.testing.assert_close(beside.score[1:], alone.score)
    torch.testing.assert_close(beside.maps["image"][1:, :64, :48], alone.maps["image"])


def test_a_picture_without_a_valid_pixel_scores_nan_and_cannot_be_fitted():
    detector = fitted(of_pixels(num_neighbors=3), torch.rand(2, 8, 8))
    batch = noise_batch(torch.rand(2, 1, 8, 8), "HW")
    batch.images["image"].valid[1] = False
    score = detector.predict(batch).score
    assert score[0] >= 0
    assert score[1].isnan()
    batch.images["image"].valid[0] = False
    normal = NormalData([object()] * 2)
    normal.batches = lambda **_: iter([batch])
    with pytest.raises(ValueError, match="none of the 2 normal items"):
        detector.fit(normal)


def test_the_bank_holds_the_asked_share_of_the_patches():
    detector, samples = PatchCore.example()
    detector.coreset_ratio = 0.05
    detector.fit(NormalData(samples[1:]))
    height, width = detector.patches(torch.zeros(1, 1, 64, 48)).shape[1:3]
    assert len(detector.bank_) == int(0.05 * 7 * height * width)


def test_a_bank_of_mapped_patches_is_that_of_patches_in_memory(tmp_path, monkeypatch):
    detector, samples = PatchCore.example()
    normal = NormalData(samples)
    expected = detector.fit(normal).bank_
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(a) or from_file(*a, **k))
    monkeypatch.setattr(patches, "_MEMORY_SHARE", 0.0)

    assert detector.fit(normal, workdir=tmp_path).bank_.equal(expected)
    assert len(mapped) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_raised_disk_scores_above_every_normal_and_is_where_the_map_is_largest():
    detector, samples = PatchCore.example()
    detector.fit(NormalData(samples[:6]))
    batch = next(NormalData(samples[6:]).batches())
    normal = detector.predict(batch).score
    batch.images["image"].pixels[:, :, 28:36, 28:36] += 8.0
    found = detector.predict(batch)
    assert found.score.min() > normal.max()
    for values in found.maps["image"]:
        row, column = divmod(int(values.nan_to_num(-1).argmax()), values.shape[1])
        assert 22 <= row < 42
        assert 22 <= column < 42


class Strided(Pixels):
    """A network whose units look at the first pixel of each cell of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 1, 3, stride=2, padding=1), nn.Conv2d(1, 1, 3, stride=2, padding=1)
        )
        for convolution in self.network:
            nn.init.zeros_(convolution.bias)
            nn.init.constant_(convolution.weight, 1 / 9)


@pytest.mark.parametrize(("row", "column"), [(24, 24), (24, 33), (38, 27)])
def test_the_map_of_a_strided_network_lies_where_its_units_look(row, column):
    detector = PatchCore(Strided(), layers=["1"], coreset_ratio=1.0, num_neighbors=1, sigma=0.0)
    fitted(detector, torch.zeros(1, 64, 64))
    picture = torch.zeros(1, 64, 64)
    picture[0, row, column] = 9.0
    found = detector.predict(noise_batch(picture[:, None], "HW")).maps["image"][0]
    place = torch.arange(64.0)
    share = found / found.sum()
    centre = [float(share.sum(1) @ place), float(share.sum(0) @ place)]
    np.testing.assert_allclose(centre, [row, column], atol=1.0)  # a quarter of a unit's stride


def test_training_mode_leaves_the_encoder_in_evaluation_mode():
    detector, _ = PatchCore.example()
    detector.train()
    assert detector.training
    assert not any(module.training for module in detector.encoder.modules())
    assert not any(parameter.requires_grad for parameter in detector.parameters())


def test_pictures_of_two_sizes_cannot_be_fitted():
    batches = [noise_batch(torch.rand(1, 1, size, 8), "HW") for size in (8, 10)]
    normal = NormalData([object()] * 2)
    normal.batches = lambda **_: iter(batches)
    with pytest.raises(ValueError, match=r"one size, got \(8, 8\) and \(10, 8\)"):
        of_pixels().fit(normal)


def test_pixels_that_are_nan_are_refused_by_item():
    detector = fitted(of_pixels(), torch.rand(2, 8, 8))
    pixels = torch.rand(2, 1, 8, 8)
    pixels[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="features of items noise0, noise1"):
        detector.predict(noise_batch(pixels, "HW"))


def test_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="takes 1 channels, got 3"):
        of_pixels().patches(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coreset_ratio": 0.0}, "coreset_ratio"),
        ({"coreset_ratio": 1.5}, "coreset_ratio"),
        ({"layers": []}, "layers"),
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"bank_dtype": "float64"}, "bank_dtype"),
        ({"max_patches": 0}, "max_patches"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        of_pixels(**arguments)


def test_an_encoder_folder_is_loaded(tmp_path):
    from medssl.data.preprocess import Preprocessing
    from medssl.models.folder import save_model, selftest_noise

    detector, _ = PatchCore.example()
    folder = save_model(
        tmp_path / "encoder",
        detector.encoder,
        kind="encoder",
        preprocessing=Preprocessing(size=(64, 64), intensity="percentile"),
        domain={},
        card="",
        noise=selftest_noise((1, 1, 64, 64)),
    )
    loaded = PatchCore(folder, layers=["layer1", "layer2"])
    images = torch.randn(1, 1, 64, 64)
    assert loaded.patches(images).equal(detector.patches(images))


def test_whitened_normal_patches_have_unit_covariance():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    patches = torch.randn(5000, 3, generator=generator) @ mixing + 7
    mean, whitening = patchcore._whitening(patches)
    white = ((patches - mean) @ whitening).numpy()
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)


def test_directions_with_little_variance_are_not_blown_up():
    deviation = torch.tensor([10.0, 2.0, 0.5])  # the last has a 400th of the largest variance
    patches = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * deviation
    mean, whitening = patchcore._whitening(patches)
    white = (patches - mean) @ whitening
    torch.testing.assert_close(white.std(0), torch.tensor([1.0, 1.0, 0.5]), atol=0.02, rtol=0)


def test_whitened_scores_are_chords_between_directions():
    pictures = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    detector = fitted(of_pixels(layers=["0", "1"], whiten=True), pictures)
    batch = noise_batch(5 * pictures[:1, None], "HW")
    white = (detector.patches(batch.images["image"].pixels) - detector.mean_) @ detector.whitening_
    direction = F.normalize(white, dim=-1).flatten(1, 2)[0]
    cosine = (direction @ detector.bank_.T).amax(1)
    expected = (2 - 2 * cosine).clamp_min(0).sqrt().max()
    found = detector.predict(batch).score
    torch.testing.assert_close(found, expected[None], atol=1e-4, rtol=1e-4)


def test_whitened_distances_do_not_depend_on_the_scale_of_the_features():
    pictures = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = noise_batch(5 * pictures[:1, None], "HW")
    plain, scaled = (of_pixels(layers=["0", "1"], whiten=True) for _ in range(2))
    expected = fitted(plain, pictures).predict(batch).score
    with torch.no_grad():
        scaled.encoder.network[0].weight *= 1000  # the second layer stands on the first
    found = fitted(scaled, pictures).predict(batch).score
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class Voxels(Pixels):
    """A network whose layer is the volume itself."""

    axes = "DHW"

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False))
        nn.init.ones_(self.network[0].weight)

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output


def of_items(count: int, side: int = 8, first: int = 0) -> NormalData:
    """Pictures of noise of their own, item0 ..."""
    generator = torch.Generator().manual_seed(first)
    samples = []
    for i in range(first, first + count):
        image = Image(
            pixels=torch.rand(1, side, side, generator=generator),
            axes="HW",
            modality=Modality.UNKNOWN,
            affine=pixel_affine(),
            frame="pixel",
        )
        samples.append(Sample(item=f"item{i}", images={"image": image}))
    return NormalData(samples, batch_size=2)


def test_a_volumes_score_is_the_distance_of_its_farthest_patch_mean():
    detector = PatchCore(
        Voxels(), layers=["0"], coreset_ratio=1.0, num_neighbors=1, sigma=[0.0, 0.0, 0.0]
    )
    assert detector.axes == "DHW"
    volumes = torch.zeros(1, 1, 5, 8, 7)
    normal = NormalData([object()])
    normal.batches = lambda **_: iter([noise_batch(volumes, "DHW")])
    detector.fit(normal)
    batch = noise_batch(volumes.clone(), "DHW")
    batch.images["image"].pixels[0, 0, 2, 4, 3] = 27.0
    batch.images["image"].valid[0, :, :, 5:] = False
    found = detector.predict(batch)
    expected = torch.zeros(1, 5, 8, 7)
    expected[0, 1:4, 3:6, 2:5] = 1.0
    expected[..., 5:] = torch.nan
    torch.testing.assert_close(found.maps["image"], expected, equal_nan=True)
    torch.testing.assert_close(found.score, torch.ones(1))


def test_a_map_is_smoothed_by_its_own_width_along_each_axis():
    detector = fitted(of_pixels(sigma=[2.0, 0.0]), torch.zeros(1, 16, 16))
    picture = torch.zeros(1, 16, 16)
    picture[0, 8, 8] = 9.0
    found = detector.predict(noise_batch(picture[:, None], "HW")).maps["image"][0]
    assert found[4, 8] > 0
    assert found[8, 4] == found[8, 12] == 0


def test_a_half_precision_bank_has_half_the_bytes_and_nearly_the_scores():
    normal, test = of_items(5), next(of_items(3, first=5).batches())
    full, half = (of_pixels(bank_dtype=name).fit(normal) for name in ("float32", "float16"))
    assert half.bank_.dtype == torch.float16
    assert half.bank_.equal(full.bank_.half())
    expected = full.predict(test)
    found = half.predict(test)
    torch.testing.assert_close(found.score, expected.score, atol=1e-3, rtol=0)
    # and exactly those of a bank that holds the rounded rows in float32
    full.bank_ = half.bank_.float()
    torch.testing.assert_close(found.score, full.predict(test).score, atol=1e-7, rtol=1e-6)


def test_features_that_half_precision_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"up to 1.01e\+05 do not fit into float16"):
        fitted(of_pixels(bank_dtype="float16"), torch.full((1, 8, 8), 1.01e5))


def test_the_coreset_is_chosen_among_a_sample_of_so_many_patches():
    detector = of_pixels(max_patches=40, coreset_ratio=0.5).fit(of_items(5))
    every = of_pixels().fit(of_items(5)).bank_
    assert len(detector.bank_) == 20
    assert torch.isin(detector.bank_, every).all()
    other = of_pixels(max_patches=40, coreset_ratio=0.5, seed=1).fit(of_items(5))
    assert not other.bank_.equal(detector.bank_)


def test_each_row_of_the_bank_knows_its_item():
    detector = of_pixels(coreset_ratio=0.3).fit(of_items(5))
    assert detector.items == [f"item{i}" for i in range(5)]
    for i in range(5):
        own = of_pixels().fit(of_items(5).picked([i])).bank_
        rows = detector.bank_[detector.owner_ == i]
        assert len(rows) > 0
        assert torch.isin(rows, own).all()


def test_added_items_give_their_patches_that_are_farthest_from_the_bank():
    detector = of_pixels(coreset_ratio=0.25).fit(of_items(3))
    before = detector.bank_.clone()
    new = of_items(2, first=3)
    patches = detector.patches(next(new.batches()).images["image"].pixels).reshape(-1, 1)
    assert detector.add(new) is detector
    assert detector.bank_[: len(before)].equal(before)
    added = detector.bank_[len(before) :]
    assert len(added) == 0.25 * len(patches)
    distance = (patches - before.T).abs().amin(1)
    assert added[0] == patches[distance.argmax()]
    for i in range(1, len(added)):
        distance = torch.minimum(distance, (patches - added[i - 1]).abs()[:, 0])
        assert (added[i] - patches[distance.argmax()]).abs() < 1e-7
    assert detector.items == [f"item{i}" for i in range(5)]
    assert set(detector.owner_[len(before) :].tolist()) == {3, 4}


def test_an_added_item_scores_lower_than_before():
    detector = of_pixels(coreset_ratio=1.0).fit(of_items(2))
    new = of_items(1, first=2)
    batch = next(new.batches())
    assert detector.predict(batch).score > 0
    assert detector.add(new).predict(batch).score == 0


def test_removing_deletes_exactly_the_rows_of_the_items():
    detector = of_pixels(coreset_ratio=0.3).fit(of_items(5))
    bank, owner = detector.bank_.clone(), detector.owner_.clone()
    assert detector.remove({"item1", "item4"}) is detector
    kept = (owner != 1) & (owner != 4)
    assert detector.bank_.equal(bank[kept])
    assert detector.items == ["item0", "item2", "item3"]
    names = [detector.items[i] for i in detector.owner_]
    assert names == [f"item{i}" for i in owner[kept]]
    assert b"item4" not in bytes(detector.items_.tolist())


def test_removing_what_was_added_gives_the_bank_of_before():
    detector = of_pixels(coreset_ratio=0.3).fit(of_items(3))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.add(of_items(2, first=3)).remove(["item3", "item4"])
    after = detector.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_whitening_stays_that_of_the_first_fit():
    detector = of_pixels(layers=["0", "1"], whiten=True).fit(of_items(3))
    mean = detector.mean_.clone()
    batch = next(of_items(1, first=7).batches())
    assert detector.add(of_items(1, first=7)).predict(batch).score < 1e-3
    assert detector.mean_.equal(mean)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["item0", "item9"], "does not know items item9; see"),
        (["item0", "item1", "item2"], "without these 3 items the bank would be empty"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_changes_nothing(items, message):
    detector = of_pixels().fit(of_items(3))
    bank = detector.bank_
    with pytest.raises(ValueError, match=message):
        detector.remove(items)
    assert detector.bank_ is bank
    with pytest.raises(ValueError, match="knows items item2 already"):
        detector.add(of_items(2, first=2))


def test_nothing_can_be_added_before_fitting():
    with pytest.raises(RuntimeError, match="not fitted"):
        of_pixels().add(of_items(1))


def test_a_bank_that_is_changed_in_place_is_searched_anew():
    detector = of_pixels().fit(of_items(3))
    batch = next(of_items(3).batches())
    assert detector.predict(batch).score.eq(0).all()
    detector.bank_.add_(5.0)
    assert (detector.predict(batch).score > 3).all()
