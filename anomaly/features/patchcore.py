"""PatchCore (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265)."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.maps import outside_is_nan, smooth, upsample, valid_patches
from anomaly.memory import greedy_coreset, nearest
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Batch, Sample
from medssl.models.alignment import grid_offset
from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder

_BLOCK = 1 << 16  # patches at a time
_FLAT = 1e-2  # below, directions are mostly noise: .87 became .91 image AUROC on head phantoms
_MEMORY_SHARE = 0.25  # training patches larger than this share of the memory go to `workdir`


class PatchCore(Detector):
    """Distance from each patch feature to the nearest one in a bank of normal features.

    encoder: a network, or the folder of one that `medssl pretrain` wrote; it stays frozen.
    layers: modules of the encoder's network; their maps are brought to the grid of the first
        and put side by side (sec. 3.1).
    coreset_ratio: share of the normal patches kept in the bank (sec. 3.2).
    num_neighbors: size b of the neighbourhood that weighs the image score (eq. 7); 1 leaves it
        unweighted.
    sigma: of the Gaussian on the maps, in pixels (sec. 3.3).
    whiten: decorrelate the features over the normal patches and compare their directions only, so
        that the distance does not follow the contrast of a patch. The paper does not.
    seed: of the first pick of the coreset.
    Differs from the paper: the coreset is chosen by exact distances, not in a random projection;
    a map is laid where the first layer's units look, not up to half a stride beside it.
    """

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        coreset_ratio: float = 0.1,
        num_neighbors: int = 9,
        sigma: float = 4.0,
        whiten: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < coreset_ratio <= 1:
            raise ValueError(f"coreset_ratio must lie in (0, 1], got {coreset_ratio}")
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}")
        self.encoder = frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)
        self.layers = list(layers)
        self.coreset_ratio = coreset_ratio
        self.num_neighbors = num_neighbors
        self.sigma = sigma
        self.whiten = whiten
        self.seed = seed
        self.register_buffer("bank_", torch.empty(0))  # (M, E), as `_comparable` gives them
        self.register_buffer("mean_", torch.empty(0))  # (E,) of the normal patches
        self.register_buffer("whitening_", torch.empty(0))  # (E, E), symmetric
        self.register_buffer("offset_", torch.empty(0))  # (2,) of the patches, in pixels
        self.bank_: Tensor
        self.mean_: Tensor
        self.whitening_: Tensor
        self.offset_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode: its statistics are part of what was fitted."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Keep a coreset of the valid patches of all normal pictures, which must have one size."""
        patches = self._collect(normal, workdir)
        if len(patches) == 0:
            raise ValueError(f"none of the {len(normal)} normal items has a valid pixel")
        device = next(self.encoder.parameters()).device  # large patches may lie elsewhere
        self.mean_, self.whitening_ = torch.zeros(1, device=device), torch.ones(1, 1, device=device)
        if self.whiten:
            mean, whitening = _whitening(patches)
            self.mean_, self.whitening_ = mean.to(device), whitening.to(device)
            for block in patches.split(_BLOCK):  # views: the patches are held once
                block.copy_(self._comparable(block.to(device)))
        count = max(1, int(self.coreset_ratio * len(patches)))
        chosen = greedy_coreset(patches, count, seed=self.seed)
        self.bank_ = patches[chosen].to(device)
        return self

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps of pictures; an item without a valid pixel scores NaN."""
        self.check_fitted()
        images = batch.images["image"].to(self.bank_.device)
        grid = self._comparable(self.patches(images.pixels))  # (B, h, w, E)
        valid = valid_patches(images.valid, grid.shape[1:3])
        _check_finite(grid[valid], batch.items)
        distance = torch.full(valid.shape, torch.nan, device=grid.device)
        owner = torch.full(valid.shape, -1, device=grid.device)  # row of the bank
        near, row = nearest(grid[valid], self.bank_)
        distance[valid], owner[valid] = near[:, 0], row[:, 0]

        maps = upsample(distance, images.valid.shape[1:], offset=self.offset_)
        maps = smooth(maps, self.sigma)
        return AnomalyMap(
            score=self._image_scores(grid, distance, owner),
            maps={"image": outside_is_nan(maps, images.valid)},
        )

    @torch.inference_mode()
    def patches(self, images: Tensor) -> Tensor:
        """Mean feature of each 3 x 3 neighbourhood of (B, C, H, W). Returns (B, h, w, E).

        Zeros surround the feature maps, as in the authors' code: a mean of fewer patches at the
        border would vary more, and the largest distance of a picture would often lie there.
        """
        if images.shape[1] != self.encoder.in_channels:
            raise ValueError(
                f"the encoder takes {self.encoder.in_channels} channels, got {images.shape[1]}; "
                "set channels in the preprocessing"
            )
        features = [
            F.avg_pool2d(feature_map, 3, stride=1, padding=1)
            for feature_map in self.encoder.feature_maps(images, self.layers)
        ]
        grid = features[0].shape[-2:]
        features[1:] = [F.interpolate(each, grid, mode="bilinear") for each in features[1:]]
        return torch.cat(features, dim=1).movedim(1, -1)

    def _comparable(self, patches: Tensor) -> Tensor:
        """Patches (..., E) as the bank holds them."""
        if not self.whiten:
            return patches
        return F.normalize((patches - self.mean_) @ self.whitening_, dim=-1)

    def _collect(self, normal: NormalData, workdir: Path | None) -> Tensor:
        """Every valid patch of the normal items, (N, E), held once."""
        device = next(self.encoder.parameters()).device
        store: Tensor | None = None
        filled, size = 0, None
        for batch in normal.batches():
            images = batch.images["image"].to(device)
            grid = self.patches(images.pixels)
            valid = valid_patches(images.valid, grid.shape[1:3])
            found = grid[valid]  # (n, E)
            _check_finite(found, batch.items)
            if store is None:
                size = images.valid.shape[1:]
                self.offset_ = grid_offset(self.encoder, self.layers[0], (size[0], size[1]))
                store = _room(len(normal) * valid[0].numel(), found.shape[1], device, workdir)
            if images.valid.shape[1:] != size:
                raise ValueError(
                    f"normal pictures must have one size, got {tuple(size or ())} and "
                    f"{tuple(images.valid.shape[1:])}; set size in the preprocessing"
                )
            store[filled : filled + len(found)] = found
            filled += len(found)
        assert store is not None
        return store[:filled]

    def _image_scores(self, grid: Tensor, distance: Tensor, owner: Tensor) -> Tensor:
        """The largest patch distance of each picture, weighed by its neighbourhood (eq. 6, 7)."""
        score, worst = distance.flatten(1).nan_to_num(-1.0).max(1)
        known = score >= 0
        items = torch.arange(len(grid), device=grid.device)
        count = min(self.num_neighbors, len(self.bank_))
        if count > 1 and known.any():
            patch = grid.flatten(1, 2)[items, worst][known]  # (B, E)
            normal = self.bank_[owner.flatten(1)[items, worst][known]]
            around = self.bank_[nearest(normal, self.bank_, count)[1]]  # (B, b, E), itself first
            reach = (patch[:, None] - around).norm(dim=2)
            score[known] *= 1 - reach.softmax(1)[:, 0]
        return score.masked_fill(~known, torch.nan)

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random residual network and eight pictures of smooth noise, one with invalid pixels."""
        from medssl.models.timm_encoder import TimmEncoder

        encoder = TimmEncoder("test_resnet", in_channels=1)
        detector = cls(encoder, layers=["layer1", "layer2"], coreset_ratio=0.2, num_neighbors=3)
        generator = torch.Generator().manual_seed(0)
        samples = []
        for i in range(8):
            coarse = torch.randn(1, 1, 8, 6, generator=generator)
            pixels = F.interpolate(coarse, (64, 48), mode="bilinear")[0]
            valid = torch.ones(64, 48, dtype=torch.bool)
            valid[:, :20] = i > 0
            image = Image(
                pixels=pixels,
                axes="HW",
                modality=Modality.UNKNOWN,
                affine=pixel_affine(),
                frame="pixel",
                valid=valid,
            )
            samples.append(Sample(item=f"normal{i}", images={"image": image}, label=0))
        return detector, samples


