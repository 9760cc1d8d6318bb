"""The contract of every pretraining method."""

from torch import nn

from medssl.training import Trainable


class Objective(Trainable):
    """A `Trainable` that gives an encoder away."""

    def export(self) -> dict[str, nn.Module]:
        """What training leaves: "image", or "points" of clouds; "text" where there is one."""
        raise NotImplementedError
