import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.reverse_distillation import ReverseDistillation, StudentOfMaps
from anomaly.maps import upsample
from medssl.data.sample import collate
from medssl.models.alignment import grid_offset
from medssl.training import TrainingPlan


def fitted(volumes: bool = False) -> ReverseDistillation:
    kind = ReverseDistillation
    detector, samples = kind.example_volume() if volumes else kind.example()
    return detector.eval().fit(NormalData(samples[:-3]))


def loss_of(shown: list[Tensor], given: list[Tensor], valid: Tensor) -> Tensor:
    trainable = StudentOfMaps(lambda images: shown, lambda maps: given)
    return trainable.loss({"image": torch.zeros(len(valid), 1, 8, 8), "valid": valid})["loss"]


def test_equal_features_have_loss_0_and_orthogonal_ones_1_per_layer():
    shown = [F.pad(torch.rand(2, 3, n, n) + 0.1, (0, 0, 0, 0, 0, 1)) for n in (4, 2)]
    orthogonal = [torch.zeros_like(one) for one in shown]
    for one in orthogonal:
        one[:, 3] = 2.0  # the channel that the teacher never uses
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    twice = [2 * one for one in shown]  # length does not matter
    assert loss_of(shown, twice, valid).item() == pytest.approx(0, abs=1e-6)
    assert loss_of(shown, [twice[0], orthogonal[1]], valid).item() == pytest.approx(1, abs=1e-6)
    assert loss_of(shown, orthogonal, valid).item() == pytest.approx(2, abs=1e-6)


def test_each_position_counts_the_same_and_those_not_valid_do_not():
    shown = torch.ones(1, 1, 2, 2)
    shown[..., 1, 1] = 100.0  # of one flattened cosine this position would be nearly all
    given = torch.tensor([[[[-1.0, 1.0], [1.0, 1.0]]]])
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    assert loss_of([shown], [given], valid).item() == pytest.approx(2 / 4)
    valid[:, 4:, :4] = False
    assert loss_of([shown], [given], valid).item() == pytest.approx(2 / 3)


def test_the_map_is_the_sum_of_the_enlarged_distances_and_the_score_its_largest():
    detector = fitted()
    detector.offset_ = torch.zeros(2, 2)
    detector.sigma = 0.0
    batch = collate(smooth_pictures(4)[1:])
    with torch.no_grad():
        distances = detector.trainable.distances(batch.images["image"].pixels)
    expected = sum(
        F.interpolate(one[:, None], (64, 48), mode="bilinear")[:, 0] for one in distances
    )
    found = detector.predict(batch)
    torch.testing.assert_close(found.maps["image"], expected)
    torch.testing.assert_close(found.score, expected.amax((1, 2)))


def test_each_layer_is_laid_where_its_own_units_look():
    detector = fitted()
    detector.sigma = 0.0
    detector.offset_ = torch.tensor([[-1.5, 2.0], [3.0, -7.5]])
    batch = collate(smooth_pictures(4)[1:])
    with torch.no_grad():
        first, second = detector.trainable.distances(batch.images["image"].pixels)
    expected = upsample(first, (64, 48), offset=(-1.5, 2.0))
    expected += upsample(second, (64, 48), offset=(3.0, -7.5))
    torch.testing.assert_close(detector.predict(batch).maps["image"], expected)


def test_fitting_measures_where_the_layers_look():
    detector = fitted()
    expected = [grid_offset(detector.encoder, layer, (64, 48)) for layer in detector.layers]
    torch.testing.assert_close(detector.offset_, torch.stack(expected))


def test_training_changes_the_student_and_not_the_encoder():
    detector, samples = ReverseDistillation.example()
    before = {name: value.clone() for name, value in detector.encoder.state_dict().items()}
    detector.train().fit(NormalData(samples[:-3]))
    after = detector.encoder.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert not any(name.startswith("encoder") for name in detector.trainable.state_dict())


def test_the_loss_falls():
    detector, samples = ReverseDistillation.example()
    images = collate(samples[1:-3]).images["image"]
    views = {"image": images.pixels, "valid": images.valid}
    before = detector.trainable.loss(views)["loss"]
    detector.fit(NormalData(samples[1:-3]))
    assert detector.trainable.loss(views)["loss"] < 0.5 * before


def test_a_foreign_texture_scores_above_the_normals():
    detector, samples = ReverseDistillation.example()
    detector.plan = TrainingPlan(total_samples=80, batch_size=8, learning_rate=5e-3)
    detector.eval().fit(NormalData(samples[1:-3]))
    pixels = collate(samples[-3:]).images["image"].pixels
    normal = detector.predict(noise_batch(pixels, "HW"))
    checkers = (torch.arange(16)[:, None] // 2 + torch.arange(16) // 2) % 2 * 2.0 - 1
    pixels[:, :, 24:40, 16:32] += 5 * checkers
    found = detector.predict(noise_batch(pixels, "HW"))
    assert found.score.min() > 1.5 * normal.score.max()


def test_a_bright_block_in_a_volume_raises_the_map_there():
    detector = fitted(volumes=True)
    batch = collate(smooth_volumes(8)[-3:])
    before = detector.predict(batch).maps["image"]
    batch.images["image"].pixels[:, :, 4:8, 8:16, 8:16] += 10.0
    more = detector.predict(batch).maps["image"] - before
    assert (more[:, 4:8, 8:16, 8:16].mean((1, 2, 3)) > more.mean((1, 2, 3))).all()
