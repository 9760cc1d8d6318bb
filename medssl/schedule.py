"""How long a training takes and how fast it goes; every length is in samples seen."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How far a training is; every schedule is a function of `progress`.

    samples_seen: samples the optimizer has stepped on.
    total_samples: samples of the whole training.
    step: optimizer steps taken.
    """

    samples_seen: int
    total_samples: int
    step: int

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        return self.samples_seen / self.total_samples


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how fast; every length is in samples seen.

    total_samples: samples to train on, an item counting each time it comes; rounded up to whole
        batches.
    batch_size: samples per optimizer step.
    learning_rate: AdamW's, at its peak; it does not change with the batch size.
    final_learning_rate: where the cosine ends.
    warmup_samples: the learning rate rises from 0 over these.
    weight_decay: at the start and at the end, joined by a cosine; biases and norms have none.
    gradient_clip: largest norm of the gradient.
    accumulation: passes that one batch is split into, to save memory.
    checkpoint_every_samples: what a killed training loses at most.
    """

    total_samples: int
    batch_size: int = 64
    learning_rate: float = 5e-4
    final_learning_rate: float = 1e-6
    warmup_samples: int = 0
    weight_decay: tuple[float, float] = (0.04, 0.4)
    gradient_clip: float = 3.0
    accumulation: int = 1
    checkpoint_every_samples: int = 10_000

    def __post_init__(self) -> None:
        for name in ("total_samples", "batch_size", "accumulation", "checkpoint_every_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be split evenly into {self.accumulation}"
            )
        if self.warmup_samples > self.total_samples:
            raise ValueError(
                f"the warm-up ({self.warmup_samples} samples) is longer than the training "
                f"({self.total_samples})"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.total_samples / self.batch_size)

    def clock(self, step: int) -> Clock:
        """The clock when `step` steps are taken."""
        return Clock(
            samples_seen=step * self.batch_size,
            total_samples=self.steps * self.batch_size,
            step=step,
        )

    def learning_rate_at(self, clock: Clock) -> float:
        """Linear warm-up from 0, then a cosine to the final learning rate."""
        if clock.samples_seen < self.warmup_samples:
            return self.learning_rate * clock.samples_seen / self.warmup_samples
        rest = clock.total_samples - self.warmup_samples
        progress = (clock.samples_seen - self.warmup_samples) / max(1, rest)
        return cosine(self.learning_rate, self.final_learning_rate, progress)


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, progress)))
