"""`Trainable`, and the one optimization loop, on Lightning Fabric."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from medssl.checkpoint import read_checkpoint, write_checkpoint
from medssl.data.sample import Sample
from medssl.schedule import Clock, TrainingPlan, cosine
from medssl.stream import Batch, Stream, Unit, Views, batches, workers_for

__all__ = [
    "Clock",
    "Report",
    "Trainable",
    "TrainingPlan",
    "Unit",
    "cosine",
    "split_by_decay",
    "train",
]

_MEMORY = 0.95  # of the running means of what a loss reports, per step
_WATCH_FROM = 0.2  # share of the training after which a collapse is looked for
_WATCH_TIMES = 20  # looks per training


class Trainable(nn.Module):
    """Anything the one loop can train.

    views: a sample and a generator to its views, all of fixed shapes; picklable and small, since
        it runs in loader processes.
    accumulation: whether splitting a batch over several passes gives the same gradient.
    one_per: what a batch holds at most one of, because the loss sets its rows against each other.
    """

    views: Views
    accumulation: Literal["exact", "refused"] = "refused"
    one_per: Unit = "item"

    def loss(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """views: by name, each (B, ...), and "item", "group", "study" (B,) int64.

        Returns scalars; "loss" is minimized, the rest is logged and watched.
        """
        raise NotImplementedError

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Learn what has to be known before the first step (a vocabulary, statistics)."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer: "params", and where wanted
        "decay" (bool, default True), "rate" (times the learning rate, default 1) and
        "frozen_until" (share of the training before which the parameters stay, default 0).
        """
        return split_by_decay(self)

    def after_step(self, clock: Clock) -> None:
        """Called after each optimizer step: a teacher, a queue, a schedule."""

    def collapsed(self, statistics: Mapping[str, float]) -> str | None:
        """What went wrong and what to change, from running means of what `loss` reports."""
        return None

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A tiny instance and samples for it, for the contract tests."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the loop tells after a step.

    warning: what the collapse watch saw, at the steps where it looks; else None.
    """

    clock: Clock
    loss: float
    learning_rate: float
    warning: str | None


def split_by_decay(*modules: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and biases and norms, which do not decay."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "decay": False},
    ]


def train(
    trainable: Trainable,
    samples: Sequence[Sample],
    plan: TrainingPlan,
    *,
    workdir: Path,
    resume: bool = False,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    workers: int | None = None,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    on_step: Callable[[Report], None] | None = None,
) -> dict[str, Any]:
    """Train in place, with a checkpoint in `workdir` from which a killed training goes on exactly.

    workers: processes that make views; the result does not depend on them. None: by the cores.
    identity: further plain values that must not change between start and resume.
    SIGTERM finishes the step, saves and returns with "finished" False.
    Raises FloatingPointError, naming the items, where the loss is not finite.
    Returns "finished", "loss", "verdict" (None is healthy), "statistics" (running means),
    "samples_per_second" and "waiting_share" (of the time, for data).
    """
    if plan.accumulation > 1 and trainable.accumulation == "refused":
        raise ValueError(
            f"{type(trainable).__name__} sets the rows of a batch against each other, so a batch "
            "cannot be split; set accumulation to 1 and lower batch_size"
        )
    if not len(samples):
        raise ValueError("no sample to train on")
    torch.manual_seed(seed)
    trainable.prepare(samples)
    loop = _Loop(trainable, plan, workdir, device=device, precision=precision)
    loop.identity = {
        **{f"plan.{name}": value for name, value in asdict(plan).items()},
        **_hyperparameters(trainable),
        "seed": seed,
        "samples": len(samples),
        **(identity or {}),
    }
    if resume:
        loop.restore()
    stream = Stream(samples, batch_size=plan.batch_size, one_per=trainable.one_per, seed=seed)
    parts = batches(
        samples,
        trainable.views,
        stream,
        start=loop.step * plan.batch_size,
        stop=plan.steps * plan.batch_size,
        batch_size=plan.batch_size // plan.accumulation,
        workers=workers_for(workers),
        pin_memory=loop.fabric.device.type == "cuda",
    )
    with _stop_asked() as asked:
        while loop.step < plan.steps and not asked.is_set():
            report = loop.advance(parts)
            if on_step is not None:
                on_step(report)
    return loop.result()


class _Loop:
    """The state of one training."""

    def __init__(
        self,
        trainable: Trainable,
        plan: TrainingPlan,
        workdir: Path,
        *,
        device: str,
        precision: str,
    ) -> None:
        from lightning.fabric import Fabric

        self.trainable, self.plan, self.workdir = trainable, plan, workdir
        workdir.mkdir(parents=True, exist_ok=True)
        trainable.to(memory_format=torch.channels_last)  # convolutions are up to twice as fast
        self.fabric = Fabric(accelerator=device, devices=1, precision=_precision(precision, device))
        groups = [
            {"decay": True, "rate": 1.0, "frozen_until": 0.0, **group}
            for group in trainable.parameter_groups()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self.model, self.stepper = self.fabric.setup(trainable, self.optimizer)
        self.model.mark_forward_method("loss")
        self.model.train()
        self.step = 0
        self.saved = 0  # samples seen at the last checkpoint
        self.means: dict[str, float] = {}
        self.identity: dict[str, Any] = {}
        self.began, self.first_step, self.waited = time.monotonic(), 0, 0.0

    @property
    def clock(self) -> Clock:
        return self.plan.clock(self.step)

    def advance(self, parts: Iterator[Batch]) -> Report:
        """One optimizer step on the next `accumulation` parts."""
        learning_rate = self._schedule()
        loss = 0.0
        for _ in range(self.plan.accumulation):
            started = time.monotonic()
            items, views = next(parts)
            views = self.fabric.to_device(views)
            self.waited += time.monotonic() - started
            reported = self.model.loss(views)
            self.fabric.backward(reported["loss"] / self.plan.accumulation)
            loss += self._note(reported, items) / self.plan.accumulation
        for group in self.optimizer.param_groups:
            if self.clock.progress < group["frozen_until"]:
                for parameter in group["params"]:
                    parameter.grad = None
        self.fabric.clip_gradients(
            self.model, self.stepper, max_norm=self.plan.gradient_clip, error_if_nonfinite=False
        )
        self.stepper.step()
        self.stepper.zero_grad()
        self.step += 1
        self.trainable.after_step(self.clock)
        if self.clock.samples_seen - self.saved >= self.plan.checkpoint_every_samples:
            self.save()
        return Report(
            clock=self.clock,
            loss=loss,
            learning_rate=learning_rate,
            warning=self._watch(),
        )

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "step": self.step,
            "means": self.means,
            "trainable": self.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_checkpoint(self.workdir, state, self.identity)
        self.saved = self.clock.samples_seen

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one."""
        state = read_checkpoint(self.workdir, self.identity)
        if state is None:
            return
        self.trainable.load_state_dict(state["trainable"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.first_step = state["step"]
        self.means = state["means"]
        self.saved = self.clock.samples_seen

    def result(self) -> dict[str, Any]:
        """Save, and say how it went."""
        if self.saved < self.clock.samples_seen:
            self.save()
        seconds = time.monotonic() - self.began
        done = (self.step - self.first_step) * self.plan.batch_size
        return {
            "finished": self.step >= self.plan.steps,
            "loss": self.means.get("loss"),
            "verdict": self.trainable.collapsed(self.means),
            "statistics": self.means,
            "samples_per_second": done / seconds,
            "waiting_share": self.waited / seconds,
        }

    def _schedule(self) -> float:
        clock = self.clock
        rate = self.plan.learning_rate_at(clock)
        decay = cosine(*self.plan.weight_decay, clock.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
            group["weight_decay"] = decay if group["decay"] else 0.0
        return rate

    def _note(self, reported: Mapping[str, Tensor], items: tuple[str, ...]) -> float:
        """Follow the running means; the loss as a number."""
        values = torch.stack([value.detach().float() for value in reported.values()]).tolist()
        found = dict(zip(reported, values, strict=True))
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(
                f"the loss is {found['loss']} at step {self.step} on the items {', '.join(items)}; "
                "look for pixels that are not finite among them, or lower the learning rate"
            )
        for name, value in found.items():
            self.means[name] = _MEMORY * self.means.get(name, value) + (1 - _MEMORY) * value
        return found["loss"]

    def _watch(self) -> str | None:
        every = max(1, self.plan.steps // _WATCH_TIMES)
        if self.step % every or self.clock.progress < _WATCH_FROM:
            return None
        return self.trainable.collapsed(self.means)


def _precision(precision: str, device: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16 where the device is a GPU that has it, unless told."""
    if precision == "auto":
        gpu = device in ("auto", "cuda", "gpu") and torch.cuda.is_available()
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    return "bf16-mixed" if precision == "bf16" else "32-true"


def _hyperparameters(trainable: Trainable) -> dict[str, Any]:
    """Plain attributes of the trainable and of its views; a change of these is another training."""
    plain = {
        name: value
        for name, value in vars(trainable).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
    }
    plain.pop("training")
    if is_dataclass(trainable.views):
        plain["views"] = repr(trainable.views)
    return {"class": type(trainable).__name__, **plain}


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process in the middle of a step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
