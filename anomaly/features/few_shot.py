"""Few-shot detection by AnomalyDINO (Damm et al., WACV 2025, https://arxiv.org/abs/2405.14529)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from anomaly.base import AnomalyMap, Detector, NormalData
from anomaly.examples import smooth_pictures, smooth_volumes
from anomaly.features.patches import check_finite, patch_grid
from anomaly.maps import pixel_maps, valid_patches
from anomaly.memory import RepeatedSearch
from anomaly.valid import by_size, scored_by_size
from medssl.data.sample import Batch, Sample
from medssl.models.encoder import Encoder, frozen
from medssl.models.folder import load_encoder


class FewShotNearest(Detector):
    """Cosine distance of each patch token to the nearest one of a few normal images, or of one.

    It learns nothing but keeps all their tokens, those of rotated copies too, so that few images
    make a large enough bank. Pictures or volumes, as the encoder takes; volumes are rotated in the
    plane of H and W.

    encoder: a self-supervised vision transformer, or the folder of one that `medssl pretrain`
        wrote; it stays frozen.
    layers: modules of the encoder's network whose tokens are put side by side; ["norm"] is the
        paper's, the normalized tokens of the last block.
    rotations: how many copies of each normal image are learnt, rotated by equal parts of a turn;
        1 learns it as it is, for images that are always upright. The paper's 8 is every 45 degrees.
    top_share: share of the valid patches whose largest distances have their mean as the score
        (eq. 2); at least one patch.
    sigma: of the Gaussian on the maps, in pixels, for all axes or one for each.
    A token is laid in the middle of its cell of the map.
    Differs from the paper: no patch is left out as background by the first principal component;
    mark what is not of interest as not valid. Of a rotated copy only the patches are learnt that
    lie wholly inside the image.
    """

    unbounded = False

    def __init__(
        self,
        encoder: Encoder | Path,
        *,
        layers: list[str],
        rotations: int = 8,
        top_share: float = 0.01,
        sigma: float | list[float] = 4.0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must name at least one module of the encoder's network")
        if rotations < 1:
            raise ValueError(f"rotations must be at least 1, got {rotations}")
        if not 0 < top_share <= 1:
            raise ValueError(f"top_share must lie in (0, 1], got {top_share}")
        self.encoder = frozen(load_encoder(encoder) if isinstance(encoder, Path) else encoder)
        self.axes = self.encoder.axes
        self.layers = list(layers)
        self.rotations = rotations
        self.top_share = top_share
        self.sigma = sigma
        self._search = RepeatedSearch()
        self.register_buffer("bank_", torch.empty(0))  # (M, E), of length 1
        self.bank_: Tensor

    def train(self, mode: bool = True) -> Self:
        """The encoder stays in evaluation mode: its statistics are part of what was fitted."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def fit(self, normal: NormalData, *, workdir: Path | None = None) -> Self:
        """Keep the tokens of all valid patches of the normal images and their rotated copies."""
        device = next(self.encoder.parameters()).device
        kept = []
        for batch in normal.batches():
            for _, images, valid in by_size(batch.images["image"].to(device)):
                for turn in range(self.rotations):
                    angle = 2 * math.pi * turn / self.rotations
                    kept.append(self._learnt(images, valid, angle, batch.items))
        self.bank_ = torch.cat(kept)
        if len(self.bank_) == 0:
            raise ValueError(f"none of the {len(normal)} normal items has a valid pixel")
        return self

    def forget(self) -> None:
        """As of `Detector`; what was prepared to search the bank goes too."""
        super().forget()
        self._search = RepeatedSearch()

    @torch.no_grad()
    def predict(self, batch: Batch) -> AnomalyMap:
        """Scores and maps, 0 to 2; an item without a valid pixel scores NaN."""
        self.check_fitted()
        images = batch.images["image"].to(self.bank_.device)
        return scored_by_size(images, lambda own, valid: self._scored(own, valid, batch.items))

    def _scored(self, images: Tensor, valid: Tensor, items: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Scores (B,) and maps (B, *spatial) of images (B, C, *spatial) of one size."""
        tokens = self._tokens(images)
        cells = valid_patches(valid, tokens.shape[1:-1])
        check_finite(tokens[cells], items)
        chord = self._search.nearest(tokens[cells], self.bank_)[0][:, 0]
        distance = torch.full(cells.shape, torch.nan, device=chord.device)
        distance[cells] = chord.square() / 2  # 1 - cosine of vectors of length 1
        return self._image_scores(distance), pixel_maps(distance, valid, sigma=self.sigma)

    def _tokens(self, images: Tensor) -> Tensor:
        """(B, C, *spatial) to tokens of length 1, (B, *grid, E)."""
        return F.normalize(patch_grid(self.encoder, images, self.layers), dim=-1)

    def _learnt(self, images: Tensor, valid: Tensor, angle: float, items: Sequence[str]) -> Tensor:
        """Tokens (n, E) of the patches that count of images rotated by `angle`, in radians."""
        if angle > 0:
            images, inside = rotated(images, angle), rotated(valid[:, None].float(), angle)[:, 0]
            valid = inside > 1 - 1e-4
        tokens = self._tokens(images)
        count = valid_patches(valid, tokens.shape[1:-1])
        if angle > 0:
            count &= ~valid_patches(~valid, tokens.shape[1:-1])
        check_finite(tokens[count], items)
        return tokens[count]

    def _image_scores(self, distance: Tensor) -> Tensor:
        """Mean of the largest distances (B, *grid) of each image, NaN where not valid."""
        largest = distance.flatten(1).nan_to_num(-1.0).sort(1, descending=True).values
        known = largest >= 0
        count = (self.top_share * known.sum(1).double()).floor().clamp_min(1)[:, None]
        taken = known & (torch.arange(largest.shape[1], device=largest.device) < count)
        return largest.where(taken, 0).sum(1) / taken.sum(1)  # 0 / 0 is NaN

    @classmethod
    def example(cls) -> tuple[Self, list[Sample]]:
        """A random vision transformer and pictures of smooth noise, one with invalid pixels."""
        from medssl.models.vit import ViTEncoder

        encoder = ViTEncoder("test_vit", image_size=64, options={"patch_size": 4})
        return cls(encoder, layers=["norm"], rotations=2, sigma=2.0), smooth_pictures()

    @classmethod
    def example_volume(cls) -> tuple[Self, list[Sample]]:
        """A random vision transformer over volumes of smooth noise."""
        from medssl.models.vit3d import ViT3DEncoder

        encoder = ViT3DEncoder(
            (16, 32, 24), patch_size=(2, 4, 4), embedding_dim=16, depth=1, num_heads=2
        )
        return cls(encoder, layers=["norm"], rotations=2, sigma=1.0), smooth_volumes()


def rotated(images: Tensor, angle: float) -> Tensor:
    """Images (B, C, H, W) or (B, C, D, H, W) rotated about the middle of H and W, with zeros where
    nothing was; linearly, by `angle` in radians, counter-clockwise as a picture is looked at."""
    height, width = images.shape[-2:]
    cosine, sine = math.cos(angle), math.sin(angle)
    theta = images.new_tensor(  # from places in the result to places in the image, (x, y) in -1..1
        [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]
    )
    flat = images.flatten(1, -3)  # slices are channels here
    places = F.affine_grid(theta.expand(len(flat), 2, 3), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, places, align_corners=False).reshape(images.shape)
