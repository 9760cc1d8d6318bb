"""Detectors with a network that is trained, by the one loop of `medssl.training`."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anomaly.base import Detector, NormalData
from anomaly.selection import PseudoScore, Selection
from medssl.distributed import processes, rank
from medssl.models.folder import describe
from medssl.models.layout import channels_last
from medssl.training import Clock, Trainable, TrainingPlan, train

Told = TypeVar("Told")


class StoppedError(RuntimeError):
    """A training was asked to stop before its end; its checkpoint lies in the workdir."""


class LearnedDetector(Detector):
    """A detector whose network a `Trainable` holds and `train` fits.

    A subclass gives `new_trainable`, calls it once at the end of its constructor, as
    `self.trainable = self.new_trainable()`, so that a saved state has somewhere to go, and gives
    `predict`. What it knows of normal items beyond the network, it learns in `after_training`.

    plan: how long and how fast to train; a killed fit goes on in the same workdir exactly.
    selection: choose among checkpoints without labels; None keeps the last.
    seed: of the first weights, the order of the samples, their views and their random numbers.
    """

    trainable: Trainable

    def __init__(self, *, plan: TrainingPlan, selection: Selection | None, seed: int) -> None:
        super().__init__()
        self.plan, self.selection, self.seed = plan, selection, seed
        self.register_buffer("samples_seen_", torch.empty(0, dtype=torch.int64))
        self.samples_seen_: Tensor  # (1,), of the weights that were kept
        # the layout of a trained network, and with it the bits of its answers
        self.register_load_state_dict_post_hook(_laid_out)

    def new_trainable(self) -> Trainable:
        """A new network with its loss; random numbers come from torch's own generator."""
        raise NotImplementedError

    def after_training(self, normal: NormalData) -> None:
        """Learn statistics of the trained network on the items it was trained on."""

    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Train anew, or go on from the checkpoint that the workdir holds.

        Where a selection is asked for, some of the items are held out of the training for it.
        Torch's random numbers go on afterwards as if nothing had been drawn, but for a GPU's.
        Raises StoppedError where SIGTERM came first, FloatingPointError for a loss that is none.
        """
        place = device_of(self)
        self.samples_seen_, self.notes = self.samples_seen_.new_empty(0), {}
        with seeded(self.seed), _folder(workdir) as folder:
            self.trainable = self.new_trainable().to(place)
            training, trial = normal, None
            if self.selection is not None:
                training, held_out = self.selection.split(normal, seed=self.seed)
                trial = Trial(self, self.selection, training, held_out, folder / "candidates")
            self._train(training, folder / "training", trial)
            seen = self.plan.clock(self.plan.steps).samples_seen
            if trial is not None:
                seen, self.notes = trial.keep_best()
            as_in_the_first_process(self.trainable)
            self.trainable.to(place).eval()
            self.samples_seen_ = torch.tensor([seen], device=place)
            with torch.no_grad():
                self.after_training(training)
        return self

    def forget(self) -> None:
        """As of `Detector`, and the network is a new one."""
        super().forget()
        place = device_of(self)
        with seeded(self.seed):
            self.trainable = self.new_trainable().to(place)

    def _train(self, normal: NormalData, workdir: Path, trial: "Trial | None") -> None:
        with _taking(self.trainable, trial):
            result = train(
                self.trainable,
                normal.samples,
                self.plan,
                workdir=workdir,
                resume=True,
                device=device_of(self).type,
                workers=normal.workers,
                seed=self.seed,
                identity=self._identity(),
            )
        if not result["finished"]:
            raise StoppedError("the training was stopped as asked, and saved; fit again to go on")

    def _identity(self) -> dict[str, str]:
        """What `train` does not compare by itself when it goes on."""
        arguments = describe(self)["init_args"]
        settings = {
            f"detector.{name}": str(value)
            for name, value in arguments.items()
            if name not in ("plan", "seed")
        }
        return {**settings, "encoder weights": frozen_digest(self)}


class Trial:
    """The checkpoints of one training: each is judged when it is taken, and the best is kept.

    folder: the candidates, weights and verdict in one file each; a killed training finds them.
    """

    def __init__(
        self,
        detector: LearnedDetector,
        selection: Selection,
        training: NormalData,
        held_out: NormalData,
        folder: Path,
    ) -> None:
        self.detector, self.selection, self.folder = detector, selection, folder
        self.training, self.held_out = training, held_out
        plan = detector.plan
        count = min(selection.checkpoints, plan.steps)
        steps = [round(plan.steps * (k + 1) / count) for k in range(count)]
        self.due = [plan.clock(step).samples_seen for step in steps]

    @torch.no_grad()
    def take(self, samples_seen: int) -> None:
        """Judge the weights as they are, and keep them where a checkpoint is due."""
        if samples_seen not in self.due:
            return
        detector, trainable = self.detector, self.detector.trainable
        training = {module: module.training for module in trainable.modules()}
        trainable.eval()
        detector.samples_seen_ = torch.tensor([samples_seen])
        detector.after_training(self.training)
        score = self.selection.judge(detector, self.held_out, seed=detector.seed)
        detector.samples_seen_ = detector.samples_seen_.new_empty(0)
        for module, flag in training.items():  # a frozen encoder inside stays as it was
            module.training = flag
        if rank() == 0:
            self._write(samples_seen, score)

    def keep_best(self) -> tuple[int, dict[str, Any]]:
        """Give the detector the weights of the best checkpoint; of equals the last.

        Returns the samples it had seen, and the choice beside the last checkpoint, for `notes`.
        """
        found: dict[int, PseudoScore] = {}
        if rank() == 0:
            found = {seen: self._read(seen)[1] for seen in self.due}
        found = told_by_the_first_process(found)
        best = max(found, key=lambda seen: (found[seen].value, seen))
        if rank() == 0:
            self.detector.trainable.load_state_dict(self._read(best)[0])
        return best, {
            "chosen_samples_seen": best,
            "chosen": asdict(found[best]),
            "last": asdict(found[self.due[-1]]),
            "num_train": len(self.training),
            "num_select": len(self.held_out),
        }

    def _write(self, samples_seen: int, score: PseudoScore) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{samples_seen}.unfinished"
        state = {"weights": self.detector.trainable.state_dict(), "score": asdict(score)}
        torch.save(state, unfinished)
        unfinished.rename(self.folder / f"{samples_seen}.pt")

    def _read(self, samples_seen: int) -> tuple[dict[str, Any], PseudoScore]:
        file = self.folder / f"{samples_seen}.pt"
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return state["weights"], PseudoScore(**state["score"])


def _laid_out(detector: nn.Module, _: Any) -> None:
    channels_last(detector)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters lie, or the buffers of a model that has none; else the CPU."""
    tensors: Iterator[Any] = iter([*model.parameters(), *model.buffers()])
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def frozen_digest(detector: Detector) -> str:
    """16 hexadecimal digits of the tensors that no fit changes: those of the encoders inside."""
    trained = tuple(
        f"{name}.trainable.".lstrip(".")
        for name, module in detector.named_modules()
        if isinstance(module, LearnedDetector)
    )
    total = hashlib.sha256()
    for name, value in sorted(detector.state_dict().items()):
        if isinstance(value, Tensor) and not name.endswith("_") and not name.startswith(trained):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from `seed` inside, and as they were afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def as_in_the_first_process(model: nn.Module) -> None:
    """Give all processes the tensors of the first; batch statistics differ between them."""
    if processes() == 1:
        return
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            told = value.contiguous()
            dist.broadcast(told, 0)
            value.copy_(told)


def told_by_the_first_process(value: Told) -> Told:
    """What the first of the processes that train together has."""
    if processes() == 1:
        return value
    told: list[Any] = [value]
    dist.broadcast_object_list(told, 0)
    return told[0]


@contextmanager
def _taking(trainable: Trainable, trial: Trial | None) -> Iterator[None]:
    """Take checkpoints for the trial after the steps inside.

    Before the training writes its own checkpoint of the same step, so that one that is killed in
    between judges again instead of going on without a verdict.
    """
    if trial is None:
        yield
        return
    after_step = trainable.after_step

    def take(clock: Clock) -> None:
        after_step(clock)
        trial.take(clock.samples_seen)

    trainable.after_step = take  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainable.after_step


@contextmanager
def _folder(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="medssl.fit.") as folder:
        try:
            yield Path(folder)
        except (StoppedError, FloatingPointError) as error:
            raise type(error)(
                f"{error}. Without a workdir all of this was temporary, and is gone; give `fit` a "
                "workdir to keep it"
            ) from error
