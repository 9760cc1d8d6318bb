"""Conditional similarity: templates against their rules, recalls against constructed embeddings."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from medssl.data.synthetic.shapes import shape_pictures
from medssl.probes.conditional import TASKS, Template, build_templates, run

VALUES = {"form": ("disk", "ring", "bar"), "light": ("bright", "dark"), "place": ("left", "right")}
OBJECTS = ("tube", "clip")
ROWS, GALLERY = 150, 9
SHORT = {"gallery": GALLERY, "count": 40}


def table(seed: int = 0, rows: int = ROWS) -> dict:
    """Random attributes and objects of three images per patient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(count, (rows,), generator=generator).tolist()

    return {
        "attributes": {name: [of[n] for n in draw(len(of))] for name, of in VALUES.items()},
        "objects": {name: [n == 1 for n in draw(2)] for name in OBJECTS},
        "groups": [f"patient{row // 3}" for row in range(rows)],
    }


def columns(made: dict) -> dict[str, list]:
    return {**made["attributes"], **made["objects"]}


def asked_column(made: dict, template: Template) -> str:
    if template.task != "change_attribute":
        return template.condition
    return next(name for name, words in VALUES.items() if template.condition in words)


def agreement(made: dict, asked: str, one: int, other: int) -> int:
    return sum(of[one] == of[other] for name, of in columns(made).items() if name != asked)


def of_task(made: dict, task: str, **changes) -> list[Template]:
    found = build_templates(**made, **{**SHORT, **changes})
    return [template for template in found if template.task == task]


@pytest.mark.parametrize("task", TASKS)
def test_only_the_target_meets_the_condition_and_no_image_is_of_the_references_patient(task: str):
    made = table()
    templates = of_task(made, task)
    assert len(templates) == 40
    for template in templates:
        cells = columns(made)[asked_column(made, template)]
        wanted = {
            "focus_attribute": cells[template.reference],
            "change_attribute": template.condition,
            "focus_object": True,
            "change_object": True,
        }[task]
        assert (cells[template.reference] == wanted) == task.startswith("focus")
        assert cells[template.target] == wanted
        gallery = {template.target, *template.distractors}
        assert len(gallery) == GALLERY
        owner = made["groups"][template.reference]
        assert all(made["groups"][row] != owner for row in gallery)


@pytest.mark.parametrize("task", ["focus_attribute", "focus_object"])
def test_focus_takes_the_least_similar_target_and_the_most_similar_distractors(task: str):
    made = table(1)
    for template in of_task(made, task):
        asked = asked_column(made, template)
        cells, reference = columns(made)[asked], template.reference
        others = [r for r in range(ROWS) if made["groups"][r] != made["groups"][reference]]
        like = {row: agreement(made, asked, reference, row) for row in others}
        right = [like[row] for row in others if cells[row] == cells[reference]]
        wrong = sorted(like[row] for row in others if cells[row] != cells[reference])
        assert like[template.target] == min(right)
        assert sorted(like[row] for row in template.distractors) == wrong[-(GALLERY - 1) :]


