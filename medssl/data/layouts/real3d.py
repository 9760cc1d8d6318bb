"""The folder layout of Real3D-AD (Liu et al., NeurIPS 2023, https://arxiv.org/abs/2309.13226) and
Anomaly-ShapeNet (Li et al., CVPR 2024, https://arxiv.org/abs/2311.14897).

    train/*.pcd                        normal clouds, the templates
    test/*_good*.pcd, *_positive*.pcd  normal clouds
    test/*_<kind>*.pcd                 anomalous ones; <kind> names the defect
    gt/NAME.txt (or GT/NAME.txt)       x y z label of each point of test/NAME.pcd, split by blanks
                                       or commas; label 1 lies on the defect

One such category, or a folder of categories. A template among the test clouds is left out, as the
public code does. Numbers, the category's name, "cut" and "copy" (how Real3D-AD scanned) are no part
of a defect's name. Units: the files do not say; the objects of Real3D-AD are given in millimeters.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.image import PointCloud
from medssl.data.layouts.plain import Entry, Listing
from medssl.data.readers.errors import CorruptFileError, InconsistentGeometryError
from medssl.data.readers.points_stored import measured, text_lines, text_values
from medssl.data.readers.stored import read_bytes

_log = logging.getLogger(__name__)

NORMAL = frozenset({"good", "positive"})
SECTIONS: Mapping[str, Literal["train", "test"]] = {"train": "train", "test": "test"}
MASKS = ("gt", "GT")
_NO_DEFECT = frozenset({"cut", "copy", ""})
_ROUNDING = 1e-4  # of the extent: how far a row of text may lie from its point


def is_real3d(root: Path) -> bool:
    """Whether a folder is one category, or holds at least one."""
    if not root.is_dir():
        return False
    return _is_category(root) or any(_is_category(folder) for folder in root.iterdir())


def place_real3d(root: Path, listing: Listing) -> Listing:
    """The clouds of `root` with split, label, category and defect, and the labels of their points.

    What lies outside the layout's folders counts as skipped, and so do labels without a cloud.
    """
    clouds: list[Entry] = []
    above = (root.name,) if _is_category(root) else ()
    for entry in listing.entries:
        parts = (*above, *entry.relative.parent.parts)
        if len(parts) == 2 and parts[1] in SECTIONS and entry.kind == "points":
            clouds += _told(entry, *parts)
    labels = [label for cloud in clouds for label in _labels_of(cloud)]
    _warn_of_lonely(root, len(labels))
    left_out = len(listing.entries) - len(clouds) - len(labels)
    return Listing(entries=(*clouds, *labels), skipped=listing.skipped + left_out)


def point_labels(file: Path, cloud: PointCloud) -> Tensor:
    """(P,) bool, True on a defect, from the x y z label rows of a text file.

    Rows of missing points, which a cloud as read no longer has, are left out. Rows lie in the
    cloud's order, or else each point takes the row at its place: public code reads the points from
    the text, so that nothing there holds the two orders together.

    Raises CorruptFileError where a row is not four numbers or a label not 0 or 1, and
    InconsistentGeometryError where rows and points are not the same.
    """
    content = read_bytes(file)
    count = sum(1 for _ in text_lines(content))
    delimiter = "," if b"," in content[: 1 << 10] else None
    rows = text_values(text_lines(content), (count, 4), delimiter)  # (P, 4)
    if not np.isin(rows[:, 3], (0, 1)).all():
        raise CorruptFileError("point labels must be 0 or 1, and others are there; correct them")
    points = cloud.points.double().numpy()
    if len(rows) != len(points):  # else none is missing, and text may have rounded one to zero
        rows = rows[measured(rows[:, :3].T)]
    if len(rows) != len(points):
        raise InconsistentGeometryError(
            f"{len(rows)} point labels for {len(points)} points; label the points of this very file"
        )
    return torch.from_numpy(_in_order(rows, points)[:, 3] == 1)


def _in_order(rows: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """rows (P, 4) in the order of points (P, 3)."""
    limit = _ROUNDING * np.linalg.norm(np.ptp(points, axis=0))
    if np.abs(rows[:, :3] - points).max() <= limit:
        return rows
    from scipy.spatial import KDTree

    distance, nearest = KDTree(rows[:, :3]).query(points)  # (P,), (P,)
    if distance.max() > limit:
        raise InconsistentGeometryError(
            f"a point lies {distance.max():.3g} from the nearest one with a label, where at most "
            f"{limit:.3g} is rounding; label the points of this very file"
        )
    return rows[nearest]


def _is_category(folder: Path) -> bool:
    return all(any((folder / section).glob("*.pcd")) for section in SECTIONS)


def _told(entry: Entry, category: str, section: str) -> list[Entry]:
    """The cloud with what its name says; nothing of a template among the test clouds."""
    words = _words(entry.relative.stem, category)
    if section == "test" and any(word.startswith("temp") for word in words):
        return []
    normal = section == "train" or not NORMAL.isdisjoint(words)
    told = replace(
        entry,
        split=SECTIONS[section],
        label=0 if normal else 1,
        category=category,
        defect=None if normal else "_".join(words) or None,
    )
    return [told]


def _words(name: str, category: str) -> list[str]:
    """["hole"] of flange_hole_03, ["bulge"] of ashtray0_bulge0 and of 482_bulge_cut."""
    words = [word.rstrip("0123456789") for word in name.removeprefix(f"{category}_").split("_")]
    return [word for word in words if word not in _NO_DEFECT]


def _labels_of(cloud: Entry) -> list[Entry]:
    """The entry of the labels of its points, where there is one."""
    above = cloud.path.parent.parent
    files = [above / name / f"{cloud.path.stem}.txt" for name in MASKS]
    return [
        replace(
            cloud,
            path=file,
            relative=PurePosixPath(*cloud.relative.parts[:-2], file.parent.name, file.name),
            kind="text",
            role="mask",
            of=cloud.key,
            label=None,
        )
        for file in files
        if cloud.split == "test" and file.is_file()
    ][:1]


def _warn_of_lonely(root: Path, tied: int) -> None:
    folders = [folder / name for folder in (root, *root.iterdir()) for name in MASKS]
    # resolved, as gt and GT are one folder where case does not count
    there = {file.resolve() for folder in folders for file in folder.glob("*.txt")}
    if len(there) > tied:
        missing = len(there) - tied
        _log.warning("%d of %d label files have no cloud and are left out", missing, len(there))
