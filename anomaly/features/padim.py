"""PaDiM (Defard et al., ICPR 2020 workshops, https://arxiv.org/abs/2011.08785)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.patches import check_finite, patch_grid, patch_offset
from anomaly.maps import pixel_maps, valid_patches
from anomaly.valid import by_size, largest, maps_by_size
from medssl.data.sample import Batch, ImageBatch, Sample
from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder

_ENTRIES = 1 << 24  # of covariances in float64 at a time


class PaDiM(Detector):
    """Mahalanobis distance of each patch to a Gaussian of its own place in the image.

    Images must be aligned, such as parts in one fixture or registered scans, and have one size;
    pictures or volumes, as the encoder takes. Learning needs 12 P F^2 bytes for P patches of an
    image and F features, 16 where it is fitted again, and half a GiB to work in; scoring 4 P F^2,
    whatever the number of normal images.

    encoder: a network, or the folder of one that `medssl pretrain` wrote; it stays frozen.
    layers: modules of the encoder's network; their maps are brought to the grid of the first, each
        unit repeated, and put side by side (sec. III-A).
    num_features: how many of all channels are used, chosen at random from `seed` (the paper's 100
        for ResNet-18; 550 for Wide ResNet-50-2).
    regularization: added to the diagonal of each covariance (eq. 1).
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    The score is the largest value of the map (sec. III-C).
    Differs from the paper: a place that was valid in one normal image only has the covariance of
    the regularization alone; where no normal image was valid, the map is NaN and counts nowhere,
    so an anomaly there goes unseen; a map is laid where the first layer's units look. The width of
    the Gaussian on the maps, which the paper leaves open, is the usual 4 pixels.
    """

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        num_features: int = 100,
        regularization: float = 0.01,
        sigma: float | list[float] = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if regularization <= 0:
            raise ValueError(f"regularization must be positive, got {regularization}")
        self.encoder = frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)
        self.axes = self.encoder.axes
        self.layers = list(layers)
        self.num_features = num_features
        self.regularization = regularization
        self.sigma = sigma
        self.seed = seed
        self.register_buffer("mean_", torch.empty(0))  # (P, F)
        self.register_buffer("whitening_", torch.empty(0))  # (P, F, F), of unit covariance
        self.register_buffer("count_", torch.empty(0))  # (P,) normal images that were valid there
        self.register_buffer("channels_", torch.empty(0))  # (F,) int64, of all channels
        self.register_buffer("size_", torch.empty(0))  # int64, pixels, one per axis
        self.register_buffer("offset_", torch.empty(0))  # of the patches, in pixels, one per axis
        self.mean_: Tensor
        self.whitening_: Tensor
        self.count_: Tensor
        self.channels_: Tensor
        self.size_: Tensor
        self.offset_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode: its statistics are part of what was fitted."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Learn mean and covariance of each place, in one pass over the normal images."""
        device = next(self.encoder.parameters()).device
        moments: _Moments | None = None
        for batch in normal.batches():
            images = batch.images["image"].to(device)
            if moments is None:
                self.size_ = torch.tensor(images.sizes[0], device=device)
            self._check_sizes(images, batch.items)
            ((_, pixels, valid),) = by_size(images)
            grid = patch_grid(self.encoder, pixels, self.layers, mode="nearest")
            if moments is None:
                self.channels_ = self._choose(grid.shape[-1]).to(device)
                self.offset_ = patch_offset(self.encoder, self.layers[0], images.sizes[0])
                moments = _Moments(grid[0, ..., 0].numel(), len(self.channels_), device)
            cells = valid_patches(valid, grid.shape[1:-1])
            patches = grid[..., self.channels_]
            check_finite(patches[cells], batch.items)
            moments.add(patches.flatten(1, -2), cells.flatten(1))
        assert moments is not None
        if not moments.count.any():
            raise ValueError(f"none of the {len(normal)} normal items has a valid pixel")
        self.count_, self.mean_ = moments.count, moments.mean.float()
        self.whitening_ = moments.whitening(self.regularization)
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item none of whose valid places was learnt scores NaN.

        Raises ValueError for an image of another size than the normal ones.
        """
        self.check_fitted()
        images = batch.images["image"].to(self.mean_.device)
        self._check_sizes(images, batch.items)
        maps = maps_by_size(images, lambda own, valid: self._maps(own, valid, batch.items))
        return AnomalyMap(score=largest(maps), maps={"image": maps})

    def _maps(self, images: Tensor, valid: Tensor, items: Sequence[str]) -> Tensor:
        """Maps (B, *spatial) of images (B, C, *spatial) of the size of the normal ones."""
        grid = patch_grid(self.encoder, images, self.layers, mode="nearest")
        cells = valid_patches(valid, grid.shape[1:-1])
        patches = grid[..., self.channels_]
        check_finite(patches[cells], items)
        centered = (patches.flatten(1, -2) - self.mean_).movedim(0, 1)  # (P, B, F)
        distance = (centered @ self.whitening_.mT).norm(dim=2).mT  # (B, P)
        distance[:, self.count_ == 0] = torch.nan
        distance = distance.reshape(cells.shape).masked_fill(~cells, torch.nan)
        return pixel_maps(distance, valid, offset=self.offset_, sigma=self.sigma)

    def _choose(self, channels: int) -> Tensor:
        """Which of all channels are used, (F,)."""
        if self.num_features > channels:
            raise ValueError(
                f"num_features must be at most the {channels} channels of layers {self.layers}, "
                f"got {self.num_features}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(channels, generator=generator)[: self.num_features]

    def _check_sizes(self, images: ImageBatch, items: tuple[str, ...]) -> None:
        fitted = tuple(self.size_.tolist())
        for item, size in zip(items, images.sizes, strict=True):
            if size != fitted:
                raise ValueError(
                    f"a place means the same in every image only where all have one size: got "
                    f"{fitted} and {size} of item {item}; set size in the preprocessing"
                )

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and pictures of smooth noise, one with invalid pixels."""
        from medssl.models.timm_encoder import TimmEncoder

        encoder = TimmEncoder("test_resnet", in_channels=1)
        return cls(encoder, layers=["layer1", "layer2"], num_features=20), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """A random vision transformer over volumes of smooth noise."""
        from medssl.models.vit3d import ViT3DEncoder

        encoder = ViT3DEncoder(
            (16, 32, 24), patch_size=(2, 4, 4), embedding_dim=16, depth=1, num_heads=2
        )
        return cls(encoder, layers=["blocks.0"], num_features=8, sigma=1.0), smooth_volumes()


