"""Decode once: prepared images on disk, memory-mapped by later epochs and later runs."""

import json
import os
import secrets
import time
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medssl.data.image import Image
from medssl.data.modality import Modality

_FORMAT = 1
_PACKAGES = ("medssl", "pydicom", "nibabel", "pillow", "tifffile", "torch")
_STALE_S = 3600.0  # after which a file that was never finished is left over from a killed process
_PLAIN = ("axes", "frame", "spacing", "times_s", "channels", "units", "value_range")
_TUPLES = ("spacing", "times_s", "channels", "value_range")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What preprocessing made of an item.

    image, mask: on the network's grid. source: the image as it was read, with its shape, geometry
    and provenance, and NaN for every pixel.
    """

    image: Image
    mask: Image | None
    source: Image


def cache_key(files: Sequence[Path], **what: Any) -> str:
    """Names an entry by content, and tells nothing of it.

    files: of the image and of its mask, all of them; their names, sizes and times of change stand
        for their content, so that a changed file is another entry and a moved folder the same.
    what: all else that decides the result, as JSON can hold it (series, preprocessing, ...). The
        versions of the packages that decode are added.
    """
    stats = [(file, file.stat()) for file in sorted(files)]
    content = {
        "format": _FORMAT,
        "versions": _versions(),
        "files": [(file.name, state.st_size, state.st_mtime_ns) for file, state in stats],
        **what,
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


class DecodedCache:
    """Prepared images by key, in files that are mapped into memory and not read.

    Tensors that come out are private copies page by page: changing them changes no file. An entry
    is checked whole on its first use in a process, and a damaged one is deleted. Processes may
    share a folder: an entry appears complete or not at all, and one that another process deletes
    stays readable for whoever has it open (POSIX).

    folder: made where there is none; it holds pixels, so keep it as safe as the images.
    max_bytes: beyond this the entries unused for longest are deleted. Every process counts again
        after each sixteenth of it, so that several may exceed it by that much each.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 64 << 30) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, got {max_bytes}")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes = folder, max_bytes
        self._checked: set[str] = set()
        self._uncounted = max_bytes  # count at the first addition
        self._total = 0
        self._warned = False

    def get(self, key: str) -> Prepared | None:
        """What was put under a key; None where nothing sound is."""
        file = self._file(key)
        try:
            with safe_open(file, "pt") as stored:
                about = stored.metadata()
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if key not in self._checked:
                if about["crc32"] != _checksum(about["about"], tensors):
                    raise ValueError("the checksum differs")
                os.utime(file)  # the time of its last use, once per process
                self._checked.add(key)
            told = json.loads(about["about"])
            return Prepared(
                image=_image("image", told["image"], tensors),
                mask=None if told["mask"] is None else _image("mask", told["mask"], tensors),
                source=_image("source", told["source"], tensors),
            )
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            self._checked.discard(key)
            file.unlink(missing_ok=True)
            return None

    def put(self, key: str, prepared: Prepared) -> None:
        """Keep an entry where there is room; a full disk is told once and ends nothing."""
        tensors: dict[str, Tensor] = {}
        told = {
            "image": _described("image", prepared.image, tensors),
            "mask": prepared.mask and _described("mask", prepared.mask, tensors),
            "source": _described("source", outline(prepared.source), tensors),
        }
        about = json.dumps(told)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.max_bytes:
            return
        self._make_room(size)
        fresh = self.folder / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            crc = _checksum(about, tensors)
            save_file(tensors, fresh, metadata={"about": about, "crc32": crc})
            fresh.replace(self._file(key))
        except (OSError, SafetensorError) as error:
            fresh.unlink(missing_ok=True)
            if not self._warned:
                self._warned = True
                reason = getattr(error, "strerror", None) or type(error).__name__
                warnings.warn(f"the cache takes nothing more ({reason})", stacklevel=2)
            return
        self._checked.discard(key)
        self._total += size
        self._uncounted += size

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Delete what was unused for longest until `size` more bytes fit."""
        if self._total + size <= self.max_bytes and 16 * self._uncounted < self.max_bytes:
            return
        with FileLock(self.folder / ".lock"):
            entries = []
            for file in self.folder.iterdir():
                try:
                    state = file.stat()
                except FileNotFoundError:
                    continue  # another process was first
                if file.suffix == ".safetensors":
                    entries.append((state.st_mtime, state.st_size, file))
                elif file.name != ".lock" and time.time() - state.st_mtime > _STALE_S:
                    file.unlink(missing_ok=True)
            self._total, self._uncounted = sum(bytes_ for _, bytes_, _ in entries), 0
            for _, bytes_, file in sorted(entries):
                if self._total + size <= self.max_bytes:
                    break
                file.unlink(missing_ok=True)
                self._total -= bytes_


def outline(image: Image) -> Image:
    """The image with NaN for every pixel, which takes no memory."""
    pixels = torch.tensor(torch.nan).expand(image.pixels.shape)
    return replace(image, pixels=pixels, valid=None)


def _described(name: str, image: Image, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is no tensor, for JSON; the tensors go into `tensors`."""
    tensors[f"{name}.affine"] = image.affine.clone()  # images may share theirs
    if image.valid is not None:
        tensors[f"{name}.valid"] = image.valid.clone()
    if image.pixels.numel() and any(image.pixels.stride()):
        tensors[f"{name}.pixels"] = image.pixels.contiguous()
    return {
        **{field: getattr(image, field) for field in _PLAIN},
        "modality": image.modality.value,
        "provenance": dict(image.provenance),
        "shape": list(image.pixels.shape),
    }


def _image(name: str, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> Image:
    shape, modality = told.pop("shape"), Modality(told.pop("modality"))
    for field in _TUPLES:
        told[field] = None if told[field] is None else tuple(told[field])
    pixels = tensors.get(f"{name}.pixels")
    if pixels is None:
        pixels = torch.tensor(torch.nan).expand(shape)
    return Image(
        pixels=pixels,
        modality=modality,
        affine=tensors[f"{name}.affine"],
        valid=tensors.get(f"{name}.valid"),
        **told,
    )


def _checksum(about: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of all that an entry says; it finds damage, not ill will."""
    crc = zlib.crc32(about.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].numpy().reshape(-1).view("u1").data, crc)
    return f"{crc:08x}"