@pytest.mark.parametrize("task", ["change_attribute", "change_object"])
def test_change_misleads_by_what_is_unchanged_and_by_what_only_has_the_condition(task: str):
    made = table(2)
    for template in of_task(made, task):
        asked = asked_column(made, template)
        cells, reference = columns(made)[asked], template.reference
        others = [r for r in range(ROWS) if made["groups"][r] != made["groups"][reference]]
        like = {row: agreement(made, asked, reference, row) for row in others}
        wanted = cells[template.target]
        right = [like[row] for row in others if cells[row] == wanted]
        best = like[template.target]
        assert best == max(right)
        less = sorted(x for x in right if x < best)[-((GALLERY - 1) // 2) :]
        unchanged = sorted(like[row] for row in others if cells[row] != wanted)
        have = [row for row in template.distractors if cells[row] == wanted]
        have_not = [row for row in template.distractors if cells[row] != wanted]
        assert sorted(like[row] for row in have) == less
        assert sorted(like[row] for row in have_not) == unchanged[-(GALLERY - 1) // 2 :]


def test_templates_are_chosen_by_the_seed():
    made = table()
    first = build_templates(**made, **SHORT)
    assert build_templates(**made, **SHORT) == first
    assert build_templates(**made, **SHORT, seed=1) != first
    assert len({template.reference for template in first}) > 40


def test_a_gallery_that_cannot_be_filled_is_not_asked():
    made = table(rows=12)
    assert {len(t.distractors) for t in build_templates(**made, gallery=4)} == {3}
    with pytest.raises(ValueError, match="12 rows make no gallery of 15"):
        build_templates(**made)


def test_a_focus_whose_target_equals_the_reference_is_not_asked():
    attributes = {"light": ["dark"] * 2 + ["bright"] * 4, "place": ["left"] * 6}
    found = build_templates(attributes, {}, groups="abcdef", gallery=3)
    assert {template.task for template in found} == {"change_attribute"}


def test_a_change_whose_target_is_like_the_reference_in_nothing_is_not_asked():
    """Row 0 alone lies left: made bright, it has no target; the others have one."""
    attributes = {"light": ["dark"] * 3 + ["bright"] * 2, "place": ["left"] + ["right"] * 4}
    found = build_templates(attributes, {}, groups="abcde", gallery=3)
    assert {t.reference for t in found if t.condition == "bright"} == {1, 2}


def test_one_kind_of_distractor_fills_up_for_the_other():
    """Only one other image is unchanged, or only the target has what is asked for."""
    light = ["dark", "dark", "bright", "bright", "bright", "bright", "bright"]
    place = ["left", "left", "left", "right", "right", "right", "right"]
    made = {"attributes": {"light": light, "place": place}, "objects": {}, "groups": "abcdefg"}
    found = of_task(made, "change_attribute", gallery=6)
    galleries = {
        (t.reference, t.target): set(t.distractors) for t in found if t.condition == "bright"
    }
    assert galleries == {(0, 2): {1, 3, 4, 5, 6}, (1, 2): {0, 3, 4, 5, 6}}
    made["attributes"] = {"light": ["bright"] * 6 + ["dark"], "place": ["left"] * 7}
    found = of_task(made, "change_attribute", gallery=6)
    assert {(t.reference, t.target) for t in found} == {(row, 6) for row in range(6)}
    assert all({t.reference, *t.distractors} == set(range(6)) for t in found)


def embedded(made: dict) -> torch.Tensor:
    """One direction for each value: similarity counts the columns that agree."""
    parts = []
    for words, cells in (
        *((VALUES[name], cells) for name, cells in made["attributes"].items()),
        *(((False, True), cells) for cells in made["objects"].values()),
    ):
        parts.append(F.one_hot(torch.tensor([words.index(cell) for cell in cells])))
    return torch.cat(parts, 1).float()


def direction(condition: str) -> torch.Tensor:
    names = [*(word for words in VALUES.values() for word in words)]
    names += [name for of in OBJECTS for name in (f"no {of}", of)]
    return F.one_hot(torch.tensor(names.index(condition)), len(names)).float()


def test_a_change_needs_image_and_words():
    """Where words weigh more than images the target wins by construction; either alone fails."""
    made = table(3)
    templates = of_task(made, "change_attribute") + of_task(made, "change_object")
    texts = torch.stack([direction(template.condition) for template in templates])
    found = run(templates, embedded(made), texts, groups=made["groups"], weight=0.6, repeats=50)
    for task in ("change_attribute", "change_object"):
        recall = found[task].recall
        assert recall["image + text"]["recall_at_1"].value == 1
        assert recall["image"]["recall_at_3"].value == 0
        assert recall["text"]["recall_at_3"].value == 0  # ties with the half that has it
        assert found[task].templates == 40
        assert found[task].chance["recall_at_2"] == pytest.approx(2 / GALLERY)


def test_a_focus_is_lost_by_the_image_alone():
    """The target agrees in fewer columns than the distractors."""
    made = table(4)
    templates = of_task(made, "focus_attribute")
    texts = torch.randn(len(templates), 11, generator=torch.Generator().manual_seed(0))
    found = run(templates, embedded(made), texts, groups=made["groups"], repeats=50)[TASKS[0]]
    assert found.recall["image"]["recall_at_3"].value == 0


def test_random_embeddings_are_at_chance():
    made = table(5, rows=400)
    templates = of_task(made, "change_attribute", count=1200)
    generator = torch.Generator().manual_seed(6)
    images = torch.randn(400, 16, generator=generator)
    texts = torch.randn(len(templates), 16, generator=generator)
    found = run(templates, images, texts, groups=made["groups"], repeats=200)["change_attribute"]
    for k in (1, 2, 3):
        for recall in found.recall.values():
            assert abs(recall[f"recall_at_{k}"].value - found.chance[f"recall_at_{k}"]) < 0.08


def test_the_length_of_an_embedding_does_not_matter():
    made = table(6)
    templates = build_templates(**made, **SHORT)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(ROWS, 8, generator=generator)
    texts = torch.randn(len(templates), 8, generator=generator)
    longer = images * (1 + torch.arange(ROWS)[:, None]), texts * 5
    found = run(templates, images, texts, groups=made["groups"], repeats=10)
    assert run(templates, *longer, groups=made["groups"], repeats=10) == found


def test_equal_embeddings_find_nothing():
    made = table()
    templates = build_templates(**made, **SHORT)
    images, texts = torch.ones(ROWS, 3), torch.ones(len(templates), 3)
    for found in run(templates, images, texts, groups=made["groups"], repeats=10).values():
        assert {of["recall_at_3"].value for of in found.recall.values()} == {0}


def test_the_interval_draws_patients_of_references():
    """All templates of one patient are found, the one of another is not: 0, 5/6 or 1 in a draw."""
    images = torch.eye(4)
    one = Template(task=TASKS[0], condition="form", reference=0, target=1, distractors=(2, 3))
    templates = [one] * 5 + [replace(one, reference=3, target=1, distractors=(2, 0))]
    texts = torch.eye(4)[[1] * 5 + [2]]
    found = run(templates, images, texts, groups="aacb")[TASKS[0]].recall["text"]["recall_at_1"]
    assert (found.low, found.high) == (0, 1)
    assert found.value == pytest.approx(5 / 6)


def test_attributes_of_the_shape_pictures_make_all_tasks_of_attributes():
    reports = shape_pictures(300, seed=0).reports
    words = [report.replace(".", "").split() for report in reports]
    attributes = {
        "size": [of[3] for of in words],
        "brightness": [of[4] for of in words],
        "shape": [of[5] for of in words],
    }
    groups = [str(row) for row in range(300)]
    found = build_templates(attributes, {}, groups=groups, count=20)
    assert {template.task for template in found} == set(TASKS[:2])
    assert {"dark", "bright"} & {template.condition for template in found}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gallery": 1}, "gallery must be at least 2 and count 1, got 1"),
        ({"groups": ["a"]}, "column 'form' has 150 rows, and groups 1"),
        ({"attributes": {"form": ["disk"] * 149 + [""]}}, "column 'form' has empty cells"),
        ({"attributes": {}, "objects": {"tube": [True] * ROWS}}, "templates need two columns"),
    ],
)
def test_a_table_that_makes_no_templates_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build_templates(**{**table(), **changes})


def test_parts_that_do_not_fit_are_refused():
    made = table()
    templates = build_templates(**made, **SHORT)
    images, texts = torch.ones(ROWS, 3), torch.ones(len(templates), 3)
    with pytest.raises(ValueError, match="one text per template and one group per image"):
        run(templates, images, texts[1:], groups=made["groups"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(templates, images / 0, texts, groups=made["groups"])
    uneven = [templates[0], replace(templates[0], distractors=templates[0].distractors[1:])]
    with pytest.raises(ValueError, match=r"must have one size, got sizes \[8, 9\]"):
        run(uneven, images, texts[:2], groups=made["groups"])
