"""Similarity under a condition in words, after GeneCIS (Vaze et al., CVPR 2023,
https://arxiv.org/abs/2306.07969), with templates from one's own table of attributes.

A template asks which image of a small gallery is like a reference under a condition ("brightness",
"dark"). One image is right, and the others mislead whoever looks at the image or the words alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.metrics import Interval, bootstrap
from medssl.probes.retrieval import composed, recall_at

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
_KS = (1, 2, 3)  # of the recalls, as in the authors' code


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One question.

    task: of `TASKS`. condition: its words, the name of an attribute or object where the task is to
        focus or to add an object, a value of an attribute where the task is to change it.
    reference, target, distractors: rows of the table; target and distractors are the gallery.
    """

    task: str
    condition: str
    reference: int
    target: int
    distractors: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecall:
    """How often the target is among the k nearest of its gallery.

    recall: "image", "text" or "image + text" -> "recall_at_k" -> interval.
    chance: "recall_at_k" -> what guessing gives. templates: how many were asked.
    """

    recall: dict[str, dict[str, Interval]]
    chance: dict[str, float]
    templates: int


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """The columns of the attributes, and after them those of the objects.

    codes: (S, C) int64, an attribute's place in its `values`, 1 for an object that is there.
    """

    codes: Tensor
    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    patients: Tensor  # (S,) int64


def build_templates(
    attributes: Mapping[str, Sequence[str]],
    objects: Mapping[str, Sequence[bool]],
    *,
    groups: Sequence[str],
    gallery: int = 15,
    count: int = 2000,
    seed: int = 0,
) -> list[Template]:
    """Templates of every task for which the table has enough rows; the same seed gives the same.

    Focus on A: the target has the reference's value of A and differs from it in as many other
    columns as possible; the distractors differ in A and agree elsewhere as far as possible.
    Change A to v: the target has v and agrees with the reference elsewhere as far as possible; half
    of the distractors agree most without having v, half have v and agree in less than the target;
    where there are too few of one kind there are more of the other.
    For objects, A is whether it is there: focus is on one that is, change adds one that is not.
    Target and distractors are of other patients than the reference.

    attributes: column -> value of each row. objects: name -> whether each row shows it.
    groups: patient of each row; where unknown, the row's own name.
    gallery: images to choose from, the target included. count: most templates of a task.

    Differs from the paper: target and distractors are ranked by the agreement of table columns,
    where the paper has annotated objects and attributes of natural images.
    """
    if gallery < 2 or count < 1:
        raise ValueError(f"gallery must be at least 2 and count 1, got {gallery} and {count}")
    table = _table(attributes, objects, groups)
    templates = []
    for task in TASKS:
        generator = torch.Generator().manual_seed(seed)
        questions = _questions(table, task)
        found: list[Template] = []
        for place in torch.randperm(len(questions), generator=generator).tolist():
            if len(found) == count:
                break
            template = _template(table, task, questions[place], gallery, generator)
            if template is not None:
                found.append(template)
        templates += found
    if not templates:
        raise ValueError(
            f"the table's {len(table.codes)} rows make no gallery of {gallery}; give more rows or "
            "columns, or a smaller gallery"
        )
    return templates


def run(
    templates: Sequence[Template],
    images: Tensor,
    texts: Tensor,
    *,
    groups: Sequence[str],
    weight: float = 0.5,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, TaskRecall]:
    """Recall of the image alone, the words alone, and their weighted mean, for each task.

    A tie is lost. Intervals are by the patient of the reference.

    images: (S, d) embeddings of the table's rows in the shared space.
    texts: (N, d), row n of the condition of template n.
    groups: as given to `build_templates`. weight: share of the words.
    Differs from the authors' code: image and text have unit length before they are averaged.
    """
    if len(texts) != len(templates) or len(images) != len(groups):
        raise ValueError(
            f"one text per template and one group per image: got {len(texts)} texts for "
            f"{len(templates)} templates and {len(groups)} groups for {len(images)} images"
        )
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ValueError("some embeddings of images or texts are NaN or infinite")
    results = {}
    for task in dict.fromkeys(template.task for template in templates):
        rows = [row for row, template in enumerate(templates) if template.task == task]
        asked = [templates[row] for row in rows]
        gallery = _gallery(asked).to(images.device)  # (n, G), the target first
        references = images[[template.reference for template in asked]]
        owners = [groups[template.reference] for template in asked]
        candidates = F.normalize(images, dim=-1)[gallery]  # (n, G, d)
        recall = {}
        for method, share in {"image": 0.0, "text": 1.0, "image + text": weight}.items():
            queries = composed(references, texts[rows], weight=share)
            similarity = torch.einsum("nd,ngd->ng", queries, candidates)
            recall[method] = _recalls(similarity, owners, repeats, seed)
        chance = {f"recall_at_{k}": min(1.0, k / gallery.shape[1]) for k in _KS}
        results[task] = TaskRecall(recall=recall, chance=chance, templates=len(rows))
    return results


