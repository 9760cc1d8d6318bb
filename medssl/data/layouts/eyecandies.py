"""The folder layout of Eyecandies (Bonfiglioli et al., ACCV 2022, https://arxiv.org/abs/2210.04570).

    train/data/*            1,000 normals, each as NNN_image_5.png, NNN_depth.png, ...
    val/data/*              100 normals
    test_public/data/*      25 normals and 25 anomalous, with masks and labels
    test_private/data/*     400 without either

One such category, or a folder of categories. `val` counts as the training side (see `mvtec_3d`).
Of the six pictures of a candy, image_5 (global lighting) is taken, as the set's own converter does;
M3DM's conversion takes image_4 (left spotlight). The other pictures, the normals, the pose and the
masks per kind of defect have no place here.

Depth is metric: the set's page (https://eyecan-ai.github.io/eyecandies/) gives the 16-bit scale,
from `min` to `max` of NNN_info_depth.yaml in meters, and one pinhole camera with a focal length of
711.11 pixels and the principal point at (W / 2, H / 2). Points are in the camera's frame: the pose,
which would bring them to the scene's, turns and moves them only, and is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from medssl.data.image import Image
from medssl.data.layouts.plain import Entry, Listing
from medssl.data.layouts.rgb_xyz import companions_last
from medssl.data.modality import Modality
from medssl.data.readers.any import read_image
from medssl.data.readers.errors import CorruptFileError, ReadError, UnsupportedFormatError
from medssl.data.readers.organized import xyz_image
from medssl.data.readers.stored import read_text

FOCAL_LENGTH = 711.11  # pixels, of pictures of 512 x 512
SECTIONS: Mapping[str, Literal["train", "test"]] = {
    "train": "train",
    "val": "train",
    "test_public": "test",
    "test_private": "test",
}
DEFECTS = ("bumps", "colors", "dents", "normals")
_NAME = re.compile(r"(\d+)_(image_5|depth|mask)\.png")
_DEPTH, _INFO = "_depth.png", "_info_depth.yaml"
_LARGEST = 65535


def is_eyecandies(root: Path) -> bool:
    """Whether a folder is one category, or holds at least one."""
    if not root.is_dir():
        return False
    return _is_category(root) or any(_is_category(folder) for folder in root.iterdir())


def place_eyecandies(root: Path, listing: Listing) -> Listing:
    """The pictures of `root` with split, label, category and defect, their depth and their masks.

    Where a picture is missing its depth is the image. The label is `anomalous` of
    NNN_metadata.yaml, the defect the names in `DEFECTS` that it marks; without it a candy of
    `train` or `val` is normal, and one of the tests is unknown. Anything else counts as skipped.
    """
    candies: dict[tuple[str, str, str], dict[str, Entry]] = {}
    above = (root.name,) if _is_category(root) else ()
    for entry in listing.entries:
        parts = (*above, *entry.relative.parent.parts)
        name = _NAME.fullmatch(entry.relative.name)
        if name and len(parts) == 3 and parts[1] in SECTIONS and parts[2] == "data":
            candies.setdefault((parts[0], parts[1], name[1]), {})[name[2]] = entry
    entries: list[Entry] = []
    for (category, section, _), found in candies.items():
        entries += _candy(found, category, section)
    left_out = len(listing.entries) - len(entries)
    return Listing(entries=companions_last(entries), skipped=listing.skipped + left_out)


def is_eyecandies_depth(path: Path) -> bool:
    """Whether a file is named as depth and has its scale beside it."""
    return path.name.endswith(_DEPTH) and _info_of(path).is_file()


def read_eyecandies_depth(path: Path, *, hashes: bool = False) -> Image:
    """The points of a depth picture, in meters, in the camera's frame: x right, y down, z away.

    hashes: as for `read_image`, over the stored depth.
    Raises ReadError where the picture is no 16-bit depth or its scale cannot be read.
    """
    depth = read_image(path, hashes=hashes)
    if len(depth.pixels) != 1 or depth.value_range != (0.0, float(_LARGEST)):
        raise UnsupportedFormatError(
            f"expected depth of one channel and 16 bits, got {len(depth.pixels)} channels of "
            f"{depth.value_range}"
        )
    scale = _yaml(_info_of(path)).get("normalization")
    try:
        near, far = float(scale["min"]), float(scale["max"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise CorruptFileError(
            "the scale of its depth needs the numbers normalization: {min, max}; copy it again"
        ) from None
    distance = near + depth.pixels[0] / _LARGEST * (far - near)  # (H, W) meters
    return xyz_image(_unprojected(distance), unit="m", provenance=depth.provenance)


def _unprojected(distance: Tensor) -> Tensor:
    """(H, W) along the optical axis -> (3, H, W) x, y, z."""
    height, width = distance.shape
    right = (torch.arange(width) - width / 2) / FOCAL_LENGTH
    down = (torch.arange(height) - height / 2) / FOCAL_LENGTH
    return torch.stack([right * distance, down[:, None] * distance, distance])


def _is_category(folder: Path) -> bool:
    return any(
        (folder / section / "data").is_dir() and any((folder / section / "data").glob(f"*{_INFO}"))
        for section in SECTIONS
    )


def _candy(found: Mapping[str, Entry], category: str, section: str) -> list[Entry]:
    """The entries of one candy; none of a mask alone."""
    image = found.get("image_5", found.get("depth"))
    if image is None:
        return []
    label, defect = _label(image.path, section)
    entries = []
    for what, entry in found.items():
        told = replace(entry, split=SECTIONS[section], category=category, defect=defect)
        if what == "depth":
            told = replace(told, modality=Modality.DEPTH, unit="m")
        if entry is image:
            told = replace(told, label=label)
        else:
            told = replace(told, role="mask" if what == "mask" else "xyz", of=image.key)
        entries.append(told)
    return entries


def _label(image: Path, section: str) -> tuple[int | None, str | None]:
    """Label and defect of a candy, from the table beside its picture."""
    table = image.with_name(f"{image.name.split('_')[0]}_metadata.yaml")
    try:
        said = _yaml(table)
    except ReadError:  # the private test has none
        said = {}
    if said.get("anomalous") not in (0, 1):
        return (0 if SECTIONS[section] == "train" else None), None
    defects = [name for name in DEFECTS if said.get(name)]
    return int(said["anomalous"]), " ".join(defects) or None


def _info_of(depth: Path) -> Path:
    return depth.with_name(depth.name.removesuffix(_DEPTH) + _INFO)


def _yaml(file: Path) -> Mapping[str, Any]:
    """Raises ReadError where it is none."""
    import yaml

    try:
        told = yaml.safe_load(read_text(file))
    except yaml.YAMLError:
        told = None
    if not isinstance(told, dict):
        what = file.name.split("_", 1)[1]  # without the number: a message names no file
        raise CorruptFileError(f"{what} of a candy is no table in YAML; copy it again")
    return told
