"""Items of a manifest as preprocessed samples, read when asked for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor
from torch.utils.data import get_worker_info

from medssl.data.cache import DecodedCache, Prepared, cache_key
from medssl.data.manifest import Item, Manifest, annotated, files_of, load_sample
from medssl.data.preprocess import Preprocessing
from medssl.data.sample import Sample


def looked_at(manifest: Manifest, preprocessing: Preprocessing) -> Manifest:
    """Without the xyz beside pictures, where the preprocessing has no geometry to take it."""
    if preprocessing.geometry is not None:
        return manifest
    return replace(manifest, items=tuple(one for one in manifest.items if one.role != "xyz"))


class PreparedSamples(Sequence[Sample]):
    """The i-th sample is the i-th item, read and preprocessed.

    Samples are kept in memory while they fit, first come first kept, so that a second epoch reads
    only the rest; do not change their tensors. Loader workers share the allowance.

    keep_bytes: how much may be kept; 0 keeps nothing.
    hashes: compute the hashes of every item read; `pixel_hashes` remembers, per item, those that
        this process has read (a loader's workers have a memory of their own; there the hash
        travels in `sample.subject.provenance["pixel_sha256"]`).
    on_read: called with each sample as it was read, before preprocessing; of one that comes out of
        the cache, with NaN for every pixel.
    cache: prepared images on disk; what lies there is mapped and not kept in memory. Free clouds
        and RGB-D are kept in memory alone.

    Indexing raises ReadError as `load_sample` does.
    """

    def __init__(
        self,
        manifest: Manifest,
        items: Sequence[Item],
        preprocessing: Preprocessing,
        *,
        keep_bytes: int = 2 << 30,
        hashes: bool = False,
        on_read: Callable[[Sample], None] | None = None,
        cache: DecodedCache | None = None,
    ) -> None:
        self.manifest = looked_at(manifest, preprocessing)
        self.items = tuple(items)
        self.preprocessing = preprocessing
        self.keep_bytes = keep_bytes
        self.hashes = hashes
        self.on_read = on_read
        self.cache = cache
        self.pixel_hashes: dict[str, str] = {}
        self._kept: dict[int, Sample] = {}
        self._kept_bytes = 0

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones, and IndexError past the end
        if index not in self._kept:
            sample = self._prepare(self.items[index])
            if not self._keep(index, sample):
                return sample
        return self._kept[index]

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker gets: everything but the kept samples."""
        return {**self.__dict__, "_kept": {}, "_kept_bytes": 0}

    def _prepare(self, item: Item) -> Sample:
        source, sample = self._from_cache(item) or self._decoded(item)
        if self.hashes:
            self.pixel_hashes[item.item] = source.subject.provenance["pixel_sha256"]
        if self.on_read is not None:
            self.on_read(source)
        return sample

    def _decoded(self, item: Item) -> tuple[Sample, Sample]:
        """The sample as it was read, and as it was prepared; the second is kept in the cache."""
        source = load_sample(self.manifest, item, hashes=self.hashes)
        sample = self.preprocessing.sample(source)
        if self.cache is not None and self._cached(item):
            image, mask = sample.images["image"], sample.mask
            prepared = Prepared(image=image, mask=mask, source=source.images["image"])
            self.cache.put(self._key(item), prepared)
        return source, sample

    def _from_cache(self, item: Item) -> tuple[Sample, Sample] | None:
        if self.cache is None or not self._cached(item):
            return None
        found = self.cache.get(self._key(item))
        if found is None:
            return None
        known = annotated(self.manifest, item)
        source = replace(known, images={"image": found.source})
        return source, replace(known, images={"image": found.image}, mask=found.mask)

    def _cached(self, item: Item) -> bool:
        return item.kind != "points" and self.manifest.xyz_of(item) is None

    def _key(self, item: Item) -> str:
        """Raises ReadError where a file is not there."""
        mask = self.manifest.mask_of(item)
        files = [file for one in (item, mask) if one is not None for file in files_of(one)]
        return cache_key(
            files,
            series=[item.series, mask and mask.series],
            modality=item.modality,
            preprocessing=self.preprocessing.to_dict(),
            hashes=self.hashes,
        )

    def _keep(self, index: int, sample: Sample) -> bool:
        worker = get_worker_info()
        if self.cache is not None and self._cached(self.items[index]):
            return False
        allowed = self.keep_bytes // (worker.num_workers if worker else 1)
        size = _bytes(sample)
        if self._kept_bytes + size > allowed:
            return False
        self._kept[index] = sample
        self._kept_bytes += size
        return True


def _bytes(sample: Sample) -> int:
    """Memory of a sample's tensors."""
    images = [*sample.images.values(), *([sample.mask] if sample.mask is not None else [])]
    tensors: list[Tensor | None] = [tensor for one in images for tensor in (one.pixels, one.valid)]
    if sample.points is not None:
        cloud = sample.points
        tensors += [cloud.points, cloud.colors, cloud.normals, cloud.valid, sample.point_labels]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
