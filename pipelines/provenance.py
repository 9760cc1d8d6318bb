"""What a run says of itself: its arguments without any path, its code, packages and device."""

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from medssl.data.privacy import salted

PACKAGES = (
    *("medssl", "torch", "torchvision", "timm", "lightning", "monai", "numpy", "scipy"),
    *("scikit-learn", "scikit-image", "pydicom", "highdicom", "nibabel", "pyarrow"),
    *("mlflow", "jsonargparse"),
)
_REFUSED = re.compile(r"[^\w. :/-]")


def versions() -> dict[str, str]:
    """Package -> installed version, for the packages a result may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def described(value: Any) -> Any:
    """A value as plain YAML without any path; a path becomes a salted identifier."""
    from torch import nn

    from medssl.models.folder import describe

    if isinstance(value, nn.Module):
        return describe(value)
    if is_dataclass(value) and not isinstance(value, type):
        return described(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    if isinstance(value, Path) or (isinstance(value, str) and _may_be_path(value)):
        return f"path-{salted(str(value))}"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(value) if isinstance(value, str) else type(value).__name__


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, of characters that MLflow takes in a name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[_REFUSED.sub("_", f"{prefix}{name}")] = value
    return found


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number by name; an interval gives its value, `name_low` and `name_high`."""
    for name, value in values.items():
        if hasattr(value, "to_dict"):
            value = value.to_dict()
        if isinstance(value, Mapping) and "value" in value:
            edges = {f"{name}_low": value.get("low"), f"{name}_high": value.get("high")}
            yield from numbers({name: value["value"], **edges}, prefix)
        elif isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", float(value)


def device_name(device: Any) -> str:
    """The GPU that `device` ("auto", "cuda", None) takes on this machine, or "cpu"."""
    import torch

    wants_gpu = device in (None, "auto") or str(device).startswith("cuda")
    if wants_gpu and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "cpu"


def commit() -> dict[str, str]:
    """The commit of this source tree and whether it was changed; nothing outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"mlflow.source.git.commit": git("rev-parse", "HEAD"), "dirty": str(bool(changed))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _may_be_path(value: str) -> bool:
    """Whether a text names a place: `--model DIR`, `--groups FILE:COLUMN`; not models:/NAME."""
    if value.startswith("models:/"):
        return False
    file = value.rpartition(":")[0] or value
    return "/" in value or "\\" in value or any(map(os.path.exists, (value, file)))
