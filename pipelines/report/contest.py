"""The table and the plot of a contest between encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.journal import write_whole


def interval_text(found: Mapping[str, float], digits: int = 3) -> str:
    """A value with its interval."""
    value, low, high = (f"{found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def write_table(file: Path, found: Mapping[str, Any]) -> None:
    """Markdown: the standings with what each encoder costs, then a table per task."""
    parts = [_standings(found)] if found["standings"] else []
    for task in dict.fromkeys(one["task"] for one in found["results"]):
        parts.append(_task(task, [one for one in found["results"] if one["task"] == task]))
    write_whole(file, "\n\n".join(parts) + "\n")


def write_plot(file: Path, found: Mapping[str, Any]) -> None:
    """PNG: how far each encoder is ahead of the mean, against what it costs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for one in found["standings"]:
        cost, z = found["cost"][one["name"]]["gflop"], one["z"]
        error = [[z["value"] - z["low"]], [z["high"] - z["value"]]]
        axes.errorbar(cost, z["value"], yerr=error, marker="o", capsize=3, label=one["name"])
    axes.axhline(0, color="0.8", zorder=0)
    axes.set(xscale="log", xlabel="GFLOP per image", ylabel="mean z-score over all tests")
    axes.legend(frameon=False, fontsize="small")
    unfinished = file.with_name(f".{file.name}")
    FigureCanvasAgg(figure).print_png(str(unfinished))
    unfinished.replace(file)


def _standings(found: Mapping[str, Any]) -> str:
    lines = [
        "| encoder | z-score | rank | parameters, 10^6 | GFLOP | images/s |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["standings"]:
        cost = found["cost"][one["name"]]
        standing = f"{interval_text(one['z'], 2)} | {interval_text(one['rank'], 1)}"
        price = f"{cost['parameters'] / 1e6:.2f} | {cost['gflop']:.2f}"
        lines.append(f"| {one['name']} | {standing} | {price} | {cost['images_per_second']:.0f} |")
    return "\n".join(lines)


def _task(task: str, results: list[Mapping[str, Any]]) -> str:
    shares = list(dict.fromkeys((one["share"], one["shown"]) for one in results))
    titles = " | ".join(f"{share:.0%}, {shown:.0f} labels" for share, shown in shares)
    lines = [
        f"{task}: AUROC; balanced accuracy in brackets\n",
        f"| encoder | probe | {titles} |",
        "|---|---|" + "---|" * len(shares),
    ]
    rows: dict[tuple[str, str], list[str]] = {}
    for one in results:
        cell = f"{interval_text(one['auroc'])} [{one['balanced_accuracy']['value']:.3f}]"
        rows.setdefault((one["encoder"], one["probe"]), []).append(cell)
    lines += [f"| {' | '.join(names)} | {' | '.join(cells)} |" for names, cells in rows.items()]
    return "\n".join(lines)
