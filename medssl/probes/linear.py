"""Linear classifiers on frozen features: logistic regression and support vector machine.

Logistic: multinomial logistic regression with an L2 penalty, by which Kornblith et al. ask how well
networks transfer (CVPR 2019, https://arxiv.org/abs/1805.08974).
LinearSVM: "CNN features off-the-shelf" (Razavian et al., CVPR-W 2014,
https://arxiv.org/abs/1403.6382); features of jittered copies of an image are further rows.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.probes.base import Probe

STRENGTHS = (1e4, 1e3, 1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of equals the first is taken
_FOLDS = 5
_UNTOLD = 1.0  # scikit-learn's default
_MAX_STEPS, _MAX_DIRECTIONS = 1000, 1000  # of Newton's method, and in each of its steps
_LEAST_GAIN = 1e-9  # of the loss, a sum over rows


class Logistic(Probe):
    """Minimizes the sum of -log p(label) plus strength / 2 times the squared weights.

    scaling: "unit" gives every row length 1; "standard" gives every column mean 0 and standard
        deviation 1 over the training rows.
    strength: of the penalty, larger shrinks more; the intercept is free. None takes the one of
        `STRENGTHS` whose loss is least in `grouped_folds`, and 1 where there are none; `strength_`
        tells which.

    The solution is scikit-learn's for C = 1 / strength: of two classes, too, where the penalty is
    on the one vector of log-odds.
    Differs from the paper: folds instead of one validation set, 9 strengths instead of 45, Newton's
    method instead of L-BFGS.
    """

    def __init__(
        self, *, scaling: Literal["unit", "standard"] = "standard", strength: float | None = None
    ) -> None:
        super().__init__()
        if scaling not in ("unit", "standard"):
            raise ValueError(f"scaling must be 'unit' or 'standard', got {scaling!r}")
        _check_strength(strength)
        self.scaling = scaling
        self.strength = strength
        self.register_buffer("weight_", torch.empty(0))  # (E, K) float64
        self.register_buffer("bias_", torch.empty(0))  # (K,) float64
        self.register_buffer("strength_", torch.empty(0))  # () float64
        self.weight_: Tensor
        self.bias_: Tensor
        self.strength_: Tensor

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Learn from features (S, E) and labels (S,), with every class from 0 to K - 1 among them.

        groups: (S,), whom a row belongs to; counts where the strength is chosen.
        Raises RuntimeError where the search does not converge.
        """
        check_rows(features, labels, groups)
        rows, labels = self._prepared(features), labels.long()
        strength = self._chosen(rows, labels, groups) if self.strength is None else self.strength
        self.weight_, self.bias_ = next(_solutions(rows, labels, [strength], self.scaling))
        self.strength_ = rows.new_tensor(strength)
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns probabilities (S, K) float64; rows sum to 1."""
        self.check_fitted()
        return F.softmax(self._prepared(features) @ self.weight_ + self.bias_, dim=1)

    def _prepared(self, features: Tensor) -> Tensor:
        rows = features.double()
        return F.normalize(rows, dim=1) if self.scaling == "unit" else rows

    def _chosen(self, rows: Tensor, labels: Tensor, groups: Tensor | None) -> float:
        losses = rows.new_zeros(len(STRENGTHS))
        for train, held_out in grouped_folds(labels, groups):
            known, targets = labels[train].unique(return_inverse=True)
            asked = torch.searchsorted(known, labels[held_out])
            solutions = _solutions(rows[train], targets, STRENGTHS, self.scaling)
            for place, (weight, bias) in enumerate(solutions):
                logits = rows[held_out] @ weight + bias
                losses[place] += F.cross_entropy(logits, asked, reduction="sum")
        return STRENGTHS[int(losses.argmin())] if losses.any() else _UNTOLD

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Two opposite directions with a little noise."""
        features, labels = _two_directions()
        return cls(strength=1.0), features, labels


