"""Linear segmentation of frozen feature maps, as DINOv2's (Oquab et al., TMLR 2024,
https://arxiv.org/abs/2304.07193, sec. 7.4), and how well predicted masks overlap the true ones."""

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.metrics import Interval, OneClassError, bootstrap
from medssl.probes.lbfgs import minimize

_LINEAR = {4: "bilinear", 5: "trilinear"}  # by the dimensions of maps


class LinearSegmentation(nn.Module):
    """Logistic regression from the features of a place to the classes of its pixels.

    Every valid pixel counts once, with the features of the place it lies in; so a place on the edge
    of a lesion is learnt as the mixture that it is, and a lesion smaller than a place counts too.

    penalty: times half the squared length of the weights, in units of standardized features, is
        added to the mean cross-entropy; larger is simpler.

    Differs from the paper: fitted to its end on all places instead of by steps on batches, without
    batch norm; the loss compares at the places, where the paper upsamples the logits before.
    """

    def __init__(self, *, penalty: float = 1e-4) -> None:
        super().__init__()
        if penalty <= 0:
            raise ValueError(f"penalty must be positive, got {penalty}")
        self.penalty = penalty
        self.register_buffer("weight_", torch.empty(0))  # (K, E)
        self.register_buffer("bias_", torch.empty(0))  # (K,)
        self.weight_: Tensor
        self.bias_: Tensor

    def fit(self, maps: Tensor, masks: Tensor, *, valid: Tensor | None = None) -> Self:
        """Learn from maps (S, E, h, w) and classes (S, H, W) int64, 0 to K - 1; or from those of
        volumes, (S, E, d, h, w) and (S, D, H, W).

        valid: bool of the shape of `masks`, False where a pixel counts nowhere.
        """
        if maps.ndim not in _LINEAR or masks.ndim != maps.ndim - 1 or len(maps) != len(masks):
            raise ValueError(
                "one mask (S, H, W) per map (S, E, h, w), or (S, D, H, W) per (S, E, d, h, w): got "
                f"{tuple(masks.shape)} and {tuple(maps.shape)}"
            )
        shares = _rows(_shares(masks, valid, maps.shape[2:]))  # (P, K)
        known = shares.sum(1) > 0
        if not known.any() or shares.shape[1] < 2:
            raise ValueError(
                f"at least two classes are needed to tell them apart, got {shares.shape[1]} in "
                f"{int(known.sum())} places with a valid pixel"
            )
        features, shares = _rows(maps.float())[known], shares[known]
        if not features.isfinite().all():
            raise ValueError(
                "some maps hold NaN or infinity where pixels are valid; leave them out"
            )
        std, mean = torch.std_mean(features, dim=0, correction=0)
        std = std.clamp(min=1e-6)
        features = (features - mean) / std
        weight = features.new_zeros(shares.shape[1], features.shape[1])
        bias = features.new_zeros(len(weight))

        def loss() -> Tensor:
            logits = F.linear(features, weight, bias)
            wrong = F.cross_entropy(logits, shares, reduction="sum") / shares.sum()
            return wrong + self.penalty / 2 * weight.square().sum()

        minimize(loss, [weight, bias])
        self.weight_ = weight / std
        self.bias_ = bias - self.weight_ @ mean
        return self

    def scores(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """maps: as of `fit`. size: (H, W) or (D, H, W) of the masks.

        Returns logits (S, K, *size), larger is more likely; RuntimeError before `fit`.
        """
        if not self.weight_.numel():
            raise RuntimeError("LinearSegmentation is not fitted; call fit(maps, masks) first")
        logits = F.linear(maps.float().movedim(1, -1), self.weight_, self.bias_).movedim(-1, 1)
        return F.interpolate(logits, tuple(size), mode=_LINEAR[maps.ndim])


def dice_and_iou(
    predicted: Tensor,
    masks: Tensor,
    *,
    classes: int,
    groups: Sequence[str | None],
    valid: Tensor | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """How the predicted pixels of each class overlap the true ones, with intervals by patient.

    "dice_k" is twice the pixels that both say over the sum of what each says, "iou_k" those over
    what either says; pixels of all items are counted together, as for the paper's mIoU, so that an
    item without the class only counts by what is wrongly found in it.

    predicted, masks: (S, *spatial axes) int64 classes, 0 to K - 1. valid: bool of that shape, False
    where a pixel counts nowhere. groups: patient or part of each item.
    Raises OneClassError for a class that no valid pixel is of.
    """
    if predicted.shape != masks.shape:
        raise ValueError(
            "predicted and true classes need one shape, got "
            f"{tuple(predicted.shape)} and {tuple(masks.shape)}"
        )
    counted = torch.ones_like(masks, dtype=torch.bool) if valid is None else valid
    found: dict[str, Interval] = {}
    for number in range(classes):
        said, true = (predicted == number) & counted, (masks == number) & counted
        pixels = [kind.flatten(1).sum(1) for kind in (said & true, said, true)]  # (S,) each
        for name, metric in (("dice", _dice), ("iou", _iou)):
            found[f"{name}_{number}"] = bootstrap(
                metric, *pixels, groups=groups, repeats=repeats, seed=seed
            )
    return found


def _dice(both: Tensor, said: Tensor, true: Tensor) -> float:
    _check_present(true)
    return float(2 * both.sum() / (said.sum() + true.sum()))


def _iou(both: Tensor, said: Tensor, true: Tensor) -> float:
    _check_present(true)
    return float(both.sum() / (said.sum() + true.sum() - both.sum()))


def _check_present(true: Tensor) -> None:
    if not true.sum():
        raise OneClassError("no valid pixel is of the class; measure the others only")


def _shares(masks: Tensor, valid: Tensor | None, grid: Sequence[int]) -> Tensor:
    """What share of the pixels of each place is valid and of each class, (S, K, *grid)."""
    kinds = [masks == number for number in range(int(masks.max()) + 1)]
    if valid is not None:
        kinds = [kind & valid for kind in kinds]
    return torch.cat(
        [F.interpolate(kind[:, None].float(), tuple(grid), mode="area") for kind in kinds], dim=1
    )


def _rows(maps: Tensor) -> Tensor:
    """(S, E, *grid) -> (S d h w, E)."""
    return maps.movedim(1, -1).flatten(0, -2)
