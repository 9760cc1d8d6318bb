"""What every test shares: a key of its own, a tracking store of its own, one torch thread."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(scope="session", autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MEDSSL_KEY_FILE"] = str(tmp_path_factory.mktemp("key") / "key")


@pytest.fixture(autouse=True)
def _own_tracking_store(tmp_path_factory: pytest.TempPathFactory, request, monkeypatch) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp()}/mlflow.db"
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; the test is skipped where MEDSSL_DATA does not name it."""
    folder = os.environ.get("MEDSSL_DATA")
    if not folder:
        pytest.skip("MEDSSL_DATA is not set: real images are not at hand")
    return Path(folder)
