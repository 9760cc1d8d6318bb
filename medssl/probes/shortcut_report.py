"""What an audit for shortcuts found, in numbers and in words."""

from dataclasses import asdict, dataclass
from typing import Any

from medssl.metrics import Interval

_CARRIED = 2 / 3  # share of a lead from which on the finding is taken to be easier to see there


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueReport:
    """How well the finding is told among the items of one value of the attribute, a site say.

    within: AUROC by a classifier trained on all values.
    unseen: AUROC by a classifier trained without the value.
    lead_p: p value of the classes lying further apart here than in the other values.
    carried: share of that lead which `unseen` has as well: near 1 where the finding is easier to
        see, near 0 where the classifier has learnt something that only this value has.
    All are None where this value, or all others, have too few patients of a class.
    """

    name: str
    items: int
    anomalous: int
    within: float | None = None
    unseen: float | None = None
    lead_p: float | None = None
    carried: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortcutReport:
    """What `audit` found; its docstring says how.

    finding: AUROC of the finding over all pairs of an anomalous and a normal item.
    balanced: over the pairs of one value of the attribute, where it cannot help; None where no
        value has both classes.
    attribute: AUROC of a value against the others, mean over the values. One above `finding` is a
        warning, but no shortcut while attribute and finding have nothing to do with each other.
    association: Cramer's V of attribute and finding, 0 to 1, every patient counting once.
    association_p, inflation_p: p values of the association, and of `finding` above `balanced`.
    alpha: level of the audit.
    left_out: number of items whose attribute is unknown or rare.
    """

    finding: Interval
    balanced: Interval | None
    attribute: float
    association: float
    association_p: float
    inflation_p: float | None
    values: tuple[ValueReport, ...]
    alpha: float
    left_out: int

    @property
    def confounding_p(self) -> float:
        """P value of the attribute going with the finding and the classifier using it."""
        return 1.0 if self.inflation_p is None else max(self.association_p, self.inflation_p)

    def mark_p(self, value: ValueReport) -> float:
        """P value of a lead that does not carry over, for all values that were compared."""
        if value.lead_p is None or value.carried is None or value.carried >= _CARRIED:
            return 1.0
        return min(1.0, value.lead_p * sum(other.lead_p is not None for other in self.values))

    @property
    def p_value(self) -> float:
        """Of the whole audit, which looks for two kinds of shortcut."""
        return min(1.0, 2 * min(self.confounding_p, *map(self.mark_p, self.values)))

    @property
    def alarm(self) -> bool:
        """Whether there is a shortcut, at the level of the audit."""
        return self.p_value <= self.alpha

    @property
    def verdict(self) -> str:
        """In words: what was seen, and what to do."""
        if self.balanced is None:
            return (
                "cannot tell: no value of the attribute has both classes, so that attribute and "
                "finding are one and the same. Add items of the missing class to a value."
            )
        found = [_mark(value) for value in self.values if 2 * self.mark_p(value) <= self.alpha]
        if 2 * self.confounding_p <= self.alpha:
            found.append(
                f"shortcut: the AUROC is {self.finding.value:.2f}, but {self.balanced.value:.2f} "
                "within values of the attribute, which goes with the finding (Cramer's V "
                f"{self.association:.2f}). Train and test on data that hold the finding equally "
                "often in every value, and go by the AUROC within values."
            )
        if not found:
            found.append(
                f"no sign of a shortcut: the AUROC is {self.finding.value:.2f}, and "
                f"{self.balanced.value:.2f} within values of the attribute."
            )
            if self.attribute > self.finding.value:
                found.append(
                    f"But the features tell the attribute better (AUROC {self.attribute:.2f}): see "
                    "that new data hold the finding equally often in every value."
                )
        return " ".join(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        judged = {"p_value": self.p_value, "alarm": self.alarm, "verdict": self.verdict}
        return asdict(self) | judged


def _mark(value: ValueReport) -> str:
    return (
        f"shortcut at {value.name!r}: the AUROC is {value.within:.2f} there, and "
        f"{value.unseen:.2f} by a classifier that never saw it. Look at its items for what only "
        "one class has, as a marker, text or a device; cover it and audit again."
    )
