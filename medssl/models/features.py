"""What a frozen encoder says of samples: read once, kept on disk, mapped into memory."""

import json
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from medssl.data.cache import cache_key
from medssl.data.sample import Sample
from medssl.models.encoder import Encoder
from medssl.models.folder import describe
from medssl.models.layout import channels_last

_RECORD = 64 + 1 + 8 + 1  # bytes of a line of the index: a name, a space, a checksum, a newline
_MAP_NORESERVE = 0x4000  # Linux's, which Python names from 3.13 on
_POOLS: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("mean", 2): F.adaptive_avg_pool2d,
    ("mean", 3): F.adaptive_avg_pool3d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read from an encoder; as it stands, its own pooled embedding (E).

    layers: of `encoder.network`, as `Encoder.feature_maps` takes them; their features are
        concatenated along E. None named is the last map, of `Encoder.embed_with_map`.
    pooling: over the places of the maps; None is the encoder's own embedding.
    grid: tokens (N, E) instead of one vector: each map is pooled to this many places, (h, w) or,
        of an encoder of volumes, (d, h, w); row by row.
    """

    layers: tuple[str, ...] = ()
    pooling: Literal["mean", "max"] | None = None
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.pooling is None and (self.layers or self.grid):
            raise ValueError(
                f"layers {self.layers} and grid {self.grid} need a pooling over places; "
                "give pooling 'mean' or 'max'"
            )
        if self.grid is not None and min(self.grid, default=0) < 1:
            raise ValueError(f"grid is places (h, w) or (d, h, w), at least 1, got {self.grid}")

    def __call__(self, encoder: Encoder, images: Tensor) -> Tensor:
        """images: (B, C, *axes), as the encoder takes them. Returns (B, E), or (B, N, E)."""
        if self.pooling is None:
            return encoder(images)
        if self.layers:
            maps = encoder.feature_maps(images, self.layers)
        else:
            maps = [encoder.embed_with_map(images)[1]]
        return torch.cat([self._pooled(feature_map) for feature_map in maps], dim=-1)

    def _pooled(self, feature_map: Tensor) -> Tensor:
        places = tuple(feature_map.shape[2:])
        grid = self.grid or (1,) * len(places)
        if len(grid) != len(places) or not all(map(int.__le__, grid, places)):
            raise ValueError(f"a map of {places} places cannot become {grid}; take a smaller grid")
        pooled = _POOLS[str(self.pooling), len(places)](feature_map, grid)  # (B, E, *grid)
        return pooled.flatten(2).mT if self.grid else pooled.flatten(1)


EMBEDDING = Reading()


class FeatureStore:
    """Features on disk, one row per picture, for any number of encoders, readings and data sets.

    A row is kept under the encoder's digest, the reading and the preprocessing, and there under
    the content of the prepared picture: a picture of two data sets is read once, and another
    encoder, weight, pixel or version of a package anew. Rows are written batch by batch. A process
    killed at any moment loses the batch it was at, and the next one goes on with equal batches, so
    that on one machine its array is that of an undisturbed pass bit for bit. A row whose bytes are
    damaged is read anew.

    Processes may share a folder: of those with one encoder, reading and preprocessing, one reads
    while the others wait, and then find its rows.

    folder: made where there is none; keep it as safe as the images. It only grows; remove it, or a
        folder in it, to begin anew.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def features(
        self,
        encoder: Encoder,
        samples: Sequence[Sample],
        reading: Reading = EMBEDDING,
        *,
        keys: Sequence[str] | None = None,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        on_progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The features of the images of role "image": (S, E), or (S, N, E) of tokens, float32.

        They are mapped into memory and not read: in place where their rows lie in this order, else
        as a copy on disk that is gone with the tensor. Changing them changes no file. An encoder
        of pictures reads a volume slice by slice, and the volume's features are the mean over all
        slices. The encoder reads in evaluation mode and is left as it was, but for the layout of
        its weights in memory.

        samples: prepared for the encoder. Neighbours of equal shape are read together.
        keys: what stands for the content of each sample, such as the manifest's file_sha256; then
            a sample with a known row is not even indexed. The preprocessing is looked up in
            `samples.preprocessing`, as of `PreparedSamples`; where there is none, it belongs into
            the keys. Without keys every sample is prepared, and its pixels are hashed.
        batch_size: pictures, slices or whole volumes (of an encoder of volumes) at a time.
        on_progress: called after each batch with the number of samples that are done.
        Raises ValueError where there is no sample, where keys do not fit, or where the encoder
        cannot take a sample.
        """
        _check(samples, keys, batch_size)
        preprocessing = getattr(samples, "preprocessing", None)
        about = {
            "encoder": encoder_digest(encoder),
            "preprocessing": preprocessing and preprocessing.to_dict(),
            "reading": asdict(reading),
        }
        folder = self.folder / cache_key([], **about)
        folder.mkdir(exist_ok=True)
        reader = _Reader(encoder, reading, batch_size, torch.device(device))
        names: list[str] = []
        with FileLock(folder / ".lock"), closing(_Rows(folder, about)) as rows:
            with _evaluating(encoder, reader.device):
                for batch in _missing(samples, keys, rows, reader, names):
                    rows.append(list(batch), reader.read(list(batch.values())))
                    if on_progress is not None:
                        on_progress(len(names))
            return rows.mapped(names)


def encoder_digest(encoder: Encoder) -> str:
    """sha256 over class, arguments and all state; device and layout in memory do not count."""
    total = sha256(json.dumps(describe(encoder), sort_keys=True).encode())
    for name, tensor in encoder.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _check(samples: Sequence[Sample], keys: Sequence[str] | None, batch_size: int) -> None:
    if len(samples) == 0:
        raise ValueError("no sample to read features of; is the selection empty?")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if keys is not None and len(keys) != len(samples):
        raise ValueError(f"one key per sample: got {len(keys)} keys and {len(samples)} samples")
    if keys is not None and not all(keys):
        raise ValueError(
            "some keys are empty; hash every file first (medssl manifest --hash), or give no keys"
        )


@contextmanager
def _evaluating(encoder: Encoder, device: torch.device) -> Iterator[None]:
    """The encoder on `device` in evaluation mode, and afterwards where and as it was."""
    training = {module: module.training for module in encoder.modules()}
    home = next(encoder.parameters()).device
    channels_last(encoder)
    try:
        encoder.to(device).eval()
        yield
    finally:
        encoder.to(home)
        for module, flag in training.items():
            module.training = flag


@dataclass(frozen=True)
class _Reader:
    """Asks the encoder, which is in evaluation mode on `device`."""

    encoder: Encoder
    reading: Reading
    batch_size: int
    device: torch.device

    def pixels(self, sample: Sample) -> Tensor:
        """(C, *axes) of the sample's image. Raises ValueError where the encoder cannot take it."""
        image = sample.images.get("image")
        if image is None or "T" in image.axes:
            has = "no image" if image is None else f"the axes {image.axes}"
            raise ValueError(
                f"item {sample.item} has {has}; features are read of pictures and volumes"
            )
        channels, pixels = self.encoder.in_channels, image.pixels
        if len(pixels) != channels or pixels.ndim < self._ndim:
            axes = "(D, H, W)" if self._ndim == 4 else "(H, W) or (D, H, W)"
            raise ValueError(
                f"item {sample.item}: the encoder takes {channels} channels and axes {axes}, got "
                f"{tuple(pixels.shape)}; prepare it otherwise, or take another encoder"
            )
        return pixels

    def at_once(self, pixels: Tensor) -> int:
        """How many samples like this one are read together: of volumes read in slices, one."""
        return 1 if self._in_slices(pixels) else self.batch_size

    def read(self, pixels: Sequence[Tensor]) -> Tensor:
        """Pixels of one shape (C, *axes). Returns their rows (B, ...) float32 on the CPU."""
        if not self._in_slices(pixels[0]):
            return self._batch(torch.stack(list(pixels))).float()
        (volume,) = pixels
        blocks = volume.transpose(0, 1).split(self.batch_size)  # (D, C, H, W)
        total = torch.stack([self._batch(block).double().sum(0) for block in blocks]).sum(0)
        return (total / volume.shape[1]).float()[None]

    @torch.inference_mode()
    def _batch(self, images: Tensor) -> Tensor:
        return self.reading(self.encoder, images.to(self.device)).cpu()

    def _in_slices(self, pixels: Tensor) -> bool:
        return pixels.ndim > self._ndim

    @property
    def _ndim(self) -> int:
        """Of the pixels (C, *axes) that the encoder takes, as its self-test shows them."""
        return len(self.encoder.selftest_shape((1, 1))) - 1


def _missing(
    samples: Sequence[Sample],
    keys: Sequence[str] | None,
    rows: "_Rows",
    reader: _Reader,
    names: list[str],
) -> Iterator[dict[str, Tensor]]:
    """Pixels by name of what has no row yet, in batches of one shape.

    A batch depends only on what is missing and its order, so that a pass that goes on makes the
    batches that the killed one would have made.

    names: takes the name of each sample, one after the other.
    """
    batch: dict[str, Tensor] = {}
    for index in range(len(samples)):
        if keys is None:
            pixels = reader.pixels(samples[index])
            name = _sha256(f"pixels {tuple(pixels.shape)}", pixels.contiguous().numpy().data)
        else:
            name = _sha256("key", keys[index].encode())
        if name not in batch and not rows.has(name):
            if keys is not None:
                pixels = reader.pixels(samples[index])
            if batch and pixels.shape != next(iter(batch.values())).shape:
                yield batch
                batch = {}
            batch[name] = pixels
        names.append(name)
        if batch and len(batch) == reader.at_once(next(iter(batch.values()))):
            yield batch
            batch = {}
    if batch:
        yield batch


def _sha256(kind: str, content: Any) -> str:
    digest = sha256(f"{kind}\n".encode())
    digest.update(content)
    return digest.hexdigest()


class _Rows:
    """The rows of one folder, one after the other in one file, and an index that names them.

    A row counts once its line of the index is whole, which is written after the row; what a killed
    process left beyond is cut off here. Of two rows of one name the later counts.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder, self._about = folder, about
        self._shape = _row_shape(folder / "about.json")  # None before the first row
        self._rows, self._index = ((folder / n).open("a+b") for n in ("rows.f32", "index.txt"))
        self._index.seek(0)
        lines = self._index.read()
        self._count = 0
        if self._shape is not None:
            on_disk = os.fstat(self._rows.fileno()).st_size // self._row_bytes
            self._count = min(len(lines) // _RECORD, on_disk)
        self._rows.truncate(self._count * self._row_bytes)
        self._index.truncate(self._count * _RECORD)
        self._places: dict[str, int] = {}
        self._unchecked: dict[str, bytes] = {}  # name -> its line
        for number in range(self._count):
            line = lines[number * _RECORD : (number + 1) * _RECORD]
            name = line[:64].decode("ascii", errors="replace")
            self._places[name], self._unchecked[name] = number, line

    @property
    def _row_bytes(self) -> int:
        return 4 * torch.Size(self._shape or ()).numel()

    def close(self) -> None:
        self._rows.close()
        self._index.close()

    def has(self, name: str) -> bool:
        """Whether there is a row of this name; its bytes are checked when first asked for."""
        line = self._unchecked.pop(name, None)
        if line is not None and line != _line(name, self._row(self._places[name])):
            del self._places[name]
        return name in self._places

    def append(self, names: Sequence[str], rows: Tensor) -> None:
        """rows: (B, ...) float32, of one shape for all times."""
        shape = tuple(rows.shape[1:])
        if self._shape is None:
            self._shape = shape
            fresh = self._folder / ".about.json"
            fresh.write_text(json.dumps({"shape": shape, **self._about}, indent=1))
            fresh.replace(self._folder / "about.json")
        if shape != self._shape:
            raise ValueError(
                f"rows of one reading need one shape, got {shape} after {self._shape}; "
                "the encoder answers pictures of different size differently, so prepare one size"
            )
        data = [row.numpy().tobytes() for row in rows]
        lines = [_line(name, row) for name, row in zip(names, data, strict=True)]
        for file, parts in ((self._rows, data), (self._index, lines)):
            file.write(b"".join(parts))
            file.flush()
        self._places |= {name: self._count + number for number, name in enumerate(names)}
        self._count += len(names)

    def mapped(self, names: Sequence[str]) -> Tensor:
        """The rows of these names (S, ...), in their order."""
        assert self._shape is not None
        places = [self._places[name] for name in names]
        shape = (len(places), *self._shape)
        if places == list(range(places[0], places[0] + len(places))):
            return _mapped(self._rows, places[0] * self._row_bytes, shape)
        with tempfile.TemporaryFile(dir=self._folder) as copy:
            for place in places:
                copy.write(self._row(place))
            copy.flush()
            return _mapped(copy, 0, shape)

    def _row(self, place: int) -> bytes:
        return os.pread(self._rows.fileno(), self._row_bytes, place * self._row_bytes)


def _row_shape(about: Path) -> tuple[int, ...] | None:
    try:
        return tuple(json.loads(about.read_text())["shape"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"about.json of the features {about.parent.name} is damaged; remove that folder"
        ) from error


def _line(name: str, row: bytes) -> bytes:
    """Of the index: a row's name and its CRC-32, which finds damage, not ill will."""
    return f"{name} {zlib.crc32(row):08x}\n".encode()


def _mapped(file: Any, start: int, shape: tuple[int, ...]) -> Tensor:
    """A private view on float32 numbers of a file; it may be larger than the memory."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    whole = mmap.mmap(
        file.fileno(), start + 4 * count, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
    )
    return torch.frombuffer(whole, dtype=torch.float32, count=count, offset=start).reshape(shape)
