"""The contract of every pretraining method."""

from torch import nn

from medssl.training import Trainable


class Objective(Trainable):
    """A `Trainable` that gives an encoder away."""

    def export(self) -> dict[str, nn.Module]:
        """What is kept after training: "image" for every method, "text" where it has one."""
        raise NotImplementedError
