"""`medssl <job>`: every job of this folder as a command, described by its own signature.

A file X.py here with a function X is the job X. Nothing heavy is imported before a job is chosen.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, get_type_hints

import pipelines

DONE, SOME_FAILED, USAGE, NO_DATA, INTERRUPTED = 0, 1, 2, 3, 130
_EXPLAINED = {"ArgumentError", "ValueError", "OSError", "ReadError", "ModelFolderError"}
_EXPLAINED |= {"FloatingPointError"}  # a training whose loss is not finite
_NOT_ACCEPTED = re.compile(r"Option '([^']+)' is not accepted")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: --([\w.]+)")
_DASHED = re.compile(r"(?<=^--)[a-z][^=\s]*")  # --max-train is the parameter max_train
_CLASS_PATH = re.compile(r"class_path '([^']+)'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job. Returns 0 done, 1 some items failed, 2 usage, 3 no usable data, 130 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    jobs = find_jobs()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(jobs))
        return DONE
    name, *arguments = arguments
    if name not in jobs:
        near = difflib.get_close_matches(name, jobs, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"jobs: {', '.join(jobs)}"
        print(f"medssl: there is no job {name!r}; {advice}", file=sys.stderr)
        return USAGE
    if "--json" not in arguments or _asks_for_help(arguments):
        return _guarded(name, arguments)[0]
    with _stdout_turned_to_stderr() as answer:
        code, result = _guarded(name, arguments)
        print(json.dumps(plain(result), allow_nan=False), file=answer, flush=True)
    return code


def find_jobs() -> dict[str, str]:
    """Job name -> first line of its docstring, read without importing anything."""
    jobs = {}
    for file in sorted(file for folder in pipelines.__path__ for file in Path(folder).glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == file.stem:
                jobs[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return jobs


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: absolute paths as text, numbers that are not finite as null."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if hasattr(value, "item"):  # a NumPy or torch number
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _overview(jobs: Mapping[str, str]) -> str:
    width = max(map(len, jobs))
    lines = [f"  {name:<{width}}  {text}" for name, text in jobs.items()]
    return "\n".join(
        [
            "usage: medssl JOB [CONFIG.yaml] [arguments]",
            "",
            "Learn what normal looks like in images, and point at what is not.",
            "",
            *lines,
            "",
            "medssl JOB --help shows a job's arguments; every job takes --json.",
        ]
    )


def _guarded(name: str, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Run a job; an error that explains itself becomes one message instead of a traceback."""
    try:
        result = _run(name, arguments) or {}
    except SystemExit as stop:  # --help
        return int(stop.code or 0), {}
    except KeyboardInterrupt:
        print("medssl: stopped", file=sys.stderr)
        return INTERRUPTED, {"error": "stopped"}
    except Exception as error:
        # by name: importing the classes would import what the job did not need
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "NoDataError" not in kinds and not kinds & _EXPLAINED:
            traceback.print_exc()
            return SOME_FAILED, {"error": type(error).__name__}
        message = _message(error)
        print(f"medssl {name}: {message}", file=sys.stderr)
        return NO_DATA if "NoDataError" in kinds else USAGE, {"error": message}
    return (SOME_FAILED if result.get("failed", 0) else DONE), result


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    job = getattr(importlib.import_module(f"pipelines.{name}"), name)
    if arguments and arguments[0].endswith(".yaml"):
        arguments = ["--config", *arguments]
    arguments = [_DASHED.sub(lambda flag: flag[0].replace("-", "_"), word) for word in arguments]
    values = _values(_parser(name, job), arguments, job)
    bare = [parameter.name for parameter in _parameters(job) if _is_positional_only(parameter)]
    named = {
        parameter.name: values[parameter.name]
        for parameter in _parameters(job)
        if parameter.name not in bare
    }
    return job(*(values[name] for name in bare), **named)


