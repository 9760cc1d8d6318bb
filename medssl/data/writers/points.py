"""One value per point beside the points: a PLY for viewers, and a CSV table."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.image import PointCloud


def write_ply(cloud: PointCloud, values: Tensor, path: Path) -> None:
    """Binary little-endian PLY with the float property "anomaly", NaN included.

    CloudCompare shows it as a scalar field. Order, number, colors and normals of the points are
    those of `cloud`; colors have 8 bits.

    values: (P,). Raises ValueError where it is not one per point.
    """
    rows = _rows(cloud, values)
    kinds = {"<f4": "float", "|u1": "uchar"}
    properties = [
        f"property {kinds[rows.dtype[name].str]} {name}" for name in rows.dtype.names or ()
    ]
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment unit {cloud.unit}",
        f"element vertex {len(rows)}",
        *properties,
        "end_header",
    ]
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    partial.write_bytes("".join(f"{line}\n" for line in header).encode() + rows.tobytes())
    partial.replace(path)


def write_points_csv(cloud: PointCloud, values: Tensor, path: Path) -> None:
    """Columns x, y, z and anomaly, one row per point; text that gives back every float32 exactly.

    values: (P,), NaN written as nan. Raises ValueError where it is not one per point.
    """
    _check(cloud, values)
    table = np.column_stack([cloud.points.cpu().numpy(), values.float().cpu().numpy()])
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    np.savetxt(partial, table, fmt="%.9g", delimiter=",", header="x,y,z,anomaly", comments="")
    partial.replace(path)


def _rows(cloud: PointCloud, values: Tensor) -> NDArray[np.void]:
    """(P,) of what a vertex has."""
    _check(cloud, values)
    columns: dict[str, NDArray[np.generic]] = {}
    columns |= _named("xyz", cloud.points.cpu().numpy().astype("<f4"))
    if cloud.normals is not None:
        columns |= _named(("nx", "ny", "nz"), cloud.normals.cpu().numpy().astype("<f4"))
    if cloud.colors is not None:
        bytes_ = (cloud.colors.clamp(0, 1) * 255).round().byte().cpu().numpy()
        columns |= _named(("red", "green", "blue"), bytes_)
    columns["anomaly"] = values.float().cpu().numpy().astype("<f4")
    rows = np.empty(len(values), dtype=[(name, one.dtype) for name, one in columns.items()])
    for name, one in columns.items():
        rows[name] = one
    return rows


def _named(names: str | tuple[str, ...], table: NDArray[np.generic]) -> dict[str, NDArray]:
    return dict(zip(names, table.T, strict=True))


def _check(cloud: PointCloud, values: Tensor) -> None:
    if values.shape != cloud.points.shape[:1]:
        raise ValueError(
            f"one value per point: got {tuple(values.shape)} for {len(cloud.points)} points"
        )
