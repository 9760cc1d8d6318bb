"""Labels proposed anew: several per image with their places, and given ones that look wrong.

ReLabel (Yun et al., CVPR 2021, https://arxiv.org/abs/2101.05022) lets a strong classifier label
places instead of images. Confident learning (Northcutt et al., JAIR 2021,
https://arxiv.org/abs/1911.00068) finds given labels that a classifier, asked about images it was
not trained on, contradicts with confidence. Both propose; a person decides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CORNERS_CONNECT = ((1, 1, 1),) * 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A label of an image with its place.

    label: class number. score: its largest probability there. num_places: places it covers.
    box: (top, left, bottom, right) on the grid of the label map, half-open.
    """

    label: int
    score: float
    num_places: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """An item whose given label is likely wrong.

    item: its row. given: its label. suggested: the class that is likely instead.
    score: how much more probable the suggested class is, in [-1, 1]; larger is more suspicious.
    """

    item: int
    given: int
    suggested: int
    score: float


def place_logits(feature_map: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a linear classifier of pooled features says of each place: W f(h, w) + b.

    ReLabel sec. 3.2, the class activation of Zhou et al. (CVPR 2016,
    https://arxiv.org/abs/1512.04150) with its bias. Its mean over the places is what the classifier
    says of the mean feature, so nothing is trained for it.

    feature_map: (S, E, h, w). weight: (K, E). bias: (K,). Returns (S, K, h, w).
    """
    return torch.einsum("ke,sehw->skhw", weight, feature_map) + bias[:, None, None]


def crop_labels(logits: Tensor, boxes: Tensor) -> Tensor:
    """Probabilities of the classes in one crop of each image, (S, K); rows sum to 1.

    LabelPooling (ReLabel sec. 3.3): the label map is averaged over the crop, interpolated linearly
    between places as RoIAlign does, and then its softmax is taken.

    logits: (S, K, h, w), as of `place_logits`. boxes: (S, 4), (top, left, bottom, right) of the
    crops as shares of the image's height and width.

    Differs from the paper: all classes of the label map are kept, not the five highest.
    """
    from torchvision.ops import roi_align

    if boxes.shape != (len(logits), 4) or logits.ndim != 4:
        raise ValueError(
            "expected logits (S, K, h, w) and one box (S, 4) for each image: got "
            f"{tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    top, left, bottom, right = boxes.unbind(1)
    inside = (boxes >= 0).all() and (boxes <= 1).all()
    if not (inside and (top < bottom).all() and (left < right).all()):
        raise ValueError(
            "boxes are (top, left, bottom, right) in [0, 1], top above bottom and left before right"
        )
    height, width = logits.shape[-2:]
    number = torch.arange(len(logits), device=logits.device)
    corners = (number, left * width, top * height, right * width, bottom * height)
    rows = torch.stack([side.to(logits) for side in corners], 1)
    return roi_align(logits, rows, 1, aligned=True)[:, :, 0, 0].softmax(1)


def proposals(logits: Tensor, *, threshold: float = 0.5) -> list[list[Proposal]]:
    """The labels of each image with their places, the most probable first.

    A proposal is a connected region, corners connecting, in which the softmax over the classes
    gives one class more than `threshold`. From a threshold of 0.5 on a place has one label at most.

    logits: (S, K, h, w), as of `place_logits`.
    """
    if logits.ndim != 4:
        raise ValueError(f"expected logits (S, K, h, w), got {tuple(logits.shape)}")
    return [_proposals(of_image, threshold) for of_image in logits.softmax(1)]


def _proposals(probabilities: Tensor, threshold: float) -> list[Proposal]:
    """probabilities: (K, h, w) of one image."""
    from scipy.ndimage import find_objects, label

    found = []
    for kind in (probabilities > threshold).any(2).any(1).nonzero()[:, 0].tolist():
        values = probabilities[kind].detach().cpu().numpy()
        regions, _ = label(values > threshold, structure=_CORNERS_CONNECT)
        for number, (rows, columns) in enumerate(find_objects(regions), 1):
            inside = values[regions == number]
            found.append(
                Proposal(
                    label=kind,
                    score=float(inside.max()),
                    num_places=inside.size,
                    box=(rows.start, columns.start, rows.stop, columns.stop),
                )
            )
    return sorted(found, key=lambda one: (-one.score, one.label, one.box))


def suspects(labels: Tensor, probabilities: Tensor) -> list[Suspect]:
    """Items whose given label is likely wrong, the most suspicious first.

    A class is confidently present where its probability reaches the mean probability that it has in
    the items given its label (sec. 3.1, eq. 2). An item is suspect where the most probable of its
    confident classes is not the one it was given (the off-diagonal of the confident joint, eq. 1),
    and is ranked by the margin between the two (sec. 3.2).

    labels: (S,) int64 in 0 to K - 1. probabilities: (S, K), each row from a classifier that has not
    seen the item or another of its patient, as by cross-validation: one that has believes the label
    it was given, and one that is too sure of itself makes many suspects of right labels. A class
    that no item was given is not suggested.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "expected labels (S,) and probabilities (S, K): got "
            f"{tuple(labels.shape)} and {tuple(probabilities.shape)}"
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("expected probabilities in [0, 1]; apply a softmax to logits first")
    num_classes = probabilities.shape[1]
    if not ((labels >= 0) & (labels < num_classes)).all():
        raise ValueError(f"labels must lie in 0 to {num_classes - 1}; leave unknown items out")
    given = probabilities.gather(1, labels[:, None])[:, 0]  # (S,) self-confidence
    total = given.new_zeros(num_classes).index_add_(0, labels, given)
    thresholds = total / torch.bincount(labels, minlength=num_classes)  # (K,); NaN reaches nothing
    confident = probabilities.masked_fill(~(probabilities >= thresholds), -1)
    best, suggested = confident.max(1)
    rows = ((best >= 0) & (suggested != labels)).nonzero()[:, 0].tolist()
    found = [
        Suspect(
            item=row,
            given=int(labels[row]),
            suggested=int(suggested[row]),
            score=float(best[row] - given[row]),
        )
        for row in rows
    ]
    return sorted(found, key=lambda one: (-one.score, one.item))
