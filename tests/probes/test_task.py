"""Tasks: classes, patients and splits from tables beside the pictures."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from medssl.data.manifest import NoDataError
from medssl.probes.task import Task, read_task, without


def folder(tmp_path: Path, rows: list[tuple[str, ...]], header: str) -> Path:
    for number, row in enumerate(rows):
        file = tmp_path / "images" / row[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.full((4, 4), number, np.uint8)).save(file)
    lines = [header, *(",".join((f"images/{row[0]}", *row[1:])) for row in rows)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path


ROWS = [
    ("a.png", "viral", "p1", "train", "left"),
    ("b.png", "normal", "p1", "train", ""),
    ("c.png", "normal", "p2", "test", "right"),
    ("d.png", "", "p2", "test", "right"),
    ("e.png", "viral", "p3", "test", "left"),
]
HEADER = "path,finding,patient,split,side"


def test_classes_are_sorted_by_name_and_images_without_one_are_left_out(tmp_path: Path):
    task = Task(
        data=folder(tmp_path, ROWS, HEADER) / "images",
        target="labels.csv:finding",
        groups="labels.csv:patient",
        split="labels.csv:split",
        columns=["labels.csv:side"],
    )
    asked = read_task(task)
    assert asked.classes == ("normal", "viral")
    names = [Path(item.path).name for item in asked.items]
    assert names == ["a.png", "b.png", "c.png", "e.png"]
    assert asked.labels.tolist() == [1, 0, 0, 1]
    assert asked.test.tolist() == [False, False, True, True]
    assert asked.columns == {"side": ["left", None, "right", "left"]}
    assert asked.groups[0] == asked.groups[1] != asked.groups[2]
    assert asked.group_numbers().tolist() == [0, 0, 1, 2]
    rest = without(asked, {asked.items[1].item})
    assert rest.labels.tolist() == [1, 0, 1]
    assert rest.columns == {"side": ["left", "right", "left"]}


def test_without_a_split_patients_are_drawn_whole(tmp_path: Path):
    rows = [(f"{n}.png", "ab"[n % 2], f"p{n // 3}", "", "") for n in range(60)]
    task = Task(data=folder(tmp_path, rows, HEADER), target="labels.csv:finding")
    single = read_task(task)
    assert single.test.sum() == 18
    asked = read_task(Task(data=tmp_path, target=task.target, groups="labels.csv:patient"))
    assert asked.test.sum() == 18
    sides: dict[int, set[bool]] = {}
    for group, test in zip(asked.group_numbers().tolist(), asked.test.tolist(), strict=True):
        sides.setdefault(group, set()).add(test)
    assert all(len(side) == 1 for side in sides.values())
    assert torch.equal(read_task(task).test, single.test)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "labels.csv:nothing"}, ValueError, "needs a column 'nothing'"),
        ({"target": "labels.csv:empty"}, NoDataError, "none of the 5 images has a"),
        ({"target": "labels.csv:one"}, ValueError, "two classes at least"),
        ({"target": "labels.csv:finding", "split": "labels.csv:one"}, ValueError, "of no image"),
        ({"split": "labels.csv:leaky"}, ValueError, "1 patients or parts are both"),
        ({"split": "labels.csv:viral_held"}, ValueError, r"no image to learn the classes \['viral"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, changes, error, message: str):
    held = ["test", "train", "train", "train", "test"]
    leaky = ["train", "test", "train", "train", "test"]
    rows = [(*row, "", "same", leaky[n], held[n]) for n, row in enumerate(ROWS)]
    data = folder(tmp_path, rows, f"{HEADER},empty,one,leaky,viral_held")
    fields = {"target": "labels.csv:finding", "groups": "labels.csv:patient"}
    fields |= {"split": "labels.csv:split", **changes}
    if "viral" in message:
        fields["groups"] = None
    with pytest.raises(error, match=message):
        read_task(Task(data=data, **fields))
