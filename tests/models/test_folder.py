import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from medssl.data.preprocess import Preprocessing
from medssl.models.folder import (
    ModelFolderError,
    build,
    describe,
    digest,
    load_encoder,
    load_model,
    save_model,
    selftest_noise,
)
from medssl.models.timm_encoder import TimmEncoder

PREPARE = Preprocessing(size=(64, 64), intensity="range", channels=1)


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    encoder, _ = TimmEncoder.example()
    out = save_model(
        tmp_path / "encoder",
        encoder,
        kind="encoder",
        preprocessing=PREPARE,
        domain={"modality": "CT"},
        card="a card",
        noise=selftest_noise((2, 1, 64, 64)),
    )
    return encoder.eval(), out


def test_a_new_process_gives_the_same_embeddings_bit_for_bit(saved):
    encoder, out = saved
    images = selftest_noise((2, 1, 64, 64))
    with torch.no_grad():
        expected = encoder(images).sum(0).tolist()
    code = (
        "import torch, json; torch.set_num_threads(1); from pathlib import Path;"
        "from medssl.models.folder import load_encoder, selftest_noise;"
        f"encoder = load_encoder(Path({str(out)!r}));"
        "print(json.dumps(encoder(selftest_noise((2, 1, 64, 64))).sum(0).tolist()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout) == expected


def test_preprocessing_and_domain_come_back(saved):
    _, out = saved
    loaded = load_model(out)
    assert loaded.preprocessing == PREPARE
    assert loaded.domain == {"modality": "CT"}
    assert load_encoder(out).preprocessing == PREPARE


def test_the_weight_file_is_not_needed_after_saving(tmp_path):
    first, _ = TimmEncoder.example()
    file = tmp_path / "w.safetensors"
    save_file(first.network.state_dict(), file)
    encoder = TimmEncoder("test_resnet", in_channels=1, weights=file)
    save_model(
        tmp_path / "out",
        encoder,
        kind="encoder",
        preprocessing=PREPARE,
        domain={},
        card="",
        noise=selftest_noise((1, 1, 64, 64)),
    )
    file.unlink()
    again = load_encoder(tmp_path / "out")
    assert torch.equal(again.network.layer1[0].conv1.weight, first.network.layer1[0].conv1.weight)
    assert str(tmp_path) not in (tmp_path / "out" / "model.yaml").read_text()


def test_changed_weights_fail_the_selftest(saved):
    _, out = saved
    tensors = load_file(out / "weights.safetensors")
    tensors["network.conv1.0.weight"] *= 1.05
    save_file(tensors, out / "weights.safetensors")
    with pytest.raises(ModelFolderError, match="fails its self-test"):
        load_model(out)


def test_an_existing_folder_is_never_overwritten(saved):
    encoder, out = saved
    before = digest(out)
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_model(
            out,
            encoder,
            kind="encoder",
            preprocessing=PREPARE,
            domain={},
            card="",
            noise=selftest_noise((1, 1, 64, 64)),
        )
    assert digest(out) == before


def test_a_failed_save_leaves_nothing(tmp_path):
    encoder, _ = TimmEncoder.example()
    with pytest.raises(RuntimeError):
        save_model(
            tmp_path / "out",
            encoder,
            kind="encoder",
            preprocessing=PREPARE,
            domain={},
            card="",
            noise=selftest_noise((1, 7, 64, 64)),
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("class_path", ["os.system", "subprocess.Popen", "torch.nn.Linear"])
def test_only_trusted_packages_are_imported(saved, class_path):
    _, out = saved
    description = yaml.safe_load((out / "model.yaml").read_text())
    description["model"]["class_path"] = class_path
    (out / "model.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(ModelFolderError, match=f"names {class_path}; a model may only name"):
        load_model(out)


def test_a_function_of_a_trusted_package_is_not_a_model():
    with pytest.raises(ModelFolderError, match="is neither a model nor a record"):
        build({"class_path": "medssl.models.weights.load_weights", "init_args": {}})


def test_another_kind_is_refused(saved):
    _, out = saved
    with pytest.raises(ModelFolderError, match="holds a fitted encoder, expected a detector"):
        load_model(out, kind="detector")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.yaml", "{"),
        ("selftest.json", "{"),
        ("learnt.json", "{"),
        ("seen.json", "{"),
        ("seen.json", '{"pixels": []}'),
        ("seen.json", "[]"),
    ],
)
def test_damaged_files_are_named(saved, name, content):
    _, out = saved
    (out / name).write_text(content)
    with pytest.raises(ModelFolderError, match=f"{name} is damaged"):
        load_model(out)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no model.yaml"):
        load_model(tmp_path / "none")


class Holder(nn.Module):
    def __init__(self, encoder, *, ratio=0.5, layers=("a",)):
        super().__init__()
        self.encoder, self.ratio, self.layers = encoder, ratio, layers


def test_nested_models_are_described_by_class_and_arguments():
    encoder, _ = TimmEncoder.example()
    described = describe(Holder(encoder, ratio=0.1, layers=["x", "y"]))
    assert described["init_args"]["ratio"] == 0.1
    assert described["init_args"]["layers"] == ["x", "y"]
    assert described["init_args"]["encoder"] == {
        "class_path": "medssl.models.timm_encoder.TimmEncoder",
        "init_args": {"name": "test_resnet", "in_channels": 1, "options": {}},
    }


class Parts(nn.Module):
    def __init__(self, encoders, *, weights=None):
        super().__init__()
        self.modules_of = nn.ModuleDict(encoders)
        self.weights = weights

    @property
    def encoders(self):
        return dict(self.modules_of)


def test_models_in_a_mapping_are_built_again():
    first, _ = TimmEncoder.example()
    parts = Parts({"t1": first, "t2": TimmEncoder("test_resnet", in_channels=2)}, weights={"a": 1})
    described = describe(parts)
    again = build(described, trust=("medssl", Parts.__module__.split(".")[0]))
    assert describe(again) == described
    assert list(again.encoders) == ["t1", "t2"]
    assert [one.in_channels for one in again.encoders.values()] == [1, 2]
    assert again.weights == {"a": 1}
    again.load_state_dict(parts.state_dict())


def test_a_model_in_a_mapping_is_of_a_trusted_package():
    inside = {"class_path": "subprocess.Popen", "init_args": {}}
    outside = {
        "class_path": "medssl.models.timm_encoder.TimmEncoder",
        "init_args": {"name": "test_resnet", "options": {"deep": [inside]}},
    }
    with pytest.raises(ModelFolderError, match=r"names subprocess\.Popen; a model may only name"):
        build(outside)
