import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features.patches import collect, patch_grid, patch_offset
from medssl.models.alignment import grid_offset
from medssl.models.encoder import Encoder
from medssl.models.timm_encoder import TimmEncoder

SCRIPT = Path(__file__).with_name("bank_of_processes.py")


class Layers(Encoder):
    def __init__(self, *layers: nn.Module, axes: str = "DHW") -> None:
        super().__init__()
        self.in_channels, self.embedding_dim, self.axes = 1, 8, axes
        self.network = nn.Sequential(*layers)

    def _as_grid(self, output: Tensor, images: Tensor) -> Tensor:
        return output


def means(images: Tensor) -> Tensor:
    """Patches of 8 x 8 pixels: their mean, (B, h, w, 1)."""
    return F.avg_pool2d(images, 8).movedim(1, -1)


def collected(samples: list, **arguments: object):
    return collect(
        NormalData(samples, batch_size=3), means, device=torch.device("cpu"), **arguments
    )


def test_volumes_have_the_mean_of_27_units_and_coarser_layers_between_them():
    encoder = Layers(nn.Conv3d(1, 1, 1, bias=False), nn.AvgPool3d(2))
    nn.init.ones_(encoder.network[0].weight)
    volumes = torch.randn(2, 1, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    grid = patch_grid(encoder, volumes, ["0", "1"], window=3)
    assert grid.shape == (2, 4, 8, 6, 2)
    torch.testing.assert_close(grid[1, 2, 3, 4, 0], volumes[1, 0, 1:4, 2:5, 3:6].mean())
    coarse = F.avg_pool3d(F.pad(F.avg_pool3d(volumes, 2), [1] * 6), 3, 1)
    up = F.interpolate(coarse, (4, 8, 6), mode="trilinear")
    torch.testing.assert_close(grid[..., 1], up[:, 0])


def test_the_grid_of_a_volume_may_be_one_unit_deep():
    encoder = Layers(nn.Conv3d(1, 1, (4, 1, 1), stride=(4, 1, 1), bias=False))
    nn.init.ones_(encoder.network[0].weight)
    grid = patch_grid(encoder, torch.full((1, 1, 4, 6, 6), 27 / 4), ["0"], window=3)
    assert grid.shape == (1, 1, 6, 6, 1)
    assert grid[0, 0, 3, 3, 0] == 9  # two of three slices are the zeros around it


def test_images_of_other_axes_or_channels_are_refused():
    encoder = Layers(nn.Conv3d(1, 1, 1))
    with pytest.raises(ValueError, match="axes DHW, got"):
        patch_grid(encoder, torch.zeros(1, 1, 8, 8), ["0"])
    with pytest.raises(ValueError, match="takes 1 channels, got 2"):
        patch_grid(encoder, torch.zeros(1, 2, 8, 8, 8), ["0"])


def test_in_volumes_each_axis_has_its_own_offset():
    layer = nn.Conv3d(1, 8, (3, 3, 1), stride=(2, 1, 1), padding=(1, 1, 0))
    nn.init.ones_(layer.weight)
    offset = patch_offset(Layers(layer, layer_of(8)), "1", (16, 24, 12))
    # two strides of 2 along D: -(2^2 - 1) / 2; one along H: -1 / 2
    torch.testing.assert_close(offset, torch.tensor([-1.5, -0.5, 0.0]), atol=1e-4, rtol=0)


def layer_of(channels: int) -> nn.Conv3d:
    layer = nn.Conv3d(channels, 8, (3, 3, 1), stride=(2, 2, 1), padding=(1, 1, 0))
    nn.init.ones_(layer.weight)
    return layer


def test_the_offset_of_a_picture_is_that_of_grid_offset():
    encoder = TimmEncoder("test_resnet", in_channels=1).eval()
    expected = grid_offset(encoder, "layer1", (64, 48))
    assert patch_offset(encoder, "layer1", (64, 48)).equal(expected)


def test_every_valid_patch_is_kept_in_order_with_its_item():
    samples = smooth_pictures(5)
    found = collected(samples)
    start = 0
    assert found.items == [sample.item for sample in samples]
    assert found.size == (64, 48)
    for i, sample in enumerate(samples):
        image = sample.images["image"]
        inside = F.max_pool2d(image.valid[None, None].float(), 8)[0, 0] > 0
        expected = means(image.pixels[None])[0][inside]
        rows = slice(start, start + len(expected))
        torch.testing.assert_close(found.patches[rows], expected)
        assert found.owner[rows].eq(i).all()
        start += len(expected)
    assert start == len(found.patches) == len(found.owner)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_normals_of_two_sizes_are_refused_in_one_batch_too(batch_size):
    samples = [smooth_pictures(2, size)[1] for size in ((64, 48), (56, 48))]
    normal = NormalData(samples, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"one size, got \(64, 48\) and \(56, 48\)"):
        collect(normal, means, device=torch.device("cpu"))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_sample_of_the_patches_is_drawn_evenly_and_stays_in_order(batch_size):
    samples = smooth_pictures(8)
    every = collected(samples)
    drawn: Counter = Counter()
    for seed in range(40):
        found = collect(
            NormalData(samples, batch_size=batch_size),
            means,
            device=torch.device("cpu"),
            max_patches=50,
            seed=seed,
        )
        places = [int((every.patches[:, 0] == value).nonzero()[0]) for value in found.patches[:, 0]]
        assert len(places) == 50 == len(set(places))
        assert places == sorted(places)
        assert found.owner.equal(every.owner[places])
        drawn.update(found.owner.tolist())
    share = torch.tensor([drawn[i] for i in range(8)]) / (40 * 50)
    expected = every.owner.bincount() / len(every.owner)
    assert (share - expected).abs().max() < 0.025


def test_the_sample_does_not_depend_on_the_batches_and_depends_on_the_seed():
    samples = smooth_pictures(8)

    def drawn(batch_size: int, seed: int) -> Tensor:
        normal = NormalData(samples, batch_size=batch_size)
        found = collect(normal, means, device=torch.device("cpu"), max_patches=50, seed=seed)
        return found.patches

    assert drawn(2, seed=1).equal(drawn(5, seed=1))
    assert not drawn(2, seed=1).equal(drawn(2, seed=2))


def test_a_sample_larger_than_all_is_all():
    samples = smooth_pictures(4)
    assert collected(samples, max_patches=10_000).patches.equal(collected(samples).patches)


def test_no_more_than_the_sample_is_ever_held():
    batch = noise_batch(torch.randn(8, 1, 64, 48), "HW")
    normal = NormalData([object()] * 8)
    normal.batches = lambda **_: iter([batch])
    found = collect(normal, means, device=torch.device("cpu"), max_patches=20)
    assert found.patches.untyped_storage().nbytes() == 20 * 4


def test_a_bank_of_two_processes_is_that_of_one(tmp_path):
    """Of seven items in batches of two: four and three items; all patches, and a sample."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = [
        subprocess.Popen(
            [sys.executable, *words, SCRIPT, tmp_path / name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, words in {"one": [], "two": two}.items()
    ]
    for process in started:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    alone = torch.load(tmp_path / "one.0.pt", weights_only=True)
    assert alone["all.bank_"].numel() > 0
    for rank in (0, 1):
        together = torch.load(tmp_path / f"two.{rank}.pt", weights_only=True)
        assert together.keys() == alone.keys()
        for name, value in alone.items():
            assert together[name].equal(value), name


def test_more_processes_than_batches_are_refused(monkeypatch):
    from anomaly.features import patches

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(patches, "join", lambda: None)
    with pytest.raises(ValueError, match="2 batches of 3, too few for 3 processes"):
        collected(smooth_pictures(4))
