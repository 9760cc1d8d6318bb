"""`Trainable`, and the one optimization loop, on Lightning Fabric."""

import copy
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from medssl.checkpoint import read_checkpoint, write_checkpoint
from medssl.data.sample import Sample
from medssl.distributed import mean_of_all, processes, started, sum_of_all
from medssl.failure import keep_failure, not_finite
from medssl.models.layout import channels_last
from medssl.schedule import Clock, TrainingPlan, cosine
from medssl.sharded import load_whole, load_whole_optimizer, whole
from medssl.stopping import stop_asked
from medssl.stream import Batch, Stream, Unit, Views, batches, number_for, workers_for

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
_WATCH_EVERY = 50  # steps between looks for a collapse, the first so long after the warm-up


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

        Returns scalars; "loss" is minimized, the rest is logged and watched. Where several
        processes train, B is this one's share, and losses and gradients are averaged; rows that
        meet others come from `medssl.distributed.gathered`. Random numbers of torch are drawn
        from a seed of the step and the process.
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
    compiled: bool = False,
    sharded: bool = False,
    seed: int = 0,
    identity: Mapping[str, Any] | None = None,
    on_step: Callable[[Report], None] | None = None,
) -> dict[str, Any]:
    """Train in place, with a checkpoint in `workdir` from which a killed training goes on exactly.

    Started by torchrun, all processes train the same weights, each on its share of every batch, and
    the first writes; the order of the samples and their views are those of a single process.

    workers: processes that make views; the result does not depend on them. None: by the cores.
    compiled: let torch.compile make the networks' forward passes faster; what it cannot compile
        runs as it is.
    sharded: share weights, gradients and optimizer state out among the processes, for networks that
        one device cannot hold (see `medssl.sharded`); a copy is trained, and taken over at the end.
    identity: further plain values that must not change between start and resume.
    SIGTERM finishes the step, saves and returns with "finished" False.
    Raises FloatingPointError where the loss or its gradient is not finite, naming the items and a
    file in `workdir` from which `medssl.failure.replay` does the step again.
    Returns "finished", "loss", "verdict" (None is healthy), "statistics" (running means),
    "samples_per_second", "waiting_share" (of the time, for data) and "peak_memory_gib" (of the
    device, or of the process on a CPU).
    """
    _check(trainable, samples, plan)
    torch.manual_seed(seed)
    trainable.prepare(samples)
    fabric = started(device, precision, sharded=sharded)  # processes wait here for each other
    trained = copy.deepcopy(trainable) if sharded else trainable
    if not sharded:  # parts of tensors have to be contiguous
        channels_last(trained)
    loop = _Loop(trained, plan, workdir, fabric=fabric, seed=seed)
    if compiled:
        loop.compile()
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
        share=(loop.fabric.global_rank, loop.fabric.world_size),
    )
    with stop_asked() as asked, closing(parts):
        while loop.step < plan.steps and not loop.stopping(asked.is_set()):
            report = loop.advance(parts)
            if on_step is not None:
                on_step(report)
    result = loop.result()
    if sharded:
        trainable.load_state_dict(whole(trained.state_dict()))
    return result


def _check(trainable: Trainable, samples: Sequence[Sample], plan: TrainingPlan) -> None:
    """Refuse what cannot be trained."""
    if plan.accumulation > 1 and trainable.accumulation == "refused":
        raise ValueError(
            f"{type(trainable).__name__} sets the rows of a batch against each other, so a batch "
            "cannot be split; set accumulation to 1 and lower batch_size"
        )
    if not len(samples):
        raise ValueError("no sample to train on")
    if plan.batch_size % (plan.accumulation * processes()):
        raise ValueError(
            f"a batch of {plan.batch_size} cannot be shared evenly by {processes()} processes with "
            f"accumulation {plan.accumulation}"
        )


