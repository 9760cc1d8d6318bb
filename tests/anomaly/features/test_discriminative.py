"""The head on frozen features: its views, its loss, and whether it finds what it was not shown."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from anomaly.base import NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features import discriminative
from anomaly.features.discriminative import DiscriminativeHead, Head, MadeUp, _focal
from anomaly.features.patches import patch_offset
from anomaly.selection import Selection
from anomaly.synthetic import Defects
from anomaly.valid import filled
from medssl.data.sample import collate
from medssl.models.folder import describe
from medssl.models.timm_encoder import TimmEncoder
from medssl.training import TrainingPlan
from pipelines.fit import fit


def head(noise=0.0):
    torch.manual_seed(0)
    detector, samples = DiscriminativeHead.example()
    return Head(detector.frozen, MadeUp(detector.defects), width=8, noise=noise), samples


def drawn(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("samples", [smooth_pictures(2), smooth_volumes(2)], ids=["HW", "DHW"])
def test_every_second_view_is_changed_exactly_where_it_says(samples):
    image, donors = samples[0].images["image"], samples[1:]
    views = [MadeUp(Defects(), donors)(samples[0], drawn(seed)) for seed in range(60)]
    for view in views:
        different = image.valid & (view["image"] != image.pixels).any(0)
        assert different.equal(view["changed"])
        assert view["image"].equal(filled(view["image"][None], view["valid"][None])[0])
    count = sum(bool(view["changed"].any()) for view in views)
    assert 20 <= count <= 40  # 30 expected, deviation 4


def test_the_focal_loss_has_its_closed_form_over_valid_cells():
    logits = torch.tensor([[[0.0, 2.0, 99.0]], [[-1.0, -99.0, 99.0]]])
    changed = torch.tensor([[[True, False, False]], [[True, False, True]]])
    valid = torch.tensor([[[True, True, False]], [[True, False, False]]])
    half, two, minus = (1 / (1 + math.exp(-x)) for x in (0.0, 2.0, -1.0))
    first = -((1 - half) ** 2 * math.log(half) + two**2 * math.log(1 - two)) / 2
    second = -((1 - minus) ** 2) * math.log(minus)
    assert _focal(logits, changed, valid).item() == pytest.approx((first + second) / 2, rel=1e-5)


def test_features_of_the_training_items_are_standardized_over_valid_cells():
    trainable, samples = head()
    samples = samples[1:]  # all valid
    trainable.prepare(samples)
    pixels = torch.stack([sample.images["image"].pixels for sample in samples])
    cells = ((trainable.features(pixels) - trainable.mean) / trainable.deviation).flatten(0, -2)
    alive = trainable.deviation > 1e-2 * trainable.deviation.max()
    torch.testing.assert_close(cells.mean(0), torch.zeros(cells.shape[1]), atol=1e-3, rtol=0)
    deviation = cells.std(0, correction=0)[alive]
    torch.testing.assert_close(deviation, torch.ones_like(deviation), atol=1e-3, rtol=0)


def test_donors_are_valid_items_and_no_more_than_a_few():
    trainable, samples = head()
    samples[3].images["image"].valid.zero_()
    trainable.prepare(samples)
    assert [donor.item for donor in trainable.views.donors] == [
        sample.item for sample in samples if sample is not samples[3]
    ]


@pytest.mark.parametrize("count", [63, 64, 65, 95, 127, 200])
def test_there_are_donors_all_over_the_normals_but_no_more_than_the_cap(count):
    trainable, samples = head()
    every = [replace(samples[1], item=str(i)) for i in range(count)]
    trainable.prepare(every)
    chosen = [int(donor.item) for donor in trainable.views.donors]
    assert discriminative._DONORS // 2 <= len(chosen) <= discriminative._DONORS
    assert max(chosen) >= count - count // 32


def test_a_picture_scores_the_same_beside_a_larger_one():
    detector, samples = DiscriminativeHead.example()
    detector.eval().fit(NormalData(samples[1:5]))
    smaller, larger = samples[6], smooth_pictures(2, (80, 72))[1]
    alone, beside = (detector.predict(collate(s)) for s in ([smaller], [larger, smaller]))
    torch.testing.assert_close(beside.score[1:], alone.score)
    torch.testing.assert_close(beside.maps["image"][1:, :64, :48], alone.maps["image"])


def test_the_map_of_a_volume_is_laid_where_the_first_layer_looks():
    detector, samples = DiscriminativeHead.example_volume()
    detector.fit(NormalData(samples))
    expected = patch_offset(detector.encoder, "blocks.0", (16, 32, 24))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(detector.offset_, expected)


def test_noise_counts_as_changed():
    trainable, samples = head(noise=0.5)
    trainable.prepare(samples)
    image = samples[1].images["image"].pixels[None]
    everywhere = torch.ones(1, *image.shape[2:], dtype=torch.bool)
    views = {"image": image, "valid": everywhere, "changed": ~everywhere}
    with torch.no_grad():
        torch.nn.init.zeros_(trainable.head[-1].weight)
        for bias, expected in ((0.0, 2 * 0.25 * math.log(2)), (30.0, 30.0), (-30.0, 30.0)):
            trainable.head[-1].bias.fill_(bias)
            assert trainable.loss(views)["loss"].item() == pytest.approx(expected, rel=1e-4)


def texture_pictures():
    """Fine noise, equal everywhere."""
    samples = smooth_pictures(16, (64, 64))
    generator = drawn(1)
    for sample in samples:
        image = sample.images["image"]
        image.pixels.copy_(torch.randn(image.pixels.shape, generator=generator))
        image.valid.fill_(True)
    return samples


def test_training_finds_defects_on_items_it_was_not_trained_on():
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", in_channels=1)
    defects = Defects(kinds=("blob",), size=(0.3, 0.6))
    plan = TrainingPlan(total_samples=640, batch_size=16, learning_rate=1e-2)
    detector = DiscriminativeHead(
        encoder, layers=["layer1"], width=16, defects=defects, sigma=2.0, plan=plan
    )
    samples = texture_pictures()
    detector.fit(NormalData(samples[:10]))
    judged = Selection(defects=defects, per_normal=3).judge(
        detector, NormalData(samples[10:]), seed=0
    )
    assert judged.pixel_auroc > 0.8
    assert judged.image_auroc > 0.6


def test_with_noise_what_is_far_from_normal_scores_higher_although_it_is_like_no_defect():
    higher = []
    for noise in (0.0, 0.1):
        detector, samples = DiscriminativeHead.example()
        detector.noise = noise
        detector.fit(NormalData(samples))
        batch = collate(samples)
        normal = detector.predict(batch).score
        batch.images["image"].pixels[:, :, 20:40, 20:30] += 100
        higher.append(bool((detector.predict(batch).score > normal).all()))
    assert higher == [False, True]


def test_a_split_batch_takes_the_same_steps():
    found = []
    for accumulation in (1, 2):
        detector, samples = DiscriminativeHead.example()
        detector.noise = 0.0
        detector.plan = TrainingPlan(total_samples=16, batch_size=4, accumulation=accumulation)
        found.append(detector.fit(NormalData(samples)).trainable.head[0].weight)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_the_config_has_the_defaults():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(fit, skip={"data", "out"}, as_group=False)
    config = Path(__file__).parents[3] / "configs" / "fit" / "discriminative_mobilenetv2.yaml"
    built = parser.instantiate(parser.parse_path(config)).detector
    plain = DiscriminativeHead(TimmEncoder("mobilenetv2_100"), layers=["blocks.2", "blocks.4"])
    assert describe(built) == describe(plain)
