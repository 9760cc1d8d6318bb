"""Tables, maps and report of a run; what is broken, refused, stopped and started again."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import tifffile
import torch
from mean_distance import save_mean_distance
from PIL import Image as Pillow
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from scipy.stats import false_discovery_control

import pipelines.score as job
from anomaly.calibration import Calibration
from medssl.data.manifest import build_manifest
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from pipelines.journal import Journal, alone
from pipelines.score import COLUMNS, SITE_COLUMNS, cut, score

SIZE = (24, 32)
PICTURES = Preprocessing(size=SIZE, intensity="range", mean=(0.0,), std=(1.0,))
DEFECT = (slice(6, 10), slice(20, 28))
NORMAL = 100


def save_pictures(folder: Path, count: int = 6) -> Path:
    """MVTec-style: even pictures normal, odd ones with a bright defect; a training picture."""
    rng = np.random.default_rng(3)
    for name in ("train/good", "test/good", "test/spot"):
        (folder / name).mkdir(parents=True)
    Pillow.fromarray(np.full(SIZE, NORMAL, np.uint8)).save(folder / "train/good/000.png")
    for number in range(count):
        pixels = rng.integers(NORMAL - 5, NORMAL + 6, SIZE).astype(np.uint8)
        if number % 2:
            pixels[DEFECT] = 200
        kind = "spot" if number % 2 else "good"
        Pillow.fromarray(pixels).save(folder / "test" / kind / f"{number:03d}.png")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "data")


@pytest.fixture
def model(tmp_path: Path, data: Path) -> str:
    calibration = Calibration.from_scores([0.1], [0.1], rate=0.5, method="split")
    select = "split == 'train'"
    return str(
        save_mean_distance(
            data, tmp_path / "model", PICTURES, calibration=calibration, select=select
        )
    )


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def without_seconds(out: Path) -> list[dict]:
    return [row | {"seconds": None} for row in rows_of(out)]


def snapshot(out: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}


def parts_of(out: Path) -> int:
    return len(list((out / "journal").glob("part-*")))


def maps_of(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "maps").iterdir())}


def test_scores_maps_and_boxes_are_the_known_ones(data, model, tmp_path):
    summary = score(data / "test", model, tmp_path / "out")
    assert {name: summary[name] for name in ("items", "ok", "failed", "anomalous")} == {
        "items": 6, "ok": 6, "failed": 0, "anomalous": 3,
    }  # fmt: skip
    for row in rows_of(tmp_path / "out"):
        bad = "spot" in row["path"]
        assert row["anomalous"] is bad
        assert row["score"] == pytest.approx(100 / 255 if bad else 5 / 255, rel=1e-4)
        assert row["p_value"] == (0.5 if bad else 1.0)
        assert row["boxes"] == ([[6, 20, 10, 28]] if bad else [])
        assert row["volume_mm3"] is None
        pixels = np.asarray(Pillow.open(row["path"])).astype(float)
        values = tifffile.imread(tmp_path / "out" / row["map_path"])
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, abs(pixels - NORMAL) / 255, atol=1e-6)


def test_the_three_tables_say_the_same(data, model, tmp_path):
    out = tmp_path / "out"
    (data / "test" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    score(data / "test", model, out)
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS
    assert pq.read_table(out / "scores.parquet").to_pylist() == rows
    with (out / "scores.csv").open() as stream:
        for told, row in zip(csv.DictReader(stream), rows, strict=True):
            boxes = "" if row["boxes"] is None else json.dumps(row["boxes"])
            expected = {name: "" if row[name] is None else str(row[name]) for name in row}
            assert told == expected | {"boxes": boxes}


def test_a_broken_file_is_one_row_with_its_reason_and_the_rest_is_scored(data, model, tmp_path):
    (data / "test" / "good" / "001b.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    summary = score(data / "test", model, tmp_path / "out")
    assert (summary["ok"], summary["error"], summary["failed"]) == (6, 1, 1)
    (row,) = [row for row in rows_of(tmp_path / "out") if row["status"] == "error"]
    assert row["path"].endswith("001b.png")
    assert "decoded" in row["error"]
    assert row["item"] not in row["error"]
    assert str(tmp_path) not in row["error"]
    assert row["score"] is None
    assert row["item"] in (tmp_path / "out" / "report.html").read_text()


def test_a_colour_picture_is_refused_by_a_grey_detector_unless_forced(data, model, tmp_path):
    Pillow.new("RGB", (32, 24), (100, 100, 100)).save(data / "test" / "good" / "colour.png")
    summary = score(data / "test", model, tmp_path / "out")
    (row,) = [row for row in rows_of(tmp_path / "out") if row["status"] == "refused"]
    assert row["path"].endswith("colour.png")
    assert "channel" in row["error"]
    assert summary["failed"] == summary["refused"] == 1
    assert score(data / "test", model, tmp_path / "forced", force=True)["ok"] == 7


def test_masks_are_not_looked_at(data, model, tmp_path):
    (data / "ground_truth" / "spot").mkdir(parents=True)
    broken = data / "ground_truth" / "spot" / "001_mask.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    assert build_manifest(data).items != build_manifest(data).images
    assert score(data, model, tmp_path / "out")["failed"] == 0


def test_a_second_run_does_no_work_and_touches_no_file(data, model, tmp_path, monkeypatch):
    first = score(data, model, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(job, "Scorer", None)  # loading the model again would be work
    assert score(data, model, tmp_path / "out") == first
    assert snapshot(tmp_path / "out") == before


def test_a_crash_between_a_map_and_its_journal_changes_nothing(data, model, tmp_path, monkeypatch):
    score(data, model, tmp_path / "calm", batch_size=2)
    write, written = Journal.write, []

    def crash(journal: Journal, part: int, rows: list) -> None:
        if part == 2:
            raise KeyboardInterrupt
        written.append(part)
        write(journal, part, rows)

    monkeypatch.setattr(Journal, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        score(data, model, tmp_path / "out", batch_size=2)
    assert len(maps_of(tmp_path / "out")) > 2 * len(written)
    assert not (tmp_path / "out" / "scores.jsonl").exists()
    monkeypatch.setattr(Journal, "write", write)
    score(data, model, tmp_path / "out", batch_size=2)
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "calm")
    assert maps_of(tmp_path / "out") == maps_of(tmp_path / "calm")


def test_a_run_killed_again_and_again_ends_with_the_undisturbed_table(model, tmp_path):
    data = save_pictures(tmp_path / "many", count=40)
    score(data, model, tmp_path / "calm", batch_size=2)
    out, chance = tmp_path / "out", random.Random(5)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mean_distance, torch;"
        "from pathlib import Path; from pipelines.score import score;"
        "torch.set_num_threads(1);"
        "score(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), batch_size=2)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(data), model, str(out)]
    for kills in range(3):
        environment = os.environ | {"SECONDS_PER_BATCH": "0.05" if kills < 2 else "0"}
        begun = parts_of(out)
        process = subprocess.Popen(command, env=environment)
        while kills < 2 and parts_of(out) == begun:
            assert process.poll() is None
            time.sleep(0.002)
        if kills < 2:
            time.sleep(chance.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert (out / "scores.jsonl").exists() is (kills == 2)
    assert process.returncode == 0
    assert without_seconds(out) == without_seconds(tmp_path / "calm")
    assert maps_of(out) == maps_of(tmp_path / "calm")


def test_another_model_in_the_same_folder_is_refused(data, model, tmp_path):
    score(data, model, tmp_path / "out")
    other = save_mean_distance(data, tmp_path / "other", PICTURES)
    with pytest.raises(ValueError, match="another model .* choose another --out"):
        score(data, str(other), tmp_path / "out")


def test_two_processes_in_one_folder_are_kept_apart(data, model, tmp_path):
    with alone(tmp_path / "out"), pytest.raises(ValueError, match="another process"):
        score(data, model, tmp_path / "out")


def test_a_model_without_calibration_ranks_and_leaves_verdicts_empty(data, tmp_path):
    model = save_mean_distance(data, tmp_path / "model", PICTURES, select="split == 'train'")
    summary = score(data / "test", str(model), tmp_path / "out")
    assert summary["anomalous"] is None
    for row in rows_of(tmp_path / "out"):
        assert [row[name] for name in ("p_value", "threshold", "anomalous", "boxes")] == [None] * 4
        assert row["score"] > 0
    assert "Not calibrated" in (tmp_path / "out" / "report.html").read_text()


def test_batches_are_fixed_by_the_manifest_and_a_volume_is_alone(data):
    from dataclasses import replace

    items = list(build_manifest(data).images)
    assert [len(batch) for batch in cut(items, 3)] == [3, 3, 1]
    items[1] = replace(items[1], kind="nifti")
    assert [len(batch) for batch in cut(items, 3)] == [1, 1, 3, 2]
    assert [item for batch in cut(items, 3) for item in batch] == items


def test_the_report_needs_no_network_and_names_no_path(data, model, tmp_path):
    out = tmp_path / "out"
    score(data, model, out, select="split == 'test'")
    page = (out / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert str(tmp_path) not in page
    assert "001.png" not in page
    assert page.count('<img src="data:image/jpeg;base64,') == 6
    for row in rows_of(out):
        assert row["item"] in page
        both = Pillow.open(out / "overlays" / f"{row['item']}.png")
        assert both.size == (2 * SIZE[1] + 2, SIZE[0])
    drawn = re.findall(r"<title>(\d+) (normal|anomalous|unknown)</title>", page)
    sums = {kind: sum(int(n) for n, name in drawn if name == kind) for _, kind in drawn}
    assert sums == {"normal": 3, "anomalous": 3}


def test_beyond_the_limit_cases_are_listed_without_a_picture(data, model, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.report.page.MOST_PICTURES", 2)
    score(data, model, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    rows = sorted(rows_of(tmp_path / "out"), key=lambda row: -row["score"])
    assert page.count('<img src="data:') == 2
    assert [row["item"] in page for row in rows] == [True] * 7
    assert "The 2 highest scores are shown with pictures" in page


def save_oblique_ct(folder: Path, change: Callable[[FileDataset], None] = lambda _: None) -> None:
    """Ten slices of an oblique stack; the header names a patient."""
    rows = np.array([0.9, 0.3, -0.316227766])
    rows /= np.linalg.norm(rows)
    columns = np.cross([0.1, 0.4, 0.9], rows)
    columns /= np.linalg.norm(columns)
    normal = np.cross(rows, columns)
    stored = np.full((10, 20, 16), 1064, np.uint16)  # 40 HU
    stored[6, 12, 5] = 1124
    folder.mkdir(parents=True)
    for number, pixels in enumerate(stored):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number + 1}"
        slice_ = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID = CTImageStorage
        slice_.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = "1.2.3", "1.2.3.4"
        slice_.FrameOfReferenceUID = "1.2.3.5"
        slice_.PatientID, slice_.PatientName, slice_.Modality = "P77", "Doe^Jane", "CT"
        slice_.ImageOrientationPatient = [round(float(x), 12) for x in (*rows, *columns)]
        place = np.array([-31.7, 44.1, 903.3]) + 4.99 * number * normal
        slice_.ImagePositionPatient = [round(float(x), 9) for x in place]
        slice_.PixelSpacing, slice_.SliceThickness = [0.4883, 0.51], 5
        slice_.InstanceNumber = number + 1
        slice_.Rows, slice_.Columns = pixels.shape
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 12, 11
        slice_.PixelRepresentation = 0
        slice_.RescaleSlope, slice_.RescaleIntercept, slice_.RescaleType = 1, -1024, "HU"
        slice_.PixelData = pixels.tobytes()
        change(slice_)
        pydicom.dcmwrite(folder / f"{number}.dcm", slice_, enforce_file_format=True)


def test_an_oblique_dicom_series_gets_a_map_in_its_own_geometry(tmp_path):
    save_oblique_ct(tmp_path / "data" / "a")
    preprocessing = Preprocessing(size=(20, 16), intensity="window", window_hu=(40.0, 200.0))
    calibration = Calibration.from_scores([0.5], [0.5], rate=0.5, method="split")
    model = save_mean_distance(
        tmp_path / "data", tmp_path / "model", preprocessing, calibration=calibration,
        select="label is None",
    )  # fmt: skip
    score(tmp_path / "data", str(model), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    source = read_image(tmp_path / "data" / "a")
    written = nibabel.load(tmp_path / "out" / row["map_path"])
    ours = source.affine[:, [2, 1, 0, 3]].numpy()  # NIfTI counts (w, h, d)
    assert written.get_data_dtype() == np.float32
    assert (written.affine == ours.astype(np.float32)).all()
    ends = np.array([[i, j, k, 1] for i in (0, 15) for j in (0, 19) for k in (0, 9)])
    np.testing.assert_allclose(ends @ written.affine.T, ends @ ours.T, atol=1e-3)

    values = written.get_fdata().T  # (d, h, w)
    d, h, w = np.unravel_index(values.argmax(), values.shape)
    assert source.pixels[0, d, h, w] == 100  # where the bright voxel was stored
    assert row["boxes"] == [[d, h, w, d + 1, h + 1, w + 1]]
    assert row["volume_mm3"] == pytest.approx(0.4883 * 0.51 * 4.99, rel=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "slice" in page
    assert "Doe" not in page
    assert "P77" not in page


def test_an_mr_is_refused_by_a_ct_detector_by_name_of_its_modality(tmp_path):
    save_oblique_ct(tmp_path / "ct")
    preprocessing = Preprocessing(size=(20, 16), intensity="window", window_hu=(40.0, 200.0))
    model = save_mean_distance(
        tmp_path / "ct", tmp_path / "model", preprocessing, select="label is None"
    )

    def to_mr(slice_: FileDataset) -> None:
        slice_.Modality = "MR"
        slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"

    save_oblique_ct(tmp_path / "mr", to_mr)
    summary = score(tmp_path / "mr", str(model), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert summary["refused"] == summary["failed"] == 1
    assert (row["status"], row["modality"]) == ("refused", "MR")
    assert "MR" in row["error"]
    assert "CT" in row["error"]
    assert score(tmp_path / "mr", str(model), tmp_path / "forced", force=True)["error"] == 1


def test_equal_input_gives_equal_bits_in_another_folder(data, model, tmp_path):
    score(data, model, tmp_path / "one")
    torch.manual_seed(99)
    score(data, model, tmp_path / "two")
    assert without_seconds(tmp_path / "one") == without_seconds(tmp_path / "two")
    assert maps_of(tmp_path / "one") == maps_of(tmp_path / "two")


def test_q_values_are_the_p_values_of_the_batch_adjusted_together(data, model, tmp_path):
    for name in ("002", "004"):  # four are left, three of them with a defect
        (data / "test" / "good" / f"{name}.png").unlink()
    (data / "test" / "good" / "001b.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    score(data / "test", model, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    judged = [row for row in rows if row["p_value"] is not None]
    assert len(judged) == len(rows) - 1
    expected = false_discovery_control([row["p_value"] for row in judged])
    assert [row["q_value"] for row in judged] == pytest.approx(expected.tolist())
    assert {row["q_value"] for row in judged} == {0.5 * 4 / 3, 1.0}
    (broken,) = [row for row in rows if row["status"] == "error"]
    assert broken["q_value"] is None
    kinds = pq.read_table(tmp_path / "out" / "scores.parquet").schema
    assert str(kinds.field("q_value").type) == "double"


def test_a_run_begun_before_there_were_q_values_ends_with_them(data, model, tmp_path):
    score(data, model, tmp_path / "calm", batch_size=2)
    score(data, model, tmp_path / "out", batch_size=2)
    for file in (tmp_path / "out" / "journal").glob("part-*"):
        rows = json.loads(file.read_text())
        file.write_text(json.dumps([{n: row[n] for n in row if n != "q_value"} for row in rows]))
    for name in ("scores.jsonl", "scores.csv", "scores.parquet"):
        (tmp_path / "out" / name).unlink()
    score(data, model, tmp_path / "out", batch_size=2)
    assert without_seconds(tmp_path / "out") == without_seconds(tmp_path / "calm")
    assert list(rows_of(tmp_path / "out")[0]) == COLUMNS


def save_sites(data: Path, **site_of: str) -> str:
    """sites.csv with a column scanner: the site of each test picture, by its file's name."""
    lines = [f"{name}.png,{site}" for name, site in site_of.items()]
    (data / "sites.csv").write_text("path,scanner\n" + "\n".join(lines) + "\n")
    return "sites.csv:scanner"


