"""What every detector shares that tells an image from its reconstruction."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import AnomalyMap
from anomaly.learning import LearnedDetector, device_of
from anomaly.maps import smooth
from anomaly.selection import Selection
from anomaly.valid import largest, maps_by_size
from medssl.data.sample import Batch, Sample
from medssl.training import TrainingPlan

_SAMPLES = 64  # that tell the limits of the intensities
_PIXELS = 100_000  # of each of them
_LIMITS = (0.005, 0.995)


class ReconstructionDetector(LearnedDetector):
    """What a network that was trained on normal images does not give back of an image.

    A subclass gives `new_trainable` and `residual`. Invalid pixels are 0 for the network.

    dims: axes of the images, 2 or 3.
    size: of the images, where the network takes no other; None takes any.
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    top: the score is the mean over this share of the valid pixels, those with the largest values;
        1 is the mean of the map.
    """

    def __init__(
        self,
        *,
        dims: int,
        size: Sequence[int] | None,
        sigma: float | list[float],
        top: float,
        plan: TrainingPlan,
        selection: Selection | None,
        seed: int,
    ) -> None:
        super().__init__(plan=plan, selection=selection, seed=seed)
        if not 0 < top <= 1:
            raise ValueError(f"top must be a share of the pixels in (0, 1], got {top}")
        if min([sigma] if isinstance(sigma, (int, float)) else sigma) < 0:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.axes = "HW" if dims == 2 else "DHW"
        self.sigma, self.top = sigma, top
        self._size = None if size is None else tuple(size)

    def residual(self, images: Tensor, valid: Tensor) -> Tensor:
        """Errors (B, *spatial) of images (B, C, *spatial) that are 0 where not `valid`."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item without a valid pixel scores NaN.

        The network sees each image without the padding of the batch.
        """
        self.check_fitted()
        images = batch.images["image"].to(device_of(self))
        maps = smooth(maps_by_size(images, self.residual), self.sigma)
        score = maps.flatten(1).nanmean(1) if self.top == 1 else largest(maps, self.top)
        return AnomalyMap(score=score, maps={"image": maps})

    def selftest(self, noise: Tensor) -> Tensor:
        """As of `Detector`; where the network takes one size only, the noise is brought to it."""
        return super().selftest(noise if self._size is None else F.interpolate(noise, self._size))


def intensity_limits(samples: Sequence[Sample]) -> tuple[float, float]:
    """The 0.5th and the 99.5th percentile of the valid pixels, of all channels together.

    Of at most 64 samples, evenly spaced, and 100 000 pixels of each. Raises ValueError where the
    two are the same or no numbers.
    """
    found = []
    for i in range(0, len(samples), -(-len(samples) // _SAMPLES)):
        image = samples[i].images["image"]
        pixels = image.pixels if image.valid is None else image.pixels[:, image.valid]
        values = pixels.flatten()
        found.append(values[:: -(-len(values) // _PIXELS) or 1])
    values = torch.cat(found)
    if len(values) == 0:
        raise ValueError(f"none of the {len(found)} normal items has a valid pixel")
    low, high = values.quantile(torch.tensor(_LIMITS)).tolist()
    if not 0 < high - low < float("inf"):
        raise ValueError(
            f"the valid pixels of the normals must span some intensities, got {low} to {high}; "
            "mark NaN pixels as not valid, and leave constant images out"
        )
    return low, high
