from pathlib import PurePosixPath

import pytest

from medssl.data.groups import read_groups

ITEMS = {
    "i1": PurePosixPath("/data/set/chest/train/good/a.jpg"),
    "i2": PurePosixPath("/data/set/chest/test/good/a.jpg"),
    "i3": PurePosixPath("/data/set/chest/test/good/b.jpg"),
}


def table(folder, text, name="labels.csv"):
    (folder / name).write_text(text)
    return folder


def test_rows_are_matched_by_the_end_of_the_path(tmp_path):
    root = table(
        tmp_path,
        "path,patient\nchest/train/good/a.jpg,p1\nchest/test/good/a.jpg,p2\ntest/good/b.jpg,p1\n",
    )
    assert read_groups("labels.csv:patient", root, ITEMS) == {"i1": "p1", "i2": "p2", "i3": "p1"}


def test_a_name_that_only_ends_alike_is_another_file(tmp_path):
    root = table(tmp_path, "path,patient\nood/b.jpg,p1\n")
    item = {"i3": ITEMS["i3"], "i4": PurePosixPath("/data/other/b.jpg")}
    with pytest.raises(ValueError, match="2 of 2 items"):
        read_groups("labels.csv:patient", root, item)


def test_the_longest_path_wins(tmp_path):
    root = table(tmp_path, "path,patient\na.jpg,p0\ntest/good/a.jpg,p2\ntrain/good/a.jpg,p1\n")
    items = {name: ITEMS[name] for name in ("i1", "i2")}
    assert read_groups("labels.csv:patient", root, items) == {"i1": "p1", "i2": "p2"}


def test_a_unique_file_name_is_enough(tmp_path):
    root = table(tmp_path, "path,patient\n/elsewhere/b.jpg,p7\n")
    assert read_groups("labels.csv:patient", root, {"i3": ITEMS["i3"]}) == {"i3": "p7"}


def test_a_file_name_of_two_items_is_not_guessed(tmp_path):
    root = table(tmp_path, "path,patient\n/elsewhere/a.jpg,p7\n")
    items = {name: ITEMS[name] for name in ("i1", "i2")}
    with pytest.raises(ValueError, match="2 of 2 items have no patient .* item i1"):
        read_groups("labels.csv:patient", root, items)


def test_a_file_name_of_two_rows_is_not_guessed(tmp_path):
    root = table(tmp_path, "path,patient\n/x/b.jpg,p7\n/y/b.jpg,p8\n")
    with pytest.raises(ValueError, match="1 of 1 items"):
        read_groups("labels.csv:patient", root, {"i3": ITEMS["i3"]})


def test_an_empty_group_counts_as_missing(tmp_path):
    root = table(tmp_path, "path,patient\ntest/good/b.jpg,\n")
    with pytest.raises(ValueError, match="item i3"):
        read_groups("labels.csv:patient", root, {"i3": ITEMS["i3"]})


def test_no_path_and_no_patient_is_in_the_error(tmp_path):
    root = table(tmp_path, "path,patient\ntest/good/secret.jpg,Miller\n")
    with pytest.raises(ValueError, match="no patient") as error:
        read_groups("labels.csv:patient", root, ITEMS)
    assert "secret" not in str(error.value)
    assert "Miller" not in str(error.value)
    assert "/data" not in str(error.value)


def test_rows_that_disagree_are_refused(tmp_path):
    root = table(tmp_path, "path,patient\ngood/b.jpg,p1\ngood/b.jpg,p2\n")
    with pytest.raises(ValueError, match="two values of patient"):
        read_groups("labels.csv:patient", root, {"i3": ITEMS["i3"]})


def test_the_table_may_lie_in_the_folder_beside_it_or_where_one_works(tmp_path, monkeypatch):
    root = tmp_path / "set" / "chest"
    root.mkdir(parents=True)
    monkeypatch.chdir(table(tmp_path, "path,patient\nb.jpg,here\n"))
    item = {"i3": ITEMS["i3"]}
    absolute = f"{tmp_path}/labels.csv:patient"
    assert read_groups("labels.csv:patient", root, item) == {"i3": "here"}
    table(root.parent, "path,patient\nb.jpg,beside\n")
    assert read_groups("labels.csv:patient", root, item) == {"i3": "beside"}
    table(root, "path,patient\nb.jpg,inside\n")
    assert read_groups("labels.csv:patient", root, item) == {"i3": "inside"}
    assert read_groups(absolute, root, item) == {"i3": "here"}


def test_a_missing_table_or_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="'none.csv' is neither in the data folder"):
        read_groups("none.csv:patient", tmp_path, ITEMS)
    table(tmp_path, "path,finding\nb.jpg,x\n")
    with pytest.raises(ValueError, match=r"column 'patient'; it has \['path', 'finding'\]"):
        read_groups("labels.csv:patient", tmp_path, ITEMS)
    with pytest.raises(ValueError, match="FILE:COLUMN"):
        read_groups("labels.csv", tmp_path, ITEMS)
