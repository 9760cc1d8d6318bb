"""A folder of images with a table of reports."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from medssl.data.layouts.reports_csv import is_reports_csv
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.privacy import salted
from medssl.data.readers.errors import ReadError

TABLE = """path,text,patient_id,study_id,split
images/a.png,"A round nodule. It is new, and large.",p1,s1,train
images/b.png,No finding.,p1,s2,val
images/c.png,,p2,s3,test
"""


def folder(root: Path, table: str = TABLE) -> Path:
    (root / "images").mkdir(parents=True)
    for name in "abcd":
        PIL.Image.fromarray(np.full((4, 5), ord(name), dtype=np.uint8)).save(
            root / "images" / f"{name}.png"
        )
    (root / "reports.csv").write_text(table)
    return root


def test_every_image_has_its_own_text_split_patient_and_study(tmp_path: Path):
    manifest = build_manifest(folder(tmp_path / "data"))
    found = {Path(i.path).stem: load_sample(manifest, i) for i in manifest.images}
    assert {name: sample.report for name, sample in found.items()} == {
        "a": "A round nodule. It is new, and large.",
        "b": "No finding.",
        "c": None,
        "d": None,
    }
    assert found["a"].images["image"].pixels.max() == ord("a")
    assert found["a"].group == found["b"].group == salted("p1")
    assert found["a"].study == salted("s1")
    assert found["d"].group is None
    splits = {Path(item.path).stem: item.split for item in manifest.images}
    assert splits == {"a": "train", "b": "train", "c": "test", "d": None}
    assert manifest.skipped == 0


def test_the_manifest_survives_a_round_trip_and_names_no_row(tmp_path: Path):
    manifest = build_manifest(folder(tmp_path / "data"))
    manifest.write(tmp_path / "items.parquet")
    again = build_manifest(tmp_path / "items.parquet")
    first = next(item for item in again.images if item.path.endswith("a.png"))
    assert load_sample(again, first).report == "A round nodule. It is new, and large."
    reports = [item for item in again.items if item.role == "report"]
    assert len(reports) == 2
    assert all("a.png" not in str(item) and "p1" not in str(item) for item in reports)


def test_a_selection_keeps_the_reports_of_its_images(tmp_path: Path):
    manifest = build_manifest(folder(tmp_path / "data")).select("split == 'train'")
    assert [item.role for item in manifest.items].count("report") == 2


def test_a_table_that_changed_is_read_anew_and_a_lost_row_is_an_error(tmp_path: Path):
    root = folder(tmp_path / "data")
    manifest = build_manifest(root)
    first = manifest.images[0]
    (root / "reports.csv").write_text(TABLE.replace("A round nodule", "A mass"))
    assert "A mass" in (load_sample(manifest, first).report or "")
    (root / "reports.csv").write_text("path,text\nimages/b.png,x\n")
    with pytest.raises(ReadError, match=r"item \w+: the table has no report of it any more"):
        load_sample(manifest, first)
    (root / "reports.csv").unlink()
    with pytest.raises(ReadError, match="cannot be read; build the manifest again"):
        load_sample(manifest, first)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,text\nother/z.png,x\n", "has a row for none of the 4 images"),
        (TABLE.replace("val", "holdout"), "the split in reports.csv must be one of train, val"),
        (TABLE + "images/a.png,Other.,p1,s1,train\n", "two values of text for one path"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path: Path, table: str, message: str):
    with pytest.raises(ValueError, match=message):
        build_manifest(folder(tmp_path / "data", table))


def test_another_table_makes_no_layout(tmp_path: Path):
    assert not is_reports_csv(tmp_path)
    (tmp_path / "reports.csv").write_text("file,finding\n")
    assert not is_reports_csv(tmp_path)
