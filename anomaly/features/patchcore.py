"""PatchCore (Roth et al., CVPR 2022, https://arxiv.org/abs/2106.08265)."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_volumes
from anomaly.features.patches import (
    NormalPatches,
    check_finite,
    collect,
    patch_grid,
    patch_offset,
)
from anomaly.maps import pixel_maps, valid_patches
from anomaly.memory import RepeatedSearch, greedy_coreset, nearest
from anomaly.valid import scored_by_size
from medssl.data.image import Image, pixel_affine
from medssl.data.modality import Modality
from medssl.data.sample import Batch, Sample
from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder

_BLOCK = 1 << 16  # patches at a time
_FLAT = 1e-2  # below, directions are mostly noise: .87 became .91 image AUROC on head phantoms
_MOST_NAMED = 5


class PatchCore(Detector):
    """Distance from each patch feature to the nearest one in a bank of normal features.

    It takes what its encoder takes, pictures or volumes. The bank remembers which item each row
    came from, so that normal items can be added to it and removed from it. Under torchrun each
    process describes a share of the normal items, and all end with the bank of one process.

    encoder: a network, or the folder of one that `medssl pretrain` wrote; it stays frozen.
    layers: modules of the encoder's network; their maps are brought to the grid of the first
        and put side by side (sec. 3.1).
    coreset_ratio: share of the normal patches kept in the bank (sec. 3.2); of their sample where
        there are more than `max_patches`.
    num_neighbors: size b of the neighbourhood that weighs the image score (eq. 7); 1 leaves it
        unweighted.
    sigma: of the Gaussian on the maps, in pixels (sec. 3.3), for all axes or one for each.
    whiten: decorrelate the features over the normal patches and compare their directions only, so
        that the distance does not follow the contrast of a patch. The paper does not.
    bank_dtype: float16 halves the bank; distances are exact to what it then holds. On the CPU a
        rounded copy of either is made for the search, see `anomaly.memory.Shortlist`.
    max_patches: choose the coreset among at most so many patches, an even random sample of all;
        then the bank covers the sample, with `coreset_ratio` times max_patches rows however many
        the normal items are, and a rare normal patch may be missing from it. None takes all: S
        items of N patches of E features need 4 S N E bytes while fitting.
    seed: of the first pick of the coreset, and of the sample.
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
        sigma: float | list[float] = 4.0,
        whiten: bool = False,
        bank_dtype: Literal["float32", "float16"] = "float32",
        max_patches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < coreset_ratio <= 1:
            raise ValueError(f"coreset_ratio must lie in (0, 1], got {coreset_ratio}")
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, got {num_neighbors}")
        if bank_dtype not in ("float32", "float16"):
            raise ValueError(f"bank_dtype must be 'float32' or 'float16', got {bank_dtype!r}")
        if max_patches is not None and max_patches < 1:
            raise ValueError(f"max_patches must be at least 1, or null for all, got {max_patches}")
        self.encoder = frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)
        self.axes = self.encoder.axes
        self.layers = list(layers)
        self.coreset_ratio = coreset_ratio
        self.num_neighbors = num_neighbors
        self.sigma = sigma
        self.whiten = whiten
        self.bank_dtype = bank_dtype
        self.max_patches = max_patches
        self.seed = seed
        self._search = RepeatedSearch()
        self.register_buffer("bank_", torch.empty(0))  # (M, E), as `_comparable` gives them
        self.register_buffer("owner_", torch.empty(0))  # (M,) int64, row of the item in `items`
        self.register_buffer("items_", torch.empty(0))  # uint8, the ids as JSON
        self.register_buffer("mean_", torch.empty(0))  # (E,) of the normal patches
        self.register_buffer("whitening_", torch.empty(0))  # (E, E), symmetric
        self.register_buffer("offset_", torch.empty(0))  # of the patches, in pixels, one per axis
        self.bank_: Tensor
        self.owner_: Tensor
        self.items_: Tensor
        self.mean_: Tensor
        self.whitening_: Tensor
        self.offset_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode: its statistics are part of what was fitted."""
        super().train(mode)
        self.encoder.eval()
        return self

    @property
    def items(self) -> list[str]:
        """Ids of the normal items that the bank knows."""
        self.check_fitted()
        return json.loads(bytes(self.items_.tolist()))

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Keep a coreset of the valid patches of all normal images, which must have one size."""
        found = self._collect(normal, workdir)
        device = next(self.encoder.parameters()).device  # large patches may lie elsewhere
        self.offset_ = patch_offset(self.encoder, self.layers[0], found.size)
        self.mean_, self.whitening_ = torch.zeros(1, device=device), torch.ones(1, 1, device=device)
        if self.whiten:
            mean, whitening = _whitening(found.patches)
            self.mean_, self.whitening_ = mean.to(device), whitening.to(device)
        self._make_comparable(found.patches)
        chosen = greedy_coreset(found.patches, self._count(found), seed=self.seed)
        bank, owner = found.patches[chosen].to(device), found.owner[chosen.cpu()].to(device)
        self._hold(bank, owner, found.items)
        return self

    @torch.no_grad()
    def add(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Append patches of further normal items, as many of theirs as `coreset_ratio` says.

        The greedy choice goes on from the bank: each pick is the new patch that is farthest from
        all rows. What `whiten` learnt stays that of `fit`.
        Raises ValueError for an item that the bank knows already.
        """
        known, device = self.items, self.bank_.device
        found = self._collect(normal, workdir)
        twice = sorted(set(known) & set(found.items))
        if twice:
            raise ValueError(f"the bank knows {_named(twice)} already; remove them before")
        self._make_comparable(found.patches)
        bank = self.bank_.to(found.patches.device)
        chosen = greedy_coreset(found.patches, self._count(found), bank=bank)
        owner = len(known) + found.owner[chosen.cpu()].to(device)
        self._hold(
            torch.cat([self.bank_, self._rounded(found.patches[chosen].to(device))]),
            torch.cat([self.owner_, owner]),
            known + found.items,
        )
        return self

    @torch.no_grad()
    def remove(self, items: Collection[str]) -> Self:
        """Delete every row that came from these items; the other rows stay as they are.

        What was learnt from the items is gone from the bank exactly, but nothing takes its place:
        patches of other items that were left out because a deleted row covered them do not come
        back, so near-by normal patches may score higher. `whiten`'s statistics stay. Where that
        matters, fit anew.
        Raises ValueError for ids that the bank does not know, and where no row would be left.
        """
        known, leaving = self.items, set(items)
        unknown = sorted(leaving - set(known))
        if unknown:
            raise ValueError(f"the bank does not know {_named(unknown)}; see `items`")
        stays = torch.tensor([item not in leaving for item in known], device=self.owner_.device)
        rows = stays[self.owner_]
        if not rows.any():
            raise ValueError(
                f"without these {len(leaving)} items the bank would be empty; add others before, "
                "or fit anew"
            )
        renumbered = stays.cumsum(0) - 1
        left = [item for item in known if item not in leaving]
        self._hold(self.bank_[rows], renumbered[self.owner_[rows]], left)
        return self

    def forget(self) -> None:
        """As of `Detector`; what was prepared to search the bank goes too."""
        super().forget()
        self._search = RepeatedSearch()

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps; an item without a valid pixel scores NaN."""
        self.check_fitted()
        images = batch.images["image"].to(self.bank_.device)
        return scored_by_size(images, lambda own, valid: self._scored(own, valid, batch.items))

    def _scored(self, images: Tensor, valid: Tensor, items: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, *spatial) of images (B, C, *spatial) of one size."""
        grid = self._comparable(self.patches(images))  # (B, *grid, E)
        cells = valid_patches(valid, grid.shape[1:-1])
        patches = grid[cells]
        check_finite(patches, items)
        distance = torch.full(cells.shape, torch.nan, device=grid.device)
        owner = torch.full(cells.shape, -1, device=grid.device)  # row of the bank
        near, row = self._search.nearest(patches, self.bank_)
        distance[cells], owner[cells] = near[:, 0], row[:, 0]
        maps = pixel_maps(distance, valid, offset=self.offset_, sigma=self.sigma)
        return self._image_scores(grid, distance, owner), maps

    @torch.inference_mode()
    def patches(self, images: Tensor) -> Tensor:
        """Mean feature of each neighbourhood of 3 units along each axis of the encoder's maps.

        Zeros surround the feature maps, as in the authors' code: a mean of fewer patches at the
        border would vary more, and the largest distance of a picture would often lie there.
        images: (B, C, *spatial). Returns (B, *grid, E).
        """
        return patch_grid(self.encoder, images, self.layers, window=3)

    def _comparable(self, patches: Tensor) -> Tensor:
        """Patches (..., E) as the bank holds them."""
        if not self.whiten:
            return patches
        return F.normalize((patches - self.mean_) @ self.whitening_, dim=-1)

    def _make_comparable(self, patches: Tensor) -> None:
        """As `_comparable` of (N, E), in place."""
        if self.whiten:
            for block in patches.split(_BLOCK):  # views: the patches are held once
                block.copy_(self._comparable(block.to(self.mean_.device)))

    def _collect(self, normal: NormalData, workdir: Path | None) -> NormalPatches:
        return collect(
            normal,
            self.patches,
            device=next(self.encoder.parameters()).device,
            workdir=workdir,
            max_patches=self.max_patches,
            seed=self.seed,
        )

    def _count(self, found: NormalPatches) -> int:
        return max(1, int(self.coreset_ratio * len(found.patches)))

    def _hold(self, bank: Tensor, owner: Tensor, items: list[str]) -> None:
        self.bank_, self.owner_ = self._rounded(bank), owner
        said = json.dumps(items).encode()
        self.items_ = torch.tensor(list(said), dtype=torch.uint8, device=owner.device)

    def _rounded(self, rows: Tensor) -> Tensor:
        held = rows.to(getattr(torch, self.bank_dtype))
        if not held.isfinite().all():
            raise ValueError(
                f"features up to {float(rows.abs().max()):.3g} do not fit into {self.bank_dtype}; "
                "set bank_dtype to float32"
            )
        return held

    def _image_scores(self, grid: Tensor, distance: Tensor, owner: Tensor) -> Tensor:
        """The largest patch distance of each image, weighed by its neighbourhood (eq. 6, 7)."""
        score, worst = distance.flatten(1).nan_to_num(-1.0).max(1)
        known = score >= 0
        items = torch.arange(len(grid), device=grid.device)
        count = min(self.num_neighbors, len(self.bank_))
        if count > 1 and known.any():
            patch = grid.flatten(1, -2)[items, worst][known]  # (B, E)
            normal = self.bank_[owner.flatten(1)[items, worst][known]].float()
            around = self.bank_[nearest(normal, self.bank_, count)[1]]  # (B, b, E), itself first
            reach = (patch[:, None] - around.float()).norm(dim=2)
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

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """A random vision transformer over volumes and eight of smooth noise."""
        from medssl.models.vit3d import ViT3DEncoder

        encoder = ViT3DEncoder(
            (16, 32, 24), patch_size=(2, 4, 4), embedding_dim=16, depth=1, num_heads=2
        )
        detector = cls(encoder, layers=["blocks.0"], coreset_ratio=0.2, num_neighbors=3)
        return detector, smooth_volumes()


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


def _named(items: list[str]) -> str:
    more = len(items) - _MOST_NAMED
    return "items " + ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