def _recalls(
    similarity: Tensor, owners: Sequence[str], repeats: int, seed: int
) -> dict[str, Interval]:
    """similarity: (n, G), the target first."""
    right = torch.zeros_like(similarity, dtype=torch.bool)
    right[:, 0] = True
    return {
        f"recall_at_{k}": bootstrap(
            lambda values: float(values.mean()),
            recall_at(k, similarity, right).cpu(),
            groups=owners,
            repeats=repeats,
            seed=seed,
        )
        for k in _KS
    }


def _gallery(templates: Sequence[Template]) -> Tensor:
    """Rows of the gallery of each, the target first: (n, G)."""
    rows = [(template.target, *template.distractors) for template in templates]
    sizes = sorted({len(of) for of in rows})
    if len(sizes) > 1:
        raise ValueError(f"the galleries of a task must have one size, got sizes {sizes}")
    return torch.tensor(rows)


def _table(
    attributes: Mapping[str, Sequence[str]],
    objects: Mapping[str, Sequence[bool]],
    groups: Sequence[str],
) -> _Table:
    names = (*attributes, *objects)
    if len(names) < 2:
        raise ValueError(
            "templates need two columns at least, one to ask for and one to mislead; got "
            f"{list(names)}"
        )
    for name, cells in (*attributes.items(), *objects.items()):
        if len(cells) != len(groups):
            raise ValueError(f"column {name!r} has {len(cells)} rows, and groups {len(groups)}")
    for name, words in attributes.items():
        if not all(words):
            raise ValueError(f"column {name!r} has empty cells; leave rows with unknown values out")
    values = [tuple(sorted(set(words))) for words in attributes.values()]
    codes = [
        [known.index(word) for word in words]
        for words, known in zip(attributes.values(), values, strict=True)
    ]
    codes += [[int(there) for there in cells] for cells in objects.values()]
    patient = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    return _Table(
        codes=torch.tensor(codes).T,
        names=names,
        values=tuple(values),
        patients=torch.tensor([patient[group] for group in groups]),
    )


def _questions(table: _Table, task: str) -> list[tuple[int, int, int]]:
    """Reference, column and wanted value of all that a task may ask."""
    kind, _, of = task.partition("_")
    attributes = {column: range(len(values)) for column, values in enumerate(table.values)}
    objects = {column: [1] for column in range(len(attributes), len(table.names))}
    questions = []
    for column, wanted in (attributes if of == "attribute" else objects).items():
        own = table.codes[:, column]
        for value in wanted:
            references = (own == value) if kind == "focus" else (own != value)
            questions += [(row, column, value) for row in references.nonzero()[:, 0].tolist()]
    return questions


def _template(
    table: _Table,
    task: str,
    question: tuple[int, int, int],
    gallery: int,
    generator: torch.Generator,
) -> Template | None:
    """None where the table lacks a target or distractors."""
    reference, column, value = question
    same = table.codes == table.codes[reference]
    same[:, column] = False
    agreement = same.sum(1)  # (S,) other columns that agree with the reference
    near = agreement + torch.rand(len(agreement), generator=generator)  # ties in random order
    strangers = table.patients != table.patients[reference]
    right = strangers & (table.codes[:, column] == value)
    wrong = strangers & ~right
    if not right.any():
        return None
    if task.startswith("focus"):
        target = _first(-near, right, 1)[0]
        distractors = _first(near, wrong, gallery - 1)
        clear = agreement[target] < table.codes.shape[1] - 1  # it differs in something
    else:
        target = _first(near, right, 1)[0]
        less = _first(near, right & (agreement < agreement[target]), gallery - 1)
        unchanged = _first(near, wrong, gallery - 1)
        half = max((gallery - 1) // 2, gallery - 1 - len(unchanged))
        changed = less[:half]
        distractors = [*unchanged[: gallery - 1 - len(changed)], *changed]
        clear = agreement[target] > 0
    if not clear or len(distractors) < gallery - 1:
        return None
    by_name = task != "change_attribute"
    return Template(
        task=task,
        condition=table.names[column] if by_name else table.values[column][value],
        reference=reference,
        target=target,
        distractors=tuple(distractors),
    )


def _first(order: Tensor, allowed: Tensor, count: int) -> list[int]:
    """The allowed rows of the largest `order`, `count` at most."""
    count = min(count, int(allowed.sum()))
    return order.masked_fill(~allowed, -torch.inf).topk(count).indices.tolist()
