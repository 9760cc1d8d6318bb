"""Prepared images come back bit for bit, and nothing damaged is ever trusted."""

import multiprocessing
import os
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from medssl.data import cache as module
from medssl.data import dataset
from medssl.data.cache import DecodedCache, Prepared, cache_key, outline
from medssl.data.dataset import PreparedSamples
from medssl.data.image import Image
from medssl.data.manifest import build_manifest
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.synthetic.dicom_series import write_dicom_series

WINDOW = Preprocessing(size=(8, 8), intensity="window", window_hu=(40.0, 80.0), channels=1)


def image(seed: int = 0, size: int = 8) -> Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, 4, size, size, generator=generator)
    pixels[0, 0, 0, 0, 0] = torch.nan
    return Image(
        pixels=pixels,
        axes="TDHW",
        modality=Modality.MR,
        affine=torch.randn(4, 4, generator=generator, dtype=torch.float64),
        frame="patient",
        spacing=(0.1, 1 / 3, 2.0),
        valid=torch.rand(4, size, size, generator=generator) > 0.5,
        times_s=(0.0, float("nan"), 2.5),
        channels=("a", "b"),
        units="stored",
        value_range=(0.0, 4095.0),
        provenance={"reader": "dicom", "slices_missing": [1, 2], "sheared": True},
    )


def same(one: Image | None, other: Image | None) -> bool:
    if one is None or other is None:
        return one is other
    for field in fields(Image):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a.nan_to_num(7), b.nan_to_num(7)):
                return False
        elif repr(a) != repr(b):
            return False
    return True


def prepared(seed: int = 0, size: int = 8) -> Prepared:
    mask = replace(image(seed + 1, size), pixels=torch.ones(1, 3, 4, size, size))
    return Prepared(image=image(seed, size), mask=mask, source=image(seed + 2, size))


def test_what_went_in_comes_out_bit_for_bit(tmp_path):
    cache, put = DecodedCache(tmp_path), prepared()
    assert cache.get("a") is None
    cache.put("a", put)
    for found in (cache.get("a"), DecodedCache(tmp_path).get("a")):
        assert same(found.image, put.image)
        assert same(found.mask, put.mask)
        assert same(found.source, outline(put.source))
    cache.put("b", replace(put, mask=None))
    assert cache.get("b").mask is None


def test_changing_what_came_out_changes_no_file(tmp_path):
    cache = DecodedCache(tmp_path)
    cache.put("a", prepared())
    found = cache.get("a").image.pixels
    found.fill_(5)
    assert same(cache.get("a").image, prepared().image)
    assert same(DecodedCache(tmp_path).get("a").image, prepared().image)