def _room(count: int, width: int, device: torch.device, workdir: Path | None) -> Tensor:
    """An empty (count, width) float32 tensor, memory-mapped where it is large for the memory."""
    size = 4 * count * width
    if device.type == "cuda" and size < _MEMORY_SHARE * torch.cuda.mem_get_info(device)[1]:
        return torch.empty(count, width, device=device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if workdir is None or size < _MEMORY_SHARE * memory:
        return torch.empty(count, width)
    with tempfile.NamedTemporaryFile(dir=workdir, prefix="patches.") as file:
        return torch.from_file(file.name, shared=True, size=count * width).reshape(count, width)


def _whitening(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (E,), and the symmetric (E, E) that gives (N, E) patches unit covariance.

    Directions with less than `_FLAT` of the largest variance are not blown up further.
    """
    mean = patches.mean(0, dtype=torch.float64)
    width = patches.shape[1]
    covariance = torch.zeros(width, width, dtype=torch.float64, device=patches.device)
    for block in patches.split(_BLOCK):
        centered = block.double() - mean
        covariance += centered.mT @ centered / len(patches)
    variance, direction = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(_FLAT * float(variance.max()) + 1e-30)
    return mean.float(), ((direction / variance.sqrt()) @ direction.mT).float()


def _check_finite(features: Tensor, items: Sequence[str]) -> None:
    if not features.isfinite().all():
        raise ValueError(
            f"the features of items {', '.join(items)} are not all finite; mark NaN pixels as not "
            "valid, or choose another encoder"
        )
