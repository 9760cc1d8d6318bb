import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features import dinomaly
from anomaly.features.dinomaly import Dinomaly, GroupedDecoder, loose_loss
from medssl.data.sample import collate
from medssl.models.timm_encoder import TimmEncoder
from medssl.schedule import Clock


def pair(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Features given and wanted (B, E, h, w), and where they are valid."""
    given, target = torch.randn(2, count, 5, 4, 6, dtype=torch.float64)
    return given.requires_grad_(), target, torch.rand(count, 4, 6) > 0.2


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one.ravel() @ other.ravel() / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("easy_share", [0.0, 0.9])
def test_the_loose_loss_is_1_minus_the_cosine_of_all_valid_features_together(easy_share):
    given, target, valid = pair()
    expected = [
        1 - cosine(own[:, known].detach().numpy(), wanted[:, known].numpy())
        for own, wanted, known in zip(given, target, valid, strict=True)
    ]
    found = loose_loss(given, target, valid, easy_share=easy_share, easy_factor=0.1)
    assert found.item() == pytest.approx(np.mean(expected))


def test_equal_features_have_loss_0_and_orthogonal_ones_1():
    given, _, valid = pair()
    arguments = {"easy_share": 0.5, "easy_factor": 0.1}
    assert loose_loss(given, 3 * given.detach(), valid, **arguments).item() == pytest.approx(0)
    own, other = torch.zeros(2, 3, 2, 4, 6)
    own[:, 0], other[:, 1] = 1.0, 1.0
    assert loose_loss(own, other, valid, **arguments).item() == pytest.approx(1)


def test_the_gradients_of_the_best_positions_are_shrunk():
    given, target, valid = pair()
    full, shrunk = (
        torch.autograd.grad(
            loose_loss(given, target, valid, easy_share=share, easy_factor=0.1), given
        )[0]
        for share in (0.0, 0.75)
    )
    distance = 1 - torch.cosine_similarity(given.detach(), target, dim=1)
    hard = int(valid.sum() * 0.25)
    threshold = np.sort(distance[valid].numpy())[-hard]
    factor = torch.where(distance >= threshold, 1.0, 0.1)
    assert (factor[valid] == 1).sum() == hard
    torch.testing.assert_close(shrunk, full * factor[:, None])
    assert not full.movedim(1, -1)[~valid].any()


def test_images_without_a_valid_position_do_not_count():
    given, target, valid = pair()
    valid[1] = False
    arguments = {"easy_share": 0.5, "easy_factor": 0.1}
    found = loose_loss(given, target, valid, **arguments)
    torch.testing.assert_close(found, loose_loss(given[::2], target[::2], valid[::2], **arguments))
    assert loose_loss(given, target, valid & False, **arguments).item() == 0


class Blocks(torch.nn.Module):
    """A decoder whose blocks give 1, 2, 3 and 4, whatever it is shown."""

    def forward(self, tokens: Tensor) -> list[Tensor]:
        self.shown = tokens
        return [torch.full_like(tokens, i) for i in (1.0, 2.0, 3.0, 4.0)]


def grouped(**settings: float) -> GroupedDecoder:
    def teacher(images: Tensor) -> list[Tensor]:
        cells = torch.arange(6.0).reshape(1, 1, 2, 3).expand(len(images), 5, 2, 3)
        return [cells + i for i in (10.0, 20.0, 30.0, 40.0)]

    defaults = {"num_groups": 2, "easy_share": 0.8, "easy_factor": 0.1, "ramp": 0.2}
    return GroupedDecoder(teacher, Blocks(), **(defaults | settings))


def test_the_first_blocks_give_back_the_last_layers_group_by_group():
    trainable = grouped()
    given, shown = trainable(torch.zeros(2, 1, 8, 12))
    assert [one.unique().item() for one in given] == [3.5, 1.5]
    assert [one[0, 0, 0, 0].item() for one in shown] == [15.0, 35.0]
    assert shown[0].shape == given[0].shape == (2, 5, 2, 3)
    mean = 25 + torch.arange(6.0)  # of all layers, position after position
    assert trainable.decoder.shown.equal(mean[None, :, None].expand(2, 6, 5))


def test_groups_need_not_have_the_same_size():
    given, shown = grouped(num_groups=3)(torch.zeros(1, 1, 8, 12))
    assert [one.unique().item() for one in given] == [3.5, 2.0, 1.0]
    assert [one[0, 0, 0, 0].item() for one in shown] == [15.0, 30.0, 40.0]


@pytest.mark.parametrize(("seen", "share"), [(0, 0.0), (10, 0.4), (20, 0.8), (70, 0.8)])
def test_the_share_of_easy_positions_rises_over_the_ramp(monkeypatch, seen, share):
    asked = []

    def loss(given, target, valid, *, easy_share, easy_factor):
        asked.append(easy_share)
        return given.sum()

    monkeypatch.setattr(dinomaly, "loose_loss", loss)
    trainable = grouped()
    trainable.after_step(Clock(samples_seen=seen, total_samples=100, step=1))
    valid = torch.ones(1, 8, 12, dtype=torch.bool)
    trainable.loss({"image": torch.zeros(1, 1, 8, 12), "valid": valid})
    assert asked == pytest.approx([share, share])


def test_the_map_is_the_mean_over_groups_and_the_score_that_of_its_top_percent():
    detector, samples = Dinomaly.example()
    detector.eval().fit(NormalData(samples[:-3]))
    detector.sigma = 0.0
    batch = collate(samples[-3:])
    with torch.no_grad():
        given, shown = detector.trainable(batch.images["image"].pixels)
    distances = [1 - torch.cosine_similarity(*both, dim=1) for both in zip(given, shown)]  # noqa: B905
    patches = torch.stack(distances).mean(0)
    expected = torch.nn.functional.interpolate(patches[:, None], (64, 48), mode="bilinear")[:, 0]
    found = detector.predict(batch)
    torch.testing.assert_close(found.maps["image"], expected)
    top = np.sort(expected.flatten(1).numpy(), axis=1)[:, -int(0.01 * 64 * 48) :].mean(1)
    np.testing.assert_allclose(found.score.numpy(), top, rtol=1e-5)


def test_a_foreign_texture_scores_above_the_normals():
    detector, samples = Dinomaly.example()
    detector.eval().fit(NormalData(samples[:-3]))
    pixels = collate(smooth_pictures(8)[-3:]).images["image"].pixels
    normal = detector.predict(noise_batch(pixels, "HW"))
    checkers = (torch.arange(16)[:, None] // 4 + torch.arange(16) // 4) % 2 * 2.0 - 1
    pixels[:, :, 32:48, 16:32] += 10 * checkers
    found = detector.predict(noise_batch(pixels, "HW"))
    assert found.score.min() > normal.score.max()
    for maps in found.maps["image"]:
        row, column = divmod(int(maps.argmax()), maps.shape[1])
        assert 32 <= row < 48
        assert 16 <= column < 32


def test_a_bright_block_in_a_volume_raises_the_map_there():
    detector, samples = Dinomaly.example_volume()
    detector.eval().fit(NormalData(samples[:-3]))
    batch = collate(smooth_volumes(8)[-3:])
    before = detector.predict(batch).maps["image"]
    batch.images["image"].pixels[:, :, 4:8, 8:16, 8:16] += 30.0
    more = detector.predict(batch).maps["image"] - before
    assert (more[:, 4:8, 8:16, 8:16].mean((1, 2, 3)) > 3 * more.abs().mean((1, 2, 3))).all()


def test_layers_on_different_grids_are_refused_with_what_to_take():
    encoder = TimmEncoder("test_resnet", in_channels=1)
    with pytest.raises(ValueError, match="blocks of one width and grid"):
        Dinomaly(encoder, layers=["layer1", "layer2"])


@pytest.mark.parametrize("num_groups", [0, 3])
def test_more_groups_than_layers_or_none_are_refused(num_groups):
    encoder = TimmEncoder("test_resnet", in_channels=1)
    with pytest.raises(ValueError, match=r"between 1 and the number of layers \(2\)"):
        Dinomaly(encoder, layers=["layer1", "layer2"], num_groups=num_groups)
