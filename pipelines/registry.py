"""Job: the models that are registered, and which of them is in use."""

from typing import Any, Literal

from pipelines.console import say, table
from pipelines.record import promote, registered


def registry(
    action: Literal["list", "show", "promote"],
    name: str | None = None,
    /,
    *,
    version: int | None = None,
    alias: str = "champion",
) -> dict[str, Any]:
    """List the registered models with their versions, show one, or promote a version.

    Args:
        action: what to do.
        name: the registered model; needed for show and promote.
        version: the version to promote.
        alias: the name by which a promoted version is found, as in models:/NAME@champion.
    """
    if action != "list" and name is None:
        raise ValueError(f"medssl registry {action} needs the NAME of a model")
    if action == "promote":
        assert name is not None
        return _promote(name, version, alias)
    found = registered(name)
    columns = ["name", "version", "aliases", "digest", "run"]
    rows = [{**entry, "aliases": ", ".join(entry["aliases"])} for entry in found]
    table(columns, [[row[column] for column in columns] for row in rows])
    return {"models": found}


def _promote(name: str, version: int | None, alias: str) -> dict[str, Any]:
    if version is None:
        have = ", ".join(str(entry["version"]) for entry in registered(name))
        raise ValueError(f"promote needs --version N; {name} has versions {have}")
    before = promote(name, version, alias)
    was = "none before" if before is None else f"version {before} before"
    say(f"models:/{name}@{alias} is version {version} now ({was})")
    return {"name": name, "version": version, "alias": alias, "before": before}
