import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from anomaly.base import NormalData, noise_batch
from anomaly.examples import smooth_pictures
from anomaly.features import efficient_student
from anomaly.features.efficient_student import (
    EfficientStudent,
    ImageAndChanged,
    hard_feature_loss,
    of_one_part,
    quantiles,
    standardized,
)
from anomaly.features.small_teacher import SmallTeacher, chosen
from anomaly.learning import LearnedDetector
from anomaly.selection import Selection
from anomaly.valid import filled
from medssl.data.sample import collate
from medssl.models.timm_encoder import TimmEncoder
from medssl.models.vit3d import ViT3DEncoder
from medssl.training import TrainingPlan


@pytest.fixture(scope="module")
def fitted() -> EfficientStudent:
    detector, samples = EfficientStudent.example()
    return detector.eval().fit(NormalData(samples[:-3]))


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9, 0.999])
def test_the_hard_loss_is_the_mean_at_and_above_the_quantile(quantile):
    difference = torch.rand(3, 4, 6, 5)
    valid = torch.rand(3, 6, 5) > 0.3
    means = []
    for one, known in zip(difference.numpy(), valid.numpy(), strict=True):
        values = one[:, known]
        means.append(values[values >= np.quantile(values, quantile)].mean())
    found = hard_feature_loss(difference, valid, quantile)
    assert found.item() == pytest.approx(np.mean(means), abs=1e-6)


def test_a_picture_without_a_valid_position_gives_no_hard_loss():
    valid = torch.zeros(2, 3, 3, dtype=torch.bool)
    valid[0] = True
    difference = torch.ones(2, 4, 3, 3)
    difference[1] = torch.nan
    assert hard_feature_loss(difference, valid, 0.9).item() == 0.5


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_all_or_none_of_the_normals_cannot_be_held_out(held_out):
    with pytest.raises(ValueError, match=r"held_out must be a share .* in \(0, 1\)"):
        EfficientStudent(TimmEncoder("test_resnet"), layers=["layer1"], held_out=held_out)


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_quantiles_are_those_of_numpy(count):
    values = torch.randn(count)
    expected = np.quantile(values.numpy(), (0.9, 0.995))
    np.testing.assert_allclose(quantiles(values, (0.9, 0.995)).numpy(), expected, atol=1e-6)


def test_the_low_quantile_becomes_0_and_the_high_one_a_tenth():
    scale = torch.tensor([[2.0, 4.0], [10.0, 30.0]])
    maps = torch.tensor([[2.0, 4.0, 8.0], [10.0, 30.0, 0.0]])[:, None, None]  # (2, 1, 1, 3)
    expected = torch.tensor([[0.0, 0.1, 0.3], [0.0, 0.1, -0.05]])[:, None, None]
    torch.testing.assert_close(standardized(maps, scale), expected)


def test_the_scale_is_of_normals_that_no_network_learnt_from(fitted, monkeypatch):
    seen: list[str] = []

    def watched(trainable, samples, plan, **settings):
        seen.extend(samples[i].item for i in range(len(samples)))
        return {"finished": True}

    def second(self, normal, *rest):
        watched(None, normal.samples, None)

    detector, samples = EfficientStudent.example()
    normal = NormalData(samples[:-3])
    monkeypatch.setattr(efficient_student, "train", watched)
    monkeypatch.setattr(LearnedDetector, "_train", second)
    monkeypatch.setattr(detector, "after_training", lambda normal: None)
    detector.fit(normal)
    _, held_out = Selection(share=detector.held_out).split(normal, seed=0)
    items = {held_out[i].item for i in range(len(held_out))}
    assert items
    assert items & set(seen) == set()
    assert items | set(seen) == {sample.item for sample in samples[:-3]}
    assert detector.notes == {"scale_from": "held-out normals", "num_scale": len(items)}

    images = collate([held_out[i] for i in range(len(held_out))]).images["image"]
    for maps, found in zip(fitted.trainable.maps(images.pixels), fitted.quantiles_, strict=True):
        expected = np.quantile(maps.detach().numpy(), (0.9, 0.995))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_normals_of_one_part_give_the_scale_themselves():
    detector, samples = EfficientStudent.example()
    samples = [replace(sample, group="part") for sample in samples[:4]]
    detector.fit(NormalData(samples))
    assert detector.notes == {"scale_from": "training normals", "num_scale": 4}


@pytest.mark.parametrize(
    ("groups", "one"),
    [("aaa", True), ("aab", False), ([None] * 3, False), (["a", None, None], False)],
)
def test_normals_without_a_group_are_parts_of_their_own(groups, one):
    samples = [replace(s, group=g) for s, g in zip(smooth_pictures(3), groups, strict=True)]
    assert of_one_part(NormalData(samples)) is one


