"""A bank of normal cells, and what one modality's says of a batch."""

import torch
from torch import Tensor

from anomaly.memory import RepeatedSearch, greedy_coreset
from anomaly.multimodal.fusion import ModalityScores
from anomaly.multimodal.modalities import ModalityName, cell_maps, valid_pixels
from anomaly.valid import largest
from medssl.data.sample import Batch


def check_share(**named: float) -> None:
    """Raises ValueError, naming it, for a share outside (0, 1]."""
    for name, share in named.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {share}")


def bank_of(cells: Tensor, ratio: float, *, seed: int) -> Tensor:
    """A coreset (M, E) of normal cells (N, E): the share `ratio` of them, at least one."""
    return cells[greedy_coreset(cells, max(1, int(ratio * len(cells))), seed=seed)]


def scores_from(
    bank: Tensor,
    search: RepeatedSearch,
    features: Tensor,
    valid: Tensor,
    batch: Batch,
    name: ModalityName,
    *,
    sigma: float,
    top: float,
) -> ModalityScores:
    """The distance of each valid cell to its nearest normal one: maps, and of the largest a mean.

    bank: (M, E). features: (B, h, w, E) of the batch. valid: (B, h, w) bool.
    sigma: of the Gaussian on the maps, in pixels. top: share of the valid cells whose mean is the
        score, at least one cell.
    """
    distance = torch.full(valid.shape, torch.nan, device=valid.device)
    if valid.any():
        distance[valid] = search.nearest(features[valid], bank)[0][:, 0]
    pixels = valid_pixels(batch, name).to(distance.device)
    maps = cell_maps(distance, batch, pixels, sigma=sigma)
    return ModalityScores(maps=maps, score=largest(distance, top))
