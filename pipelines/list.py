"""Job: the methods there are, read from their files."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anomaly
import medssl
from pipelines.console import table

PACKAGES = {
    "Encoder": ("medssl.models", medssl),
    "Objective": ("medssl.objectives", medssl),
    "Detector": ("anomaly", anomaly),
    "Probe": ("medssl.probes", medssl),
}
"""Contract -> the package that holds its methods, and the package that one lies in."""


def list() -> dict[str, Any]:  # noqa: A001 the job's name is the command's
    """List the methods: import path for a config, and what each is."""
    methods = [
        method for contract in PACKAGES for method in sorted(_methods(contract), key=_class_path)
    ]
    columns = ("kind", "class_path", "what")
    table(columns, [[method[column] for column in columns] for method in methods])
    return {"methods": methods}


def _methods(contract: str) -> Iterator[dict[str, str]]:
    """Classes below the contract that give an example, without importing any of them."""
    package, top = PACKAGES[contract]
    root = Path(top.__path__[0]).parent
    classes = {
        node.name: (".".join(file.relative_to(root).with_suffix("").parts), node)
        for file in root.joinpath(*package.split(".")).rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
    }

    def below(node: ast.ClassDef) -> bool:
        names = [_name(base) for base in node.bases]
        return any(
            name == contract or (name in classes and below(classes[name][1])) for name in names
        )

    for name, (module, node) in classes.items():
        if below(node) and any(getattr(one, "name", None) == "example" for one in node.body):
            yield {
                "kind": contract.lower(),
                "class_path": f"{module}.{name}",
                "what": (ast.get_docstring(node) or "").partition("\n")[0],
            }


def _name(base: ast.expr) -> str:
    return ast.unparse(base).rpartition(".")[2]


def _class_path(method: dict[str, str]) -> str:
    return method["class_path"]
