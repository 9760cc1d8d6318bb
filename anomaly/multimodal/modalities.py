"""A picture and the xyz beside it, described on one grid of cells over the same field of view.

FPFH averaged per cell beside the features of a network is the pairing of BTF (Horwitz and Hoshen,
CVPR workshops 2023, https://arxiv.org/abs/2203.05550).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anomaly.base import NormalData, noise_batch
from anomaly.features.patches import check_finite, patch_grid, patch_offset
from anomaly.learning import seeded
from anomaly.maps import pixel_maps, valid_patches
from anomaly.valid import by_size
from medssl.data.modality import Modality
from medssl.data.sample import Batch, ImageBatch
from medssl.models.encoder import Encoder, frozen, output_channels
from medssl.models.folder import load_encoder
from medssl.models.fpfh import BINS, fpfh
from medssl.models.points import estimate_normals, point_spacing

ModalityName = Literal["color", "geometry"]

_SIDE = 224  # pixels of the picture that the width of the features is measured on
_NORMAL_POINTS = 30  # neighbours that a normal is estimated from
_SPACINGS = 5.0  # radius of the neighbourhoods, in spacings of the points; BTF's 5 voxels


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureGrid:
    """What one modality says of each cell.

    features: (B, h, w, E) float32, zero where not valid. valid: (B, h, w) bool.
    """

    features: Tensor
    valid: Tensor


def has_color(batch: Batch) -> Tensor:
    """Which items have a picture: (B,) bool. A DEPTH "image" is none."""
    images = batch.images["image"]
    found = [one is not Modality.DEPTH for one in images.modalities]
    return torch.tensor(found, device=images.valid.device)


def has_geometry(batch: Batch) -> Tensor:
    """Which items have organized points, beside the picture or in its place: (B,) bool."""
    if "xyz" in batch.images:
        return torch.ones_like(has_color(batch))
    return ~has_color(batch) & (batch.images["image"].pixels.shape[1] == 3)


def valid_pixels(batch: Batch, modality: ModalityName) -> Tensor:
    """Where a modality was measured: (B, H, W) bool on the padded grid, False where it is missing.

    Raises ValueError where picture and xyz have not the same grid.
    """
    present = has_color(batch) if modality == "color" else has_geometry(batch)
    return _images(batch, modality).valid & present[:, None, None]


def cell_maps(cells: Tensor, batch: Batch, valid: Tensor, *, sigma: float) -> Tensor:
    """Values of cells (B, h, w) on the pixels: (B, H, W), NaN outside `valid` (B, H, W).

    Cells that are NaN count nowhere. sigma: of the Gaussian, in pixels.
    """
    maps = torch.full(valid.shape, torch.nan, device=cells.device)
    sizes = batch.images["image"].sizes
    for height, width in dict.fromkeys((size[0], size[1]) for size in sizes):
        rows = [i for i, size in enumerate(sizes) if size == (height, width)]
        own = pixel_maps(cells[rows], valid[rows, :height, :width], sigma=sigma)
        maps[rows, :height, :width] = own
    return maps


class _Cells(Protocol):
    @property
    def grid(self) -> list[int]: ...


def same_grid(color: _Cells | None, geometry: _Cells | None) -> None:
    """Raises ValueError where the cells of the two are not the same, or where there is neither."""
    grids = [one.grid for one in (color, geometry) if one is not None]
    if not grids or grids[0] != grids[-1]:
        raise ValueError(
            f"color and geometry, at least one of them, must have one grid, got {grids}"
        )


def noise_shape(color: "ColorFeatures | None", image: Sequence[int]) -> tuple[int, ...]:
    """Of the noise that `rgbd_noise` takes, for images (C, H, W) as a detector was fitted on."""
    channels = 1 if color is None else color.encoder.in_channels
    return (2, channels + 1, *image[-2:])


def rgbd_noise(noise: Tensor, spacing: Tensor | None) -> Batch:
    """A batch around bare noise (B, C + 1, H, W): C channels of a picture, and a relief.

    spacing: of neighboring points, (1,); the relief is in units of it, and 100 of them away. None
        leaves the points out.
    """
    batch = noise_batch(noise[:, :-1], "HW")
    if spacing is None:
        return batch
    image = batch.images["image"]
    height, width = noise.shape[2:]
    rows = torch.arange(height, device=noise.device) - height / 2
    columns = torch.arange(width, device=noise.device) - width / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    xyz = torch.stack([torch.stack([x, y, 100 + relief]) for relief in noise[:, -1]])
    organized = replace(
        image,
        pixels=xyz * spacing.to(noise),
        modalities=(Modality.DEPTH,) * len(noise),
    )
    return replace(batch, images={"image": image, "xyz": organized})


class ColorFeatures(nn.Module):
    """A frozen network's features of the pictures, on the common grid of cells.

    encoder: of pictures, or the folder of one that `medssl pretrain` wrote; it stays frozen.
    layers: modules of its network, put side by side on the grid of the first; a feature is the mean
        of 3 x 3 units. Linear interpolation between the places where the units look brings them to
        the middle of each cell.
    grid: h and w of the cells.
    """

    def __init__(
        self, encoder: Encoder | Path, *, layers: Sequence[str], grid: Sequence[int]
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        self.encoder = frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)
        if self.encoder.axes != "HW":
            raise ValueError(f"color needs an encoder of pictures, got axes {self.encoder.axes}")
        self.layers, self.grid = list(layers), _checked_grid(grid)
        self.width = sum(output_channels(self.encoder, self.layers, (_SIDE, _SIDE)))
        self.register_buffer("offset_", torch.empty(0))  # (2,) pixels, see `patch_offset`
        self.offset_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def fit(self, normal: NormalData) -> Self:
        """Learn where the units look, in pictures of the size of the first normal one."""
        size = normal[0].images["image"].spatial_shape
        self.offset_ = patch_offset(self.encoder, self.layers[0], size)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> FeatureGrid:
        """Of the pictures; nothing is valid in an item that has none.

        Raises RuntimeError before `fit`, ValueError where a feature is not finite.
        """
        if self.offset_.numel() == 0:
            raise RuntimeError("ColorFeatures is not fitted (offset_ is empty); call fit first")
        device = next(self.encoder.parameters()).device
        images = batch.images["image"].to(device)
        present = has_color(batch).tolist()
        valid = torch.zeros(len(batch), *self.grid, dtype=torch.bool, device=device)
        features = torch.zeros(*valid.shape, self.width, device=device)
        for rows, pixels, inside in by_size(images):
            shown = [i for i, row in enumerate(rows) if present[row]]
            if shown:
                at = [rows[i] for i in shown]
                valid[at] = valid_patches(inside[shown], self.grid)
                features[at] = self.described(pixels[shown])
        features = torch.where(valid[..., None], features, 0.0)
        check_finite(features, batch.items)
        return FeatureGrid(features=features, valid=valid)

    def described(self, pixels: Tensor) -> Tensor:
        """Features (b, h, w, E) of pictures (b, C, H, W) of one size, once fitted."""
        units = patch_grid(self.encoder, pixels, self.layers, window=3).movedim(-1, 1)
        shift = 2 * self.offset_.flip(0) / pixels.new_tensor(pixels.shape[:1:-1])  # x, y
        theta = torch.cat([torch.eye(2).to(shift), -shift[:, None]], dim=1)
        places = F.affine_grid(
            theta.expand(len(units), 2, 3), [len(units), 1, *self.grid], align_corners=False
        )
        laid = F.grid_sample(units, places, padding_mode="border", align_corners=False)
        return laid.movedim(1, -1)


class GeometryFeatures(nn.Module):
    """Descriptors of the organized points, averaged over those that lie in each cell.

    Points are described among those of their item that are valid, with normals that are turned
    towards the sensor, which is the origin.

    grid: h and w of the cells.
    radius: of the neighborhoods, in the unit of the points; None learns 5 times the median distance
        of neighboring points of the normal items.
    max_neighbors: of a point that are looked at, the nearest.
    max_points: of an item with more, an even choice of about so many is described: the first valid
        one of each square of pixels, and one more of each cell that is left without.
    descriptor: takes the place of FPFH: its `describe(points (P, 3), normals (P, 3))` gives (P, E),
        and `embedding_dim` is E. Also the folder of a Point-MAE encoder that `medssl pretrain`
        wrote; it stays frozen.
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        radius: float | None = None,
        max_neighbors: int = 100,
        max_points: int = 20_000,
        descriptor: nn.Module | Path | None = None,
    ) -> None:
        super().__init__()
        if radius is not None and radius <= 0:
            raise ValueError(f"radius must be positive, or null to be learnt, got {radius}")
        if max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {max_points}")
        self.grid = _checked_grid(grid)
        self.radius, self.max_neighbors, self.max_points = radius, max_neighbors, max_points
        given = _point_encoder(descriptor) if isinstance(descriptor, Path) else descriptor
        self.descriptor = given if given is None else given.eval()
        self.width = 3 * BINS if given is None else int(cast(Any, given).embedding_dim)
        self.register_buffer("radius_", torch.empty(0))  # (1,) in the unit of the points
        self.radius_: Tensor

    def train(self, mode: bool = True) -> Self:
        """A descriptor stays in evaluation mode."""
        super().train(mode)
        if self.descriptor is not None:
            self.descriptor.eval()
        return self

    @property
    def spacing(self) -> Tensor:
        """(1,) distance of points that are neighbors, taken for a fifth of the radius."""
        return self.radius_ / _SPACINGS

    @torch.no_grad()
    def fit(self, normal: NormalData) -> Self:
        """Learn the radius, where none was given.

        Raises ValueError where no normal item has two valid points.
        """
        device = self.radius_.device
        if self.radius is not None:
            self.radius_ = torch.tensor([self.radius], device=device)
            return self
        every = (one for batch in normal.batches() for one in organized(batch))
        spacings = [point_spacing(self._chosen(*one)[0]) for one in every]
        self.radius_ = _SPACINGS * usual_spacing(spacings).to(device)
        return self

    @torch.no_grad()
    def forward(self, batch: Batch) -> FeatureGrid:
        """Of the organized points; nothing is valid in an item that has none.

        Raises RuntimeError before `fit`, ValueError where a valid point is not finite.
        """
        if self.radius_.numel() == 0:
            raise RuntimeError("GeometryFeatures is not fitted (radius_ is empty); call fit first")
        h, w = self.grid
        features = torch.zeros(len(batch), h * w, self.width, device=self.radius_.device)
        counts = torch.zeros(len(batch), h * w, device=self.radius_.device)
        for i, (xyz, valid) in enumerate(organized(batch)):
            points, cells = self._chosen(xyz.to(counts.device), valid.to(counts.device))
            if len(points):
                described = self._described(points)
                counts[i] = cells.bincount(minlength=h * w)
                total = torch.zeros(h * w, self.width, dtype=torch.float64, device=points.device)
                total.index_add_(0, cells, described.double())  # in no order on a GPU
                features[i] = total / counts[i].clamp_min(1)[:, None]
        check_finite(features, batch.items)
        return FeatureGrid(
            features=features.unflatten(1, (h, w)), valid=counts.unflatten(1, (h, w)) > 0
        )

    def _chosen(self, xyz: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Points (P, 3) of xyz (3, H, W) that are described, and the cell (P,) of each."""
        height, width = valid.shape
        rows, columns = valid.nonzero(as_tuple=True)
        h, w = self.grid
        cells = (2 * rows + 1) * h // (2 * height) * w + (2 * columns + 1) * w // (2 * width)
        step = ceil(sqrt(len(rows) / self.max_points))
        if step > 1:
            kept = _first_of_each(rows // step * width + columns // step)
            left = torch.isin(cells, cells[kept], invert=True).nonzero()[:, 0]
            kept = torch.cat([kept, left[_first_of_each(cells[left])]])
            rows, columns, cells = rows[kept], columns[kept], cells[kept]
        return xyz[:, rows, columns].mT.contiguous(), cells

    def _described(self, points: Tensor) -> Tensor:
        """(P, E) of points (P, 3)."""
        points, owner = points.unique(dim=0, return_inverse=True)  # see `sensor_normals`
        normals = sensor_normals(points, _NORMAL_POINTS)
        if self.descriptor is not None:
            return cast(Any, self.descriptor).describe(points, normals)[owner]
        radius, most = float(self.radius_), self.max_neighbors
        return fpfh(points[None], normals[None], radius=radius, max_neighbors=most)[0][owner]


def organized(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each item its xyz (3, H, W) without padding, and where it was measured (H, W) bool.

    Raises ValueError where picture and xyz have not the same grid, and naming an item of which a
    valid point is not finite.
    """
    xyz, valid = _images(batch, "geometry"), valid_pixels(batch, "geometry")
    for i, (height, width) in enumerate(xyz.sizes):
        pixels, inside = xyz.pixels[i, :, :height, :width], valid[i, :height, :width]
        if not pixels[:, inside].isfinite().all():
            raise ValueError(
                f"item {batch.items[i]} has valid points that are NaN or infinite; mark them as "
                "not valid"
            )
        yield pixels, inside


def usual_spacing(spacings: Sequence[Tensor]) -> Tensor:
    """The median (1,) over items of the spacing () of their points, 0 where an item has none.

    Raises ValueError where no item has any.
    """
    known = [one for one in spacings if one > 0]
    if not known:
        raise ValueError(
            f"none of the {len(spacings)} normal items has organized points; give an xyz image "
            "beside each picture, or fit on color alone"
        )
    return torch.stack(known).median()[None]


def sensor_normals(points: Tensor, count: int) -> Tensor:
    """Normals (P, 3) of points (P, 3) from `count` neighbors, towards the sensor, the origin.

    None may be there twice: where a grid was enlarged, copies would be all of the neighbors.
    """
    normals = estimate_normals(points[None], count=min(count, len(points)))[0]
    away = (normals * points).sum(1, keepdim=True) > 0
    return torch.where(away, -normals, normals)


def _first_of_each(key: Tensor) -> Tensor:
    """Where each value of `key` (P,) comes first."""
    values, owner = key.unique(return_inverse=True)
    order = torch.arange(len(key), device=key.device)
    return order.new_full(values.shape, len(key)).scatter_reduce(0, owner, order, "amin")


def _images(batch: Batch, modality: ModalityName) -> ImageBatch:
    """Those that a modality would be in."""
    image = batch.images["image"]
    if modality == "color" or "xyz" not in batch.images:
        return image
    xyz = batch.images["xyz"]
    if xyz.sizes != image.sizes:
        raise ValueError(
            f"picture and xyz must lie on one grid, got sizes {image.sizes} and {xyz.sizes}; give "
            "geometry to the preprocessing, which brings both to its size"
        )
    return xyz


def _point_encoder(folder: Path) -> Encoder:
    encoder = load_encoder(folder)
    if encoder.axes != "points":
        raise ValueError(
            f"descriptor needs an encoder of points, such as of Point-MAE; {folder.name} holds one "
            f"of axes {encoder.axes}"
        )
    return frozen(encoder)


def _checked_grid(grid: Sequence[int]) -> list[int]:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid is the two numbers h and w of cells, got {list(grid)}")
    return list(grid)


def example_features() -> tuple[ColorFeatures, GeometryFeatures]:
    """A random residual network, and FPFH of a few hundred points, on one grid."""
    from medssl.models.timm_encoder import TimmEncoder

    with seeded(0):
        encoder = TimmEncoder("test_resnet", in_channels=3)
    color = ColorFeatures(encoder, layers=["layer1", "layer2"], grid=(16, 12))
    return color, GeometryFeatures(grid=(16, 12), max_points=400)
