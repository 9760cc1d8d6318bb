import importlib
import json
import subprocess
import sys

import anomaly
from anomaly.base import Detector
from medssl.models.encoder import Encoder
from medssl.objectives.base import Objective
from medssl.probes.base import Probe
from pipelines.cli import main
from pipelines.list import PACKAGES

CONTRACTS = {"encoder": Encoder, "objective": Objective, "detector": Detector, "probe": Probe}


def listed(capfd) -> list[dict[str, str]]:
    assert main(["list", "--json"]) == 0
    return json.loads(capfd.readouterr().out)["methods"]


def test_every_listed_class_exists_and_keeps_its_contract(capfd):
    methods = listed(capfd)
    assert {method["kind"] for method in methods} == {name.lower() for name in PACKAGES}
    for method in methods:
        module, _, name = method["class_path"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert issubclass(kind, CONTRACTS[method["kind"]])
        assert (kind.__doc__ or "").startswith(method["what"])


def test_a_new_file_is_a_new_line(capfd, monkeypatch, tmp_path):
    (tmp_path / "anomaly" / "features").mkdir(parents=True)
    (tmp_path / "anomaly" / "features" / "fresh.py").write_text(
        "import base\n"
        "class Fresh(Learning):\n    '''Finds it.\n\n    More.\n    '''\n"
        "    def example(cls): pass\n"
        "class Learning(base.Detector):\n    '''No method, but what some stand on.'''\n"
        "class Helper:\n    '''No method.'''\n"
    )
    monkeypatch.setattr(anomaly, "__path__", [str(tmp_path / "anomaly")])
    detectors = [method for method in listed(capfd) if method["kind"] == "detector"]
    path = "anomaly.features.fresh.Fresh"
    assert detectors == [{"kind": "detector", "class_path": path, "what": "Finds it."}]


def test_listing_imports_no_method():
    code = "import sys; from pipelines.list import list as job; job(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()
