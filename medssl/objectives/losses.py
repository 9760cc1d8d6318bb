"""Losses that more than one method is built from."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.distributed import gathered, mean_of_all, own_rows, sum_of_all
from medssl.models.precision import full_precision

_SAME = 1 - 1e-6  # cosine from which on two embeddings are those of one and the same image


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; 0 log 0 counts as 0. (..., K) -> (...)."""
    return torch.special.entr(probabilities).sum(-1)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy of every student view against every other view of the teacher.

    Eq. 3 of DINO (https://arxiv.org/abs/2104.14294): the first G student views are the crops the
    teacher saw, in the same order, and a crop is never compared with itself.

    student: (V, B, K) log-probabilities.
    teacher: (G, B, K) probabilities, G <= V and V >= 2.
    Returns a scalar, the mean over pairs and items.
    """
    views, batch, _ = student.shape
    if len(teacher) > views or teacher.shape[1:] != student.shape[1:] or views < 2:
        raise ValueError(
            "student (V, B, K) must begin with the teacher's views (G, B, K) and hold at least "
            f"two: got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    with full_precision(student):
        pairs = -torch.einsum("gbk,vbk->gv", teacher, student) / batch  # (G, V) cross-entropies
    other = ~torch.eye(len(teacher), views, dtype=torch.bool, device=pairs.device)
    return pairs[other].mean()


def masked_distillation_loss(student: Tensor, teacher: Tensor, masked: Tensor) -> Tensor:
    """Mean over images of the mean cross-entropy at their masked places.

    Eq. 2 of iBOT (https://arxiv.org/abs/2111.07832), weighted as in DINOv2: an image counts once,
    however much of it is hidden; images with nothing hidden do not count.

    student: (M, K) log-probabilities and teacher: (M, K) probabilities at the masked places, in the
        order of `masked.nonzero()`. masked: (B, N) bool.
    """
    hidden = masked.sum(1)  # (B,)
    weight = (1 / hidden.clamp(min=1))[:, None].expand_as(masked)[masked]
    entropies = -(teacher * student).sum(-1)
    counting = mean_of_all((hidden > 0).sum().float())  # processes share a batch's masks unevenly
    return (entropies * weight).sum() / counting.clamp(min=1e-6)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, *, iterations: int = 3) -> Tensor:
    """Answers that are as sharp as `temperature` and use all prototypes equally over the batch.

    Sinkhorn-Knopp normalization of exp(logits / temperature) (SwAV, https://arxiv.org/abs/2006.09882,
    sec. 3.1; DINOv2, sec. 4): columns, then rows, `iterations` times. Rows of all processes count,
    however many each has.

    logits: (R, K). Returns (R, K), each row summing to 1.
    """
    answers = logits.float() / temperature  # logarithms, which cannot overflow
    prototypes = answers.shape[1]
    rows = sum_of_all(torch.tensor(float(len(answers)), device=answers.device)).log()
    for _ in range(iterations):
        columns = gathered(answers.logsumexp(0, keepdim=True)).logsumexp(0)
        answers = answers - columns - math.log(prototypes)
        answers = answers - answers.logsumexp(1, keepdim=True) - rows
    return (answers + rows).exp()


def koleo(embedding: Tensor) -> Tensor:
    """Minus the mean log distance of embeddings to their nearest neighbours; smaller is more even.

    The Kozachenko-Leonenko estimator (Sablayrolles et al., https://arxiv.org/abs/1806.03198, eq. 2)
    on the sphere, as in DINOv2. Neighbours come from all processes. An embedding has no distance to
    its own duplicate: images that are the same have no neighbour in each other, and where an image
    has no other, it does not count.

    embedding: (B, E) of one crop per image. Returns a scalar, 0 where nothing counts.
    """
    own = F.normalize(embedding.float(), dim=-1)
    everyone = gathered(own)
    with torch.no_grad(), full_precision(own):
        cosine = own @ everyone.mT
        cosine[:, own_rows(everyone)].fill_diagonal_(-2)
        cosine[cosine > _SAME] = -2
        best, nearest = cosine.max(1)
        counts = best > -1.5
    distance = (own - everyone[nearest]).square().sum(1).clamp(min=1e-12).sqrt()
    total = sum_of_all(counts.sum().float()) / len(everyone) * len(own)  # per process
    return -(distance.log() * counts).sum() / total.clamp(min=1)


def info_nce(
    first: Tensor, second: Tensor, *, temperature: float, same: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of finding row i of one side among all rows of the other, in both directions.

    InfoNCE (van den Oord et al., https://arxiv.org/abs/1807.03748, eq. 4) with cosines over
    `temperature`. Rows of all processes are candidates.

    first, second: (B, E), row i of one belongs to row i of the other.
    same: (B, N) int64; rows that share any of N numbers (of a patient, a study, a sentence) are
        not held against each other.
    Returns the scalars first -> second and second -> first; log of the number of candidates is
    chance.
    """
    sides = [F.normalize(side.float(), dim=-1) for side in (first, second)]
    everyone = [gathered(side) for side in sides]
    own = own_rows(everyone[0])
    target = torch.arange(own.start, own.stop, device=first.device)
    excluded = None
    if same is not None:
        excluded = (same[:, None] == gathered(same)[None]).any(-1)
        excluded[torch.arange(len(same), device=same.device), target] = False
    losses = []
    for side, others in ((sides[0], everyone[1]), (sides[1], everyone[0])):
        with full_precision(side):
            logits = side @ others.mT / temperature
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        losses.append(F.cross_entropy(logits, target))
    return losses[0], losses[1]