class _Moments:
    """Running count, mean and scatter of each place, in float64 (Chan et al. 1979).

    count: (P,) int64; mean: (P, F); scatter: (P, F, F), sums of products of deviations.
    """

    def __init__(self, places: int, width: int, device: torch.device) -> None:
        self.count = torch.zeros(places, dtype=torch.int64, device=device)
        self.mean = torch.zeros(places, width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(places, width, width, dtype=torch.float64, device=device)
        self.step = max(1, _ENTRIES // width**2)

    def add(self, patches: Tensor, valid: Tensor) -> None:
        """Features (B, P, F) and which of them count (B, P)."""
        for start in range(0, len(self.count), self.step):
            here = slice(start, start + self.step)
            weight = valid[:, here].double().mT[..., None]  # (p, B, 1)
            values = patches[:, here].double().movedim(0, 1)  # (p, B, F)
            values = torch.where(weight > 0, values, 0)
            before, new = self.count[here].double()[:, None], weight.sum(1)  # (p, 1)
            total = (before + new).clamp_min(1)
            mean = values.sum(1) / new.clamp_min(1)
            centered = (values - mean[:, None]) * weight
            moved = mean - self.mean[here]
            between = moved * (before * new / total).sqrt()
            self.scatter[here] += centered.mT @ centered + between[:, :, None] * between[:, None]
            self.mean[here] += moved * new / total
        self.count += valid.sum(0)

    def whitening(self, regularization: float) -> Tensor:
        """(P, F, F) float32, inverse Cholesky factors of the covariances; these, with a divisor of
        N - 1, have `regularization` added to their diagonals."""
        found = torch.empty(self.scatter.shape, device=self.scatter.device)
        unit = torch.eye(self.scatter.shape[-1], dtype=torch.float64, device=found.device)
        for start in range(0, len(self.count), self.step):
            here = slice(start, start + self.step)
            freedom = (self.count[here] - 1).clamp_min(1)[:, None, None]
            factor = torch.linalg.cholesky(self.scatter[here] / freedom + regularization * unit)
            found[here] = torch.linalg.solve_triangular(factor, unit, upper=False).float()
        return found
