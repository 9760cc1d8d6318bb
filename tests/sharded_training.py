"""Trains DINOv2's example: python sharded_training.py FOLDER FINAL [sharded] [stop], also under
torchrun. "stop" ends the program in the middle, after the third step; without it the training goes
on from where FOLDER is, and FINAL takes the weights."""

import sys
from pathlib import Path

import torch

from medssl.distributed import rank
from medssl.objectives.masked.dinov2 import DINOv2
from medssl.training import Report, TrainingPlan, train


def main(folder: Path, final: Path, *words: str) -> None:
    torch.manual_seed(0)
    objective, samples = DINOv2.example()

    def end(report: Report) -> None:
        if "stop" in words and report.clock.step == 3:
            sys.exit(3)

    train(
        objective,
        samples,
        TrainingPlan(total_samples=24, batch_size=4, checkpoint_every_samples=8),
        workdir=folder,
        resume=True,
        device="cpu",
        workers=0,
        sharded="sharded" in words,
        on_step=end,
    )
    if rank() == 0:
        torch.save(objective.state_dict(), final)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
