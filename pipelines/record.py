"""Runs and models on the record: the only module that knows MLflow.

The store is MLFLOW_TRACKING_URI, or `mlflow.db` in the working directory with its artifacts in
`mlruns` beside it. No path, user or host name is written into a run.
"""

import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.provenance import commit, described, device_name, flat, numbers, versions

if TYPE_CHECKING:
    from medssl.data.manifest import Manifest

EXPERIMENT = "medssl"
_SQLITE = "sqlite:///"
_LONGEST_VALUE = 500
_NAME = re.compile(r"[\w. -]+")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Registered:
    """A model version as it was registered.

    champion: whether this version got the alias `champion`; only the first one does by itself.
    """

    name: str
    version: int
    champion: bool


class Run:
    """One run in the tracking store; `recorded` makes it."""

    def __init__(self, client: Any, run_id: str, experiment_id: str) -> None:
        self.client, self.run_id, self.experiment_id = client, run_id, experiment_id

    def metrics(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Log numbers; an interval (value, low, high) becomes name, name_low and name_high.

        values: numbers, None (left out), `Interval`s or their dicts, or such mappings by name.
        """
        from mlflow.entities import Metric

        found = [Metric(name, value, 0, 0) for name, value in numbers(values, prefix)]
        for start in range(0, len(found), 1000):
            self.client.log_batch(self.run_id, metrics=found[start : start + 1000])

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings as text; a name is given once. Long values are cut."""
        from mlflow.entities import Param

        found = [Param(name, str(value)[:_LONGEST_VALUE]) for name, value in values.items()]
        for start in range(0, len(found), 100):
            self.client.log_batch(self.run_id, params=found[start : start + 100])

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; the last value of a name stays."""
        from mlflow.entities import RunTag

        found = [RunTag(name, str(value)[:_LONGEST_VALUE]) for name, value in values.items()]
        self.client.log_batch(self.run_id, tags=found)

    def child(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        """A finished run below this one, for one of many results."""
        tags = {"mlflow.user": "medssl", "mlflow.parentRunId": self.run_id}
        info = self.client.create_run(self.experiment_id, tags=tags, run_name=name).info
        below = Run(self.client, info.run_id, self.experiment_id)
        below.params(params)
        below.metrics(metrics)
        self.client.set_terminated(info.run_id, "FINISHED")

    def artifact(self, path: Path) -> None:
        """Keep a file under its own name, or a folder's content; the job chose these names."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path))
        else:
            self.client.log_artifact(self.run_id, str(path))

    def manifest(self, manifest: "Manifest") -> None:
        """Log which data this was: the digest, and how many images each split and label has."""
        counts: dict[str, int] = {}
        for item in manifest.images:
            label = {None: "unlabeled", 0: "normal", 1: "anomalous"}[item.label]
            name = f"manifest.{item.split or 'unsplit'}.{label}"
            counts[name] = counts.get(name, 0) + 1
        self.params({"manifest.digest": manifest.digest, **dict(sorted(counts.items()))})


@contextmanager
def recorded(job: str, arguments: Mapping[str, Any]) -> Iterator[Run]:
    """A run of `job` with its resolved arguments, the code and the packages; yields the `Run`.

    An exception ends it as FAILED with the error's class alone, for a message may hold a path.

    arguments: the job's own, objects included, such as `locals()` on its first line.
    """
    import yaml

    client, experiment_id = _client()
    tags = {
        "mlflow.user": "medssl",
        "mlflow.source.name": f"medssl {job}",
        "mlflow.source.type": "LOCAL",
        "job": job,
        "device_name": device_name(arguments.get("device")),
        **{f"version.{name}": version for name, version in versions().items()},
        **commit(),
    }
    info = client.create_run(experiment_id, tags=tags, run_name=job).info
    run = Run(client, info.run_id, experiment_id)
    try:
        config = {name: described(value) for name, value in arguments.items()}
        run.params(flat(config))
        client.log_text(info.run_id, yaml.safe_dump(config, sort_keys=False), "config.yaml")
        yield run
    except BaseException as error:
        run.tags({"error": type(error).__name__})
        stopped = isinstance(error, KeyboardInterrupt)
        client.set_terminated(info.run_id, "KILLED" if stopped else "FAILED")
        raise
    client.set_terminated(info.run_id, "FINISHED")


def register(folder: Path, name: str, run: Run) -> Registered:
    """Log a model folder as a pyfunc model of `run` and register it as the next version of `name`.

    The logged model holds the folder and `served.py` as source text, so it loads with pickling
    disabled. It imports `medssl` from the environment that serves it: install it there and serve
    with `--env-manager local`.
    Raises ValueError for a name the registry cannot hold.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    from medssl.models.folder import digest

    _check_name(name)
    client = run.client
    logged = client.create_logged_model(run.experiment_id, name, source_run_id=run.run_id)
    with tempfile.TemporaryDirectory(prefix="medssl-") as work, warnings.catch_warnings():
        # MLmodel keeps the paths it was made from: neutral ones
        copy = shutil.copytree(folder, Path(work, "model"))
        code = shutil.copy(Path(__file__).with_name("served.py"), work)
        warnings.simplefilter("ignore")  # an input example would be a picture of someone
        mlflow.pyfunc.save_model(
            path=f"{work}/logged",
            mlflow_model=Model(run_id=run.run_id, model_id=logged.model_id),
            python_model=str(code),
            artifacts={"model": str(copy)},
            signature=_signature(),
            pip_requirements=[f"mlflow=={mlflow.__version__}"],
        )
        client.log_model_artifacts(logged.model_id, f"{work}/logged")
    client.finalize_logged_model(logged.model_id, "READY")
    if name not in _names(client):
        client.create_registered_model(name)
    made = client.create_model_version(
        name,
        source=f"models:/{logged.model_id}",
        run_id=run.run_id,
        model_id=logged.model_id,
        tags={"digest": digest(folder)},
    )
    version = int(made.version)
    champion = "champion" not in client.get_registered_model(name).aliases
    if champion:
        client.set_registered_model_alias(name, "champion", str(version))
    return Registered(name, version, champion)


def resolve(model: str) -> Path:
    """The local folder of a model: a folder itself, models:/NAME@ALIAS or models:/NAME/VERSION.

    A model in a remote store is downloaded once, into the user's cache.
    Raises FileNotFoundError, or ValueError that says what exists instead.
    """
    if not model.startswith("models:"):
        if not Path(model).is_dir():
            raise FileNotFoundError(f"no model folder at {model}")
        return Path(model)
    wanted = _MODEL_URI.fullmatch(model)
    if wanted is None:
        raise ValueError(f"expected models:/NAME@ALIAS or models:/NAME/VERSION, got {model!r}")
    client = _client(create=False)[0]
    version = _find(client, wanted["name"], wanted["version"], wanted["alias"])
    location = _location(client, version)
    folder = location / "artifacts" / "model"
    if not (folder / "model.yaml").is_file():
        raise ValueError(f"{model} holds no model folder; it was not registered by medssl")
    return folder


def promote(name: str, version: int, alias: str = "champion") -> int | None:
    """Point `alias` to a version. Returns the version it pointed to before, if any."""
    client = _client(create=False)[0]
    _find(client, name, str(version), None)
    before = client.get_registered_model(name).aliases.get(alias)
    client.set_registered_model_alias(name, alias, str(version))
    return None if before is None else int(before)


def registered(name: str | None = None) -> list[dict[str, Any]]:
    """Every version of the registered models, or of one, by name and newest first.

    Each has name, version, aliases, digest (of the model folder), run and created (seconds).
    """
    client = _client(create=False)[0]
    found = []
    for owner in _names(client) if name is None else [name]:
        aliases = _aliases(client, owner)
        for version in _versions(client, owner):
            number = int(version.version)
            found.append(
                {
                    "name": owner,
                    "version": number,
                    "aliases": sorted(key for key in aliases if int(aliases[key]) == number),
                    "digest": version.tags.get("digest"),
                    "run": version.run_id,
                    "created": version.creation_timestamp // 1000,
                }
            )
    return found


def store_uri() -> str:
    """Where runs and models go: MLFLOW_TRACKING_URI, or mlflow.db in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{Path.cwd() / 'mlflow.db'}"


def sqlite_file(uri: str) -> Path | None:
    """The database file of an SQLite store, None for any other store."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def _client(*, create: bool = True) -> tuple[Any, str]:
    """A client of the store and the id of our experiment; a fresh store is made once."""
    uri, database = store_uri(), sqlite_file(store_uri())
    if database is not None and not database.exists() and not create:
        raise ValueError(
            "no tracking store in this folder, so no registered model; go to the folder that has "
            "mlflow.db, or set MLFLOW_TRACKING_URI"
        )
    if not uri.startswith(("sqlite:", "postgresql", "mysql", "http:", "https:", "databricks")):
        raise ValueError(
            "the tracking store must be a database or a server, such as "
            f"sqlite:///mlflow.db or http://HOST:5000, got {uri!r} in MLFLOW_TRACKING_URI"
        )
    # nothing leaves unasked, and the project in the working directory is no part of a model
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with _only_one(database):
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, _experiment(client, database)


@contextmanager
def _only_one(database: Path | None) -> Iterator[None]:
    """Two processes that make one SQLite store at once crash in its schema migrations."""
    if database is None:
        yield
        return
    from filelock import FileLock

    if not os.access(database.parent, os.W_OK):
        raise PermissionError(
            "cannot write the tracking store beside mlflow.db; work in a writable folder or set "
            "MLFLOW_TRACKING_URI"
        )
    with FileLock(f"{database.absolute()}.lock"):
        yield


def _experiment(client: Any, database: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        beside = database and (database.absolute().parent / "mlruns" / EXPERIMENT).as_uri()
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=beside)
        except MlflowException:  # on a server, another process may have been first
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    return found.experiment_id


def _find(client: Any, name: str, version: str | None, alias: str | None) -> Any:
    """The model version; ValueError that says which exist."""
    aliases = _aliases(client, name)
    if alias is not None and alias not in aliases:
        listed = ", ".join(sorted(aliases)) or "none"
        raise ValueError(
            f"the model {name} has no alias {alias!r}; it has: {listed}. "
            f"Set it with: medssl registry promote {name} --version N --alias {alias}"
        )
    wanted = int(aliases[alias]) if alias is not None else int(version or 0)
    found = {int(entry.version): entry for entry in _versions(client, name)}
    if wanted not in found:
        listed = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(f"the model {name} has no version {wanted}; it has: {listed}")
    return found[wanted]


def _aliases(client: Any, name: str) -> dict[str, Any]:
    names = _names(client)
    if name not in names:
        listed = ", ".join(names) or "none"
        raise ValueError(f"no registered model is named {name!r}; registered: {listed}")
    return dict(client.get_registered_model(name).aliases)


def _names(client: Any) -> list[str]:
    return sorted(model.name for model in _pages(client.search_registered_models))


def _versions(client: Any, name: str) -> list[Any]:
    """Versions of a model, newest first."""
    _check_name(name)
    found = _pages(client.search_model_versions, filter_string=f"name = '{name}'")
    return sorted(found, key=lambda entry: -int(entry.version))


def _pages(search: Any, **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **arguments)
        yield from page
        token = page.token
        if not token:
            return


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a registered name has letters, digits, spaces and . _ - only, got {name!r}"
        )


def _location(client: Any, version: Any) -> Path:
    """The folder of a logged model on this machine."""
    from mlflow.artifacts import download_artifacts
    from mlflow.utils.file_utils import local_file_uri_to_path

    model_id = version.source.removeprefix("models:/")
    if not model_id.startswith("m-"):
        raise ValueError(f"version {version.version} was not registered by medssl")
    uri = client.get_logged_model(model_id).artifact_location
    if uri.startswith(("/", "file:")):
        return Path(local_file_uri_to_path(uri))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medssl" / "models"
    kept = cache / model_id  # a logged model never changes
    if not kept.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            download_artifacts(
                version.source, dst_path=f"{work}/m", tracking_uri=client.tracking_uri
            )
            try:
                os.rename(f"{work}/m", kept)
            except OSError:
                if not kept.is_dir():  # else another process was first
                    raise
    return kept


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    given = [("binary", "content"), *(("string", name) for name in ("path", "site", "unit"))]
    told = [
        *(("double", "score"), ("double", "p_value"), ("double", "threshold")),
        *(("boolean", "anomalous"), ("string", "status"), ("string", "error")),
        *(("string", "predicted"), ("string", "class_scores")),
    ]
    inputs, outputs = (
        Schema([ColSpec(kind, name, required=False) for kind, name in columns])
        for columns in (given, told)
    )
    return ModelSignature(inputs=inputs, outputs=outputs)
