import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from medssl.data import dataset
from medssl.data.dataset import PreparedSamples
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import ReadError

TO_GREY = Preprocessing(size=(8, 8), intensity="range", mean=(0.0,), std=(1.0,))
SAMPLE_BYTES = 8 * 8 * 4


@pytest.fixture
def manifest(tmp_path):
    """Five grey pictures; picture k is filled with 51 k, so 0.2 k of the range."""
    for number in range(5):
        Pillow.fromarray(np.full((8, 8), 51 * number, np.uint8)).save(tmp_path / f"{number}.png")
    return build_manifest(tmp_path)


@pytest.fixture
def reads(monkeypatch):
    """The paths read, in order."""
    paths = []
    load = dataset.load_sample

    def counted(manifest, item, *, hashes=False):
        paths.append(item.path[-5])
        return load(manifest, item, hashes=hashes)

    monkeypatch.setattr(dataset, "load_sample", counted)
    return paths


def brightness(sample):
    return round(sample.images["image"].pixels.mean().item(), 4)


def test_the_samples_are_the_items_in_order_and_preprocessed(manifest):
    samples = PreparedSamples(manifest, manifest.images[::-1], TO_GREY)
    assert len(samples) == 5
    assert [brightness(sample) for sample in samples] == [0.8, 0.6, 0.4, 0.2, 0.0]
    assert [sample.item for sample in samples] == [item.item for item in manifest.images[::-1]]
    assert [brightness(sample) for sample in samples[1:3]] == [0.6, 0.4]
    assert brightness(samples[-1]) == 0.0
    with pytest.raises(IndexError):
        samples[5]


def test_nothing_is_read_before_it_is_asked_for_nor_twice(manifest, reads):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY)
    assert reads == []
    first = samples[3]
    assert samples[3] is first
    assert samples[-2] is first
    assert reads == ["3"]


def test_only_what_fits_is_kept(manifest, reads):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY, keep_bytes=2 * SAMPLE_BYTES + 1)
    for _ in range(2):
        assert [brightness(sample) for sample in samples] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert "".join(reads) == "01234" + "234"


def test_a_sample_of_exactly_the_allowance_is_kept(manifest, reads):
    samples = PreparedSamples(manifest, manifest.images[:1], TO_GREY, keep_bytes=SAMPLE_BYTES)
    assert samples[0] is samples[0]
    none = PreparedSamples(manifest, manifest.images[:1], TO_GREY, keep_bytes=SAMPLE_BYTES - 1)
    assert none[0] is not none[0]


def test_the_mask_counts_and_lies_on_the_grid_of_the_image(tmp_path, reads):
    marked = np.zeros((16, 16), np.uint8)
    marked[:8] = 255
    for name, pixels in (
        ("train/good/0", np.zeros((16, 16), np.uint8)),
        ("test/crack/1", np.zeros((16, 16), np.uint8)),
        ("ground_truth/crack/1_mask", marked),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(pixels).save(tmp_path / f"{name}.png")
    manifest = build_manifest(tmp_path)
    items = manifest.where(label=1).images
    samples = PreparedSamples(manifest, items, TO_GREY, keep_bytes=2 * SAMPLE_BYTES - 1)
    assert samples[0].mask.pixels[0].tolist() == [[1.0] * 8] * 4 + [[0.0] * 8] * 4
    assert samples[0] is not samples[0]  # image and mask together do not fit


def test_the_hashes_are_those_of_the_stored_pixels(manifest, tmp_path):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY, hashes=True)
    assert samples.pixel_hashes == {}
    assert len(samples[1:3]) == 2
    expected = {
        manifest.images[k].item: read_image(tmp_path / f"{k}.png", hashes=True).provenance[
            "pixel_sha256"
        ]
        for k in (1, 2)
    }
    assert samples.pixel_hashes == expected
    assert len(set(expected.values())) == 2


def test_no_hash_is_computed_unasked(manifest):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY)
    assert "pixel_sha256" not in samples[0].images["image"].provenance
    assert samples.pixel_hashes == {}


def test_loader_workers_give_the_same_samples(manifest):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY, hashes=True)
    loaded = list(DataLoader(samples, batch_size=None, num_workers=2))
    assert [brightness(sample) for sample in loaded] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert all("pixel_sha256" in sample.images["image"].provenance for sample in loaded)
    assert torch.equal(loaded[0].images["image"].affine, samples[0].images["image"].affine)


def test_kept_samples_stay_behind_when_the_rest_travels(manifest, reads):
    samples = PreparedSamples(manifest, manifest.images, TO_GREY)
    assert brightness(samples[4]) == 0.8
    travelled = pickle.loads(pickle.dumps(samples))
    assert brightness(travelled[4]) == 0.8
    assert samples[4] is samples[4]
    assert reads == ["4", "4"]


def test_workers_share_the_allowance(manifest, reads, monkeypatch):
    class Info:
        num_workers = 2

    monkeypatch.setattr(dataset, "get_worker_info", Info)
    samples = PreparedSamples(manifest, manifest.images, TO_GREY, keep_bytes=4 * SAMPLE_BYTES)
    for _ in range(2):
        assert len(list(samples)) == 5
    assert "".join(reads) == "01234" + "234"


def test_a_broken_item_is_named_when_it_is_asked_for(manifest, tmp_path):
    (tmp_path / "2.png").write_bytes(b"damaged")
    samples = PreparedSamples(manifest, manifest.images, TO_GREY)
    assert brightness(samples[1]) == 0.2
    with pytest.raises(ReadError, match=f"item {manifest.images[2].item}: "):
        samples[2]


def test_every_item_may_come_from_a_part_of_the_manifest(manifest):
    part = replace(manifest, items=manifest.items[2:3])
    assert [brightness(sample) for sample in PreparedSamples(part, part.images, TO_GREY)] == [0.4]
