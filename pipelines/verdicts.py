"""What reviewers answered about a model's mistakes: read, put together, and how far they agree.

The questions are those of Vasudevan et al., "When does dough become a bagel? Analyzing the
remaining mistakes on ImageNet", NeurIPS 2022, https://arxiv.org/abs/2205.04596.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERDICTS = {
    "right": "No mistake: the label is wrong, or both are valid",
    "minor": "Minor mistake: one can see why",
    "major": "Major mistake: obviously wrong",
}
CATEGORIES = {
    "fine_grained": "Fine-grained error: two similar classes",
    "out_of_vocabulary": "Fine-grained error, and what is shown is none of the classes",
    "spurious_correlation": "Spurious correlation: something beside the object decided",
    "non_prototypical": "Non-prototypical instance: an unusual example of its class",
}
UNDECIDED = "undecided"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reviewer says of a mistake: a key of VERDICTS; one of CATEGORIES, or None."""

    verdict: str
    category: str | None


Answers = Mapping[str, Answer]
"""What one reviewer answered, by item."""


def read_answers(file: Path, page: str) -> dict[str, Answer]:
    """What a reviewer answered; items without a verdict are left out.

    page: identity of the page that was to be filled in.
    Raises ValueError where the file is no review of that page.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        belongs = given["page"] == page
        told = {item: (one["verdict"], one["category"]) for item, one in given["answers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.name} is no review.json that a page gave back") from error
    if not belongs:
        raise ValueError(
            f"{file.name} was filled in for other predictions; give the table it belongs to"
        )
    for item, (verdict, category) in told.items():
        if verdict not in (None, *VERDICTS) or category not in (None, *CATEGORIES):
            raise ValueError(
                f"{file.name}, item {item}: expected a verdict of {', '.join(VERDICTS)} and a "
                f"category of {', '.join(CATEGORIES)}, got {verdict!r} and {category!r}"
            )
    return {
        item: Answer(verdict, None if verdict == "right" else category)
        for item, (verdict, category) in told.items()
        if verdict is not None
    }


def summarize(
    mistakes: Sequence[str], num_items: int, answers: Sequence[Answers]
) -> dict[str, Any]:
    """What the reviewers found together.

    A mistake counts as right where more than half of those who judged it say so; one that nobody
    judged stays a mistake. For the others, `counts` says how many have each category and severity,
    by most of the reviewers who call it wrong; "undecided" where two are named equally often.

    mistakes: their items. num_items: of all items, right ones too. answers: of each reviewer.
    """
    severities = ("minor", "major", UNDECIDED)
    counts = {name: dict.fromkeys(severities, 0) for name in (*CATEGORIES, UNDECIDED)}
    num_right = num_reviewed = 0
    for item in mistakes:
        votes = [of_one[item] for of_one in answers if item in of_one]
        wrong = [vote for vote in votes if vote.verdict != "right"]
        num_reviewed += bool(votes)
        if 2 * len(wrong) < len(votes):
            num_right += 1
        elif votes:
            category = _most([vote.category for vote in wrong])
            counts[category][_most([vote.verdict for vote in wrong])] += 1
    return {
        "reviewers": len(answers),
        "reviewed": num_reviewed,
        "called_right": num_right,
        "corrected_accuracy": share(num_items - len(mistakes) + num_right, num_items),
        "counts": counts,
        "agreement": _agreement(mistakes, answers) if len(answers) > 1 else None,
    }


def share(hits: int, total: int) -> dict[str, float]:
    """A share with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    low, high = binomtest(hits, total).proportion_ci(0.95, method="wilson")
    return {"value": hits / total, "low": float(low), "high": float(high)}


def cohen_kappa(first: Sequence[str | None], second: Sequence[str | None]) -> float | None:
    """Agreement of two reviewers beyond chance (Cohen 1960); 1 is perfect, 0 is chance.

    Both name a class of each item, or None, which leaves the item out. None where they named only
    one class, so that nothing can be said.
    """
    pairs = [pair for pair in zip(first, second, strict=True) if None not in pair]
    agreed = sum(one == other for one, other in pairs)
    firsts, seconds = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    by_chance = sum(count * seconds[name] for name, count in firsts.items())
    square = len(pairs) ** 2
    if by_chance == square:
        return None
    return (len(pairs) * agreed - by_chance) / (square - by_chance)


def krippendorff_alpha(reviewers: Sequence[Sequence[str | None]]) -> float | None:
    """Agreement of any number of reviewers beyond chance, for nominal classes; as `cohen_kappa`.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011,
    https://repository.upenn.edu/asc_papers/43, part C: what is missing (None) counts nowhere, nor
    does an item that only one reviewer judged.
    """
    units = [[name for name in unit if name is not None] for unit in zip(*reviewers, strict=True)]
    units = [unit for unit in units if len(unit) > 1]
    values = Counter(name for unit in units for name in unit)
    total = values.total()
    expected = total**2 - sum(count**2 for count in values.values())
    if expected == 0:
        return None
    observed = sum(
        (len(unit) ** 2 - sum(count**2 for count in Counter(unit).values())) / (len(unit) - 1)
        for unit in units
    )
    return 1 - (total - 1) * observed / expected


def _agreement(mistakes: Sequence[str], answers: Sequence[Answers]) -> dict[str, Any]:
    """Whether reviewers agree that there is a mistake, and of what severity and category it is."""
    questions: dict[str, Callable[[Answer], str | None]] = {
        "mistake": lambda answer: "no" if answer.verdict == "right" else "yes",
        "severity": lambda answer: None if answer.verdict == "right" else answer.verdict,
        "category": lambda answer: answer.category,
    }
    two = len(answers) == 2
    found: dict[str, Any] = {"statistic": "Cohen's kappa" if two else "Krippendorff's alpha"}
    for name, question in questions.items():
        told = [
            [question(of_one[item]) if item in of_one else None for item in mistakes]
            for of_one in answers
        ]
        found[name] = cohen_kappa(told[0], told[1]) if two else krippendorff_alpha(told)
    return found


def _most(named: Sequence[str | None]) -> str:
    """What is named most often; undecided where nothing is, or two things equally often."""
    ranked = Counter(name for name in named if name is not None).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return UNDECIDED
    return ranked[0][0]
