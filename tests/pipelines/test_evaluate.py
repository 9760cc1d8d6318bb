"""Metrics against closed forms and scikit-learn, what is left out, and what is reused."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import tifffile
from mean_distance import save_mean_distance
from PIL import Image as Pillow
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

import pipelines.score as job
from anomaly.calibration import Calibration
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from pipelines.evaluate import evaluate, measure
from pipelines.report.page import METRICS
from pipelines.score import score

SIZE = (24, 32)
PICTURES = Preprocessing(size=SIZE, intensity="range", mean=(0.0,), std=(1.0,))
GOOD = {"000": 8, "001": 20, "002": 35, "003": 11}  # largest distance from 100 grey values
SPOT = {"004": 30, "005": 90, "006": 60}
THRESHOLD = 32 / 255


def save_part(file: Path, largest: int, mask: Path | None) -> None:
    """Noise of 0 to 3, one pixel off by `largest`; with a mask also a square of that."""
    rng = np.random.default_rng(largest)
    pixels = rng.integers(100, 104, SIZE).astype(np.uint8)
    pixels[2, 3] = 100 + largest
    if mask is not None:
        pixels[10:16, 20:28] = 100 + largest
        marked = np.zeros(SIZE, np.uint8)
        marked[9:16, 20:27] = 255  # a row too many, a column too few
        mask.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(marked).save(mask)
    file.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(pixels).save(file)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluate.REPEATS", 50)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "train" / "good").mkdir(parents=True)
    Pillow.fromarray(np.full(SIZE, 100, np.uint8)).save(folder / "train" / "good" / "000.png")
    for name, largest in GOOD.items():
        save_part(folder / "test" / "good" / f"{name}.png", largest, None)
    for name, largest in SPOT.items():
        mask = folder / "ground_truth" / "spot" / f"{name}_mask.png"
        save_part(folder / "test" / "spot" / f"{name}.png", largest, mask)
    return folder


@pytest.fixture
def model(tmp_path: Path, data: Path) -> str:
    calibration = Calibration.from_scores([THRESHOLD], [THRESHOLD], rate=0.5, method="split")
    folder = save_mean_distance(
        data, tmp_path / "model", PICTURES, calibration=calibration, select="split == 'train'"
    )
    return str(folder)


def truth_and_maps(data: Path) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Label, |pixel - 100| / 255 and mask of every test picture, made without our code."""
    found = []
    for file in sorted((data / "test").rglob("*.png")):
        values = abs(np.asarray(Pillow.open(file)).astype(float) - 100) / 255
        mask_file = data / "ground_truth" / "spot" / f"{file.stem}_mask.png"
        mask = np.zeros(SIZE, bool)
        if mask_file.is_file():
            mask = np.asarray(Pillow.open(mask_file)) > 0
        found.append((int(mask_file.is_file()), values, mask))
    return found


def test_metrics_are_those_of_scikit_learn_on_the_same_numbers(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    truth = truth_and_maps(data)
    labels, scores = [label for label, _, _ in truth], [values.max() for _, values, _ in truth]
    assert found["image_auroc"]["value"] == pytest.approx(roc_auc_score(labels, scores))
    precision = average_precision_score(labels, scores)
    assert found["image_average_precision"]["value"] == pytest.approx(precision)
    values = np.concatenate([values.ravel() for _, values, _ in truth])
    marked = np.concatenate([mask.ravel() for _, _, mask in truth])
    assert found["pixel_auroc"]["value"] == pytest.approx(roc_auc_score(marked, values), abs=1e-6)
    precision = average_precision_score(marked, values)
    assert found["pixel_average_precision"]["value"] == pytest.approx(precision, abs=1e-6)
    assert found["pixel_form"] == "exact"
    assert list(found["skipped"]) == ["aupimo"]
    assert "100000" in found["skipped"]["aupimo"]  # pixels
    assert (found["num_normal"], found["num_anomalous"], found["num_masked"]) == (4, 3, 3)


def test_every_shown_metric_has_an_interval_and_an_oracle_says_so(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    of_clouds = {"point_auroc", "point_average_precision"}
    assert set(METRICS) - set(found) == {"aupimo", *of_clouds}
    for name, (shown, _) in METRICS.items():
        assert name.endswith("_oracle") == shown.endswith("(oracle)")
        if name in found:
            assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_f1_and_dice_are_those_of_scikit_learn_at_the_calibrated_thresholds(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    truth = truth_and_maps(data)
    labels = [label for label, _, _ in truth]
    flags = [values.max() > THRESHOLD for _, values, _ in truth]
    assert found["image_f1"]["value"] == pytest.approx(f1_score(labels, flags))
    every = [
        f1_score(labels, [other.max() >= values.max() for _, other, _ in truth])
        for _, values, _ in truth
    ]
    assert found["image_f1_max_oracle"]["value"] == pytest.approx(max(every))
    each = [
        f1_score(mask.ravel(), values.ravel() > THRESHOLD) for label, values, mask in truth if label
    ]
    assert found["dice"]["value"] == pytest.approx(np.mean(each))
    marked = np.concatenate([mask.ravel() for _, _, mask in truth])
    above = np.concatenate([values.ravel() > THRESHOLD for _, values, _ in truth])
    assert found["dice_pooled"]["value"] == pytest.approx(f1_score(marked, above))
    assert found["dice_oracle"]["value"] >= found["dice"]["value"]
    assert found["dice_pooled_oracle"]["value"] >= found["dice_pooled"]["value"]


def test_lesions_found_and_false_findings_are_counted_at_the_map_threshold(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    # squares of 90 and 60 of 30, 90, 60; the single pixels of 35, 90 and 60 lie outside the masks
    assert found["lesion_recall"]["value"] == pytest.approx(2 / 3)
    assert found["false_findings"]["value"] == pytest.approx(3 / 7)
    curve = found["froc"]
    assert len(curve["recall"]) == len(curve["false_findings"]) == 7
    assert found["froc_mean_recall"]["value"] == pytest.approx(np.mean(curve["recall"]))


def test_more_pixels_than_the_budget_are_counted_in_bins_and_nothing_else_changes(
    data, model, tmp_path, monkeypatch
):
    exact = evaluate(data, model, tmp_path / "out")
    for budget in ("PIXEL_BUDGET", "KEPT_PIXELS"):
        monkeypatch.setattr(f"pipelines.map_metrics.{budget}", 2 * SIZE[0] * SIZE[1])
    binned = evaluate(data, model, tmp_path / "out")
    assert binned["pixel_form"] == "binned"
    for name in set(METRICS) & set(exact):
        assert binned[name] == pytest.approx(exact[name], abs=1e-3)


def save_volume(file: Path, values: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.8, -0.9, 2.0, 1.0])
    nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), affine), file)


