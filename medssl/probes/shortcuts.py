"""Do features tell a finding by itself, or by the site, the scanner, the view or a marker?

A classifier that reads the site where sites hold the finding in different shares, or a marker that
one site draws on its anomalous items, does well on such data and nowhere else (Zech et al., PLOS
Medicine 2018, https://doi.org/10.1371/journal.pmed.1002683; Geirhos et al., Nature Machine
Intelligence 2020, https://arxiv.org/abs/2004.07780).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.metrics import Interval, OneClassError, auroc, auroc_of_draws, draws_of_groups
from medssl.probes.permutation import by_chance
from medssl.probes.shortcut_report import ShortcutReport, ValueReport

_DRAWS = 1_000_000  # entries of draws held at once
_FEWEST = 10  # patients that a value of the attribute needs
_FEWEST_OF_A_CLASS = 5  # patients of each class that it needs to be compared with the others

_Test = Callable[..., tuple[float, float]]  # `by_chance` with its repeats and generator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Items:
    """What is audited.

    features: (S, E) float64, of deviation 1 over all items: over those of a fold without a marker,
        the direction of the marker would be blown up.
    labels, codes (of the attribute), owners: (S,) int64 from 0 on.
    """

    features: Tensor
    labels: Tensor
    codes: Tensor
    owners: Tensor

    def where(self, rows: Tensor) -> "_Items":
        return _Items(
            features=self.features[rows],
            labels=self.labels[rows],
            codes=self.codes[rows],
            owners=self.owners[rows].unique(return_inverse=True)[1],
        )

    def classes(self) -> Tensor:
        """(P,) 0 where none of a patient's items is anomalous, 2 where all are, else 1."""
        share = torch.bincount(self.owners, self.labels) / torch.bincount(self.owners)
        return share.ceil().long() + share.floor().long()


def audit(
    features: Tensor,
    finding: Tensor,
    attribute: Sequence[str | None],
    patients: Sequence[str | None],
    *,
    seed: int,
    folds: int = 5,
    alpha: float = 0.05,
    repeats: int = 1000,
) -> ShortcutReport:
    """Whether a classifier of the finding leans on the attribute, beyond chance.

    features: (S, E), frozen. finding: (S,), 0 normal, 1 anomalous. attribute: site, scanner, view,
    marker ... of each item, None where unknown. patients: whom it belongs to; an item without one
    is its own. alpha: share of sound data sets that may raise an alarm, at most. repeats: of
    permutations and of draws for intervals.

    Scores come from a ridge classifier trained on other patients. Two kinds of shortcut are looked
    for, each at half of `alpha`:

    Confounding: the attribute goes with the finding, and the classifier uses it. Both p values must
    be small: of the association, where the attribute is handed on among all patients; and of pairs
    of one value being told apart worse than pairs at large, where it is handed on among patients of
    one class. Either alone is harmless: a site that has the finding more often but looks like the
    others, or one that looks different but has it as often. A classifier always uses the latter a
    little, in the direction that chance gave it, so the second p value alone would be small too
    often.

    A mark of one value, as a marker that one site draws on anomalous items: the two classes lie
    further apart there than in the other values (mean scores in standard deviations; once shift and
    scale of every value are taken off, it is handed on within classes; Bonferroni over the values),
    and the classifier keeps less than two thirds of that lead when trained without the value. The
    last is meant to spare values where the finding is only easier to see; with few patients it may
    not.

    What goes with the finding in the same way in every value cannot be told from it.

    Raises ValueError where fewer than two values have 10 patients, or `repeats` are too few for
    `alpha`; OneClassError where the finding is all 0 or all 1.
    """
    items, names = _known(features, finding, attribute, patients)
    if 4 * len(names) > alpha * (repeats + 1):
        raise ValueError(
            f"{len(names)} values at alpha {alpha} need at least {4 * len(names) / alpha:.0f} "
            f"repeats, got {repeats}; take more, or join values"
        )
    generator = torch.Generator().manual_seed(seed)
    fold = _folds(items.classes(), folds, generator)[items.owners]
    scores = _held_out(items, items.labels[:, None], fold)[:, 0]
    whole, balanced = _with_intervals(items, scores, repeats, seed)
    tested = partial(by_chance, repeats=repeats, generator=generator)
    all_patients = torch.zeros_like(items.classes())
    association = tested(partial(_cramers_v, items), items.codes, items.owners, all_patients)
    apart = partial(_balanced_auroc, items, -scores)  # larger is worse
    inflation = tested(apart, items.codes, items.owners, items.classes())
    return ShortcutReport(
        finding=whole,
        balanced=balanced,
        attribute=_attribute_auroc(items, folds, generator),
        association=association[0],
        association_p=association[1],
        inflation_p=None if balanced is None else inflation[1],
        values=_values(items, names, scores, fold, tested),
        alpha=alpha,
        left_out=len(attribute) - len(items.labels),
    )