def _values(parser: Any, arguments: list[str], job: Callable[..., Any]) -> dict[str, Any]:
    """Argument name -> value, objects made. Raises ValueError, or what a constructor raised."""
    import jsonargparse

    raised: list[Exception] = []
    try:
        config = parser.parse_args(arguments)
        if "torch" in sys.modules and "seed" in config:  # networks are initialized right here
            sys.modules["torch"].manual_seed(config["seed"])
        makers = [(_remembering(raised), object, True)]
        return vars(parser.instantiate(config, instantiators=makers))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        if not raised:
            raise ValueError(_explained(str(error), job)) from error
        first = raised[0]  # a constructor's own words, which a union of types would bury
        raise (ValueError(str(first)) if isinstance(first, TypeError) else first) from None


def _remembering(raised: list[Exception]) -> Callable[..., Any]:
    """An instantiator for jsonargparse that keeps what a constructor raised."""

    def instantiate(kind: Callable[..., Any], *values: Any, **named: Any) -> Any:
        try:
            return kind(*values, **named)
        except Exception as error:
            raised.append(error)
            raise

    return instantiate


def _parser(name: str, job: Callable[..., Any]) -> Any:
    """The job's signature as a jsonargparse.ArgumentParser."""
    import docstring_parser
    from jsonargparse import ArgumentParser, set_parsing_settings

    if "medssl.data.augment" in sys.modules:  # a dataclass, whose kinds a config may name
        kind = sys.modules["medssl.data.augment"].Augmentation
        set_parsing_settings(subclasses_enabled=[kind])
    text = docstring_parser.parse(inspect.getdoc(job) or "")
    helps = {entry.arg_name: entry.description for entry in text.params}
    parser = ArgumentParser(
        prog=f"medssl {name}",
        description="\n\n".join(filter(None, (text.short_description, text.long_description))),
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("--config", action="config", help="YAML file of arguments; may come first")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, no more")
    hints = get_type_hints(job)
    own = []
    for parameter in _parameters(job):
        said: dict[str, Any] = {"help": helps.get(parameter.name)}
        if parameter.default is False:  # a flag without a value
            parser.add_argument(f"--{parameter.name}", action="store_true", **said)
        elif parameter.name == "path" or _is_positional_only(parameter):
            if parameter.default is not inspect.Parameter.empty:
                said |= {"nargs": "?", "default": parameter.default}
            parser.add_argument(parameter.name, type=hints[parameter.name], **said)
        else:
            continue
        own.append(parameter.name)
    parser.add_function_arguments(job, as_group=False, skip=set(own))
    return parser


def _parameters(job: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(job).parameters.values())


def _is_positional_only(parameter: inspect.Parameter) -> bool:
    return parameter.kind is inspect.Parameter.POSITIONAL_ONLY


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") or ".help" in argument for argument in arguments)


def _explained(message: str, job: Callable[..., Any]) -> str:
    """An unknown key with the class it was meant for and the names that class takes."""
    unknown = _NOT_ACCEPTED.search(message) or _UNRECOGNIZED.search(message)
    if unknown is None:
        return message
    owner: Callable[..., Any] = job
    title = job.__name__
    within = _CLASS_PATH.findall(message[: unknown.start()])
    if within:
        title = within[-1]
        module, _, kind = title.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    taken = [name for name in inspect.signature(owner).parameters if name != "self"]
    near = difflib.get_close_matches(unknown[1], taken, n=1)
    advice = f"did you mean {near[0]!r}? " if near else ""
    return f"{title} has no argument {unknown[1]!r}; {advice}it takes {', '.join(taken)}"


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _stdout_turned_to_stderr() -> Iterator[TextIO]:
    """Yields the real stdout; whatever else is printed meanwhile, in C too, goes to stderr."""
    real = sys.stdout
    real.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield _reopened(real, kept)
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _reopened(real: TextIO, descriptor: int) -> TextIO:
    """Where the answer goes: the kept descriptor, or `real` itself where it is no file."""
    try:
        is_stdout = real.fileno() == 1
    except OSError:
        is_stdout = False
    return os.fdopen(os.dup(descriptor), "w") if is_stdout else real
