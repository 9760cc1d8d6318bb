"""A fitted probe and the encoder below it as one model: images in, a score per class out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medssl.models.encoder import Encoder, frozen
from medssl.probes.base import Probe

_SLICES_AT_ONCE = 16  # bounds memory, whatever the depth of a volume


class Classifier(nn.Module):
    """The probe's scores of what the encoder makes of an image; one folder holds both.

    encoder: frozen here.
    probe: fitted on embeddings of this encoder, as `medssl.models.features.EMBEDDING` reads them.
    classes: the names of the probe's classes, in its order.
    normal: which of them is normal, so that scores tell how anomalous an image is; None where none
        of them is.
    """

    def __init__(
        self,
        encoder: Encoder,
        probe: Probe,
        *,
        classes: Sequence[str],
        normal: str | None = None,
    ) -> None:
        super().__init__()
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"at least two classes of different names, got {list(classes)}")
        if normal is not None and normal not in classes:
            raise ValueError(f"normal must be one of the classes {list(classes)}, got {normal!r}")
        self.encoder = frozen(encoder)
        self.probe = probe
        self.classes = list(classes)
        self.normal = normal
        self.eval()  # nothing here learns

    def predict(self, images: Tensor) -> Tensor:
        """The probe's scores (B, K), larger is more likely.

        images: (B, C, H, W), preprocessed; or volumes (B, C, D, H, W), whose embedding is the mean
            of their slices' where the encoder takes pictures.
        Raises RuntimeError before the probe is fitted, and ValueError where it knows another number
        of classes.
        """
        scores = self.probe.scores(self._embedding(images))
        if scores.shape[1] != len(self.classes):
            raise ValueError(
                f"the probe was fitted on {scores.shape[1]} classes, but {len(self.classes)} are "
                f"named: {self.classes}; name each one"
            )
        return scores

    def item_scores(self, class_scores: Tensor) -> Tensor:
        """One number per image, (B,), from class scores (B, K).

        With a normal class it is 1 minus the score of that class, so where scores are probabilities
        that of not being normal: larger is more anomalous. Without one it is the score of the
        likeliest class: larger is surer.
        """
        if self.normal is None:
            return class_scores.amax(1)
        return 1 - class_scores[:, self.classes.index(self.normal)]

    def selftest(self, noise: Tensor) -> Tensor:
        """What `load_model` compares: the class scores (B, K) of a noise batch."""
        return self.predict(noise)

    def _embedding(self, images: Tensor) -> Tensor:
        if images.ndim == len(self.encoder.selftest_shape((1, 1))):
            return self.encoder(images)
        return torch.stack([self._mean_of_slices(volume) for volume in images])

    def _mean_of_slices(self, volume: Tensor) -> Tensor:
        """volume: (C, D, H, W). Returns (E,)."""
        slices = volume.transpose(0, 1)  # (D, C, H, W)
        parts = [self.encoder(part) for part in slices.split(_SLICES_AT_ONCE)]
        return torch.cat(parts).double().mean(0).float()