def _known(
    features: Tensor,
    finding: Tensor,
    attribute: Sequence[str | None],
    patients: Sequence[str | None],
) -> tuple[_Items, list[str]]:
    """The items whose attribute is known and not rare, and the names of its codes."""
    lengths = [len(column) for column in (features, finding, attribute, patients)]
    if len(set(lengths)) != 1 or features.ndim != 2 or not features.isfinite().all():
        raise ValueError(
            "features (S, E) must be finite, with one finding, attribute and patient per row: got "
            f"{tuple(features.shape)} and {lengths[1:]}"
        )
    owners = [(i,) if patient is None else patient for i, patient in enumerate(patients)]
    having = Counter(name for name, _ in set(zip(attribute, owners, strict=True)))
    names = sorted(n for n, size in having.items() if n is not None and size >= _FEWEST)
    if len(names) < 2:
        raise ValueError(
            f"an audit compares two or more values of the attribute of {_FEWEST} patients each, "
            f"got {len(names)}; join rare values"
        )
    codes = {name: code for code, name in enumerate(names)}
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    rows = features.detach().cpu().double()
    items = _Items(
        features=rows / rows.std(0, correction=0).clamp(min=1e-9),
        labels=finding.cpu().long(),
        codes=torch.tensor([-1 if name is None else codes.get(name, -1) for name in attribute]),
        owners=torch.tensor([numbers[owner] for owner in owners]),
    )
    known = items.codes >= 0
    kinds = finding.cpu()[known].unique().tolist()
    if kinds != [0, 1]:
        raise OneClassError(
            f"the finding must be 0 and 1 where the attribute is known, got {kinds}"
        )
    return items.where(known), names


