"""Features are the encoder's own, in order, and no row is read twice, whatever happens between."""

import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from medssl.data.dataset import PreparedSamples
from medssl.data.image import Image, pixel_affine
from medssl.data.manifest import build_manifest
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample
from medssl.models.encoder import frozen
from medssl.models.features import FeatureStore, Reading, encoder_digest
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit import ViTEncoder
from medssl.models.vit3d import ViT3DEncoder


def sample(pixels: torch.Tensor, axes: str | None = None) -> Sample:
    image = Image(
        pixels=pixels,
        axes=axes or {3: "HW", 4: "DHW"}[pixels.ndim],
        modality=Modality.CT,
        affine=pixel_affine(),
        frame="pixel",
        times_s=tuple(range(pixels.shape[1])) if axes == "THW" else None,
    )
    return Sample(item="one", images={"image": image})


def pictures(count: int, *, seed: int = 0, size: tuple[int, ...] = (32, 32)) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [sample(torch.randn(1, *size, generator=generator)) for _ in range(count)]


def pixels_of(samples: list[Sample]) -> torch.Tensor:
    return torch.stack([one.images["image"].pixels for one in samples])


def network(seed: int = 0) -> TimmEncoder:
    torch.manual_seed(seed)
    return TimmEncoder("test_resnet", in_channels=1)


def counted(network: torch.nn.Module) -> list[int]:
    """The sizes of the batches that a network sees from now on."""
    batches: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    return batches


