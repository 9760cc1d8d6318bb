"""Every config of `medssl fit` builds the detector that it names, with its settings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anomaly.base import Detector
from medssl.models.folder import describe
from pipelines.cli import _parser
from pipelines.fit import fit

FILES = sorted(Path("configs/fit").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_builds_the_detector_that_it_names(file: Path):
    given = yaml.safe_load(file.read_text())
    wanted = yaml.safe_load(file.read_text())  # the parser changes what it is given
    parser = _parser("fit", fit)
    values = parser.instantiate(parser.parse_object({**given, "data": ".", "out": "there"}))
    assert isinstance(values.detector, Detector)
    assert_described(wanted["detector"], describe(values.detector))
    if "size" in wanted.get("preprocessing", {}):
        found = values.preprocessing.to_dict()
        assert found["size"] == wanted["preprocessing"].get("size")
    first = file.read_text().partition("\n")[0]
    assert first.startswith(f"# medssl fit {file} --data ")


def assert_described(wanted: Any, found: Any) -> None:
    """Everything that the config says is what the detector holds; a weight file is never kept."""
    if isinstance(wanted, dict):
        inner = found["init_args"] if set(found) == {"class_path", "init_args"} else found
        for name, value in wanted.items():
            if name in ("class_path", "init_args"):
                assert_described(value, found[name])
            elif name != "weights":
                assert_described(value, inner[name])
    elif isinstance(wanted, list):
        assert len(wanted) == len(found)
        for one, other in zip(wanted, found, strict=True):
            assert_described(one, other)
    else:
        assert found == wanted
