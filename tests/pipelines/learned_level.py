"""A detector that learns one number by gradient: the grey level of the normals."""

import os
import signal
import time

import mean_distance  # noqa: F401  it says anew which packages are trusted
import torch
from torch import nn

import medssl.models.folder
from anomaly.base import AnomalyMap
from anomaly.learning import LearnedDetector
from medssl.training import Trainable, TrainingPlan

medssl.models.folder.TRUSTED = (*medssl.models.folder.TRUSTED, "learned_level")


def pixels(sample, generator):
    return {"image": sample.images["image"].pixels}


class Level(Trainable):
    """Squared distance from the level, of pixels with a little noise."""

    accumulation = "exact"
    losses = 0  # how often the loss was asked for in this process
    stop_at = None

    def __init__(self):
        super().__init__()
        self.views = pixels
        self.level = nn.Parameter(torch.rand(1))

    def loss(self, views):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
        Level.losses += 1
        if Level.losses == Level.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        noisy = views["image"] + 0.05 * torch.randn_like(views["image"])
        return {"loss": (noisy - self.level).square().mean()}


class LearnedLevel(LearnedDetector):
    """|pixel - level|; the score is the largest."""

    def __init__(self, *, plan=None, selection=None, seed: int = 0):
        plan = plan or TrainingPlan(total_samples=24, batch_size=4, learning_rate=0.05)
        super().__init__(plan=plan, selection=selection, seed=seed)
        self.trainable = self.new_trainable()

    def new_trainable(self):
        return Level()

    def predict(self, batch):
        self.check_fitted()
        images = batch.images["image"]
        maps = (images.pixels - self.trainable.level).abs().mean(1)
        return AnomalyMap(score=maps.flatten(1).amax(1), maps={"image": maps})
