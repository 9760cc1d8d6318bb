import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image as Picture

from anomaly.base import NormalData
from anomaly.calibration import Calibration
from anomaly.features.patchcore import PatchCore
from medssl.data.domain import learn_domain
from medssl.data.preprocess import Preprocessing
from medssl.data.readers.any import read_image
from medssl.data.sample import Sample
from medssl.models.folder import save_model, selftest_noise
from medssl.models.timm_encoder import TimmEncoder
from pipelines.record import Registered, recorded, register
from pipelines.scoring import Scorer
from pipelines.served import COLUMNS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and a detector fitted on all but the last in `model`."""
    folder = tmp_path_factory.mktemp("served")
    generator = np.random.default_rng(0)
    for i in range(5):
        gray = generator.integers(0, 256, (40, 48), dtype=np.uint8)
        Picture.fromarray(gray).save(folder / f"{i}.png")
    Picture.fromarray(np.zeros((40, 48, 3), np.uint8)).save(folder / "color.png")
    images = [read_image(folder / f"{i}.png") for i in range(4)]
    preprocessing = Preprocessing(size=(32, 32), intensity="range", channels=1)
    samples = [
        preprocessing.sample(Sample(item=str(i), images={"image": image}))
        for i, image in enumerate(images)
    ]
    encoder = TimmEncoder("test_resnet", in_channels=1)
    detector = PatchCore(encoder, layers=["layer1"]).fit(NormalData(samples))
    known = Calibration.from_scores([0.1] * 19, [0.1] * 19, rate=0.05, method="split")
    save_model(
        folder / "model",
        detector,
        kind="detector",
        preprocessing=preprocessing,
        domain=learn_domain(images),
        card="",
        noise=selftest_noise((1, 1, 32, 32)),
        files={"calibration.json": known.to_dict()},
    )
    return folder


def put(place: Path, name: str) -> Registered:
    with recorded("fit", {}) as run:
        return register(place / "model", name, run)


def load(name: str) -> mlflow.pyfunc.PyFuncModel:
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    try:
        return mlflow.pyfunc.load_model(f"models:/{name}@champion")
    finally:
        mlflow.set_tracking_uri(None)


def expected(place: Path, name: str) -> tuple[float, float | None, bool | None]:
    """What the folder says of a picture, without any registry."""
    sample = Sample(item="row", images={"image": read_image(place / name)})
    scored = Scorer(place / "model").score([sample])[0]
    return scored.score, scored.p_value, scored.anomalous


def test_a_registered_model_scores_as_its_folder_bit_for_bit(place, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    put(place, "exact")
    model = load("exact")
    raw = (place / "4.png").read_bytes()
    frame = pd.DataFrame({"content": [raw, base64.b64encode(raw).decode()]}, index=[7, 3])
    told = model.predict(frame.iloc[:1])
    assert list(told.columns) == list(COLUMNS)
    assert list(told.index) == [7]
    row = told.iloc[0]
    assert (row["score"], row["p_value"], row["anomalous"]) == expected(place, "4.png")
    assert row["p_value"] == pytest.approx(0.05)  # above all 19: 1 / (19 + 1)
    assert (row["status"], row["error"]) == ("ok", None)
    as_text = model.unwrap_python_model().predict(None, frame.iloc[1:])
    assert as_text.loc[3, "score"] == row["score"]


def test_a_model_calibrated_by_site_says_why_a_site_has_no_verdict(place, tmp_path):
    folder = shutil.copytree(place / "model", tmp_path / "model")
    known = Calibration.from_scores(
        [0.1] * 19,
        [0.1] * 19,
        rate=0.05,
        method="split",
        sites=["A"] * 19,
        by="scanner",
    )
    (folder / "calibration.json").write_text(json.dumps(known.to_dict()))
    with recorded("fit", {}) as run:
        register(folder, "sites", run)
    raw = (place / "4.png").read_bytes()
    frame = pd.DataFrame({"content": [raw] * 2, "site": ["A", "B"]})
    told = load("sites").predict(frame)
    assert told["status"].tolist() == ["ok", "ok"]
    assert told["score"][0] == told["score"][1]
    assert told["anomalous"].tolist() == [True, None]
    assert told["no_verdict"][0] is None
    assert "its scanner has no held-out normal" in told["no_verdict"][1]


def test_a_bad_row_leaves_the_others_their_verdict(place, monkeypatch):
    monkeypatch.delenv("MEDSSL_SERVE_ROOT", raising=False)
    put(place, "rows")
    good = (place / "4.png").read_bytes()
    rows = [
        {"content": good[: len(good) // 2]},
        {"content": b"no picture"},
        {"content": None},
        {"content": (place / "color.png").read_bytes()},
        {"content": good},
    ]
    told = load("rows").predict(pd.DataFrame(rows))
    assert list(told["status"]) == ["error", "error", "error", "refused", "ok"]
    assert told["score"].iloc[4] == expected(place, "4.png")[0]
    assert told["score"].iloc[:4].isna().all()
    assert "needs content" in told["error"].iloc[2]
    assert "channels" in told["error"].iloc[3]


def test_a_path_is_read_below_the_allowed_folder_only(place, monkeypatch, tmp_path):
    put(place, "paths")
    outside = tmp_path / "secret.png"
    outside.write_bytes((place / "4.png").read_bytes())
    (place / "link.png").unlink(missing_ok=True)
    (place / "link.png").symlink_to(outside)
    asked = ["4.png", str(place / "4.png"), str(outside), "../secret.png", "link.png", "gone.png"]
    model = load("paths")
    monkeypatch.delenv("MEDSSL_SERVE_ROOT", raising=False)
    told = model.predict(pd.DataFrame({"path": asked}))
    assert set(told["status"]) == {"error"}
    assert "MEDSSL_SERVE_ROOT is not set" in told["error"].iloc[0]

    monkeypatch.setenv("MEDSSL_SERVE_ROOT", str(place))
    told = model.predict(pd.DataFrame({"path": asked}))
    assert list(told["status"]) == ["ok", "ok", "error", "error", "error", "error"]
    assert told["score"].iloc[0] == expected(place, "4.png")[0]
    assert all("not below MEDSSL_SERVE_ROOT" in error for error in told["error"].iloc[2:5])
    assert not [error for error in told["error"].dropna() if "secret" in error]


def test_text_that_is_not_base64_is_told_so(place):
    put(place, "text")
    frame = pd.DataFrame({"content": ["%%%"]})
    told = load("text").unwrap_python_model().predict(None, frame)
    assert "not base64" in told["error"].iloc[0]


@pytest.mark.slow
def test_mlflow_serves_the_model_over_http(place):
    put(place, "http")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/http@champion"]
    command += ["-h", "127.0.0.1", "-p", str(port), "--env-manager", "local", "--workers", "1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": path}
    process = subprocess.Popen(command, env={**os.environ, **settings}, start_new_session=True)
    try:
        content = base64.b64encode((place / "4.png").read_bytes()).decode()
        rows = {"dataframe_records": [{"content": content}, {"content": "bm8gcGljdHVyZQ=="}]}
        told = post(f"http://127.0.0.1:{port}/invocations", rows)["predictions"]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    score, p_value, anomalous = expected(place, "4.png")
    assert (told[0]["score"], told[0]["p_value"], told[0]["anomalous"]) == (
        score,
        p_value,
        anomalous,
    )
    assert (told[1]["status"], told[1]["score"]) == ("error", None)


def post(address: str, body: dict) -> dict:
    """The server's answer, once it is up."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()) from error
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)
