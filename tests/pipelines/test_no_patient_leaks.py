"""Names, numbers and dates of a made-up patient in every text of a study: where do they end up?"""

import csv
import gzip
import io
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import torch
import yaml
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.tag import Tag

from medssl.data.image import Image
from medssl.data.modality import Modality
from medssl.data.synthetic.dicom_series import write_dicom_series
from pipelines.cli import main

CANARY = "QZVX"
ROOT_OF_UIDS = "1.2.840.99974213"
TEXT = ("LO", "SH", "PN", "ST", "LT", "UT", "UC", "UR", "AE")
MEANT = {"RescaleType", "TransferSyntaxUID", "SOPClassUID", "MediaStorageSOPClassUID"}
"""Elements that are not free text: they say what the pixels are."""


def volume(seed: int) -> Image:
    noise = np.random.default_rng(seed).integers(-60, 140, (4, 40, 40))
    affine = torch.diag(torch.tensor([2.0, 0.5, 0.8, 1.0], dtype=torch.float64))[[2, 1, 0, 3]]
    return Image(
        pixels=torch.from_numpy(noise).float()[None],
        axes="DHW",
        modality=Modality.CT,
        affine=affine,
        frame="patient",
        spacing=(2.0, 0.5, 0.8),
    )


def sow(file: Path, series: int) -> None:
    """Put a canary into every text, date and identifier that the standard knows, and a private."""
    dataset = pydicom.dcmread(file)
    for number, entry in DicomDictionary.items():
        tag, vr, keyword = Tag(number), entry[0], keyword_for_tag(number)
        if tag.group in (0, 2) or keyword in MEANT or entry[3] == "Retired" or entry[1] == "0":
            continue
        if vr in TEXT:
            dataset.add_new(tag, vr, f"{CANARY}{tag.group:x}{tag.element:x}")
        elif vr == "UI":
            level = 0 if keyword == "StudyInstanceUID" else series
            instance = f".{file.stem.encode().hex()[:12]}" if keyword == "SOPInstanceUID" else ""
            instance = instance and f".{int(instance[1:], 16)}"
            dataset.add_new(tag, vr, f"{ROOT_OF_UIDS}.{level}.{number % 10**9}{instance}")
        elif keyword in ("PatientBirthDate", "StudyDate"):
            dataset.add_new(tag, vr, "19310207")
    dataset.private_block(0x0099, f"{CANARY}CREATOR", create=True).add_new(1, "LO", f"{CANARY}P")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(file.with_name(f"{CANARY}-{file.name}"), enforce_file_format=True)
    file.unlink()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Six sound series, one with a gap, one damaged file, and a picture with a text inside."""
    root = tmp_path_factory.mktemp("data") / f"{CANARY}-hospital"
    for number in range(7):
        folder = root / f"{CANARY}-patient-{number}"
        write_dicom_series(volume(number), folder, name=f"{CANARY}{number}")
        for file in sorted(folder.iterdir()):
            sow(file, number + 1)
    for file in (root / f"{CANARY}-patient-6").iterdir():
        if float(pydicom.dcmread(file).ImagePositionPatient[2]) == 2:
            file.unlink()
    damaged = root / f"{CANARY}-damaged"
    damaged.mkdir()
    whole = next((root / f"{CANARY}-patient-0").iterdir()).read_bytes()
    (damaged / f"{CANARY}.dcm").write_bytes(whole[: len(whole) // 2])
    about = PngInfo()
    about.add_text("Comment", f"{CANARY} in a picture")
    Pillow.fromarray(np.zeros((40, 40), np.uint8)).save(root / f"{CANARY}.png", pnginfo=about)
    return root


def test_the_canaries_are_really_there(study):
    file = next((study / f"{CANARY}-patient-0").iterdir())
    dataset = pydicom.dcmread(file)
    texts = [e for e in dataset if e.VR in TEXT and CANARY in str(e.value)]
    uids = [e for e in dataset if e.VR == "UI" and str(e.value).startswith(ROOT_OF_UIDS)]
    assert len(texts) > 500
    assert len(uids) > 30
    assert CANARY in dataset.PatientName


def config(file: Path, content: dict) -> Path:
    file.write_text(yaml.safe_dump(content))
    return file


def encoder() -> dict:
    name = "medssl.models.timm_encoder.TimmEncoder"
    return {"class_path": name, "init_args": {"name": "test_resnet", "in_channels": 1}}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def whole_way(study: Path, work: Path) -> None:
    """From the folder to the report, by the command line."""
    pretraining = {
        "preprocessing": {
            "size": [32, 32], "intensity": "window", "window_hu": "brain", "channels": 1,
        },
        "objective": {
            "class_path": "medssl.objectives.joint_embedding.dino.DINO",
            "init_args": {
                "encoder": encoder(), "prototypes": 16, "hidden_dim": 32, "bottleneck_dim": 16,
                "global_size": 32, "local_crops": 1, "local_size": 16,
            },
        },
        "plan": {"total_samples": 12, "batch_size": 4},
    }  # fmt: skip
    detector = {
        "detector": {
            "class_path": "anomaly.slicewise.Slicewise",
            "init_args": {
                "detector": {
                    "class_path": "anomaly.features.patchcore.PatchCore",
                    "init_args": {"encoder": str(work / "encoder"), "layers": ["layer1"]},
                }
            },
        },
        "rate": 0.5,
    }
    table, out = work / "items.parquet", work / "scores"
    assert run("manifest", study, "--out", table, "--hash", "--workers", 1) == 1
    ct = "modality == 'CT'"
    pretrain = config(work / "pretrain.yaml", pretraining)
    assert run("pretrain", pretrain, "--data", study, "--out", work / "encoder", "--select", ct,
               "--workers", 0) == 1  # fmt: skip
    fit = config(work / "fit.yaml", detector)
    assert run("fit", fit, "--data", study, "--out", work / "model", "--select", ct,
               "--register", "leaks", "--calibration", "none") == 1  # fmt: skip
    assert run("score", study, "--model", "models:/leaks@champion", "--out", out) == 1
    assert run("score", work / "nowhere", "--model", work / "model", "--out", work / "x") != 0
    assert run("convert", table, "--out", work / "nifti") == 1


def test_nothing_of_a_patient_leaves_by_any_way_but_the_column_path(
    study, tmp_path, monkeypatch, capfd, caplog
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    whole_way(study, tmp_path)
    said = capfd.readouterr()
    logged = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("medssl")
    )
    for text in (said.out, said.err, logged):
        assert leaks(text.encode()) == []
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"report.html", "mlflow.db", "scores.csv", "items.parquet"} <= {f.name for f in files}
    assert len(list((tmp_path / "nifti").glob("*.nii.gz"))) == 7
    for file in files:
        assert leaks(str(file.relative_to(tmp_path)).encode()) == []
        assert leaks(without_paths(file)) == [], file.relative_to(tmp_path)


def test_inspect_shows_paths_and_nothing_else(study, tmp_path, capfd):
    assert run("inspect", study, "--json") == 1
    rows = json.loads(capfd.readouterr().out)["images"]
    for row in rows:
        del row["path"], row["folder"]
    assert leaks(json.dumps(rows).encode()) == []


def leaks(content: bytes) -> list[str]:
    """What of the patient stands in these bytes, also zipped or as UTF-16."""
    secrets = (CANARY, ROOT_OF_UIDS, "19310207")
    forms = {secret: (secret.encode(), secret.encode("utf-16-le")) for secret in secrets}
    return [secret for secret, ways in forms.items() if any(way in content for way in ways)]


def without_paths(file: Path) -> bytes:
    """A file's bytes, unpacked; of a local table without its one column of paths."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        kept = table.drop_columns(["path"]) if "path" in table.column_names else table
        return repr((kept.to_pylist(), kept.schema.metadata)).encode()
    content = file.read_bytes()
    if file.suffix == ".gz":
        return gzip.decompress(content)
    if file.suffix in (".csv", ".jsonl"):
        return repr(list(map(without_path, rows_of(file, content.decode())))).encode()
    if file.suffix == ".json" and file.name.startswith("part-"):
        return repr(list(map(without_path, json.loads(content)))).encode()
    return content


def rows_of(file: Path, text: str) -> list[dict]:
    if file.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.splitlines()]


def without_path(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "path"}