def test_volumes_have_dice_and_lesions_in_three_dimensions(tmp_path):
    shape = (6, 12, 14)
    rng = np.random.default_rng(0)
    maps, each = {}, []
    for i in range(6):
        values, mask = rng.random(shape).astype(np.float32), np.zeros(shape, np.uint8)
        if i >= 3:
            mask[1:4, 2:6, 3:8] = 1
            mask[4, 6, 8] = 1  # touches it by a corner, so that it is the same lesion
            mask[5, 10:, 12:] = 1  # never found
            values[1:3, 2:6, 3:8] += 5
            save_volume(tmp_path / "ground_truth" / "lesion" / f"{i}_mask.nii.gz", mask)
            each.append(f1_score(mask.ravel(), values.ravel() > 2))
        if i == 5:
            values[0, 0, 0] = values[1, 1, 1] = 5  # one false finding
            values[5, 0, 13] = 5  # another
        name = f"{'lesion' if i >= 3 else 'good'}/{i}.nii.gz"
        save_volume(tmp_path / "test" / name, np.zeros(shape, np.int16))
        maps[f"{i}.nii.gz"] = values
    (tmp_path / "train" / "good").mkdir(parents=True)
    manifest = build_manifest(tmp_path).where(split="test")
    rows = []
    for item in manifest.images:
        save_volume(tmp_path / "out" / f"{item.item}.nii.gz", maps[Path(item.path).name])
        row = {"item": item.item, "status": "ok", "score": 0.0, "anomalous": False}
        rows.append(row | {"map_path": f"{item.item}.nii.gz"})
    calibration = Calibration.from_scores([2.0], [2.0], rate=0.5, method="split")
    found = measure(manifest, rows, tmp_path / "out", calibration=calibration)
    each[2] = 2 * 40 / (40 + 3 + 65)  # with the false ones: 40 of 65 voxels, 3 others
    assert found["dice"]["value"] == pytest.approx(np.mean(each))
    assert found["lesion_recall"]["value"] == 0.5
    assert found["false_findings"]["value"] == pytest.approx(2 / 6)
    # a voxel has 1.44 mm3, and the false findings two voxels and one
    fewer = measure(manifest, rows, tmp_path / "out", calibration=calibration, min_finding=2.0)
    assert fewer["lesion_recall"]["value"] == 0.5  # marked lesions all count
    assert fewer["false_findings"]["value"] == pytest.approx(1 / 6)
    assert fewer["dice"] == found["dice"]


@pytest.mark.parametrize("least", [-1.0, float("nan"), 2.0])
def test_a_size_in_mm_that_means_nothing_is_refused_before_anything_is_scored(
    data, model, tmp_path, least
):
    with pytest.raises(ValueError, match="has no distance|is a volume in mm3"):
        evaluate(data, model, tmp_path / "out", min_finding=least)
    assert not (tmp_path / "out").exists()