def flipped(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(os.urandom(1000)),
    "another": lambda file: file.write_bytes(file.read_bytes().replace(b"0.333", b"0.334", 1)),
    **{f"bit at {at}": lambda file, at=at: flipped(file, at) for at in np.linspace(0, 1, 23)},
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_deleted_and_never_trusted(tmp_path, how):
    DecodedCache(tmp_path).put("a", prepared())
    (file,) = tmp_path.glob("*.safetensors")
    DAMAGE[how](file)
    found = DecodedCache(tmp_path).get("a")
    if found is None:
        assert not file.exists()
    else:  # a bit of padding between header and tensors, which nobody reads
        assert same(found.image, prepared().image)
        assert same(found.mask, prepared().mask)


def test_the_oldest_unused_entries_make_room(tmp_path):
    size = sum(
        tensor.nbytes
        for one in (prepared().image, prepared().mask)
        for tensor in (one.pixels, one.valid, one.affine)
    )
    cache = DecodedCache(tmp_path, max_bytes=int(3.7 * (size + 128)))
    for number, key in enumerate("abc"):
        cache.put(key, prepared(number))
        file = tmp_path / f"{key}.safetensors"
        os.utime(file, (number, number))
    DecodedCache(tmp_path).get("a")  # used just now
    cache.put("d", prepared(3))
    left = {file.stem for file in tmp_path.glob("*.safetensors")}
    assert left == {"a", "c", "d"}
    total = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert total <= cache.max_bytes
    cache.put("huge", prepared(size=64))  # larger than all that is allowed
    assert cache.get("huge") is None
    assert cache.get("d") is not None


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    (tmp_path / ".a.123.beef").write_bytes(b"half")
    (tmp_path / ".b.124.beef").write_bytes(b"being written")
    os.utime(tmp_path / ".a.123.beef", (0, 0))
    DecodedCache(tmp_path).put("a", prepared())
    assert {file.name for file in tmp_path.iterdir()} >= {".b.124.beef", "a.safetensors"}
    assert not (tmp_path / ".a.123.beef").exists()


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    cache = DecodedCache(tmp_path)
    with pytest.warns(UserWarning, match=r"No space left") as told:
        cache.put("a", prepared())
    assert str(tmp_path) not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put("b", prepared())
    assert cache.get("a") is None


def hammer(folder: str, seed: int) -> bool:
    torch.set_num_threads(1)
    cache, rng = DecodedCache(Path(folder), max_bytes=150_000), np.random.default_rng(seed)
    for number in rng.integers(0, 12, 60).tolist():
        found = cache.get(f"k{number}")
        if found is None:
            cache.put(f"k{number}", prepared(number))
        elif not same(found.image, prepared(number).image):
            return False
    return True


def test_processes_share_a_folder_and_see_whole_entries(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(hammer, [(str(tmp_path), seed) for seed in range(3)]) == [True] * 3


@pytest.fixture
def manifest(tmp_path):
    """Two series and a picture-less mask-less folder of them."""
    affine = torch.diag(torch.tensor([2.0, 0.5, 0.8, 1.0], dtype=torch.float64))[[2, 1, 0, 3]]
    for number in range(2):
        volume = Image(
            pixels=torch.arange(3 * 16 * 16.0).reshape(1, 3, 16, 16) / 10 // 1 + number,
            axes="DHW",
            modality=Modality.CT,
            affine=affine,
            frame="patient",
            spacing=(2.0, 0.5, 0.8),
        )
        write_dicom_series(volume, tmp_path / "data" / str(number), name=str(number))
    return build_manifest(tmp_path / "data")


def no_reading(*_, **__):
    raise AssertionError("the file was read again")


def test_a_second_run_reads_no_file(manifest, tmp_path, monkeypatch):
    first = PreparedSamples(manifest, manifest.images, WINDOW, hashes=True)
    cached = {"hashes": True, "cache": DecodedCache(tmp_path / "cache")}
    for sample, expected in zip(
        PreparedSamples(manifest, manifest.images, WINDOW, **cached), first, strict=True
    ):
        assert same(sample.images["image"], expected.images["image"])
    monkeypatch.setattr(dataset, "load_sample", no_reading)
    seen = []
    again = PreparedSamples(
        manifest,
        manifest.images,
        WINDOW,
        hashes=True,
        cache=DecodedCache(tmp_path / "cache"),
        on_read=seen.append,
    )
    for sample, expected in zip(again, first, strict=True):
        assert same(sample.images["image"], expected.images["image"])
        assert (sample.item, sample.group, sample.study) == (
            expected.item,
            expected.group,
            expected.study,
        )
    assert again.pixel_hashes == first.pixel_hashes
    assert [one.images["image"].spatial_shape for one in seen] == [(3, 16, 16)] * 2
    for batch in DataLoader(again, batch_size=None, num_workers=2, multiprocessing_context="fork"):
        assert batch.images["image"].pixels.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    "change", ["preprocessing", "file", "hashes", "modality"], ids=lambda change: change
)
def test_what_decides_the_result_decides_the_entry(manifest, tmp_path, monkeypatch, change):
    cache = DecodedCache(tmp_path / "cache")
    assert len(list(PreparedSamples(manifest, manifest.images, WINDOW, cache=cache))) == 2
    item, preprocessing, hashes = manifest.images[0], WINDOW, False
    if change == "preprocessing":
        preprocessing = replace(WINDOW, window_hu=(40.0, 81.0))
    elif change == "file":
        file = next(Path(item.path).iterdir())
        os.utime(file, ns=(time.time_ns(), time.time_ns()))
    elif change == "hashes":
        hashes = True
    else:
        item = replace(item, modality="MR")
    monkeypatch.setattr(dataset, "load_sample", no_reading)
    samples = PreparedSamples(manifest, [item], preprocessing, cache=cache, hashes=hashes)
    with pytest.raises(AssertionError, match="read again"):
        samples[0]
    assert len(list(PreparedSamples(manifest, manifest.images[1:], WINDOW, cache=cache))) == 1


def test_a_moved_folder_keeps_its_entries(manifest, tmp_path, monkeypatch):
    files = list(Path(manifest.images[0].path).iterdir())
    before = cache_key(files, series="s")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = [Path(str(file).replace("/data/", "/elsewhere/")) for file in files]
    assert cache_key(moved, series="s") == before


def test_names_and_entries_tell_nothing_of_the_files(tmp_path):
    (tmp_path / "Miller").mkdir()
    Pillow.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "Miller" / "Miller.png")
    manifest = build_manifest(tmp_path / "Miller")
    grey = Preprocessing(size=(8, 8), intensity="range")
    cache = DecodedCache(tmp_path / "cache")
    assert len(list(PreparedSamples(manifest, manifest.images, grey, cache=cache))) == 1
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    assert "Miller" not in file.name
    assert b"Miller" not in file.read_bytes()
