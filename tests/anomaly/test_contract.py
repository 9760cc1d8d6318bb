"""Every detector under anomaly/ keeps the contract of `Detector`; new files need no entry here."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch
from torch import Tensor

import anomaly
from anomaly.base import Detector, NormalData
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch, Sample, collate
from medssl.models.folder import load_model, save_model, selftest_noise

Example = Callable[[], tuple[Detector, list[Sample]]]


def kinds_of(kind: type[Detector]) -> Iterator[type[Detector]]:
    for below in kind.__subclasses__():
        yield below
        yield from kinds_of(below)


def examples() -> dict[str, Example]:
    """Of every detector of the package: its example, and that of volumes where it has one."""
    for module in walk_packages(anomaly.__path__, "anomaly."):
        import_module(module.name)
    found: dict[str, Example] = {}
    for kind in sorted(set(kinds_of(Detector)), key=lambda kind: kind.__name__):
        if kind.__module__.startswith("anomaly."):
            for name in ("example", "example_volume"):
                if name in vars(kind):
                    found[kind.__name__ + name.removeprefix("example")] = getattr(kind, name)
    return found


every_detector = pytest.mark.parametrize("example", examples().values(), ids=examples().keys())


def fitted(example: Example) -> tuple[Detector, Batch]:
    """Fitted on all but three samples of the example; the batch holds the first one and those."""
    detector, samples = example()
    detector.eval().fit(NormalData(samples[:-3], batch_size=2))
    return detector, collate([samples[0], *samples[-3:]])


def pixels_of(detector: Detector, batch: Batch) -> Tensor:
    maps = detector.predict(batch).maps["image"]
    assert isinstance(maps, Tensor)
    return maps


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
    assert batch.images["image"].axes == detector.axes
    assert found.score.shape == (len(batch),)
    assert found.score.dtype == torch.float32
    assert pixels_of(detector, batch).shape == batch.images["image"].valid.shape


@every_detector
def test_maps_are_nan_outside_valid_and_finite_inside(example):
    detector, batch = fitted(example)
    valid = batch.images["image"].valid
    valid[-1, ..., :7] = False
    assert not valid.all()
    assert pixels_of(detector, batch).isnan().equal(~valid)
    assert detector.predict(batch).score.isfinite().all()


@every_detector
def test_scores_are_raw_and_grow_without_a_limit(example):
    detector, batch = fitted(example)
    pixels = batch.images["image"].pixels
    original = pixels.clone()
    middle = tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in pixels.shape[2:])
    scores = [detector.predict(batch).score]
    for strength in (10.0, 100.0):
        pixels.copy_(original)
        pixels[(slice(None), slice(None), *middle)] += strength
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
            alone.maps["image"][0],
            together.maps["image"][i],
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
        )


@every_detector
def test_predicting_changes_neither_the_batch_nor_the_detector(example):
    detector, batch = fitted(example)
    pixels = batch.images["image"].pixels.clone()
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.predict(batch)
    assert batch.images["image"].pixels.equal(pixels)
    assert all(value.equal(state[name]) for name, value in detector.state_dict().items())


@every_detector
def test_maps_can_be_changed_and_carry_no_gradient(example):
    detector, batch = fitted(example)
    found = detector.predict(batch)
    assert not found.score.requires_grad
    pixels_of(detector, batch).mul_(2)
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
    name = "example_volume" if folder.name.endswith("_volume") else "example"
    _, samples = getattr(type(model), name)()
    torch.save(model.predict(collate([samples[0], *samples[-3:]])).score, folder / "again.pt")
"""


def test_saved_detectors_score_the_same_bits_in_another_process(tmp_path: Path):
    folders = []
    for name, example in examples().items():
        detector, batch = fitted(example)
        folders.append(tmp_path / name)
        save_model(
            folders[-1],
            detector,
            kind="detector",
            preprocessing=Preprocessing(size=(64, 48), intensity="percentile", channels=1),
            domain={},
            card="",
            noise=selftest_noise(batch.images["image"].pixels[:2].shape),
        )
        torch.save(detector.predict(batch).score, folders[-1] / "score.pt")
        assert type(load_model(folders[-1]).model) is type(detector)

    subprocess.run([sys.executable, "-c", READER, *map(str, folders)], check=True)

    for folder in folders:
        score, again = (
            torch.load(folder / name, weights_only=True) for name in ("score.pt", "again.pt")
        )
        assert score.equal(again), folder.name