@pytest.fixture
def model_by_site(tmp_path: Path, data: Path) -> str:
    calibration = Calibration.from_scores(
        [0.1, 0.5], [0.1, 0.5], rate=0.5, method="split", sites=["Mary", "North"], by="scanner"
    )
    return str(
        save_mean_distance(
            data, tmp_path / "by_site", PICTURES, calibration=calibration,
            select="split == 'train'",
        )
    )  # fmt: skip


def test_each_item_is_judged_by_the_site_that_the_table_names(data, model_by_site, tmp_path):
    site = save_sites(data, **{"000": "Mary", "001": "Mary", "003": "North", "005": "Elsewhere"})
    out = tmp_path / "out"
    summary = score(data, model_by_site, out, site=site, select="split == 'test'")
    rows = {Path(row["path"]).stem: row for row in rows_of(out)}
    told = {name: (row["site"], row["threshold"], row["anomalous"]) for name, row in rows.items()}
    assert told == {
        "000": ("Mary", 0.1, False), "002": (None, None, None), "004": (None, None, None),
        "001": ("Mary", 0.1, True), "003": ("North", 0.5, False), "005": ("Elsewhere", None, None),
    }  # fmt: skip
    assert summary["anomalous"] == 1
    assert "no scanner is known" in rows["002"]["no_verdict"]
    assert "has no held-out normal" in rows["005"]["no_verdict"]
    assert rows["001"]["no_verdict"] is None
    assert list(rows["001"]) == COLUMNS + SITE_COLUMNS
    assert pq.read_table(out / "scores.parquet").to_pylist() == rows_of(out)


