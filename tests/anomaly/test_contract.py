"""Every detector under anomaly/ keeps the contract of `Detector`; new files need no entry here."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch
from torch import Tensor

import anomaly
from anomaly.base import AnomalyMap, Detector, NormalData
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch, Sample, collate
from medssl.models.folder import load_model, save_model, selftest_noise

Example = Callable[[], tuple[Detector, list[Sample]]]


def kinds_of(kind: type[Detector]) -> Iterator[type[Detector]]:
    for below in kind.__subclasses__():
        yield below
        yield from kinds_of(below)


def examples() -> dict[str, Example]:
    """Of every detector of the package: its example, and those of volumes and clouds it has."""
    for module in walk_packages(anomaly.__path__, "anomaly."):
        import_module(module.name)
    found: dict[str, Example] = {}
    for kind in sorted(set(kinds_of(Detector)), key=lambda kind: kind.__name__):
        if kind.__module__.startswith("anomaly."):
            for name in ("example", "example_volume", "example_cloud"):
                if name in vars(kind):
                    found[kind.__name__ + name.removeprefix("example")] = getattr(kind, name)
    return found


every_detector = pytest.mark.parametrize("example", examples().values(), ids=examples().keys())


def fitted(example: Example) -> tuple[Detector, Batch]:
    """Fitted on all but three samples of the example; the batch holds the first one and those."""
    detector, samples = example()
    detector.eval().fit(NormalData(samples[:-3], batch_size=2))
    return detector, collate([samples[0], *samples[-3:]])


def values_of(found: AnomalyMap) -> list[Tensor]:
    """The map of each item: of an image, or of a free cloud."""
    assert len(found.maps) == 1
    return list(next(iter(found.maps.values())))


def valid_of(batch: Batch) -> list[Tensor]:
    """Where the map of each item must say something: where any modality does."""
    clouds = [cloud.looked_at for cloud in batch.points if cloud is not None]
    return clouds or list(torch.stack([i.valid for i in batch.images.values()]).any(0))


def inputs_of(batch: Batch) -> list[Tensor]:
    """What a detector looks at, to be changed in place."""
    clouds = [cloud.points for cloud in batch.points if cloud is not None]
    return clouds + [images.pixels for images in batch.images.values()]


def disturb(inputs: list[Tensor], strength: float) -> None:
    """A step in the middle of images; scattered points in clouds."""
    for values in inputs:
        if values.ndim == 2:
            noise = torch.randn(len(values) // 4, 3, generator=torch.Generator().manual_seed(0))
            values[-len(noise) :] += strength * values.std() * noise
        else:
            middle = tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in values.shape[2:])
            values[(slice(None), slice(None), *middle)] += strength


def test_there_are_detectors_to_test():
    assert len(examples()) >= 2


@every_detector
def test_fit_returns_the_detector_itself(example):
    detector, samples = example()
    assert detector.fit(NormalData(samples)) is detector


@every_detector
def test_scores_and_maps_have_the_shape_of_the_batch(example):
    detector, batch = fitted(example)
    found = detector.predict(batch)
    if detector.axes != "points":
        assert batch.images["image"].axes == detector.axes
        assert isinstance(found.maps["image"], Tensor)
    assert found.score.shape == (len(batch),)
    assert found.score.dtype == torch.float32
    shapes = [values.shape for values in values_of(found)]
    assert shapes == [valid.shape for valid in valid_of(batch)]


@every_detector
def test_maps_are_nan_outside_valid_and_finite_inside(example):
    detector, batch = fitted(example)
    if detector.axes == "points":
        last = batch.points[-1]
        valid = last.looked_at
        valid[: len(valid) // 7] = False
        batch = replace(batch, points=(*batch.points[:-1], replace(last, valid=valid)))
    for images in batch.images.values():
        images.valid[-1, ..., :7] = False
    assert not valid_of(batch)[-1].all()
    found = detector.predict(batch)
    for values, valid in zip(values_of(found), valid_of(batch), strict=True):
        assert values.isnan().equal(~valid)
    assert found.score.isfinite().all()


@every_detector
def test_scores_are_raw_and_grow_without_a_limit(example):
    detector, batch = fitted(example)
    original = [values.clone() for values in inputs_of(batch)]
    scores = [detector.predict(batch).score]
    for strength in (10.0, 100.0):
        for values, before in zip(inputs_of(batch), original, strict=True):
            values.copy_(before)
        disturb(inputs_of(batch), strength)
        scores.append(detector.predict(batch).score)
    assert (scores[1] > scores[0]).all()
    if detector.unbounded:
        assert (scores[2] > 2 * scores[1]).all()


@every_detector
def test_predicting_before_fitting_is_an_error_that_says_so(example):
    detector, samples = example()
    with pytest.raises(RuntimeError, match=r"not fitted .* call fit\(normal\) first"):
        detector.predict(collate(samples[:1]))


@every_detector
def test_fitting_twice_is_fitting_once(example):
    detector, batch = fitted(example)
    _, samples = example()
    once = detector.predict(batch).score
    detector.fit(NormalData([samples[1], samples[2]]))
    assert not detector.predict(batch).score.equal(once)
    detector.fit(NormalData(samples[:-3], batch_size=2))
    assert detector.predict(batch).score.equal(once)


@every_detector
def test_an_item_scores_the_same_alone_and_in_a_batch(example):
    detector, batch = fitted(example)
    _, samples = example()
    together = detector.predict(batch)
    for i, sample in enumerate([samples[0], *samples[-3:]]):
        alone = detector.predict(collate([sample]))
        torch.testing.assert_close(alone.score[0], together.score[i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            values_of(alone)[0],
            values_of(together)[i],
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )


@every_detector
def test_predicting_changes_neither_the_batch_nor_the_detector(example):
    detector, batch = fitted(example)
    before = [values.clone() for values in inputs_of(batch)]
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.predict(batch)
    assert all(values.equal(old) for values, old in zip(inputs_of(batch), before, strict=True))
    assert all(value.equal(state[name]) for name, value in detector.state_dict().items())


@every_detector
def test_maps_can_be_changed_and_carry_no_gradient(example):
    detector, batch = fitted(example)
    found = detector.predict(batch)
    assert not found.score.requires_grad
    for values in values_of(found):
        values.mul_(2)
    found.score.add_(1)


READER = """
import sys
from importlib import import_module
from pathlib import Path
import torch
torch.set_num_threads(1)
from medssl.data.sample import collate
from medssl.models.folder import load_model
for folder in map(Path, sys.argv[1:]):
    model = load_model(folder, kind="detector").model
    name = "example" + "".join(
        kind for kind in ("_volume", "_cloud") if folder.name.endswith(kind)
    )
    _, samples = getattr(type(model), name)()
    torch.save(model.predict(collate([samples[0], *samples[-3:]])).score, folder / "again.pt")
"""


def test_saved_detectors_score_the_same_bits_in_another_process(tmp_path: Path):
    folders = []
    for name, example in examples().items():
        detector, batch = fitted(example)
        look = inputs_of(batch)[0]
        folders.append(tmp_path / name)
        save_model(
            folders[-1],
            detector,
            kind="detector",
            preprocessing=Preprocessing(size=(64, 48), intensity="percentile", channels=1),
            domain={},
            card="",
            noise=selftest_noise(detector.selftest_shape(look.shape[look.ndim > 2 :])),
        )
        torch.save(detector.predict(batch).score, folders[-1] / "score.pt")
        assert type(load_model(folders[-1]).model) is type(detector)

    subprocess.run([sys.executable, "-c", READER, *map(str, folders)], check=True)

    for folder in folders:
        score, again = (
            torch.load(folder / name, weights_only=True) for name in ("score.pt", "again.pt")
        )
        assert score.equal(again), folder.name
