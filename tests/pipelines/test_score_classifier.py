"""A classifier scored as a detector is: tables, report, what is refused, stopped and registered."""

import base64
import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import mlflow
import nibabel
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as Pillow
from sklearn.metrics import roc_auc_score
from torch import Tensor

from anomaly.calibration import Calibration
from medssl.data.domain import learn_domain
from medssl.data.image import Image, pixel_affine
from medssl.data.manifest import build_manifest, load_sample
from medssl.data.modality import Modality
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample
from medssl.models.encoder import Encoder
from medssl.models.folder import ModelFolderError, save_model, selftest_noise
from medssl.models.timm_encoder import TimmEncoder
from medssl.probes.classifier import Classifier
from medssl.probes.knn import KNN
from pipelines.evaluate import evaluate
from pipelines.journal import Journal
from pipelines.record import recorded, register, resolve
from pipelines.score import CLASS_COLUMNS, COLUMNS, score
from pipelines.scoring import OutsideDomainError, Scorer

SIZE = (24, 32)
PICTURES = Preprocessing(size=SIZE, intensity="range", mean=(0.0,), std=(1.0,), channels=1)
SCANS = Preprocessing(size=SIZE, intensity="percentile", mean=(0.0,), std=(1.0,), channels=1)


def save_pictures(folder: Path, count: int = 8) -> Path:
    """Dark pictures in test/good, bright ones in test/bright, every fourth of either in between."""
    rng = np.random.default_rng(3)
    for number in range(count):
        bright = number % 2
        level = 130 if number % 4 > 1 else 60 + 140 * bright
        file = folder / "test" / ("bright" if bright else "good") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(rng.integers(level - 20, level + 21, SIZE).astype(np.uint8)).save(file)
    return folder


def pixels_of(files: list[Path]) -> Tensor:
    """(S, 1, H, W), read without our code."""
    return torch.stack([torch.from_numpy(np.array(Pillow.open(file)) / 255) for file in files])[
        :, None
    ].float()


def fitted(data: Path) -> tuple[TimmEncoder, KNN]:
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet", in_channels=1).eval()
    files = sorted(data.rglob("*.png"))
    with torch.no_grad():
        features = encoder(pixels_of(files))
    labels = torch.tensor([int("bright" in str(file)) for file in files])
    return encoder, KNN(neighbours=5).fit(features, labels)


def save(
    model: torch.nn.Module, data: Path, out: Path, preprocessing: Preprocessing = PICTURES
) -> str:
    manifest = build_manifest(data)
    images = [load_sample(manifest, item).images["image"] for item in manifest.images]
    noise = selftest_noise((2, 1, *SIZE))
    domain = learn_domain(images)
    save_model(
        out,
        model,
        kind="probe",
        preprocessing=preprocessing,
        domain=domain,
        card="Dark or bright.",
        noise=noise,
    )
    return str(out)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path, data: Path) -> str:
    encoder, probe = fitted(data)
    classifier = Classifier(encoder, probe, classes=["dark", "bright"], normal="dark")
    return save(classifier, data, tmp_path / "model")


class Level(Encoder):
    """(log of the mean, 1), so minus infinity for a black picture."""

    in_channels = 1

    def forward(self, images: Tensor) -> Tensor:
        level = images.flatten(1).mean(1, keepdim=True)
        return torch.cat([level.log(), torch.ones_like(level)], dim=1)


class AsIs(torch.nn.Module):
    """The features are the scores. No `Probe`, for tests of all of them would find it."""

    def scores(self, features: Tensor) -> Tensor:
        return features


def levels() -> Classifier:
    return Classifier(Level(), AsIs(), classes=["a", "b"])


def even(item: str, level: float, modality: Modality = Modality.PICTURE) -> Sample:
    """A picture of one grey value."""
    image = Image(
        pixels=torch.full((1, *SIZE), level),
        axes="HW",
        modality=modality,
        affine=pixel_affine(),
        frame="pixel",
        value_range=(0, 255),
    )
    return Sample(item=item, images={"image": image})


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def without_seconds(out: Path) -> list[dict]:
    return [row | {"seconds": None} for row in rows_of(out)]