def test_an_error_while_the_normals_are_divided_is_told(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("the file is broken")

    detector, samples = EfficientStudent.example()
    monkeypatch.setattr(Selection, "split", broken)
    with pytest.raises(ValueError, match="the file is broken"):
        detector.fit(NormalData(samples))


def test_the_scale_sees_no_padding(fitted):
    detector = deepcopy(fitted)
    samples = [smooth_pictures(2, size)[1] for size in ((64, 48), (80, 72))]
    found = []
    for batch_size in (1, 2):
        detector._for_scale = normal = NormalData(samples, batch_size=batch_size)
        with torch.no_grad():
            detector.after_training(normal)
        found.append(detector.quantiles_)
    torch.testing.assert_close(found[1], found[0])


def test_what_the_student_learns_is_standardized(fitted):
    normal = NormalData(EfficientStudent.example()[1][:-3])
    training, _ = Selection(share=fitted.held_out).split(normal, seed=0)
    images = collate([training[i] for i in range(len(training))]).images["image"]
    taught = fitted.trainable.taught(filled(images.pixels, images.valid))
    rows = chosen(taught, images.valid)
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(0, correction=0), torch.ones(8), atol=1e-4, rtol=0)


def test_the_maps_are_mean_squared_differences(fitted):
    images = collate(smooth_pictures(2)).images["image"].pixels
    part = fitted.trainable
    with torch.no_grad():
        student = part.student(images)
        expected = (part.taught(images) - student[:, :8]).pow(2).mean(1)
        coded = (part.autoencoder(images) - student[:, 8:]).pow(2).mean(1)
        found = part.maps(images)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], coded)


def test_the_teacher_does_not_learn_with_the_student(fitted):
    trainable = fitted.trainable
    groups = [parameter for group in trainable.parameter_groups() for parameter in group["params"]]
    own = [*trainable.student.parameters(), *trainable.autoencoder.parameters()]
    assert {id(parameter) for parameter in groups} == {id(parameter) for parameter in own}
    assert not any(parameter.requires_grad for parameter in trainable.teacher.parameters())


def test_a_fit_killed_between_its_trainings_goes_on_with_the_teacher_it_has(
    tmp_path: Path, monkeypatch, fitted
):
    detector, samples = EfficientStudent.example()
    normal = NormalData(samples[:-3])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LearnedDetector, "_train", killed)
        with pytest.raises(KeyboardInterrupt):
            detector.fit(normal, workdir=tmp_path)
    steps = []
    again, _ = EfficientStudent.example()
    monkeypatch.setattr(SmallTeacher, "after_step", lambda self, clock: steps.append(clock))
    again.eval().fit(normal, workdir=tmp_path)
    assert steps == []
    batch = collate(samples[-3:])
    assert again.predict(batch).score.equal(fitted.predict(batch).score)


@pytest.mark.parametrize("seed", range(8))
def test_the_changed_picture_differs_by_a_shift_or_in_contrast(seed):
    sample = smooth_pictures(1)[0]
    views = ImageAndChanged(strength=0.2)(sample, torch.Generator().manual_seed(seed))
    inside, changed = (views[name][0][views["valid"]] for name in ("image", "changed"))
    slope, shift = np.polyfit(inside.numpy(), changed.numpy(), 1)
    if slope == pytest.approx(1, abs=1e-5):
        assert 0 < abs(shift) <= 0.2 * inside.std() + 1e-5
    else:
        assert 0.8 <= slope <= 1.2
        assert changed.mean().item() == pytest.approx(inside.mean().item(), abs=1e-5)
    assert not views["changed"][0][~views["valid"]].any()


def test_a_foreign_texture_scores_above_the_normals(fitted):
    images = collate(smooth_pictures(8)[-3:]).images["image"].pixels
    normal = fitted.predict(noise_batch(images, "HW"))
    checkers = (torch.arange(12)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    images[:, :, 24:36, 20:32] += 2 * checkers
    found = fitted.predict(noise_batch(images, "HW"))
    assert found.score.min() > normal.score.max()
    for maps in found.maps["image"]:
        row, column = divmod(int(maps.argmax()), maps.shape[1])
        assert 18 <= row < 42
        assert 14 <= column < 38


def test_an_encoder_of_volumes_is_refused():
    encoder, _ = ViT3DEncoder.example()
    with pytest.raises(ValueError, match="got one of DHW"):
        EfficientStudent(encoder, layers=["blocks.0"])


def seconds(function: Callable[[], object]) -> float:
    """The shortest of many calls: the least disturbed."""
    found = []
    for _ in range(40):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)


@pytest.mark.slow
def test_a_picture_is_scored_in_one_and_a_half_mobilenets():
    import timm

    plan = TrainingPlan(total_samples=2, batch_size=2)
    detector = EfficientStudent(
        TimmEncoder("mobilenetv2_100"),
        layers=["blocks.2", "blocks.4"],
        teacher_plan=plan,
        plan=plan,
    )
    samples = []
    for sample in smooth_pictures(3, (256, 256)):
        image = sample.images["image"]
        color = replace(image, pixels=image.pixels.repeat(3, 1, 1), valid=None)
        samples.append(sample.with_image(color))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        detector.eval().fit(NormalData(samples))
        batch = collate(samples[:1])
        bare = timm.create_model("mobilenetv2_100").eval().to(memory_format=torch.channels_last)
        pixels = batch.images["image"].pixels
        with torch.inference_mode():
            limit = 1.5 * seconds(lambda: bare(pixels))
            assert seconds(lambda: detector.predict(batch)) <= limit
    finally:
        torch.set_num_threads(threads)
