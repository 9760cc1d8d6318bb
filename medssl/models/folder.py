"""One folder format for encoders, detectors and fitted probes.

    model.yaml           class paths, arguments, preprocessing, domain
    weights.safetensors  every tensor of the state
    learnt.json          learnt state that is no tensor
    selftest.json        what generated noise must score
    card.md              for people
    calibration.json     written by calibration, where there is one
    seen.json            hashes of what an encoder was pretrained on
    fitted.json          hashes of what a detector was fitted and calibrated on

Loading never unpickles and imports classes of trusted packages only.
"""

import hashlib
import importlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medssl.data.preprocess import Preprocessing
from medssl.data.seen import Seen
from medssl.models.encoder import Encoder

Kind = Literal["encoder", "detector", "probe", "text"]
TRUSTED = ("medssl", "anomaly")
FORMAT = 1
_SELFTEST_TOLERANCE = 1e-3


class ModelFolderError(Exception):
    """A model folder that cannot be trusted or understood."""


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A model as loaded from its folder.

    domain: what it was fitted on; see `medssl.data.domain`.
    digest: sha256 of model.yaml, weights and calibration; names this model in score tables.
    """

    model: nn.Module
    kind: Kind
    preprocessing: Preprocessing
    domain: Mapping[str, Any]
    path: Path
    digest: str


def save_model(
    out: Path,
    model: nn.Module,
    *,
    kind: Kind,
    preprocessing: Preprocessing,
    domain: Mapping[str, Any],
    card: str,
    noise: Tensor,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the folder whole or not at all.

    noise: the batch the self-test scores; its shape and seed are saved, not its values.
    files: further JSON files by name, such as calibration.json.
    Raises FileExistsError where `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tensors, learnt = _split(model.state_dict())
        description = {
            "format": FORMAT,
            "kind": kind,
            "model": describe(model),
            "preprocessing": preprocessing.to_dict(),
            "domain": dict(domain),
        }
        (work / "model.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
        save_file(tensors, work / "weights.safetensors")
        selftest = {"shape": list(noise.shape), "expected": _run_selftest(model, noise).tolist()}
        contents = {"learnt.json": learnt, "selftest.json": selftest, **(files or {})}
        for name, content in contents.items():
            (work / name).write_text(json.dumps(content, indent=1))
        (work / "card.md").write_text(card)
        work.chmod(0o755)
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return out


def load_model(path: Path, *, kind: Kind | None = None, trust: Sequence[str] = ()) -> SavedModel:
    """Load a folder written by `save_model` and run its self-test.

    trust: further packages whose classes model.yaml may name.
    Raises FileNotFoundError or ModelFolderError, naming what is wrong.
    """
    if not (path / "model.yaml").is_file():
        raise FileNotFoundError(f"no model folder at {path}: it has no model.yaml")
    try:
        description = yaml.safe_load((path / "model.yaml").read_text())
        found, preprocessing = description["kind"], description["preprocessing"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"{path.name}/model.yaml is damaged; copy the folder anew"
        ) from error
    if description.get("format") != FORMAT:
        raise ModelFolderError(
            f"{path.name} has format {description.get('format')}, this version reads {FORMAT}"
        )
    if kind is not None and found != kind:
        raise ModelFolderError(f"{path.name} holds a fitted {found}, expected a {kind}")
    model = build(description["model"], trust=(*TRUSTED, *trust)).eval()
    _restore(model, load_file(path / "weights.safetensors"), _read_json(path / "learnt.json"))
    prepared = Preprocessing.from_dict(preprocessing)
    if isinstance(model, Encoder):
        model.preprocessing = prepared
        if (path / "seen.json").is_file():
            model.seen = _read_seen(path / "seen.json")
    _check_selftest(model, _read_json(path / "selftest.json"), path.name)
    return SavedModel(
        model=model,
        kind=found,
        preprocessing=prepared,
        domain=description["domain"],
        path=path,
        digest=digest(path),
    )


def load_encoder(path: Path) -> Encoder:
    """The encoder of a folder written by `medssl pretrain`, with its preprocessing."""
    return cast(Encoder, load_model(path, kind="encoder").model)


def describe(model: nn.Module) -> dict[str, Any]:
    """Class path and constructor arguments; every argument must be an attribute of its name."""
    kind = type(model)
    born_from: frozenset[str] = getattr(model, "born_from", frozenset())
    arguments = {}
    for name in inspect.signature(kind.__init__).parameters:
        if name == "self" or name in born_from:
            continue
        value = getattr(model, name)
        if isinstance(value, Path):
            raise TypeError(f"{kind.__name__}.{name} is a path; a saved model holds no paths")
        arguments[name] = _plain(value)
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def build(description: Mapping[str, Any], *, trust: Sequence[str] = TRUSTED) -> Any:
    """The inverse of `describe`, importing only from the trusted packages."""
    class_path = str(description["class_path"])
    package = class_path.split(".")[0]
    if package not in trust:
        allowed = " and ".join(f"{name}." for name in trust)
        raise ModelFolderError(
            f"model.yaml names {class_path}; a model may only name classes under {allowed}"
        )
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelFolderError(f"this version has no {class_path}") from error
    if not (isinstance(kind, type) and (issubclass(kind, nn.Module) or is_dataclass(kind))):
        raise ModelFolderError(f"{class_path} is neither a model nor a record of its settings")
    arguments = {key: _built(value, trust) for key, value in description["init_args"].items()}
    return kind(**arguments)


def _built(value: Any, trust: Sequence[str]) -> Any:
    """An argument with the models and records that it holds."""
    if _is_description(value):
        return build(value, trust=trust)
    if isinstance(value, Mapping):
        return {key: _built(entry, trust) for key, entry in value.items()}
    return [_built(entry, trust) for entry in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    """sha256 over the files that decide a verdict, as 16 hexadecimal digits."""
    total = hashlib.sha256()
    for name in ("model.yaml", "weights.safetensors", "learnt.json", "calibration.json"):
        file = path / name
        total.update(file.read_bytes() if file.is_file() else b"")
    return total.hexdigest()[:16]


def _is_description(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == {"class_path", "init_args"}


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return describe(value)
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        settings = {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": settings}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an argument of type {type(value).__name__} cannot be saved")


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _restore(model: nn.Module, tensors: Mapping[str, Tensor], learnt: Mapping[str, Any]) -> None:
    """Load the state; a learnt buffer (its name ends in _) takes the shape that was saved."""
    for name in tensors:
        if name.endswith("_"):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], torch.empty_like(tensors[name]))
    try:
        model.load_state_dict({**tensors, **learnt})
    except RuntimeError as error:
        raise ModelFolderError(
            f"the weights do not fit {type(model).__name__}; the folder is from another version"
        ) from error


def selftest_noise(shape: Sequence[int]) -> Tensor:
    """The noise of the self-test: standard normal, the same everywhere."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(20_261))


@torch.no_grad()
def _run_selftest(model: nn.Module, noise: Tensor) -> Tensor:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    training = {module: module.training for module in model.modules()}
    answer = cast(Any, model.eval()).selftest(noise.to(device)).float().cpu()
    for module, flag in training.items():  # a frozen encoder inside stays as it was
        module.training = flag
    return answer


def _check_selftest(model: nn.Module, selftest: Mapping[str, Any], name: str) -> None:
    expected = torch.tensor(selftest["expected"])
    answer = _run_selftest(model, selftest_noise(selftest["shape"]))
    scale = expected.abs().max().clamp_min(1e-6)
    error = float((answer - expected).abs().max() / scale)
    if not error <= _SELFTEST_TOLERANCE:
        raise ModelFolderError(
            f"{name} fails its self-test: scores of the same noise differ by {error:.2g} of the "
            "largest; the files or a library changed since it was saved"
        )


def _read_seen(file: Path) -> Seen:
    try:
        return Seen.from_dict(_read_json(file))
    except (KeyError, TypeError) as error:
        raise ModelFolderError(f"{file.parent.name}/{file.name} is damaged") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelFolderError(f"{file.parent.name}/{file.name} is damaged") from error
