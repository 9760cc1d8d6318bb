"""The plan of the house, held against the code."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("medssl", "anomaly", "pipelines")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

DATA, MODELS, TRAINING = "medssl.data", "medssl.models", "medssl.training"
DISTRIBUTED = "medssl.distributed"
METRICS, LOSSES = "medssl.metrics", "medssl.objectives.losses"
MAY_IMPORT = {  # folder or file -> what of ours it may import besides itself
    "medssl/data": (),
    "medssl/metrics.py": (),
    "medssl/multilabel.py": ("medssl.metrics",),
    "medssl/models": (DATA,),
    "medssl/checkpoint.py": (),
    "medssl/schedule.py": (),
    "medssl/stopping.py": (),
    "medssl/stream.py": (DATA, "medssl.stopping"),
    "medssl/sharded.py": (),
    "medssl/distributed.py": ("medssl.sharded",),
    "medssl/failure.py": (DISTRIBUTED,),
    "medssl/training.py": (
        DATA,
        MODELS,
        DISTRIBUTED,
        "medssl.checkpoint",
        "medssl.failure",
        "medssl.schedule",
        "medssl.sharded",
        "medssl.stopping",
        "medssl.stream",
    ),
    "medssl/objectives": (DATA, MODELS, TRAINING, DISTRIBUTED),
    "medssl/probes": (DATA, MODELS, TRAINING, METRICS),
    "anomaly": (DATA, MODELS, TRAINING, DISTRIBUTED, METRICS, LOSSES, "medssl.schedule"),
    "pipelines": ("medssl", "anomaly"),
}
KNOWS_MLFLOW = {"pipelines/record.py", "pipelines/served.py"}
HEAVY = {
    "torch",
    "torchvision",
    "mlflow",
    "timm",
    "monai",
    "lightning",
    "sklearn",
    "scipy",
    "skimage",
    "pydicom",
    "highdicom",
    "nibabel",
    "tifffile",
    "pandas",
    "pyarrow",
    "transformers",
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> set[str]:
    """Full dotted names of everything a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)} imports relatively; name the package"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def files_of(place: str) -> list[Path]:
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_downwards(place):
    itself = place.removesuffix(".py").replace("/", ".")
    for file in files_of(place):
        ours = {name for name in imports(file) if within(name, PACKAGES)}
        upward = {name for name in ours if not within(name, (itself, *MAY_IMPORT[place]))}
        assert not upward, f"{name_of(file)} may not import {sorted(upward)}"


def test_every_source_file_has_a_place_in_the_plan():
    planned = {file for place in MAY_IMPORT for file in files_of(place)}
    packages = {file for file in SOURCES if file.name == "__init__.py"}
    stray = [name_of(file) for file in SOURCES if file not in planned | packages]
    assert not stray, f"no rule says what {stray} may import"


def test_only_the_record_knows_mlflow():
    knowing = {name_of(file) for file in SOURCES if any(map(is_mlflow, imports(file)))}
    assert knowing <= KNOWS_MLFLOW


def is_mlflow(name: str) -> bool:
    return within(name, ("mlflow",))


def test_every_init_file_is_empty():
    full = [name_of(file) for file in SOURCES if file.name == "__init__.py" and file.read_text()]
    assert not full


def test_every_folder_of_sources_is_a_package():
    folders = {file.parent for file in SOURCES}
    assert not [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize("name", ["utils", "util", "common", "helpers", "misc"])
def test_no_module_is_a_drawer_for_everything(name):
    assert not [name_of(file) for file in SOURCES if name in file.relative_to(ROOT).parts]
    assert not [name_of(file) for file in SOURCES if file.stem == name]


def test_no_folder_is_deeper_than_four_levels():
    assert not [name_of(file) for file in SOURCES if len(file.relative_to(ROOT).parent.parts) > 4]


def test_no_file_is_longer_than_400_lines():
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def definitions(file: Path) -> Iterator[Definition]:
    for node in ast.walk(tree(file)):
        if isinstance(node, Definition):
            yield node


def docstring_lines(node: Definition) -> int:
    if ast.get_docstring(node) is None:
        return 0
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    return docstring.end_lineno - docstring.lineno + 1


def length_of(node: Definition) -> int:
    """Lines from `def` to the end, without the docstring."""
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1 - docstring_lines(node)


def test_no_function_is_longer_than_60_lines_without_its_docstring():
    long = {
        f"{name_of(file)}:{node.name}": length_of(node)
        for file in SOURCES
        for node in definitions(file)
        if not isinstance(node, ast.ClassDef) and length_of(node) > 60
    }
    assert long == {}


def public_definitions(file: Path) -> Iterator[Definition]:
    """Classes and functions of a module, and the methods of classes that inherit no contract."""
    for node in tree(file).body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = [inner for inner in node.body if isinstance(inner, Definition)]
            yield from (method for method in methods if not method.name.startswith("_"))


def test_every_public_class_and_function_has_a_docstring():
    bare = [
        f"{name_of(file)}:{node.name}"
        for file in SOURCES
        for node in public_definitions(file)
        if not ast.get_docstring(node)
    ]
    assert bare == []


def test_every_module_says_what_it_is():
    bare = [
        name_of(f) for f in SOURCES if f.name != "__init__.py" and not ast.get_docstring(tree(f))
    ]
    assert bare == []


def forgives_its_imports(node: ast.AST) -> bool:
    """Whether a statement tries an import and goes on without it."""
    if not isinstance(node, ast.Try):
        return False
    tried = any(isinstance(line, ast.Import | ast.ImportFrom) for line in node.body)
    caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type}
    return tried and any("ImportError" in name or "ModuleNotFound" in name for name in caught)


def test_no_import_is_optional():
    """What a file needs is a dependency, and its absence is not an algorithm."""
    optional = [name_of(f) for f in SOURCES if any(map(forgives_its_imports, ast.walk(tree(f))))]
    assert optional == []


def configs() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert configs()


@pytest.mark.parametrize("config", configs(), ids=name_of)
def test_a_config_is_short_and_says_first_how_to_run_it(config):
    lines = config.read_text().splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith(f"# medssl {config.parent.name} {name_of(config)}")


def test_the_command_line_starts_without_heavy_packages():
    script = "import sys, pipelines.cli; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "pipelines" in loaded
    assert HEAVY & set(loaded) == set()
