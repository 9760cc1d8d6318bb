"""The contract of every probe: what can frozen features do?"""

from typing import Self

from torch import Tensor, nn


class Probe(nn.Module):
    """Fitted on frozen features; hyperparameters are attributes, learnt buffers end in `_`."""

    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Learn from features (S, E) and class labels (S,) int64, 0 to K - 1.

        groups: (S,) int64, whom a row belongs to; for probes that choose by cross-validation.
        Fitting again forgets the first fit.
        """
        raise NotImplementedError

    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns (S, K), larger is more likely; RuntimeError before `fit`."""
        raise NotImplementedError

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: the scores (S, K) of noise features."""
        return self.scores(noise)

    def check_fitted(self) -> None:
        """Raises RuntimeError where a learnt buffer is empty."""
        for name, buffer in self.named_buffers():
            if name.endswith("_") and buffer.numel() == 0:
                raise RuntimeError(
                    f"{type(self).__name__} is not fitted ({name} is empty); "
                    "call fit(features, labels) first"
                )

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """A tiny unfitted probe, features (S, E) and labels (S,), for the contract tests."""
        raise NotImplementedError
