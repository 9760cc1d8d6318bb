"""What every detector does that is trained by gradient."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from anomaly.base import AnomalyMap, NormalData
from anomaly.examples import smooth_pictures
from anomaly.learning import LearnedDetector, StoppedError, frozen_digest
from anomaly.maps import outside_is_nan
from anomaly.selection import Chosen, PseudoScore, Selection
from anomaly.slicewise import Slicewise
from anomaly.synthetic import Defects
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import collate
from medssl.models.folder import load_model, save_model, selftest_noise
from medssl.training import Trainable, TrainingPlan

ROOT = Path(__file__).parents[2]
SELECTION = Selection(share=0.3, checkpoints=4, defects=Defects(kinds=("blob",)))
PLAN = TrainingPlan(total_samples=32, batch_size=4, checkpoint_every_samples=4)


def view(sample, generator):
    pixels = sample.images["image"].pixels
    return {"image": pixels + 0.1 * torch.randn(pixels.shape, generator=generator)}


class Smoother(Trainable):
    """Learns to give pixels back; its `quality` is 1 after half of the training, then negative."""

    views = staticmethod(view)
    accumulation = "exact"

    def __init__(self, noise: float, norm: nn.Module):
        super().__init__()
        self.noise, self.norm = noise, norm
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.register_buffer("quality", torch.zeros(1))

    def loss(self, views):
        image = views["image"]
        noisy = image + self.noise * torch.randn_like(image)
        return {"loss": (self.layer(self.norm(noisy)) - image).square().mean()}

    def after_step(self, clock):
        self.quality.fill_({0.25: 0.0, 0.5: 1.0}.get(clock.progress, -1.0))


class Tiny(LearnedDetector):
    """Scores a pixel by its square, times the quality that the training has come to."""

    def __init__(self, *, noise=0.1, batch_norm=False, plan=PLAN, selection=None, seed=0):
        super().__init__(plan=plan, selection=selection, seed=seed)
        self.noise, self.batch_norm = noise, batch_norm
        self.stop_at: int | None = None
        self.trainable = self.new_trainable()

    def new_trainable(self):
        made = Smoother(self.noise, nn.BatchNorm2d(1) if self.batch_norm else nn.Identity())
        rest = made.after_step

        def after_step(clock):
            rest(clock)
            if clock.step == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        made.after_step = after_step
        return made

    def predict(self, batch):
        self.check_fitted()
        image = batch.images["image"]
        pixels = self.trainable.quality * image.pixels.square().sum(1)
        maps = outside_is_nan(pixels, image.valid)
        return AnomalyMap(score=maps.flatten(1).nanmean(1), maps={"image": maps})


def normals():
    return NormalData(smooth_pictures(10, (32, 24)), batch_size=4)


def weights(detector):
    return {name: value.clone() for name, value in detector.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_checkpoint_that_tells_defects_best_is_kept_and_not_the_last():
    detector = Tiny(selection=SELECTION).fit(normals())
    assert detector.trainable.quality == 1
    assert detector.samples_seen_.tolist() == [16]
    assert detector.notes["chosen_samples_seen"] == 16
    for name in ("image_auroc", "pixel_auroc"):
        value = detector.notes["chosen"][name]
        assert value > 0.5
        assert value == pytest.approx(1 - detector.notes["last"][name])  # the same maps, negative
    assert detector.notes["num_train"] + detector.notes["num_select"] == 10


def test_without_a_selection_the_last_weights_are_kept_and_nothing_is_held_out():
    detector = Tiny().fit(normals())
    assert detector.trainable.quality == -1
    assert detector.samples_seen_.tolist() == [32]
    assert not detector.notes


def test_fitting_twice_gives_the_same_bits():
    detector = Tiny(selection=SELECTION)
    first = weights(detector.fit(normals()))
    assert_same_bits(weights(detector.fit(normals())), first)


def test_judging_does_not_change_what_is_trained(tmp_path: Path):
    Tiny(batch_norm=True, selection=SELECTION).fit(normals(), workdir=tmp_path)
    last = torch.load(tmp_path / "candidates" / "32.pt", weights_only=True)["weights"]
    training, _ = SELECTION.split(normals(), seed=0)
    assert_same_bits(last, Tiny(batch_norm=True).fit(training).trainable.state_dict())


def test_torchs_random_numbers_go_on_as_if_nothing_was_fitted():
    detector = Tiny(selection=SELECTION)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    detector.fit(normals())
    assert torch.rand(3).equal(expected)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stopped_fit_goes_on_to_the_same_choice_and_bits(tmp_path: Path, step: int):
    undisturbed = Tiny(selection=SELECTION).fit(normals())
    detector = Tiny(selection=SELECTION).fit(normals())
    detector.stop_at = step
    with pytest.raises(StoppedError, match="fit again to go on"):
        detector.fit(normals(), workdir=tmp_path)
    with pytest.raises(RuntimeError, match="is not fitted"):
        detector.predict(collate(smooth_pictures(1)))
    again = Tiny(selection=SELECTION).fit(normals(), workdir=tmp_path)
    assert_same_bits(weights(again), weights(undisturbed))
    assert again.notes == undisturbed.notes


class KilledError(Exception):
    pass


@pytest.mark.parametrize("killed_in", [1, 2, 4])
def test_a_fit_killed_while_it_judges_goes_on_to_the_same_choice(
    tmp_path: Path, monkeypatch, killed_in: int
):
    undisturbed = Tiny(selection=SELECTION).fit(normals())
    judge, calls = Selection.judge, []

    def killed(*arguments, **named) -> PseudoScore:
        calls.append(1)
        if len(calls) == killed_in:
            raise KilledError
        return judge(*arguments, **named)

    monkeypatch.setattr(Selection, "judge", killed)
    with pytest.raises(KilledError):
        Tiny(selection=SELECTION).fit(normals(), workdir=tmp_path)
    again = Tiny(selection=SELECTION).fit(normals(), workdir=tmp_path)
    assert_same_bits(weights(again), weights(undisturbed))
    assert again.notes == undisturbed.notes


def test_a_finished_fit_in_the_same_folder_is_not_trained_again(tmp_path: Path):
    detector = Tiny(selection=SELECTION).fit(normals(), workdir=tmp_path)
    again = Tiny(selection=SELECTION)
    again.stop_at = 1  # would stop
    assert_same_bits(weights(again.fit(normals(), workdir=tmp_path)), weights(detector))


def test_going_on_with_another_selection_or_hyperparameter_is_refused(tmp_path: Path):
    Tiny(selection=SELECTION).fit(normals(), workdir=tmp_path / "a")
    with pytest.raises(ValueError, match=r"detector\.selection was"):
        Tiny(selection=Selection(share=0.3)).fit(normals(), workdir=tmp_path / "a")
    Tiny(batch_norm=False).fit(normals(), workdir=tmp_path / "b")
    with pytest.raises(ValueError, match=r"detector\.batch_norm was False and is True"):
        Tiny(batch_norm=True).fit(normals(), workdir=tmp_path / "b")


class Beside(nn.Module):
    """A frozen network with one number, which was given and not learnt."""

    def __init__(self, *, number: float):
        super().__init__()
        self.number = number
        self.weight = nn.Parameter(torch.tensor([1.0, number]), requires_grad=False)


class WithEncoder(Tiny):
    """As `Tiny`, with an encoder of which only the weights may differ."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