class _Loss(nn.Module):
    """The loss as the forward pass, which Fabric gives its precision and its processes."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        self.trainable = trainable

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.trainable.loss(views)


class _Loop:
    """The state of one training."""

    def __init__(
        self,
        trainable: Trainable,
        plan: TrainingPlan,
        workdir: Path,
        *,
        fabric: Any,
        seed: int,
    ) -> None:
        self.trainable, self.plan, self.workdir, self.seed = trainable, plan, workdir, seed
        self.fabric = fabric
        workdir.mkdir(parents=True, exist_ok=True)
        self.model = fabric.setup_module(_Loss(trainable))
        groups = [  # of the parameters as they are now: on the device, or this process's parts
            {"decay": True, "rate": 1.0, "frozen_until": 0.0, **group}
            for group in trainable.parameter_groups()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
        self.stepper = fabric.setup_optimizers(self.optimizer)
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
        torch.manual_seed(self._seed_of_step())
        done: list[Batch] = []
        found: list[dict[str, Tensor]] = []
        for _ in range(self.plan.accumulation):
            started = time.monotonic()
            items, views = next(parts)
            views = self.fabric.to_device(views)
            self.waited += time.monotonic() - started
            reported = self.model(views)
            self.fabric.backward(reported["loss"] / self.plan.accumulation)
            done.append((items, views))
            found.append({name: value.detach().float() for name, value in reported.items()})
        for group in self.optimizer.param_groups:
            if self.clock.progress < group["frozen_until"]:
                for parameter in group["params"]:
                    parameter.grad = None
        norm = self.fabric.clip_gradients(
            self.model, self.stepper, max_norm=self.plan.gradient_clip, error_if_nonfinite=False
        )
        loss = self._note(found, whole(norm), done)
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
            "trainable": whole(self.trainable.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
        }
        if self.fabric.global_rank == 0:
            write_checkpoint(self.workdir, state, self.identity)
        self.fabric.barrier()
        self.saved = self.clock.samples_seen

    def compile(self) -> None:
        """Let torch.compile speed up each network that the trainable holds."""
        import torch._dynamo

        torch._dynamo.config.suppress_errors = True  # what fails to compile runs eagerly
        for network in self.trainable.children():
            network.compile()

    def stopping(self, asked: bool) -> bool:
        """Whether any process was asked to stop; all of them stop at the same step."""
        if self.fabric.world_size == 1:
            return asked
        return bool(sum_of_all(torch.tensor(float(asked), device=self.fabric.device)) > 0)

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one."""
        state = read_checkpoint(self.workdir, self.identity)
        if state is None:
            return
        load_whole(self.trainable, state["trainable"])
        load_whole_optimizer(self.optimizer, state["optimizer"])
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
            "verdict": self.trainable.collapsed(self.means) if self._warm() > 0 else None,
            "statistics": self.means,
            "samples_per_second": done / seconds,
            "waiting_share": self.waited / seconds,
            "peak_memory_gib": self._peak_memory_gib(),
        }

    def _schedule(self) -> float:
        clock = self.clock
        rate = self.plan.learning_rate_at(clock)
        decay = cosine(*self.plan.weight_decay, clock.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
            group["weight_decay"] = decay if group["decay"] else 0.0
        return rate

    def _seed_of_step(self) -> int:
        return number_for(f"{self.seed}/{self.step}/{self.fabric.global_rank}/step")

    def _note(
        self, reported: Sequence[Mapping[str, Tensor]], norm: Tensor, parts: Sequence[Batch]
    ) -> float:
        """Follow the running means over all parts and processes; the loss as a number."""
        names = list(reported[0])
        own = torch.stack([torch.stack(list(one.values())) for one in reported]).mean(0)
        values = torch.cat([mean_of_all(own), norm[None].to(own)]).tolist()
        found = dict(zip([*names, "norm"], values, strict=True))
        if not math.isfinite(found["loss"]) or not math.isfinite(found["norm"]):
            weights = whole(self.trainable.state_dict())
            file = keep_failure(
                self.workdir, weights, parts, step=self.step, seed=self._seed_of_step()
            )
            items = [item for items, _ in parts for item in items]
            raise FloatingPointError(
                not_finite(found["loss"], found["norm"], items, self.step, file)
            )
        for name in names:
            mean = self.means.get(name, found[name])
            self.means[name] = _MEMORY * mean + (1 - _MEMORY) * found[name]
        return found["loss"]

    def _watch(self) -> str | None:
        if self._warm() <= 0 or self._warm() % _WATCH_EVERY:
            return None
        return self.trainable.collapsed(self.means)

    def _warm(self) -> int:
        """Steps since the warm-up."""
        return self.step - math.ceil(self.plan.warmup_samples / self.plan.batch_size)

    def _peak_memory_gib(self) -> float:
        if self.fabric.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.fabric.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


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