def test_rates_count_what_lies_above_the_threshold_with_wilsons_interval(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    alarms = binomtest(1, 4).proportion_ci(0.95, "wilson")  # 35 of 8, 20, 35, 11
    hits = binomtest(2, 3).proportion_ci(0.95, "wilson")  # 90 and 60 of 30, 90, 60
    rate, recall = found["false_alarm_rate"], found["recall"]
    assert (rate["value"], rate["low"], rate["high"]) == (0.25, alarms.low, alarms.high)
    assert (recall["value"], recall["low"], recall["high"]) == (2 / 3, hits.low, hits.high)
    assert "Wilson" in found["rate_interval"]


def test_pictures_of_one_part_widen_the_interval_and_make_it_a_bootstrap(data, model, tmp_path):
    names = sorted(file.relative_to(data).as_posix() for file in data.rglob("*.png"))
    parts = ["path,part", *(f"{name},{'a' if '3' in name or '2' in name else name}"
                            for name in names)]  # fmt: skip
    (tmp_path / "parts.csv").write_text("\n".join(parts))
    groups = f"{tmp_path / 'parts.csv'}:part"
    found = evaluate(data, model, tmp_path / "out", groups=groups)
    assert "bootstrap" in found["rate_interval"]
    assert found["num_groups"] == 6
    assert found["false_alarm_rate"]["value"] == 0.25


def test_training_pictures_do_not_count(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out")
    assert found["items"] == 7
    score(data, model, tmp_path / "all")  # scored with the training picture
    again = evaluate(data, model, tmp_path / "all")
    assert again["items"] == 8
    assert again["image_auroc"] == found["image_auroc"]
    assert again["num_normal"] == 4


def test_finished_scores_are_not_made_again_but_measured(data, model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    score(data, model, out, select="split == 'test'")
    tables = {name: (out / name).stat().st_mtime_ns for name in job.TABLES}
    monkeypatch.setattr(job, "Scorer", None)
    found = evaluate(data, model, out)
    assert {name: (out / name).stat().st_mtime_ns for name in job.TABLES} == tables
    written = json.loads((out / "metrics.json").read_text())
    assert written["image_auroc"] == found["image_auroc"]
    page = (out / "report.html").read_text()
    assert "Image AUROC" in page
    assert f"{found['image_auroc']['value']:.3f}" in page
    assert evaluate(data, model, out) == found


def test_scores_forced_beyond_the_domain_are_measured_as_they_are(data, model, tmp_path):
    score(data, model, tmp_path / "out", force=True, batch_size=3)
    assert evaluate(data, model, tmp_path / "out")["ok"] == 8


def test_without_masks_pixel_metrics_are_left_out_with_the_reason(data, model, tmp_path):
    for mask in (data / "ground_truth" / "spot").iterdir():
        mask.unlink()
    found = evaluate(data, model, tmp_path / "out")
    assert "pixel_auroc" not in found
    assert "mask" in found["skipped"]["pixel metrics"]
    assert "image_auroc" in found


def test_normals_alone_have_a_false_alarm_rate_and_no_auroc(data, model, tmp_path):
    found = evaluate(data, model, tmp_path / "out", select="label == 0")
    assert found["false_alarm_rate"]["value"] == 0.25
    assert "image_auroc" not in found
    assert set(found["skipped"]) == {"image metrics", "recall", "pixel metrics"}


def test_an_uncalibrated_model_has_no_rates(data, tmp_path):
    model = save_mean_distance(data, tmp_path / "model", PICTURES, select="split == 'train'")
    found = evaluate(data, str(model), tmp_path / "out")
    assert "false_alarm_rate" not in found
    for name in ("recall", "image_f1", "dice", "lesion_recall"):
        assert found["skipped"][name] == "the model is not calibrated"
    assert "dice_oracle" in found
    assert "froc_mean_recall" in found


def test_nothing_labelled_is_an_error_that_says_what_labels_look_like(data, model, tmp_path):
    with pytest.raises(ValueError, match="test/good"):
        evaluate(data / "test" / "good", model, tmp_path / "out")


def test_a_normal_pixel_without_a_value_does_not_count_and_an_anomalous_one_is_missed(
    data, model, tmp_path
):
    out = tmp_path / "out"
    score(data, model, out)
    found = [evaluate(data, model, out)["pixel_auroc"]["value"]]
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    for place in ((2, 3), (9,)):  # the one wrong pixel outside the mask; a row of the mask
        for row in rows:
            values = tifffile.imread(out / row["map_path"])
            values[place] = np.nan
            tifffile.imwrite(out / row["map_path"], values)
        found.append(evaluate(data, model, out)["pixel_auroc"]["value"])
    assert found[1] > found[0]
    assert found[2] < found[1]


def test_items_of_a_site_without_a_threshold_are_why_rates_are_missing(data, tmp_path):
    calibration = Calibration.from_scores(
        [THRESHOLD], [THRESHOLD], rate=0.5, method="path", sites=["north"], by="scanner"
    )
    model = save_mean_distance(
        data, tmp_path / "model", PICTURES, calibration=calibration, select="split == 'train'"
    )
    sites = [*(f"{name}.png,south" for name in GOOD), *(f"{name}.png,north" for name in SPOT)]
    (data / "sites.csv").write_text("path,scanner\n" + "\n".join(sites) + "\n")
    found = evaluate(data, str(model), tmp_path / "out", site="sites.csv:scanner")
    assert found["recall"]["value"] == pytest.approx(2 / 3)
    for name in ("false_alarm_rate", "image_f1", "dice", "lesion_recall"):
        assert found["skipped"][name] == "some items are of a site without a threshold"
