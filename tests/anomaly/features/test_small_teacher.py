from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.examples import smooth_pictures
from anomaly.features.small_teacher import SmallTeacher, chosen, laid, moments, stacked
from anomaly.features.targets import FrozenEncoder
from anomaly.maps import upsample
from medssl.data.sample import collate
from medssl.models.encoder import Encoder, frozen


class Corners(Encoder):
    """Its layers are the first pixel of each 4 x 4 cell, and twice that of each 8 x 8 cell."""

    def __init__(self) -> None:
        super().__init__()
        self.in_channels = self.embedding_dim = 1
        self.network = nn.Sequential(
            nn.Conv2d(1, 1, 1, stride=4, bias=False), nn.Conv2d(1, 1, 1, stride=2, bias=False)
        )
        nn.init.ones_(self.network[0].weight)
        nn.init.constant_(self.network[1].weight, 2.0)


def teacher_of(layers: Sequence[str] = ("0", "1"), num_features: int = 8) -> SmallTeacher:
    encoder = FrozenEncoder(frozen(Corners()), list(layers))
    return SmallTeacher(encoder, num_features=num_features, width=8)


def ramp(height: int, width: int) -> Tensor:
    """(1, 1, H, W): 3 x the row + the column."""
    return (3.0 * torch.arange(height)[:, None] + torch.arange(width))[None, None]


def test_moments_are_those_of_all_rows_together():
    blocks = [torch.randn(n, 3) * 5 + 100 for n in (4, 0, 7)]
    rows = torch.cat(blocks).double().numpy()
    mean, spread = moments(iter(blocks))
    np.testing.assert_allclose(mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(spread.numpy(), rows.std(0), rtol=1e-5)


def test_normals_without_a_valid_pixel_are_an_error():
    with pytest.raises(ValueError, match="no.* valid pixel"):
        moments([torch.empty(0, 3)])


def test_the_features_of_cells_with_a_valid_pixel_are_chosen():
    maps = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[1, 0, 7] = True
    assert chosen(maps, valid).equal(maps[1, :, 0, 1][None])


def test_all_pictures_are_stacked_in_order():
    samples = smooth_pictures(11)
    parts = list(stacked(samples, torch.device("cpu")))
    images = collate(samples).images["image"]
    assert [len(valid) for _, valid in parts] == [8, 3]
    assert torch.cat([valid for _, valid in parts]).equal(images.valid)


def test_the_encoders_maps_are_laid_where_their_units_look():
    teacher = teacher_of()
    picture = ramp(64, 48)
    teacher.offset_ = torch.tensor([[-1.5, -1.5], [-3.5, -3.5]])

    described = teacher.described(picture)

    middles = F.avg_pool2d(picture, 4)[0, 0]  # a ramp at the middle of each cell
    inner = (slice(2, -2), slice(2, -2))
    torch.testing.assert_close(described[0, 0][inner], middles[inner])
    torch.testing.assert_close(described[0, 1][inner], 2 * middles[inner])


def test_every_channel_is_laid_as_by_the_detectors_maps():
    maps = torch.randn(2, 3, 7, 5)
    expected = upsample(maps.flatten(0, 1), (16, 12), offset=(-0.4, 1.3)).unflatten(0, (2, 3))
    assert laid(maps, (16, 12), (-0.4, 1.3)).equal(expected)


def test_preparing_learns_offsets_and_moments():
    samples = smooth_pictures(5)
    teacher = teacher_of()
    teacher.prepare(samples)
    expected = torch.tensor([[-1.5, -1.5], [-3.5, -3.5]])
    torch.testing.assert_close(teacher.offset_, expected, atol=1e-4, rtol=0)
    images, valid = next(stacked(samples, torch.device("cpu")))
    rows = chosen(teacher.described(images), valid)
    torch.testing.assert_close(teacher.mean_, rows.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher.std_, rows.std(0, correction=0), atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_squared_difference_to_the_projected_channels(monkeypatch):
    teacher = teacher_of(num_features=2)
    teacher.offset_ = torch.zeros(2, 2)
    teacher.mean_, teacher.std_ = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])
    teacher.projection = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # a quarter turn
    images = torch.randn(2, 1, 16, 16)
    first, second = teacher.described(images).unbind(1)
    given = torch.stack([(second - 2) / 4, -(first - 1) / 0.5], dim=1)
    views = {"image": images, "valid": torch.ones(2, 16, 16, dtype=torch.bool)}
    for added, expected in ((0.0, 0.0), (3.0, 9.0)):
        monkeypatch.setattr(teacher.network, "forward", lambda _, added=added: given + added)
        torch.testing.assert_close(teacher.loss(views)["loss"], torch.tensor(expected))


def test_it_has_no_more_features_than_the_encoder_has_channels():
    teacher = teacher_of(num_features=8)
    assert teacher.num_features == 2
    torch.testing.assert_close(teacher.projection.T @ teacher.projection, torch.eye(2))
    assert teacher(torch.zeros(1, 1, 16, 16)).shape == (1, 2, 4, 4)
