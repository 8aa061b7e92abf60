"""Figures -> one HTML page. It needs nothing else but the thumbnails, which it shows from where the data lie."""

import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib
import numpy as np
from matplotlib.figure import Figure as Plot

from agegender import Model
from training.data import Sample
from training.files import written_whole
from training.loop import EpochResult
from training.metrics import AGE_BANDS, Figure, Scored, confidence_bins
from training.robustness import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Evaluation", "write_report"]

_WORST: Final = 24
_PLOTS_A_ROW: Final = 3
_BLUE, _ROSE, _GREY = "#2f6fed", "#c2347e", "#8a8f98"

_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark }}
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }}
 table {{ border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }}
 td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap }}
 td:first-child, th:first-child {{ text-align: left }}
 figure {{ margin: 1rem 0; overflow-x: auto }} svg {{ max-width: 100%; height: auto; background: white }}
 @media (max-width: 48rem) {{ svg {{ max-width: none; width: 48rem }} }}
 .faces {{ display: flex; flex-wrap: wrap; gap: .8rem }} .faces figure {{ width: 7.5rem; margin: 0; font-size: 12px }}
 .faces img {{ width: 100%; border-radius: 4px }} .note {{ background: #fa03; padding: .6rem }}
 small {{ color: #888; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


_MEANINGS: Final = """<p>Bias: predicted minus labelled age. Within 5 years: share of the pictures whose error is no
larger (cumulative score). Coverage: share of the age intervals that hold the labelled age, nominally {coverage:.0%}.
Calibration error: how far the stated probabilities of gender are from the shares that are right (expected calibration
error); it is never below 0, so that its interval lies too high. Challenge 25: share of those labelled 13 to 17 who are
told to be 25 or older.</p>"""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that a report shows.

    Attributes:
        model: that was measured.
        samples: the N pictures that it was measured on.
        scored: their labels and predictions, in the same order.
        groups: name -> number of pictures and metrics; "all" is always among them.
        robustness: corruption -> how the figures change with its level; empty where that was left out.
        robustness_pictures: how many pictures that was measured on.
        curve: the epochs of the model's training; empty where they are not known.
        warning: what must be said of the figures.
    """

    model: Model
    samples: list[Sample]
    scored: Scored
    groups: dict[str, tuple[int, dict[str, Figure]]]
    robustness: dict[str, Curve]
    robustness_pictures: int
    curve: list[EpochResult]
    warning: str | None


def write_report(result: Evaluation, path: Path) -> Path:
    """Writes the page; thumbnails are shown from where the data lie and are not copied into it.

    Returns:
        `path`.

    Raises:
        OSError: it cannot be written.
    """
    spec = result.model.spec
    parts = [
        f"<p>{len(result.samples)} pictures. Backbone {html.escape(spec.backbone)}, trained on "
        f"{html.escape(spec.training_data)}; weights: {html.escape(spec.licence)}.<br>"
        f"<small>SHA-256 {result.model.sha256}, commit {html.escape(spec.commit or 'unknown')}</small></p>",
        f'<p class="note">{html.escape(result.warning)}</p>' if result.warning else "",
        "<h2>Figures</h2>",
        _overall(result),
        _MEANINGS.format(coverage=spec.coverage),
        _learning_curves(result.curve) if result.curve else "",
        "<h2>Age</h2>",
        _svg(2, lambda axes: _age(result.scored, axes)),
        _intervals(result),
        "<h2>Gender</h2>",
        _svg(2, lambda axes: _gender(result, axes)),
        _robustness(result) if result.robustness else "",
        "<h2>Groups</h2><p>Race labels serve this audit alone; the model neither sees nor tells them.</p>",
        _group_table(result),
        "<h2>Largest age errors</h2><p>Many of them are wrong labels.</p>",
        _worst(result),
    ]
    title = html.escape(f"{spec.name} {spec.version}: evaluation")
    page = _PAGE.format(title=title, body="\n".join(parts))
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files are any bytes
    return path


def _overall(result: Evaluation) -> str:
    rows = [
        (name.replace("_", " "), f"{figure.value:.3f}", f"{figure.low:.3f} to {figure.high:.3f}")
        for name, figure in result.groups["all"][1].items()
    ]
    return _table(("metric", "value", "95% bootstrap interval"), rows)


def _group_table(result: Evaluation) -> str:
    names = list(result.groups["all"][1])
    rows = [
        (group, count, *(_cell(figures.get(name)) for name in names))
        for group, (count, figures) in result.groups.items()
    ]
    return _table(("group", "pictures", *(name.replace("_", " ") for name in names)), rows)


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.3f} ({figure.low:.2f} to {figure.high:.2f})"


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _svg(columns: int, draw: Callable[[Any], None], *, height: float = 3.6) -> str:
    """Draws on a row of axes, and returns it as inline SVG."""
    plot = Plot(figsize=(5.2 * columns, height), layout="constrained")
    draw(np.atleast_1d(plot.subplots(1, columns)))
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "agegender"}):  # the same ids from run to run
        plot.savefig(text, format="svg", metadata={"Date": None})
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"


def _learning_curves(curve: Sequence[EpochResult]) -> str:
    def draw(axes: "Sequence[Axes]") -> None:
        epochs = [row.epoch + 1 for row in curve]
        for axis, name in zip(axes, ("train_loss", "val_age_mae_years", "val_gender_accuracy"), strict=True):
            axis.plot(epochs, [getattr(row, name) for row in curve], color=_BLUE, marker=".")
            axis.set(xlabel="epoch", ylabel=name.replace("_", " "))

    return "<h2>Learning curves</h2>" + _svg(3, draw, height=2.8)


def _age(scored: Scored, axes: "Sequence[Axes]") -> None:
    axes[0].scatter(scored.age_true, scored.age, s=4, alpha=0.3, color=_BLUE, linewidths=0)
    axes[0].plot((0, 116), (0, 116), color=_GREY, linewidth=1)
    axes[0].set(xlabel="labelled age, years", ylabel="predicted age, years", xlim=(0, 116), ylim=(0, 116))
    errors = [np.abs(scored.error[mask]) for _, mask in _bands(scored)]
    axes[1].boxplot(errors, tick_labels=[name for name, _ in _bands(scored)], showfliers=False)
    axes[1].set(xlabel="labelled age, years", ylabel="absolute error, years")
    axes[1].tick_params(axis="x", rotation=45)


def _intervals(result: Evaluation) -> str:
    """By age band; empty where no band has enough pictures for figures of its own."""
    bands = [band for low, high in AGE_BANDS if (band := f"age {low}-{high}") in result.groups]

    def draw(axes: "Sequence[Axes]") -> None:
        for axis, name in zip(axes, ("age_coverage", "age_interval_width_years"), strict=True):
            figures = [result.groups[band][1][name] for band in bands]
            values = [figure.value for figure in figures]
            error = [[f.value - f.low for f in figures], [f.high - f.value for f in figures]]
            axis.bar(bands, values, yerr=error, color=_BLUE, alpha=0.8, ecolor=_GREY)
            axis.set_ylabel(name.replace("_", " "))
            axis.tick_params(axis="x", rotation=45)
        axes[0].axhline(result.model.spec.coverage, color=_ROSE, linewidth=1)
        axes[0].set_ylim(_least([result.groups[band][1]["age_coverage"].low for band in bands]), 1)

    return _svg(2, draw) if bands else ""


def _least(shares: Sequence[float]) -> float:
    """Where an axis of shares begins: mostly at a half, below which differences are no longer small."""
    return min([0.5, *shares])


def _gender(result: Evaluation, axes: "Sequence[Axes]") -> None:
    scored, bins = result.scored, confidence_bins(result.scored)
    axes[0].plot((0.5, 1), (0.5, 1), color=_GREY, linewidth=1)
    points = [
        (scored.confidence[bins == index].mean(), scored.gender_right[bins == index].mean())
        for index in np.unique(bins)
    ]
    axes[0].plot(*zip(*points, strict=True), marker="o", color=_BLUE)
    axes[0].set(xlabel="stated probability", ylabel="share that is right")
    bands = [(name, scored.gender_right[mask].mean()) for name, mask in _bands(scored)]
    axes[1].bar(*zip(*bands, strict=True), color=_BLUE, alpha=0.8)
    axes[1].set(xlabel="labelled age, years", ylabel="gender accuracy", ylim=(_least([share for _, share in bands]), 1))
    axes[1].tick_params(axis="x", rotation=45)


def _bands(scored: Scored) -> list[tuple[str, np.ndarray]]:
    masks = [(f"{low}-{high}", scored.aged(low, high)) for low, high in AGE_BANDS]
    return [(name, mask) for name, mask in masks if mask.any()]


def _robustness(result: Evaluation) -> str:
    note = f"Of {result.robustness_pictures} pictures; errors and accuracies are of those in which a face was found."
    return f"<h2>Robustness</h2><p>{note}</p>" + _robustness_curves(result.robustness)


def _robustness_curves(curves: dict[str, Curve]) -> str:
    names = list(curves)
    plots = [
        _robustness_plots({name: curves[name] for name in names[at : at + _PLOTS_A_ROW]})
        for at in range(0, len(names), _PLOTS_A_ROW)
    ]
    rows = [
        (name, f"{level:g}", *("-" if math.isnan(value) else text for value, text in _robustness_texts(values)))
        for name, curve in curves.items()
        for level, values in curve.items()
    ]
    return "".join(plots) + _table(("corruption", "level", "age MAE, years", "gender accuracy", "face found"), rows)


def _robustness_texts(values: tuple[float, float, float]) -> list[tuple[float, str]]:
    mae, accuracy, found = values
    return [(mae, f"{mae:.2f}"), (accuracy, f"{accuracy:.1%}"), (found, f"{found:.1%}")]


def _robustness_plots(curves: dict[str, Curve]) -> str:
    def draw(axes: "Sequence[Axes]") -> None:
        for axis, (name, curve) in zip(axes, curves.items(), strict=True):
            levels = [f"{level:g}" for level in curve]
            axis.plot(levels, [values[0] for values in curve.values()], marker="o", color=_BLUE)
            axis.set(xlabel=name, ylabel="age MAE, years", ylim=(0, None))

    return _svg(len(curves), draw, height=3.2)


def _worst(result: Evaluation) -> str:
    order = np.argsort(-np.abs(result.scored.error))[:_WORST]
    cards = (
        _card(result.samples[index].path, float(result.scored.age_true[index]), float(result.scored.age[index]))
        for index in order
    )
    return f'<div class="faces">{"".join(cards)}</div>'


def _card(path: Path, labelled: float, predicted: float) -> str:
    return (
        f'<figure><img loading="lazy" alt="not there any more" src="{html.escape(path.resolve().as_uri())}">'
        f"labelled {labelled:.0f}, predicted {predicted:.0f}<br><small>{html.escape(path.name)}</small></figure>"
    )