def _folds(strata: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold for every patient, (P,); each stratum is spread evenly over the folds."""
    order = (torch.rand(len(strata), generator=generator) + strata).argsort()
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold


def _held_out(items: _Items, targets: Tensor, fold: Tensor, without: int = -1) -> Tensor:
    """Ridge predictions (S, K) of targets (S, K) less their mean, by the other folds.

    fold: (S,). without: code of the attribute whose items are not trained on.
    The penalty, E for features of deviation 1, suits a signal that is as strong as the noise.
    """
    found = torch.zeros(targets.shape, dtype=torch.float64)
    penalty = items.features.shape[1] * torch.eye(items.features.shape[1], dtype=torch.float64)
    for number in fold.unique():
        rows = (fold != number) & (items.codes != without)
        centre = items.features[rows].mean(0)
        x, y = items.features[rows] - centre, targets[rows].double()
        weights = torch.linalg.solve(x.mT @ x + penalty, x.mT @ (y - y.mean(0)))
        found[fold == number] = (items.features[fold == number] - centre) @ weights
    return found


def _attribute_auroc(items: _Items, folds: int, generator: torch.Generator) -> float:
    """Of every value against the others, by classifiers of other patients; mean over values."""
    of_patient = torch.zeros_like(items.classes())
    of_patient[items.owners] = items.codes
    values = F.one_hot(items.codes)
    scores = _held_out(items, values, _folds(of_patient, folds, generator)[items.owners])
    return sum(map(auroc, scores.mT, values.mT)) / values.shape[1]


def _cramers_v(items: _Items, codes: Tensor) -> Tensor:
    """Of the finding and codes (R, S); a patient's items share its weight."""
    weights = 1 / torch.bincount(items.owners).double()[items.owners]
    anomalous = weights * items.labels
    share = anomalous.sum() / weights.sum()
    chi_squared = torch.zeros(len(codes), dtype=torch.float64)
    for code in items.codes.unique():
        here = (codes == code).double()
        size = here @ weights
        excess = here @ anomalous - size * share
        chi_squared += excess.square() / (size * share * (1 - share)).clamp(min=1e-9)
    return (chi_squared / weights.sum()).sqrt()


def _balanced_auroc(
    items: _Items, scores: Tensor, codes: Tensor, counts: Tensor | int = 1
) -> Tensor:
    """AUROC over the pairs of one value, (R,); NaN where there is none.

    codes: (R, S) or (1, S). counts: how often each of R draws holds an item, (R, S).
    """
    won = pairs = torch.zeros((), dtype=torch.float64)
    for code in items.codes.unique():
        weights = counts * (codes == code).long()
        of_code = (weights * items.labels).sum(1) * (weights * (1 - items.labels)).sum(1)
        won = won + auroc_of_draws(scores, items.labels, weights).nan_to_num() * of_code
        pairs = pairs + of_code
    return won / pairs


def _with_intervals(
    items: _Items, scores: Tensor, repeats: int, seed: int
) -> tuple[Interval, Interval | None]:
    """AUROC of the finding over all pairs, and over those of one value."""
    counts = draws_of_groups([str(owner) for owner in items.owners.tolist()], repeats, seed)
    blocks = counts.split(max(1, _DRAWS // counts.shape[1]))
    whole = torch.cat([auroc_of_draws(scores, items.labels, block) for block in blocks])
    codes = items.codes[None]
    balanced = torch.cat([_balanced_auroc(items, scores, codes, block) for block in blocks])
    value = _balanced_auroc(items, scores, codes).item()
    return (
        Interval(auroc(scores, items.labels), *_tails(whole)),
        None if math.isnan(value) else Interval(value, *_tails(balanced)),
    )


def _tails(draws: Tensor) -> list[float]:
    """What 95 % of the draws (R,) lie between; NaN counts nowhere."""
    return draws.nanquantile(draws.new_tensor([0.025, 0.975])).tolist()


def _separation(scores: Tensor, labels: Tensor, members: Tensor) -> Tensor:
    """Distance of the classes' mean scores in standard deviations within them, (R,).

    members: (R, S) bool, which items count.
    """
    sizes, means, squares = [], [], []
    for label in (0, 1):
        of_class = (members & (labels == label)).double()
        sizes.append(of_class.sum(1))
        means.append(of_class @ scores / sizes[-1])
        squares.append(of_class @ scores.square() - sizes[-1] * means[-1].square())
    variance = (squares[0] + squares[1]) / (sizes[0] + sizes[1])
    return (means[1] - means[0]) / variance.sqrt()


def _lead(scores: Tensor, labels: Tensor, code: int, codes: Tensor) -> Tensor:
    """By how much the classes lie further apart in one value than in the others, (R,)."""
    here = codes == code  # (R, S)
    return _separation(scores, labels, here) - _separation(scores, labels, ~here)


def _level(scores: Tensor, items: _Items) -> Tensor:
    """The scores less the shift and the scale of every value, each with both classes."""
    level = scores.clone()
    for code in items.codes.unique():
        here = items.codes == code
        sides = [scores[here & (items.labels == label)] for label in (0, 1)]
        around = torch.cat([side - side.mean() for side in sides])
        middle = (sides[0].mean() + sides[1].mean()) / 2
        level[here] = (scores[here] - middle) / around.std(correction=0)
    return level


def _has_enough(items: _Items, code: int) -> bool:
    """Whether a value has enough patients of each class."""
    sides = [items.owners[(items.codes == code) & (items.labels == label)] for label in (0, 1)]
    return min(len(side.unique()) for side in sides) >= _FEWEST_OF_A_CLASS


def _values(
    items: _Items, names: Sequence[str], scores: Tensor, fold: Tensor, tested: _Test
) -> tuple[ValueReport, ...]:
    """Every value; those with enough patients of each class are compared with one another."""
    compared = [code for code in range(len(names)) if _has_enough(items, code)]
    rows = torch.isin(items.codes, torch.tensor(compared, dtype=torch.int64))
    part = items.where(rows)
    level = _level(scores[rows], part)
    found = []
    for code, name in enumerate(names):
        here = items.codes == code
        labels = items.labels[here]
        told: dict[str, float | None] = {}
        if code in compared and len(compared) > 1:
            unseen = _held_out(items, items.labels[:, None], fold, without=code)[here, 0]
            statistic = partial(_lead, level, part.labels, code)
            lead, lead_p = tested(statistic, part.codes, part.owners, part.classes())
            others = _separation(level, part.labels, part.codes[None] != code)
            kept = _separation(unseen, labels, torch.ones(1, len(labels), dtype=torch.bool))
            told = {
                "within": auroc(scores[here], labels),
                "unseen": auroc(unseen, labels),
                "lead_p": lead_p,
                "carried": (kept - others).item() / lead if lead > 0 else None,
            }
        found.append(ValueReport(name=name, items=len(labels), anomalous=int(labels.sum()), **told))
    return tuple(found)