class LinearSVM(Probe):
    """One class against the rest, squared hinge loss, on features of unit length.

    strength: of the L2 penalty, larger shrinks more; scikit-learn's C is 1 / strength. The
        intercept is penalized like a weight, as liblinear does.

    With copies of each image (the paper's crops, rotations and mirrors), fit the rows of
    `spread_copies` and let `average_copies` take the mean of their scores.
    Differs from the paper: no signed square of the features.
    """

    def __init__(self, *, strength: float = 1.0) -> None:
        super().__init__()
        _check_strength(strength)
        self.strength = strength
        self.register_buffer("weight_", torch.empty(0))  # (E, K) float64
        self.register_buffer("bias_", torch.empty(0))  # (K,) float64
        self.weight_: Tensor
        self.bias_: Tensor

    @torch.no_grad()
    def fit(self, features: Tensor, labels: Tensor, *, groups: Tensor | None = None) -> Self:
        """Learn from features (S, E) and labels (S,), with every class from 0 to K - 1 among them.

        groups: count for nothing here.
        """
        from sklearn.svm import LinearSVC

        num_classes = check_rows(features, labels)
        rows = F.normalize(features.double(), dim=1)
        machine = LinearSVC(C=1 / self.strength, dual=False, tol=1e-8, max_iter=10_000)
        machine.fit(rows.cpu().numpy(), labels.cpu().numpy())
        weight = torch.from_numpy(machine.coef_).mT.to(rows)
        bias = torch.from_numpy(machine.intercept_).to(rows)
        if num_classes == 2:  # one machine, whose positive side is class 1
            weight, bias = torch.cat([-weight, weight], 1), torch.cat([-bias, bias])
        self.weight_, self.bias_ = weight, bias
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """features: (S, E). Returns (S, K) float64, positive on the side of the class."""
        self.check_fitted()
        return F.normalize(features.double(), dim=1) @ self.weight_ + self.bias_

    @classmethod
    def example(cls) -> tuple[Self, Tensor, Tensor]:
        """Two opposite directions with a little noise."""
        features, labels = _two_directions()
        return cls(), features, labels


