"""`python -m training.evaluate`: artifact + labelled folder -> metrics.json and a report to look at."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import tyro

from agegender import AgeGenderError, Model
from agegender.model import Predictions
from agegender.spec import DEFAULT_MODEL
from training.cache import ChipCache, load_chips
from training.data import Sample, evenly_chosen, scan
from training.dataset import Splits, read_splits, splits_path
from training.files import written_whole
from training.loop import EpochResult, read_curve
from training.metrics import Scored, measure_groups
from training.options import check_folder, refuse_repeated
from training.robustness import robustness

if TYPE_CHECKING:
    from training.report import Evaluation

__all__ = [
    "METRICS_FILE",
    "REPORT_FILE",
    "EvaluateOptions",
    "evaluate",
    "keep_fonts_in",
    "main",
    "predict_chips",
    "run",
]

METRICS_FILE: Final = "metrics.json"
REPORT_FILE: Final = "report.html"
_BATCH = 64


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a model on labelled faces: overall, by group, and under corruptions."""

    data_dir: Path
    """Folder of labelled faces, named age_gender_race_date.jpg as in UTKFace."""
    model: Path = DEFAULT_MODEL
    """The artifact."""
    out_dir: Path = Path("runs/evaluation")
    """metrics.json and report.html go here."""
    cache_dir: Path = Path("runs/cache")
    """Cut chips are kept here between runs."""
    pictures: Literal["unseen", "all"] = "unseen"
    """unseen: leave out those that the model was trained or calibrated on; all: measure on them too."""
    robustness_pictures: int = 300
    """Pictures for each level of each corruption; 0 leaves robustness out."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.robustness_pictures < 0:
            raise ValueError(f"--robustness-pictures must be 0 or above, not {self.robustness_pictures}")
        check_folder("--out-dir", self.out_dir)
        check_folder("--cache-dir", self.cache_dir)


def run(options: EvaluateOptions) -> Path:
    """Evaluates, and returns the path of the report.

    Raises:
        ValueError: no usable picture, none with a face, or none that the model has not seen; or what it has seen is
            not told by the file that should.
        ModelLoadError: the artifact cannot be used.
    """
    keep_fonts_in(options.cache_dir)
    model = Model(options.model, device=options.device)
    splits = read_splits(splits_path(options.model))
    samples, rejected = scan(options.data_dir)
    samples, warning = _unseen(samples, splits, options)
    samples, chips = load_chips(
        samples,
        model.spec.chip_size_px,
        margin=model.spec.chip_margin,
        cache_dir=options.cache_dir,
        rejected=rejected,
    )
    if not samples:
        raise ValueError(f"no picture in {options.data_dir} can be measured on: {rejected.counts()}")
    strangers = [splits.of(sample) for sample in samples].count(None)
    if strangers and not warning:
        warning = (
            f"{strangers} pictures are new to the model, unless they are copies in other bytes of what it has seen"
        )
    print(f"pictures: {len(samples)}; left out: {rejected.counts() or 'none'}")
    return evaluate(
        model,
        samples,
        chips,
        options.out_dir,
        robustness_pictures=options.robustness_pictures,
        curve=read_curve(options.model.parent),
        warning=warning,
    )


def evaluate(
    model: Model,
    samples: Sequence[Sample],
    chips: ChipCache,
    out_dir: Path,
    *,
    robustness_pictures: int = 0,
    curve: Sequence[EpochResult] = (),
    warning: str | None = None,
) -> Path:
    """Measures a model on pictures whose chips are cut, and writes metrics.json and report.html.

    Args:
        model: the artifact.
        samples: the pictures, at least one.
        chips: of all of them.
        out_dir: of both files; made if it is missing.
        robustness_pictures: at most how many of them are made worse at each level of each corruption.
        curve: of the model's training, for the report.
        warning: what must be said of the figures.

    Returns:
        The path of the report.
    """
    from training.report import Evaluation, write_report  # imports matplotlib, see `keep_fonts_in`

    scored = Scored.of([sample.labels for sample in samples], predict_chips(model, samples, chips))
    groups = measure_groups(scored)
    worsened = evenly_chosen(samples, robustness_pictures)
    curves = robustness(model, worsened) if worsened else {}
    result = Evaluation(model, list(samples), scored, groups, curves, len(worsened), list(curve), warning)
    out_dir.mkdir(parents=True, exist_ok=True)
    with written_whole(out_dir / METRICS_FILE) as temporary:
        temporary.write_text(json.dumps(_as_json(result), indent=1) + "\n")
    report = write_report(result, out_dir / REPORT_FILE)
    _print_summary(result, report)
    return report


def keep_fonts_in(cache_dir: Path) -> None:
    """Where matplotlib, once it is imported, keeps its list of fonts; by itself it would take the home directory."""
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir.absolute() / "matplotlib"))


def _unseen(samples: list[Sample], splits: Splits, options: EvaluateOptions) -> tuple[list[Sample], str | None]:
    """The pictures to measure on, and what must be said of them."""
    if not splits_path(options.model).exists():
        name = splits_path(options.model).name
        return samples, f"there is no {name} beside the model: it may have seen these pictures"
    unseen = [sample for sample in samples if splits.of(sample) in (None, "test")]
    seen = len(samples) - len(unseen)
    if options.pictures == "all":
        told = f"the model has seen {seen} of these {len(samples)} pictures in training or validation"
        return samples, told if seen else None
    if not unseen:
        raise ValueError(
            f"the model has seen all {seen} pictures in training or validation; --pictures all measures on them anyway"
        )
    if seen:
        print(f"{seen} pictures that the model was trained or calibrated on are left out")
    return unseen, None


def predict_chips(model: Model, samples: Sequence[Sample], chips: ChipCache) -> Predictions:
    """Predictions for N >= 1 pictures whose chips are cut, in their order and a batch at a time."""
    parts = [model.predict(chips.read(samples[at : at + _BATCH])) for at in range(0, len(samples), _BATCH)]
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _as_json(result: "Evaluation") -> dict[str, Any]:
    spec = result.model.spec
    return {
        "model": {"name": spec.name, "version": spec.version, "sha256": result.model.sha256},
        "warning": result.warning,
        "groups": {
            group: {"pictures": count, **{name: asdict(figure) for name, figure in figures.items()}}
            for group, (count, figures) in result.groups.items()
        },
        "robustness": {
            name: {f"{level:g}": _robust_json(values) for level, values in curve.items()}
            for name, curve in result.robustness.items()
        },
    }


def _robust_json(values: tuple[float, float, float]) -> dict[str, float | None]:
    names = ("age_mae_years", "gender_accuracy", "found")
    return {name: None if np.isnan(value) else round(value, 4) for name, value in zip(names, values, strict=True)}


def _print_summary(result: "Evaluation", report: Path) -> None:
    if result.warning:
        print(f"note: {result.warning}")
    count, figures = result.groups["all"]
    print(f"{count} pictures, with 95% bootstrap intervals:")
    for name, figure in figures.items():
        print(f"  {name:<28} {figure.value:8.3f}  ({figure.low:.3f} to {figure.high:.3f})")
    print(f"report: {report}")


def main() -> int:
    """Returns the process's exit code."""
    try:
        refuse_repeated(sys.argv[1:])
        run(tyro.cli(EvaluateOptions, prog="python -m training.evaluate"))
    except (AgeGenderError, ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
