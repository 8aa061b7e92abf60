"""The figures of benchmarks, as they were written in JSON -> plots."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["PLOTS", "draw"]

Rows = Sequence[Mapping[str, Any]]


def draw(name: str, figures: Any, path: Path) -> None:
    """Draws what a benchmark wrote as JSON into an SVG file; the same figures give the same bytes.

    Args:
        name: one of `PLOTS`.
    """
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        plot = PLOTS[name](figures)
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.savefig(path, metadata={"Date": None})


def _accuracy(rows: Rows) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    age, gender = figure.subplots(1, 2, sharey=True)
    contestants = _each(rows, "contestant")
    for row in rows:
        at = contestants.index(row["contestant"]) + 0.2 * (_each(rows, "group").index(row["group"]) - 1)
        colour = f"C{_each(rows, 'group').index(row['group'])}"
        for axes, name, scale in ((age, "age_mae_all", 1), (gender, "gender_all", 100)):
            value, low, high = (scale * row[name][part] for part in ("value", "low", "high"))
            axes.errorbar(value, at, xerr=[[value - low], [high - value]], fmt="o", color=colour, markersize=4)
    age.set_yticks(range(len(contestants)), contestants)
    age.invert_yaxis()
    age.set(xlabel="age, mean absolute error in years (less is better)", xlim=(0, None))
    gender.set(xlabel="gender accuracy, %")
    for index, group in enumerate(_each(rows, "group")):
        gender.plot([], [], "o", color=f"C{index}", label=group)
    gender.legend()
    return figure


def _chain(rows: Rows) -> Figure:
    figure, axes = _one(7, 3)
    workloads = _each(rows, "workload")
    for at, workload in enumerate(workloads):
        own = [row for row in rows if row["workload"] == workload]
        parts = {stage: statistics.median(row["stages_ms"][stage] for row in own) for stage in own[0]["stages_ms"]}
        parts["rest"] = max(0.0, statistics.median(row["rest_ms"] for row in own))
        total, left = sum(parts.values()), 0.0
        for index, (stage, value) in enumerate(parts.items()):
            share = 100 * value / total
            axes.barh(at, share, left=left, color=f"C{index}", label=None if at else stage)
            left += share
        axes.text(101, at, f"{total:.3g} ms", va="center")
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.set(xlabel="share of an image's time in one thread, %", xlim=(0, 115))
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1))
    return figure


def _batch(rows: Rows) -> Figure:
    figure, axes = _one(7, 3.5)
    contestants = _each(rows, "contestant")
    for index, contestant in enumerate(contestants):
        for at, workload in enumerate(_each(rows, "workload")):
            own = [
                row["images_per_s"] for row in rows if (row["contestant"], row["workload"]) == (contestant, workload)
            ]
            if own:
                place = at + 0.8 * (index + 0.5) / len(contestants) - 0.4
                label = contestant if at == 0 else None
                axes.bar(place, statistics.median(own), 0.8 / len(contestants), color=f"C{index}", label=label)
    axes.set_xticks(range(len(_each(rows, "workload"))), _each(rows, "workload"))
    axes.set(ylabel="images/s, all processes", yscale="log")
    axes.legend()
    return figure


def _serve(rows: Rows) -> Figure:
    sizes = _each(rows, "image")
    figure = Figure(figsize=(3.5 * len(sizes), 3.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        own = [row for row in rows if row["image"] == size]
        for contestant in _each(own, "contestant"):
            closed = [row for row in own if row["contestant"] == contestant and row["load"].endswith(" clients")]
            clients = [int(row["load"].split()[0]) for row in closed]
            if closed:
                axes.plot(clients, [row["requests_per_s"] for row in closed], "o-", label=contestant)
        for row in own:
            if row["contestant"] == "bare":
                axes.axhline(row["requests_per_s"], color="grey", linestyle="--", label="bare predictor")
        axes.set(title=size, xlabel="clients", ylabel="requests/s", xscale="log", ylim=(0, None))
        axes.legend()
    return figure


def _growth(figures: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    runs = figures["runs"]
    inputs = [run["inputs"] for run in runs]
    speed.plot(inputs, [run["images_per_s"] for run in runs], "o-")
    speed.set(xlabel="inputs", ylabel="images/s", xscale="log", ylim=(0, None))
    for name, label in (("driver_mb", "driver"), ("all_mb", "all processes")):
        memory.plot(inputs, [run[name] for run in runs], "o-", label=label)
    memory.set(xlabel="inputs", ylabel="memory, MB", xscale="log", ylim=(0, None))
    memory.legend()
    return figure


PLOTS: Final[Mapping[str, Callable[[Any], Figure]]] = {
    "accuracy": _accuracy,
    "chain": _chain,
    "batch": _batch,
    "serve": _serve,
    "growth": _growth,
}


def _one(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _each(rows: Rows, name: str) -> list[str]:
    """The values of a field, each once, in order."""
    return list(dict.fromkeys(row[name] for row in rows))