@torch.no_grad()
def test_rows_hold_what_encoder_and_probe_say_by_hand(data, model, tmp_path):
    summary = score(data, model, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    encoder, probe = fitted(data)
    expected = probe.scores(encoder(pixels_of([Path(row["path"]) for row in rows])))
    assert expected[:, 1].unique().numel() > 3  # or the order of the items could not be seen
    for row, (dark, bright) in zip(rows, expected.tolist(), strict=True):
        assert row["class_scores"] == pytest.approx({"dark": dark, "bright": bright}, abs=1e-4)
        assert row["score"] == pytest.approx(bright, abs=1e-4)
        assert row["predicted"] == ("bright" if bright > dark else "dark")
        empty = ("p_value", "threshold", "anomalous", "map_path", "boxes", "volume_mm3", "error")
        assert [row[name] for name in empty] == [None] * 7
        assert row["status"] == "ok"
    told = [row["predicted"] for row in rows]
    assert summary["predicted"] == {name: told.count(name) for name in sorted(set(told))}
    assert (summary["ok"], summary["failed"], summary["anomalous"]) == (8, 0, None)
    assert summary["maps"] is None
    assert not (tmp_path / "out" / "maps").exists()


def test_the_three_tables_say_the_same_with_class_scores_as_json(data, model, tmp_path):
    out = tmp_path / "out"
    (data / "test" / "good" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    assert score(data, model, out)["error"] == 1
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS + CLASS_COLUMNS
    written = pq.read_table(out / "scores.parquet").to_pylist()
    with (out / "scores.csv").open() as stream:
        texts = list(csv.DictReader(stream))
    for row, parquet, text in zip(rows, written, texts, strict=True):
        failed = row["status"] == "error"
        assert (row["class_scores"] is None) is failed
        assert parquet["class_scores"] == (None if failed else text["class_scores"])
        assert text["class_scores"] == ("" if failed else json.dumps(row["class_scores"]))
        assert parquet | {"class_scores": row["class_scores"]} == row


def test_without_a_normal_class_the_score_is_that_of_the_predicted_class(data, tmp_path):
    encoder, probe = fitted(data)
    folder = save(Classifier(encoder, probe, classes=["dark", "bright"]), data, tmp_path / "model")
    score(data, folder, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert {row["predicted"] for row in rows} == {"dark", "bright"}
    for row in rows:
        assert row["score"] == row["class_scores"][row["predicted"]]
        assert row["score"] == max(row["class_scores"].values())
    with pytest.raises(ValueError, match="none of the classes .* is the normal one"):
        evaluate(data, folder, tmp_path / "evaluated")
    assert not (tmp_path / "evaluated").exists()


def test_a_stopped_run_ends_with_the_undisturbed_table(data, model, tmp_path, monkeypatch):
    score(data, model, tmp_path / "calm", batch_size=3)
    write = Journal.write

    def crash(journal: Journal, part: int, rows: list) -> None:
        if part == 1:
            raise KeyboardInterrupt
        write(journal, part, rows)

    monkeypatch.setattr(Journal, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        score(data, model, tmp_path / "out", batch_size=3)
    monkeypatch.setattr(Journal, "write", write)
    assert not (tmp_path / "out" / "scores.jsonl").exists()
    score(data, model, tmp_path / "out", batch_size=3)
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "calm")


def test_a_colour_picture_is_refused_unless_forced(data, model, tmp_path):
    Pillow.new("RGB", (32, 24), (100, 100, 100)).save(data / "test" / "good" / "colour.png")
    summary = score(data, model, tmp_path / "out")
    (row,) = [row for row in rows_of(tmp_path / "out") if row["status"] == "refused"]
    assert row["path"].endswith("colour.png")
    assert "channel" in row["error"]
    assert (row["predicted"], row["class_scores"]) == (None, None)
    assert summary["failed"] == 1
    assert score(data, model, tmp_path / "forced", force=True)["ok"] == 9


def test_an_mr_is_refused_by_a_classifier_of_ct():
    ct = even("a", 9.0, modality=Modality.CT)
    scorer = Scorer.from_parts(levels(), PICTURES, domain=learn_domain([ct.images["image"]]))
    assert scorer.score([ct])[0].predicted == "b"
    with pytest.raises(OutsideDomainError, match="MR"):
        scorer.score([even("b", 9.0, modality=Modality.MR)])


@torch.no_grad()
def test_a_volume_is_scored_by_the_mean_of_its_slices_and_shown_by_the_middle_one(data, tmp_path):
    encoder, probe = fitted(data)
    values = np.random.default_rng(0).random((32, 24, 6), np.float32) * np.linspace(0.1, 1, 6)
    (tmp_path / "scans").mkdir()
    scan = nibabel.Nifti1Image(values.astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0]))
    nibabel.save(scan, tmp_path / "scans" / "a.nii.gz")
    classifier = Classifier(encoder, probe, classes=["dark", "bright"], normal="dark")
    folder = save(classifier, tmp_path / "scans", tmp_path / "model", SCANS)
    score(tmp_path / "scans", folder, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    slices = SCANS(read_image(tmp_path / "scans" / "a.nii.gz")).pixels.transpose(0, 1)
    expected = probe.scores(encoder(slices).mean(0, keepdim=True))[0]
    assert row["score"] == pytest.approx(expected[1].item(), abs=1e-4)
    assert "axial slice 4 of 6" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_shows_classes_and_pictures_and_names_no_path(data, model, tmp_path):
    out = tmp_path / "out"
    score(data, model, out)
    page = (out / "report.html").read_text()
    assert str(tmp_path) not in page
    assert "001.png" not in page
    assert "http" not in page
    assert "Classification report" in page
    assert not re.findall("[Oo]verlay of|p-value|Regions|no verdict|Not calibrated|heat", page)
    rows = rows_of(out)
    for row in rows:
        (line,) = re.findall(rf'<tr data-item="{row["item"]}".*?</tr>', page, re.DOTALL)
        kind = {"dark": "normal", "bright": "anomalous"}[row["predicted"]]
        assert f'<span class="chip {kind}">{row["predicted"]}</span>' in line
        assert f"bright {row['class_scores']['bright']:.3g}" in line
        assert '<img src="data:image/jpeg;base64,' in line
        assert Pillow.open(out / "overlays" / f"{row['item']}.png").size == (SIZE[1], SIZE[0])
    told = [row["predicted"] for row in rows]
    for name in ("dark", "bright"):
        assert f"<b>{told.count(name)}</b>{name}<" in page
    columns = page.partition('<table id="cases">')[2].partition("</table>")[0]
    heads, cells = columns.count("<th"), columns.count("<td") // len(rows)
    assert heads - columns.count("<thead") == cells


def test_every_tag_of_the_report_is_closed(data, model, tmp_path):
    class Tags(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012 - one page is read

        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag not in ("meta", "img", "input", "br", "line", "rect"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "rect"):
                assert self.open_tags.pop() == tag

    score(data, model, tmp_path / "out")
    reader = Tags()
    reader.feed((tmp_path / "out" / "report.html").read_text())
    assert reader.open_tags == []


def test_evaluate_measures_the_scores_and_leaves_the_maps_out(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.evaluate.REPEATS", 50)
    mask = data / "ground_truth" / "bright" / "001_mask.png"
    mask.parent.mkdir(parents=True)
    Pillow.fromarray(np.full(SIZE, 255, np.uint8)).save(mask)
    found = evaluate(data, model, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    labels = ["bright" in row["path"] for row in rows]
    expected = roc_auc_score(labels, [row["score"] for row in rows])
    assert found["image_auroc"]["value"] == pytest.approx(expected)
    assert expected > 0.5
    assert (found["num_masked"], "pixel_auroc" in found) == (1, False)
    assert found["skipped"]["pixel metrics"] == "a classifier gives no maps"
    assert "Image AUROC" in (tmp_path / "out" / "report.html").read_text()


def test_a_registered_classifier_answers_as_its_folder_bit_for_bit(
    data, model, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with recorded("probe", {}) as run:
        register(Path(model), "brightness", run)
    score(data, model, tmp_path / "folder")
    score(data, "models:/brightness@champion", tmp_path / "registry")
    assert without_seconds(tmp_path / "registry") == without_seconds(tmp_path / "folder")
    assert resolve("models:/brightness@champion") != Path(model)

    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    try:
        served = mlflow.pyfunc.load_model("models:/brightness@champion")
    finally:
        mlflow.set_tracking_uri(None)
    file = data / "test" / "bright" / "003.png"
    sample = Sample(item="row", images={"image": read_image(file)})
    (expected,) = Scorer(Path(model)).score([sample])
    content = [base64.b64encode(file.read_bytes()).decode(), "bm8gcGljdHVyZQ=="]
    told = served.unwrap_python_model().predict(None, pd.DataFrame({"content": content}))
    assert told.loc[0, "score"] == expected.score
    assert told.loc[0, "predicted"] == expected.predicted
    assert json.loads(told.loc[0, "class_scores"]) == expected.class_scores
    assert list(told["status"]) == ["ok", "error"]
    assert told.loc[1, "class_scores"] is None


def test_a_probe_without_its_encoder_is_refused(tmp_path):
    probe, features, labels = KNN.example()
    folder = save_model(
        tmp_path / "bare",
        probe.fit(features, labels),
        kind="probe",
        preprocessing=PICTURES,
        domain={},
        card="",
        noise=selftest_noise((2, 4)),
    )
    with pytest.raises(
        ModelFolderError, match="bare holds a fitted probe, expected .* its encoder"
    ):
        Scorer(folder)


def test_class_scores_that_are_not_finite_are_an_error_with_the_item():
    scorer = Scorer.from_parts(levels(), PICTURES)
    assert scorer.score([even("a1", 9.0)])[0].predicted == "b"
    with pytest.raises(ValueError, match="item b2.*inf"):
        scorer.score([even("a1", 9.0), even("b2", 0.0)])


def test_a_calibration_gives_a_classifier_verdicts_and_no_boxes():
    known = Calibration.from_scores([2.0], [2.0], rate=0.5, method="split")
    scorer = Scorer.from_parts(levels(), PICTURES, calibration=known)
    (scored,) = scorer.score([even("a", 9.0)])
    assert (scored.p_value, scored.threshold, scored.anomalous) == (1.0, 2.0, False)
    assert scored.boxes is None