def spread_copies(
    features: Tensor, labels: Tensor, groups: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of V copies of each item, (S, V, E), as rows (S V, E) to fit on.

    Returns them with the labels and the groups (S V,); without `groups` every item is its own, so
    that no cross-validation parts its copies.
    """
    if features.ndim != 3 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"copies need features (S, V, E) and a label per item: got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if groups is None:
        groups = torch.arange(len(labels), device=labels.device)
    copies = features.shape[1]
    return (
        features.flatten(0, 1),
        labels.repeat_interleave(copies),
        groups.repeat_interleave(copies),
    )


def average_copies(scores: Tensor, copies: int) -> Tensor:
    """Mean (S, K) of the scores (S V, K) of V copies each, in the order of `spread_copies`."""
    if copies < 1 or len(scores) % copies:
        raise ValueError(f"{len(scores)} rows of scores are not {copies} copies of each item")
    return scores.unflatten(0, (-1, copies)).mean(1)


def check_rows(features: Tensor, labels: Tensor, groups: Tensor | None = None) -> int:
    """The number of classes K.

    Raises ValueError unless features are (S, E) and finite, labels and groups (S,), and every class
    from 0 to K - 1, two at least, has a row.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"one label per row of features (S, E): got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if groups is not None and groups.shape != labels.shape:
        raise ValueError(
            f"one group per row: got {tuple(groups.shape)} groups for {len(labels)} rows"
        )
    if not features.isfinite().all():
        broken = int((~features.isfinite()).any(1).sum())
        raise ValueError(f"{broken} of {len(features)} rows of features hold NaN or infinity")
    found = labels.unique().tolist()
    if len(found) < 2 or found != list(range(len(found))):
        raise ValueError(
            f"labels must be 0 to K - 1 with a row of every class and at least two, got {found}; "
            "number the classes anew"
        )
    return len(found)


def grouped_folds(labels: Tensor, groups: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows to train on and rows held out, at most 5 times; no group (S,) is on both sides.

    Groups whose rarest class is the same are dealt to the folds in turn, from the largest on.
    Held-out rows of a class that the training rows lack are left out, for they can tell nothing; so
    are folds in which nothing is left, and there are none where no class has rows of two groups.
    """
    owners = torch.arange(len(labels), device=labels.device) if groups is None else groups
    owners = owners.unique(return_inverse=True)[1]
    classes = F.one_hot(labels).double()  # (S, K)
    members = classes.new_zeros(int(owners.max()) + 1, classes.shape[1])
    members.index_add_(0, owners, classes)  # (G, K), rows of each class in each group
    rarest = classes.sum(0).where(members > 0, torch.inf).argmin(1)  # (G,)
    order = members.sum(1).argsort(descending=True, stable=True)
    order = order[rarest[order].argsort(stable=True)]
    fold_of = torch.empty_like(order)
    fold_of[order] = torch.arange(len(order), device=order.device) % _FOLDS
    folds = fold_of[owners]
    for fold in range(_FOLDS):
        train = (folds != fold).nonzero()[:, 0]
        known = labels[train].unique()
        held_out = ((folds == fold) & torch.isin(labels, known)).nonzero()[:, 0]
        if len(known) > 1 and len(held_out) > 0:
            yield train, held_out


def _solutions(
    rows: Tensor,
    labels: Tensor,
    strengths: Sequence[float],
    scaling: Literal["unit", "standard"],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (E, K) and biases (K,) for each strength; each search starts at the one before."""
    num_classes = int(labels.max()) + 1
    centre = rows.mean(0)
    scale = _deviations(rows) if scaling == "standard" else torch.ones_like(centre)
    left, lengths, right = torch.linalg.svd((rows - centre) / scale, full_matrices=False)
    basis = torch.cat([left * lengths, left.new_ones(len(rows), 1)], 1)  # the last: the intercept
    point = basis.new_zeros(basis.shape[1], num_classes)  # along the principal directions
    for strength in strengths:
        penalty = point.new_full((len(point), 1), strength * (2 if num_classes == 2 else 1))
        penalty[-1] = 0
        point = _minimum(basis, labels, penalty, point)
        weight = right.mT @ point[:-1] / scale[:, None]
        yield weight, point[-1] - centre @ weight


def _minimum(basis: Tensor, labels: Tensor, penalty: Tensor, start: Tensor) -> Tensor:
    """Where the loss of the logits basis (S, R) @ point (R, K) plus the penalty (R, 1) is least."""
    targets = F.one_hot(labels, start.shape[1]).to(start)

    def evaluated(point: Tensor) -> tuple[Tensor, float]:
        log_probability = F.log_softmax(basis @ point, dim=1)
        loss = (penalty * point**2).sum() / 2 - (targets * log_probability).sum()
        return log_probability.exp(), float(loss)

    point = start
    probability, loss = evaluated(point)
    for _ in range(_MAX_STEPS):
        gradient = basis.mT @ (probability - targets) + penalty * point
        step = _newton_step(basis, probability, penalty, gradient)
        gain = -float((gradient * step).sum())  # twice what a step of length 1 should gain
        if gain < _LEAST_GAIN:
            return point + step
        length, bound = 1.0, loss + 1e-13 * abs(loss)  # the loss has no more digits
        trial, found = evaluated(point + step)
        while found > bound - 1e-4 * length * gain:
            length /= 2
            trial, found = evaluated(point + length * step)
        point, probability, loss = point + length * step, trial, found
    raise RuntimeError(
        f"logistic regression did not converge in {_MAX_STEPS} steps; give a larger strength"
    )


def _newton_step(basis: Tensor, probability: Tensor, penalty: Tensor, gradient: Tensor) -> Tensor:
    """Minus the gradient (R, K) over the curvature, by conjugate gradients to a tenth of it."""
    diagonal = (basis**2).mT @ (probability * (1 - probability)) + penalty
    diagonal = diagonal.clamp(min=1e-30)
    step, residual = torch.zeros_like(gradient), -gradient
    direction = residual / diagonal
    size = (residual * direction).sum()
    goal = 0.01 * size
    for _ in range(_MAX_DIRECTIONS):
        if size <= goal:
            break
        moved = probability * (basis @ direction)  # (S, K)
        moved = moved - probability * moved.sum(1, keepdim=True)
        curved = basis.mT @ moved + penalty * direction
        length = size / (direction * curved).sum()
        step = step + length * direction
        residual = residual - length * curved
        last, size = size, (residual**2 / diagonal).sum()
        direction = residual / diagonal + size / last * direction
    return step


def _deviations(rows: Tensor) -> Tensor:
    """Standard deviation of each column, (E,); 1 where a column is constant but for rounding."""
    deviation, mean = torch.std_mean(rows, dim=0, correction=0)
    return deviation.where(deviation > 1e-7 * mean.abs(), 1.0)


def _check_strength(strength: float | None) -> None:
    if strength is not None and strength <= 0:
        raise ValueError(f"strength must be positive, got {strength}")


def _two_directions() -> tuple[Tensor, Tensor]:
    labels = torch.tensor([0, 1] * 6)
    noise = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return F.one_hot(labels, 4) + 0.1 * noise, labels
