"""A bank of grey levels, one per normal item, that takes items in and forgets them."""

import mean_distance  # noqa: F401  it says anew which packages are trusted
import torch

import medssl.models.folder
from anomaly.base import AnomalyMap, Detector

medssl.models.folder.TRUSTED = (*medssl.models.folder.TRUSTED, "grey_bank")


class GreyBank(Detector):
    """Distance of each pixel from the nearest mean grey; the score is the largest."""

    def __init__(self):
        super().__init__()
        self.register_buffer("levels_", torch.empty(0))  # (M,)
        self.names = []

    def fit(self, normal, *, workdir=None):
        self.levels_, self.names = torch.empty(0), []
        return self.add(normal)

    def add(self, normal, *, workdir=None):
        for batch in normal.batches():
            assert not set(batch.items) & set(self.names)
            means = batch.images["image"].pixels.mean((1, 2, 3)).to(self.levels_.device)
            self.levels_ = torch.cat([self.levels_, means])
            self.names += batch.items
        return self

    def remove(self, items):
        kept = [name not in items for name in self.names]
        self.levels_ = self.levels_[torch.tensor(kept)]
        self.names = [name for name in self.names if name not in items]
        return self

    def predict(self, batch):
        self.check_fitted()
        pixels = batch.images["image"].pixels[:, 0]
        maps = (pixels[..., None] - self.levels_).abs().amin(-1)
        return AnomalyMap(score=maps.flatten(1).amax(1), maps={"image": maps})

    def get_extra_state(self):
        return {"names": self.names}

    def set_extra_state(self, state):
        self.names = state["names"]
