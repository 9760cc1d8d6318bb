"""Two tables of scores of the same items, against what scikit-learn makes of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from pyarrow import parquet
from sklearn.metrics import average_precision_score, roc_auc_score

from medssl.data.image import Image
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.writers.picture import write_tiff
from pipelines.cli import main
from pipelines.compare import compare
from pipelines.tables import COLUMNS, write_tables

SIZE = (16, 20)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.compare.REPEATS", 60)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight normal pictures and six with a square, which has a mask."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for i in range(14):
        kind = "good" if i < 8 else "spot"
        file = folder / "test" / kind / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(rng.integers(0, 255, SIZE).astype(np.uint8)).save(file)
        if i >= 8:
            mask = np.zeros(SIZE, np.uint8)
            mask[4:9, i - 6 : i] = 255
            marked = folder / "ground_truth" / kind / f"{i:03}_mask.png"
            marked.parent.mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(mask).save(marked)
    (folder / "train" / "good").mkdir(parents=True)
    Pillow.fromarray(np.zeros(SIZE, np.uint8)).save(folder / "train" / "good" / "0.png")
    return folder


def scored(data: Path, out: Path, *, strength: float, maps: bool = True, seed: int = 1) -> Path:
    """A folder as `medssl score` leaves it, by a detector that sees the squares so strongly."""
    rng = np.random.default_rng(seed)
    manifest = build_manifest(data)
    (out / "maps").mkdir(parents=True)
    rows = []
    for item in manifest.where(split="test").images:
        sample = load_sample(manifest, item)
        values = rng.normal(size=SIZE)
        if sample.mask is not None:
            values += strength * sample.mask.pixels[0].numpy()
        image: Image = sample.images["image"]
        if maps:
            pixels = torch.tensor(values, dtype=torch.float32)[None]
            home = replace(image, pixels=pixels, value_range=None)
            write_tiff(home, out / f"maps/{item.item}.tiff")
        score = float(values.max())
        rows.append(
            dict.fromkeys(COLUMNS)
            | {"item": item.item, "path": item.path, "score": score, "status": "ok"}
            | {"threshold": 3.0, "anomalous": score > 3.0, "model": f"model{strength:g}"}
            | {"map_path": f"maps/{item.item}.tiff" if maps else None, "seconds": 0.1}
        )
    write_tables(out, rows)
    return out


def change(folder: Path, place: int, **values: object) -> str:
    """Change one row of a table. Returns its item."""
    rows = parquet.read_table(folder / "scores.parquet").to_pylist()
    rows[place] |= values
    write_tables(folder, rows)
    return rows[place]["item"]


def labels_and_scores(data: Path, folder: Path) -> tuple[list, list, list]:
    """Label, score and verdict of each row, without our code for labels."""
    rows = parquet.read_table(folder / "scores.parquet").to_pylist()
    labels = [int("spot" in Path(row["path"]).parts) for row in rows]
    return labels, [row["score"] for row in rows], [row["anomalous"] for row in rows]


def test_both_values_are_those_of_scikit_learn_and_the_better_one_leads(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=0.5)
    found = compare(a, b / "scores.parquet", data, tmp_path / "out", seed=3)
    for side, folder in (("a", a), ("b", b)):
        labels, scores, flags = labels_and_scores(data, folder)
        precision = average_precision_score(labels, scores)
        assert found["image_auroc"][side] == pytest.approx(roc_auc_score(labels, scores))
        assert found["image_average_precision"][side] == pytest.approx(precision)
        assert found["recall"][side] == pytest.approx(np.mean(flags[8:]))
        assert found["false_alarm_rate"][side] == pytest.approx(np.mean(flags[:8]))
    for name in ("image_auroc", "pixel_auroc", "pixel_average_precision", "aupro", "aupro_0.01"):
        ahead = found[name]["difference"]
        assert ahead["value"] == pytest.approx(found[name]["a"] - found[name]["b"])
        assert 0 < ahead["low"] <= ahead["value"] <= ahead["high"]
        assert found[name]["a_larger"] == 1.0
    assert (found["model_a"], found["model_b"]) == ("model4", "model0.5")
    assert (found["num_normal"], found["num_anomalous"], found["failed"]) == (8, 6, 0)
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["image_auroc"] == found["image_auroc"]


def test_false_alarms_are_equal_in_every_draw_where_the_normals_scored_alike(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=0.5)  # the same noise
    rate = compare(a, b, data)["false_alarm_rate"]
    assert rate["a_larger"] == 0.5
    assert (rate["difference"]["low"], rate["difference"]["high"]) == (0, 0)


def test_pictures_of_one_part_are_drawn_together(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=2)
    b = scored(data, tmp_path / "b", strength=1, seed=2)
    names = sorted(file.relative_to(data).as_posix() for file in data.rglob("*.png"))
    parts = ["path,part", *(f"{name},one" for name in names)]
    (tmp_path / "parts.csv").write_text("\n".join(parts))
    found = compare(a, b, data, groups=f"{tmp_path / 'parts.csv'}:part")
    assert found["num_groups"] == 1
    for name in ("image_auroc", "pixel_auroc"):
        ahead = found[name]["difference"]
        assert ahead["low"] == pytest.approx(ahead["high"])
    alone = compare(a, b, data)
    assert alone["num_groups"] == 14
    assert alone["image_auroc"]["difference"]["low"] < alone["image_auroc"]["difference"]["high"]


def test_an_item_with_a_score_in_one_table_is_named_and_left_out(data, tmp_path, capsys):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=1)
    failed = change(b, 2, status="error", score=None, anomalous=None, map_path=None)
    found = compare(a, b, data)
    assert found["left_out"] == [{"item": failed, "reason": "A: scored, B: error"}]
    assert (found["num_normal"], found["failed"]) == (7, 1)
    labels, scores, _ = labels_and_scores(data, a)
    del labels[2], scores[2]
    assert found["image_auroc"]["a"] == pytest.approx(roc_auc_score(labels, scores))
    capsys.readouterr()
    code = main(["compare", str(a), str(b), "--data", str(data), "--json"])
    told = capsys.readouterr()
    assert code == 1
    assert json.loads(told.out)["left_out"] == found["left_out"]
    assert failed in told.err
    assert str(tmp_path) not in told.err


def test_without_maps_or_thresholds_the_rest_is_compared(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=1, maps=False)
    for place in range(14):
        change(b, place, anomalous=None, threshold=None)
    found = compare(a, b, data)
    assert "image_auroc" in found
    assert set(found["skipped"]) == {"false_alarm_rate", "recall", "pixel metrics"}
    assert "maps" in found["skipped"]["pixel metrics"]


def test_tables_of_other_items_are_refused(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=1)
    for place in range(13):
        change(b, place, item=f"other{place}")
    with pytest.raises(ValueError, match=r"1 of the 14 labelled images .* takes two"):
        compare(a, b, data)


def test_what_is_no_table_of_scores_is_refused(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    with pytest.raises(FileNotFoundError, match="scores.parquet"):
        compare(a, tmp_path / "nothing", data)
    build_manifest(data).write(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="lacks .*score"):
        compare(a, tmp_path / "items.parquet", data)
    with pytest.raises(ValueError, match="no table in parquet"):
        compare(a / "scores.csv", a, data)


def test_different_files_of_one_name_are_named_and_left_out(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=1)
    same, other = "1" * 64, "2" * 64
    for place in range(14):
        change(a, place, file_sha256=same)
        item = change(b, place, file_sha256=other if place == 13 else same)
    found = compare(a, b, data)
    assert found["num_anomalous"] == 5
    assert found["left_out"] == [
        {"item": item, "reason": "A and B scored different files under this name"}
    ]


def test_a_missing_verdict_is_explained_for_the_model_that_lacks_it(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    b = scored(data, tmp_path / "b", strength=1)
    rows = parquet.read_table(b / "scores.parquet").to_pylist()
    rows = [row | {"site": "x", "no_verdict": None} for row in rows]
    rows[2] |= {"anomalous": None, "threshold": None, "no_verdict": "No promise"}
    write_tables(b, rows)
    found = compare(a, b, data)
    assert found["skipped"]["recall"] == "B: some items are of a site without a threshold"


def test_results_are_not_written_into_a_model(data, tmp_path):
    a = scored(data, tmp_path / "a", strength=4)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.yaml").touch()
    with pytest.raises(ValueError, match="holds a model; choose another --out"):
        compare(a, a, data, tmp_path / "model")
