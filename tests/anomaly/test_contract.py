"""Every detector under anomaly/ keeps the contract of `Detector`; new files need no entry here."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
import torch
from torch import Tensor

import anomaly
from anomaly.base import Detector, NormalData
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Batch, collate
from medssl.models.folder import load_model, save_model, selftest_noise


def detectors() -> list[type[Detector]]:
    """Direct subclasses of Detector in every module of the package."""
    for module in walk_packages(anomaly.__path__, "anomaly."):
        import_module(module.name)
    found = [kind for kind in Detector.__subclasses__() if kind.__module__.startswith("anomaly.")]
    return sorted(found, key=lambda kind: kind.__name__)


every_detector = pytest.mark.parametrize("kind", detectors(), ids=lambda kind: kind.__name__)


def fitted(kind: type[Detector]) -> tuple[Detector, Batch]:
    """Fitted on all but three samples of the example; the batch holds the first one and those."""
    detector, samples = kind.example()
    detector.eval().fit(NormalData(samples[:-3], batch_size=2))
    return detector, collate([samples[0], *samples[-3:]])


def pixels_of(detector: Detector, batch: Batch) -> Tensor:
    maps = detector.predict(batch).maps["image"]
    assert isinstance(maps, Tensor)
    return maps


def test_there_are_detectors_to_test():
    assert len(detectors()) >= 2


@every_detector
def test_fit_returns_the_detector_itself(kind):
    detector, samples = kind.example()
    assert detector.fit(NormalData(samples)) is detector


@every_detector
def test_scores_and_maps_have_the_shape_of_the_batch(kind):
    detector, batch = fitted(kind)
    found = detector.predict(batch)
    assert batch.images["image"].axes == detector.axes
    assert found.score.shape == (len(batch),)
    assert found.score.dtype == torch.float32
    assert pixels_of(detector, batch).shape == batch.images["image"].valid.shape


@every_detector
def test_maps_are_nan_outside_valid_and_finite_inside(kind):
    detector, batch = fitted(kind)
    valid = batch.images["image"].valid
    valid[-1, ..., :7] = False
    assert not valid.all()
    assert pixels_of(detector, batch).isnan().equal(~valid)
    assert detector.predict(batch).score.isfinite().all()


@every_detector
def test_scores_are_raw_and_grow_without_a_limit(kind):
    detector, batch = fitted(kind)
    pixels = batch.images["image"].pixels
    original = pixels.clone()
    middle = tuple(slice(n // 3, n // 3 + max(1, n // 3)) for n in pixels.shape[2:])
    scores = [detector.predict(batch).score]
    for strength in (10.0, 100.0):
        pixels.copy_(original)
        pixels[(slice(None), slice(None), *middle)] += strength
        scores.append(detector.predict(batch).score)
    assert (scores[1] > scores[0]).all()
    assert (scores[2] > 2 * scores[1]).all()


@every_detector
def test_predicting_before_fitting_is_an_error_that_says_so(kind):
    detector, samples = kind.example()
    with pytest.raises(RuntimeError, match=r"not fitted .* call fit\(normal\) first"):
        detector.predict(collate(samples[:1]))


@every_detector
def test_fitting_twice_is_fitting_once(kind):
    detector, batch = fitted(kind)
    _, samples = kind.example()
    once = detector.predict(batch).score
    detector.fit(NormalData([samples[1], samples[2]]))
    assert not detector.predict(batch).score.equal(once)
    detector.fit(NormalData(samples[:-3], batch_size=2))
    assert detector.predict(batch).score.equal(once)


@every_detector
def test_an_item_scores_the_same_alone_and_in_a_batch(kind):
    detector, batch = fitted(kind)
    _, samples = kind.example()
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
def test_predicting_changes_neither_the_batch_nor_the_detector(kind):
    detector, batch = fitted(kind)
    pixels = batch.images["image"].pixels.clone()
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.predict(batch)
    assert batch.images["image"].pixels.equal(pixels)
    assert all(value.equal(state[name]) for name, value in detector.state_dict().items())


@every_detector
def test_maps_can_be_changed_and_carry_no_gradient(kind):
    detector, batch = fitted(kind)
    found = detector.predict(batch)
    assert not found.score.requires_grad
    pixels_of(detector, batch).mul_(2)
    found.score.add_(1)


READER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from medssl.data.sample import collate
from medssl.models.folder import load_model
for folder in map(Path, sys.argv[1:]):
    model = load_model(folder, kind="detector").model
    _, samples = type(model).example()
    torch.save(model.predict(collate([samples[0], *samples[-3:]])).score, folder / "again.pt")
"""


def test_saved_detectors_score_the_same_bits_in_another_process(tmp_path: Path):
    folders = []
    for kind in detectors():
        detector, batch = fitted(kind)
        folders.append(tmp_path / kind.__name__)
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
        assert type(load_model(folders[-1]).model) is kind

    subprocess.run([sys.executable, "-c", READER, *map(str, folders)], check=True)

    for folder in folders:
        score, again = (
            torch.load(folder / name, weights_only=True) for name in ("score.pt", "again.pt")
        )
        assert score.equal(again), folder.name
