"""What detectors share that look at pieces of larger images, such as slices or tiles."""

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

from anomaly.base import Detector, NormalData
from medssl.data.image import Image
from medssl.data.sample import Sample

Place = TypeVar("Place")


class PiecewiseDetector(Detector):
    """Fits a detector of pictures on the pieces of larger images, and learns nothing itself.

    Whether it is fitted, and whether its scores have a limit, the detector of the pieces says.

    detector: takes images with axes HW.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        if detector.axes != "HW":
            raise ValueError(
                f"{type(self).__name__} needs a detector of axes HW, got {detector.axes}"
            )
        self.detector = detector
        self.unbounded = detector.unbounded

    def check_fitted(self) -> None:
        """Raises RuntimeError where the detector of the pieces does."""
        self.detector.check_fitted()


class Pieces(Sequence[Sample], Generic[Place]):
    """The pieces of all images, image after image; keeps the image that was read last.

    Each image is read once here. In order they are read once more; at random, as a training asks,
    nearly every piece reads its image, which should then come from memory or a cache, such as
    those of `medssl.data.dataset.PreparedSamples`.

    whole: the images. places: where the pieces of an image are. cut: a piece of an item; picklable.
    """

    def __init__(
        self,
        whole: NormalData,
        places: Callable[[Image], Iterable[Place]],
        cut: Callable[[Sample, Place], Sample],
    ) -> None:
        self.whole, self.cut = whole, cut
        self.places = [
            (i, place) for i in range(len(whole)) for place in places(whole[i].images["image"])
        ]
        self.last: tuple[int, Sample] | None = None

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i, place = self.places[index]
        if self.last is None or self.last[0] != i:
            self.last = (i, self.whole[i])
        return self.cut(self.last[1], place)