def test_going_on_with_other_weights_of_the_encoder_is_refused(tmp_path: Path):
    one, other = Beside(number=2.0), Beside(number=2.0)
    WithEncoder(one).fit(normals(), workdir=tmp_path)
    WithEncoder(other).fit(normals(), workdir=tmp_path)  # equal ones
    other.weight.data[1] = 3.0
    with pytest.raises(ValueError, match="another training: encoder weights was"):
        WithEncoder(other).fit(normals(), workdir=tmp_path)


def test_the_digest_of_the_frozen_weights_is_the_same_before_and_after_a_fit():
    detector = WithEncoder(Beside(number=2.0))
    before = frozen_digest(detector)
    assert frozen_digest(detector.fit(normals())) == before
    around = Slicewise(detector)
    whole = frozen_digest(around)
    detector.trainable.layer.weight.data.zero_()
    assert frozen_digest(around) == whole
    detector.encoder.weight.data.zero_()
    assert frozen_digest(around) != whole


def test_the_digest_does_not_depend_on_how_weights_lie_in_memory():
    one, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    other.load_state_dict(one.state_dict())
    other.to(memory_format=torch.channels_last)
    assert not other.weight.is_contiguous()
    assert frozen_digest(WithEncoder(one)) == frozen_digest(WithEncoder(other))
    assert frozen_digest(WithEncoder(one)) != frozen_digest(WithEncoder(one.double()))