def test_names_of_sites_are_in_the_tables_alone(data, model_by_site, tmp_path, capsys):
    site = save_sites(data, **{"001": "Mary", "003": "Elsewhere"})
    score(data, model_by_site, tmp_path / "out", site=site)
    told = capsys.readouterr()
    assert "5 items scored without a verdict: No promise for this item: no scanner" in told.out
    shown = [told.out, told.err, (tmp_path / "out" / "report.html").read_text()]
    shown += [file.read_text() for file in Path(model_by_site).glob("*.[jym]*")]
    assert len(shown) >= 6
    for name in ("Mary", "Elsewhere", "North"):
        assert not any(name in text for text in shown)


def test_a_model_by_site_is_not_scored_without_sites_nor_with_others(data, model_by_site, tmp_path):
    site = save_sites(data, **{"001": "Mary"})
    with pytest.raises(ValueError, match="--site FILE:scanner"):
        score(data, model_by_site, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    score(data, model_by_site, tmp_path / "out", site=site)
    save_sites(data, **{"001": "North"})
    with pytest.raises(ValueError, match="another sites"):
        score(data, model_by_site, tmp_path / "out", site=site)


def test_a_model_that_knows_no_sites_takes_none(data, model, tmp_path):
    site = save_sites(data, **{"001": "Mary"})
    with pytest.raises(ValueError, match="not calibrated by site"):
        score(data, model, tmp_path / "out", site=site)


def test_results_are_not_written_into_the_model(data, model, tmp_path):
    before = sorted(Path(model).rglob("*"))
    with pytest.raises(ValueError, match="holds a model; choose another --out"):
        score(data, model, Path(model))
    assert sorted(Path(model).rglob("*")) == before