def by_hand(encoder, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([frozen(encoder)(block) for block in images.split(batch_size)])


def only_folder(store: FeatureStore) -> Path:
    (folder,) = store.folder.iterdir()
    return folder


class Forbidden(list):
    """Samples nobody may look at."""

    def __getitem__(self, index):
        raise AssertionError(f"sample {index} was asked for")


def test_features_are_the_embeddings_in_the_order_of_the_samples(tmp_path):
    samples, done = pictures(7), []
    found = FeatureStore(tmp_path).features(
        network(), samples, batch_size=3, on_progress=done.append
    )
    assert torch.equal(found, by_hand(network(), pixels_of(samples), 3))
    assert (found.shape, found.dtype) == ((7, network().embedding_dim), torch.float32)
    assert done == [3, 6, 7]


def maps_by_hand(layer: str, images: torch.Tensor) -> torch.Tensor:
    found = []
    encoder = frozen(network())
    encoder.network.get_submodule(layer).register_forward_hook(lambda m, i, o: found.append(o))
    encoder(images)
    return found[0]


def test_layers_are_pooled_over_their_places_and_concatenated(tmp_path):
    samples, store = pictures(3), FeatureStore(tmp_path)
    first, third = (maps_by_hand(layer, pixels_of(samples)) for layer in ("layer1", "layer3"))
    assert (first.shape[2], third.shape[2]) == (8, 2)
    mean = store.features(network(), samples, Reading(layers=("layer3", "layer1"), pooling="mean"))
    expected = torch.cat([third.mean((2, 3)), first.mean((2, 3))], 1)
    torch.testing.assert_close(mean, expected)
    largest = store.features(network(), samples, Reading(layers=("layer1",), pooling="max"))
    assert torch.equal(largest, first.flatten(2).amax(2))


def test_tokens_are_the_places_row_by_row_pooled_to_the_grid(tmp_path):
    samples, store = pictures(3, size=(64, 32)), FeatureStore(tmp_path)
    feature_map = maps_by_hand("layer1", pixels_of(samples))  # (3, E, 16, 8)
    found = store.features(
        network(), samples, Reading(layers=("layer1",), pooling="mean", grid=(4, 2))
    )
    assert found.shape == (3, 8, feature_map.shape[1])
    torch.testing.assert_close(found[:, 5], feature_map[:, :, 8:12, 4:8].mean((2, 3)))
    torch.testing.assert_close(found[:, 2], feature_map[:, :, 4:8, 0:4].mean((2, 3)))


def test_without_layers_the_tokens_are_those_of_the_last_map(tmp_path):
    torch.manual_seed(0)
    encoder = ViTEncoder("test_vit", image_size=64)
    samples = pictures(2, size=(64, 64))
    with torch.no_grad():
        _, tokens = frozen(encoder).tokens(pixels_of(samples))
    found = FeatureStore(tmp_path).features(
        encoder, samples, Reading(pooling="max", grid=encoder.grid((64, 64)))
    )
    torch.testing.assert_close(found, tokens)


def test_the_order_holds_where_half_is_known_and_only_the_rest_is_read(tmp_path):
    samples, encoder = pictures(8), network()
    expected = by_hand(encoder, pixels_of(samples), 8)
    batches = counted(encoder.network)
    FeatureStore(tmp_path).features(encoder, samples[1::2])
    found = FeatureStore(tmp_path).features(encoder, samples)
    torch.testing.assert_close(found, expected)
    assert batches == [4, 4]
    assert torch.equal(FeatureStore(tmp_path).features(encoder, samples[::-1]), found.flip(0))
    assert torch.equal(FeatureStore(tmp_path).features(encoder, samples[2:5]), found[2:5])
    assert batches == [4, 4]


def test_one_picture_in_two_places_is_read_once(tmp_path):
    samples, encoder = pictures(3), network()
    batches = counted(encoder.network)
    found = FeatureStore(tmp_path).features(encoder, [*samples, *pictures(3), samples[1]])
    assert batches == [3]
    assert torch.equal(found, found[[0, 1, 2, 0, 1, 2, 1]])


def test_with_keys_a_second_pass_looks_at_no_sample(tmp_path):
    samples, keys, encoder = pictures(5), list("abcde"), network()
    first = FeatureStore(tmp_path).features(encoder, samples, keys=keys, batch_size=2)
    assert torch.equal(first, by_hand(encoder, pixels_of(samples), 2))
    batches = counted(encoder.network)
    again = FeatureStore(tmp_path).features(encoder, Forbidden(samples), keys=keys[::-1])
    assert torch.equal(again, first.flip(0))
    assert batches == []


def test_of_samples_with_one_key_one_is_looked_at(tmp_path):
    samples = pictures(1) + [None]
    found = FeatureStore(tmp_path).features(network(), samples, keys=["a", "a"])
    assert torch.equal(found[0], found[1])


def test_equal_numbers_of_another_shape_are_another_picture(tmp_path):
    batches = counted((encoder := network()).network)
    lying = [sample(torch.zeros(1, 32, 64)), sample(torch.zeros(1, 64, 32))]
    FeatureStore(tmp_path).features(encoder, lying)
    assert batches == [1, 1]


def test_with_keys_another_preprocessing_is_read_anew(tmp_path):
    for number in range(2):
        picture = np.random.default_rng(number).integers(255, size=(32, 32), dtype=np.uint8)
        Pillow.fromarray(picture).save(tmp_path / f"{number}.png")
    manifest, store, found = build_manifest(tmp_path), FeatureStore(tmp_path / "store"), []
    for mean in (0.0, 0.5, 0.0):
        preprocessing = Preprocessing(size=(32, 32), intensity="range", mean=(mean,), std=(1.0,))
        samples = PreparedSamples(manifest, manifest.images, preprocessing)
        found.append(store.features(network(), samples, keys=["one", "two"]))
        torch.testing.assert_close(found[-1], by_hand(network(), pixels_of(samples), 2))
    assert not torch.allclose(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_another_weight_pixel_or_reading_is_read_anew(tmp_path):
    samples, store, encoder = pictures(2), FeatureStore(tmp_path), network()
    batches = counted(encoder.network)
    before = store.features(encoder, samples)
    samples[0].images["image"].pixels[0, 5, 5] += 1
    store.features(encoder, samples)
    assert batches == [2, 1]
    with torch.no_grad():
        list(encoder.parameters())[-1][0] += 1
    changed = store.features(encoder, samples)
    assert batches == [2, 1, 2]
    assert not torch.equal(before[1], changed[1])
    store.features(encoder, samples, Reading(layers=("layer4",), pooling="max"))
    assert batches == [2, 1, 2, 2]


def test_the_digest_is_of_class_arguments_and_every_number():
    original = encoder_digest(network())
    assert encoder_digest(frozen(network())) == original  # another layout in memory
    assert encoder_digest(network(seed=1)) != original
    statistics = network()
    statistics.network.bn1.running_mean[3] += 1e-6
    assert encoder_digest(statistics) != original
    torch.manual_seed(0)
    other_arguments = TimmEncoder("test_resnet", in_channels=1, options={"output_stride": 16})
    other_arguments.load_state_dict(network().state_dict())
    assert encoder_digest(other_arguments) != original


def slowly(folder: str, threads: str) -> None:
    """What is killed: a pass that prints the size of each batch when it begins."""
    torch.set_num_threads(int(threads))  # bits are equal for one number of threads
    encoder = network()

    def tell(module, inputs):
        print(len(inputs[0]), flush=True)  # noqa: T201
        time.sleep(0.05)

    encoder.network.register_forward_pre_hook(tell)
    FeatureStore(Path(folder)).features(encoder, pictures(41), batch_size=3)


CHILD = "import runpy, sys; runpy.run_path(sys.argv[1])['slowly'](*sys.argv[2:])"


def test_a_pass_killed_at_any_moment_goes_on_bit_for_bit_and_reads_one_batch_again(tmp_path):
    samples, encoder = pictures(41), network()
    undisturbed = FeatureStore(tmp_path / "whole").features(encoder, samples, batch_size=3)
    told = [__file__, str(tmp_path / "killed"), str(torch.get_num_threads())]
    command, begun = [sys.executable, "-c", CHILD, *told], []
    kill_at = random.randint(1, 8)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            begun.append(int(line))
            if len(begun) == kill_at:
                time.sleep(random.random() * 0.08)
                process.kill()
    assert process.returncode == -signal.SIGKILL, "it was faster than the kill"
    batches = counted(encoder.network)
    found = FeatureStore(tmp_path / "killed").features(encoder, samples, batch_size=3)
    assert torch.equal(found, undisturbed)
    assert 41 <= sum(begun) + sum(batches) <= 41 + 3
    files = [only_folder(FeatureStore(tmp_path / name)) for name in ("whole", "killed")]
    for name in ("rows.f32", "index.txt"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_every_torn_write_is_cut_off_and_read_again(tmp_path):
    samples, encoder = pictures(4), network()
    whole = FeatureStore(tmp_path / "whole")
    expected = whole.features(encoder, samples, batch_size=2)
    rows, index = ((only_folder(whole) / n).read_bytes() for n in ("rows.f32", "index.txt"))
    row, line = len(rows) // 4, len(index) // 4
    states = [(cut, 2 * line) for cut in range(2 * row, 4 * row + 1, row // 2)]
    states += [(4 * row, cut) for cut in range(2 * line, 4 * line, line // 3)]
    states += [(0, 0), (row, 0), (3 * row, 4 * line)]  # nothing named; lost in a power cut
    batches = counted(encoder.network)
    for rows_cut, index_cut in states:
        torn = FeatureStore(tmp_path / "torn")
        folder = torn.folder / only_folder(whole).name
        shutil.copytree(only_folder(whole), folder)
        (folder / "rows.f32").write_bytes(rows[:rows_cut])
        (folder / "index.txt").write_bytes(index[:index_cut])
        batches.clear()
        torch.testing.assert_close(torn.features(encoder, samples, batch_size=2), expected)
        assert sum(batches) == 4 - min(rows_cut // row, index_cut // line)
        assert len((folder / "rows.f32").read_bytes()) == len(rows)
        batches.clear()
        torn.features(encoder, samples)
        assert batches == []
        shutil.rmtree(torn.folder)


@pytest.mark.parametrize("name", ["rows.f32", "index.txt"])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.99])
def test_a_damaged_row_is_read_again_and_no_other(tmp_path, name, at):
    samples, encoder = pictures(4), network()
    expected = FeatureStore(tmp_path).features(encoder, samples).clone()
    file = only_folder(FeatureStore(tmp_path)) / name
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 129
    file.write_bytes(content)
    batches = counted(encoder.network)
    for _ in range(2):
        found = FeatureStore(tmp_path).features(encoder, samples)
        torch.testing.assert_close(found, expected)
    assert batches == [1]


def test_damage_of_what_describes_the_rows_is_an_error(tmp_path):
    FeatureStore(tmp_path).features(network(), pictures(1))
    (only_folder(FeatureStore(tmp_path)) / "about.json").write_text('{"shape": 3')
    with pytest.raises(ValueError, match=r"about.json .* is damaged; remove that folder"):
        FeatureStore(tmp_path).features(network(), pictures(1))


def test_a_volume_is_the_mean_over_its_slices_of_which_few_are_in_memory(tmp_path):
    encoder = network()
    volumes = [*pictures(1, size=(7, 32, 32)), *pictures(2), *pictures(1, size=(3, 32, 32))]
    expected = [
        by_hand(network(), one.images["image"].pixels.reshape(-1, 1, 32, 32), 1).mean(0)
        for one in volumes
    ]
    batches = counted(encoder.network)
    found = FeatureStore(tmp_path).features(encoder, volumes, batch_size=4)
    torch.testing.assert_close(found, torch.stack(expected))
    assert batches == [4, 3, 2, 3]
    tokens = Reading(layers=("layer1",), pooling="mean", grid=(2, 2))
    (of_volume,) = FeatureStore(tmp_path).features(encoder, volumes[:1], tokens)
    slices = [sample(one) for one in volumes[0].images["image"].pixels.transpose(0, 1)]
    of_slices = FeatureStore(tmp_path).features(encoder, slices, tokens)
    torch.testing.assert_close(of_volume, of_slices.mean(0))


def test_an_encoder_of_volumes_reads_them_as_they_are_by_shape(tmp_path):
    torch.manual_seed(0)
    encoder, _ = ViT3DEncoder.example()
    deep, shallow = pictures(3, size=(16, 32, 32)), pictures(2, size=(8, 32, 32))
    batches = counted(encoder.network.patch_embed.proj)
    found = FeatureStore(tmp_path).features(encoder, [*deep, *shallow], batch_size=2)
    assert batches == [2, 1, 2]
    expected = [by_hand(encoder, pixels_of(part), 2) for part in (deep, shallow)]
    assert torch.equal(found, torch.cat(expected))
    tokens = Reading(pooling="mean", grid=(1, 2, 2))
    with torch.no_grad():
        last = encoder.embed_with_map(pixels_of(deep))[1]  # (3, E, 2, 2, 2)
    torch.testing.assert_close(
        FeatureStore(tmp_path).features(encoder, deep, tokens), last.mean(2).flatten(2).mT
    )


def test_the_encoder_is_left_as_it_was_and_can_be_trained(tmp_path):
    encoder, samples = network().train(), pictures(2)
    encoder.network.bn1.eval()
    before = {name: module.training for name, module in encoder.named_modules()}
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    features = FeatureStore(tmp_path).features(encoder, samples)
    assert {name: module.training for name, module in encoder.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    probe = torch.nn.Linear(encoder.embedding_dim, 1)
    (probe(features) + encoder(pixels_of(samples))).sum().backward()
    assert all(one.grad is not None for one in [*encoder.parameters(), *probe.parameters()])


def test_the_features_are_mapped_and_changing_them_changes_no_file(tmp_path):
    samples, store = pictures(4), FeatureStore(tmp_path)
    in_place = store.features(network(), samples)
    kept, stored = in_place.clone(), (only_folder(store) / "rows.f32").read_bytes()
    assert str(only_folder(store) / "rows.f32") in Path("/proc/self/maps").read_text()
    in_place.zero_()
    store.features(network(), samples[::-1]).zero_()
    assert (only_folder(store) / "rows.f32").read_bytes() == stored
    assert torch.equal(store.features(network(), samples), kept)
    assert {file.name for file in only_folder(store).iterdir()} == {
        ".lock",
        "about.json",
        "index.txt",
        "rows.f32",
    }


def test_of_two_that_share_a_folder_one_reads(tmp_path):
    samples, encoders = pictures(30), [network(), network()]
    batches = [counted(encoder.network) for encoder in encoders]
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(
            lambda encoder: FeatureStore(tmp_path).features(encoder, samples, batch_size=2),
            encoders,
        )
    assert torch.equal(one, other)
    assert sum(map(sum, batches)) == 30


def test_what_does_not_fit_is_refused_with_what_to_do(tmp_path):
    store, samples = FeatureStore(tmp_path), pictures(2)
    with pytest.raises(ValueError, match="no sample"):
        store.features(network(), [])
    with pytest.raises(ValueError, match="one key per sample: got 1 keys and 2 samples"):
        store.features(network(), samples, keys=["a"])
    with pytest.raises(ValueError, match="hash every file first"):
        store.features(network(), samples, keys=["a", None])
    with pytest.raises(ValueError, match="batch_size must be positive"):
        store.features(network(), samples, batch_size=0)
    with pytest.raises(ValueError, match=r"got \(2, 32, 32\)"):
        store.features(network(), [sample(torch.zeros(2, 32, 32))])
    with pytest.raises(ValueError, match="axes THW"):
        store.features(network(), [sample(torch.zeros(1, 2, 32, 32), "THW")])
    with pytest.raises(ValueError, match="has no image"):
        store.features(network(), [Sample(item="cloud")])
    with pytest.raises(ValueError, match=r"takes 1 channels and axes \(D, H, W\)"):
        store.features(ViT3DEncoder.example()[0], samples)


def test_a_reading_that_means_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need a pooling"):
        Reading(layers=("layer1",))
    with pytest.raises(ValueError, match="at least 1"):
        Reading(pooling="mean", grid=(0, 2))
    for grid in ((9, 1), (1, 1, 1)):
        with pytest.raises(ValueError, match=r"a map of \(8, 8\) places cannot become"):
            FeatureStore(tmp_path).features(
                network(),
                pictures(1),
                Reading(layers=("layer1",), pooling="mean", grid=grid),
            )


def test_rows_of_different_shape_do_not_meet_in_one_file(tmp_path):
    class Flat(TimmEncoder):
        def forward(self, images):
            return images.flatten(1)

    encoder = Flat("test_resnet", in_channels=1)
    FeatureStore(tmp_path).features(encoder, pictures(1))
    with pytest.raises(ValueError, match=r"need one shape, got \(2048,\) after \(1024,\)"):
        FeatureStore(tmp_path).features(encoder, pictures(1, size=(64, 32)))