def test_a_forgotten_detector_has_the_network_that_it_began_with():
    detector = Tiny(selection=SELECTION, seed=3)
    torch.manual_seed(3)
    first = detector.new_trainable().state_dict()
    detector.fit(normals())
    trained = detector.trainable
    assert not trained.layer.weight.equal(first["layer.weight"])
    detector.forget()
    assert detector.trainable is not trained
    assert_same_bits(detector.trainable.state_dict(), first)
    assert not detector.notes
    with pytest.raises(RuntimeError, match="is not fitted"):
        detector.predict(collate(smooth_pictures(1)))


def test_the_loser_of_a_choice_keeps_nothing_of_its_training():
    candidates = [Tiny(noise=0.2), Tiny()]
    choice = Chosen(candidates, selection=SELECTION).fit(normals())
    loser = candidates[1 - choice.notes["chosen"]]
    assert loser.trainable.quality == 0  # -1 after a whole training


def test_a_loss_that_is_no_number_names_the_step_and_what_is_kept_of_it(tmp_path: Path):
    data = normals()
    data[2].images["image"].pixels[0, 3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step") as raised:
        Tiny().fit(data, workdir=tmp_path)
    (kept,) = (tmp_path / "training").glob("not_finite_*.pt")
    assert str(kept) in str(raised.value)
    with pytest.raises(FloatingPointError, match="give `fit` a workdir to keep it"):
        Tiny().fit(data)


def test_a_stopped_fit_without_a_workdir_does_not_say_that_it_can_go_on():
    detector = Tiny()
    detector.stop_at = 2
    with pytest.raises(StoppedError, match="was temporary, and is gone; give `fit` a workdir"):
        detector.fit(normals())


def test_a_split_batch_takes_the_same_steps():
    whole = Tiny(noise=0.0).fit(normals())
    plan = TrainingPlan(total_samples=32, batch_size=4, accumulation=2)
    parts = Tiny(noise=0.0, plan=plan).fit(normals())
    torch.testing.assert_close(
        parts.trainable.layer.weight, whole.trainable.layer.weight, atol=1e-6, rtol=0
    )


def test_a_saved_detector_keeps_its_choice_and_its_settings(tmp_path: Path):
    detector = Tiny(selection=SELECTION).fit(normals())
    save_model(
        tmp_path / "model",
        detector,
        kind="detector",
        preprocessing=Preprocessing(size=(32, 24), intensity="percentile", channels=1),
        domain={},
        card="",
        noise=selftest_noise((2, 1, 32, 24)),
    )
    loaded = load_model(tmp_path / "model", trust=("tests",)).model
    assert isinstance(loaded, Tiny)
    assert loaded.selection == SELECTION
    assert_same_bits(weights(loaded), weights(detector))
    assert loaded._identity() == detector._identity()


SCRIPT = """
import sys, torch
from pathlib import Path
from medssl.distributed import rank
from tests.anomaly.test_learning import SELECTION, Tiny, normals
torch.set_num_threads(1)
found = {}
for name, selection in {"last": None, "chosen": SELECTION}.items():
    detector = Tiny(batch_norm=True, selection=selection).fit(normals())
    found[name] = detector.state_dict()
    found[name + " notes"] = dict(detector.notes)
torch.save(found, Path(sys.argv[1]) / f"{rank()}.pt")
"""


def test_two_processes_keep_the_same_checkpoint_and_the_same_bits(tmp_path: Path):
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, *command, tmp_path], check=True, env=environment, cwd=ROOT, timeout=120
    )
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    for name in ("last", "chosen"):
        assert_same_bits(first[name], second[name])
    assert first["chosen notes"] == second["chosen notes"]
    assert first["chosen"]["samples_seen_"].tolist() == [16]
    alone = Tiny(batch_norm=True, selection=SELECTION).fit(normals())
    assert first["chosen notes"].keys() == alone.notes.keys()
