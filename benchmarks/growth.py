"""How speed and memory of the batch job depend on the number of inputs, measured, and simulated for 100 million.

`python -m benchmarks.growth` makes directories of 1,000, 10,000 and 100,000 small chips (hard links of a few, of one
sample) and runs the job on each, with the fast model, since it is not the network that grows. A larger one of
`--slice` chips is listed, worked on for `--slice-seconds`, then interrupted and resumed for as long, since all of it
would take too long for a benchmark. Then it makes a manifest (the list of inputs that a run keeps) of `--names` names
without files, counts and publishes `--parts` made-up parts of an output, and extrapolates both to 100 million inputs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from agegender import FacePrediction, ImageResult
from agegender.records import arrow_table
from batch.listing import Input, blocks_of, digest
from batch.output import Output, Run, now
from batch.publish import committed_parts, publish
from batch.scorer import BLOCK_SCHEMA
from benchmarks.batch import FAST_MODEL
from benchmarks.command_line import duration, errors_without_traceback, make_parser, positive
from benchmarks.images import sample_face
from benchmarks.outputs import add_output_options, write_outputs

CHIPS: Final = 20
CHIP_PX: Final = 64
NAMES_PER_FOLDER: Final = 10_000
ROWS_PER_PART: Final = 1024
TARGET: Final = 100_000_000
SAMPLED_S: Final = 0.25


@dataclass
class Measurement:
    """One run, or a part of one.

    Attributes:
        inputs: in the directory.
        scored: by this run.
        images_per_s: after the first result.
        startup_s: from the command to the first result, the listing included.
        driver_mb: most memory of the process that lists, watches and publishes.
        all_mb: most memory of all processes, what they share counted for each.
    """

    inputs: int
    scored: int
    images_per_s: float
    startup_s: float
    driver_mb: float
    all_mb: float


@errors_without_traceback("growth")
def main() -> None:
    options = _options()
    measured: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="growth-", dir=options.tmp) as name:
        for size in options.sizes:
            measured.append(_whole_run(_directory(Path(name), size), size, Path(name) / "out", options))
            _print(measured[-1])
        if options.slice:
            folder = _directory(Path(name), options.slice)
            for _ in range(2):
                measured.append(_slice(folder, options.slice, Path(name) / "sliced", options))
                _print(measured[-1])
    simulated = _aside(_manifest, options.names) | _aside(_publishing, options.parts)
    report = "\n".join([*_table(measured), "", *_extrapolated(simulated)])
    print(report)
    figures = {"runs": [asdict(each) for each in measured], "simulated": simulated}
    write_outputs(options, report, figures)


def _options() -> argparse.Namespace:
    parser = make_parser("growth", __doc__)
    parser.add_argument("--sizes", nargs="*", type=positive, default=[1_000, 10_000, 100_000], help="runs to their end")
    parser.add_argument("--slice", type=int, default=1_000_000, help="inputs of the interrupted run; 0 leaves it out")
    parser.add_argument("--slice-seconds", type=duration, default=60, help="of scoring, before and after it is resumed")
    parser.add_argument("--names", type=positive, default=2_000_000, help="names of the simulated listing")
    parser.add_argument("--parts", type=positive, default=500, help="parts of the simulated output")
    parser.add_argument("--workers", type=positive, default=psutil.cpu_count(), help="processes (default: the cores)")
    parser.add_argument("--tmp", type=Path, help="where the directories are made (default: the system's)")
    add_output_options(parser)
    options = parser.parse_args()
    if options.slice < 0:
        parser.error(f"argument --slice: {options.slice} is below 0")
    return options


def _directory(folder: Path, size: int) -> Path:
    """So many names of a few small images, in directories of 10,000."""
    root = folder / str(size)
    seeds = folder / "chips"
    if not seeds.exists():
        seeds.mkdir()
        face = sample_face()
        for number in range(CHIPS):
            face.rotate(number - CHIPS // 2).resize((CHIP_PX, CHIP_PX)).save(seeds / f"{number:03}.jpg")
    for number in range(size):
        if number % NAMES_PER_FOLDER == 0:
            (root / f"{number // NAMES_PER_FOLDER:04}").mkdir(parents=True)
        target = f"{root}/{number // NAMES_PER_FOLDER:04}/{number % NAMES_PER_FOLDER:04}.jpg"
        os.link(f"{seeds}/{number % CHIPS:03}.jpg", target)
    return root


# Runs.


def _whole_run(folder: Path, size: int, out: Path, options: argparse.Namespace) -> Measurement:
    shutil.rmtree(out, ignore_errors=True)
    process = _start(folder, out, options)
    memory = _Memory(process.pid)
    while process.poll() is None:
        memory.look()
    if process.returncode:
        raise ValueError(f"the batch job ended with {process.returncode} on {size:,} inputs")
    summary = json.loads((out / "_summary.json").read_text())
    return Measurement(
        size, summary["inputs"], summary["images_per_s"], summary["startup_s"], memory.driver_mb, memory.all_mb
    )


def _slice(folder: Path, size: int, out: Path, options: argparse.Namespace) -> Measurement:
    """Works for a while beyond the first part, then is interrupted; the next call goes on."""
    before = _inputs_done(out)
    started = time.monotonic()
    process = _start(folder, out, options)
    memory = _Memory(process.pid)
    while process.poll() is None and _parts(out) <= before[0]:
        memory.look()
    first, first_parts = time.monotonic(), _parts(out)
    while process.poll() is None and time.monotonic() < first + options.slice_seconds:
        memory.look()
    seconds, parts = time.monotonic() - first, _parts(out)
    process.send_signal(signal.SIGINT)
    process.wait()
    done = _inputs_done(out)
    mean = (done[1] - before[1]) / max(1, done[0] - before[0])  # blocks grow at first, and are alike later
    rate = (parts - first_parts) * mean / seconds
    return Measurement(size, done[1] - before[1], rate, first - started, memory.driver_mb, memory.all_mb)


def _start(folder: Path, out: Path, options: argparse.Namespace) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "batch", str(folder), str(out), "--faces", "whole", "--model", str(FAST_MODEL)]
    return subprocess.Popen(
        [*command, "--workers", str(options.workers)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _parts(out: Path) -> int:
    return sum(".pending." not in path.name for path in (out / "_run").glob("*/checkpoint/*.parquet"))


def _inputs_done(out: Path) -> tuple[int, int]:
    """Parts and inputs that are committed."""
    output = Output(str(out))
    if (run := output.run()) is None:
        return 0, 0
    parts, counts = committed_parts(output, run)
    return len(parts), counts.inputs


class _Memory:
    """The most that a process, and all that it started, have held."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self.driver_mb = self.all_mb = 0.0

    def look(self) -> None:
        """Waits a moment and looks."""
        time.sleep(SAMPLED_S)
        try:
            own = self._root.memory_info().rss / 1e6
            rest = sum(each.memory_info().rss for each in self._root.children(recursive=True)) / 1e6
        except psutil.Error:
            return  # one has ended meanwhile
        self.driver_mb, self.all_mb = max(self.driver_mb, own), max(self.all_mb, own + rest)


# The simulation. Each part runs in a process of its own, so that the memory of one is not counted for the other.


def _aside(function: Any, count: int) -> dict[str, float]:
    with get_context("spawn").Pool(1) as pool:
        figures: dict[str, float] = pool.apply(function, (count,))
        return figures


def _peak_mb() -> float:
    """The most memory since `_forget_peak`; `ru_maxrss` may be that of whoever started this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


def _forget_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts over
    return _peak_mb()


def _names(count: int) -> Iterator[Input]:
    for number in range(count):
        yield Input(f"/data/photographs/{number // NAMES_PER_FOLDER:05}/IMG_{number % NAMES_PER_FOLDER:05}.jpg")


def _manifest(count: int) -> dict[str, float]:
    base = _forget_peak()
    started, size = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, shard in enumerate(blocks_of(_names(count))):
            path = f"{folder}/{number}.parquet"
            pq.write_table(shard, path, row_group_size=64)
            size += os.path.getsize(path)
    figures = {
        "names": count,
        "manifest_s": time.monotonic() - started,
        "manifest_bytes": size,
        "manifest_peak_mb": _peak_mb() - base,
    }
    base = psutil.Process().memory_info().rss / 1e6
    known = {digest(each.path) for each in _names(count)}
    figures["digests_mb"] = psutil.Process().memory_info().rss / 1e6 - base
    assert len(known) == count
    return figures


def _publishing(count: int) -> dict[str, float]:
    inputs = count * ROWS_PER_PART
    with tempfile.TemporaryDirectory() as folder:
        output = Output(folder)
        run = Run("0" * 8, now(), "0", {"sha256": ""}, {}, [], inputs, count)
        parts_folder, checkpoint = output.parts(run), output.checkpoint(run)
        for path in (parts_folder, checkpoint):
            os.makedirs(path)
        for block in range(count):
            table = _part(block)
            pq.write_table(table, f"{parts_folder}/run_{block:06}_000000-0.parquet", compression="zstd")
            pq.write_table(table.select(["block"]), f"{checkpoint}/run_{block:06}_000000.parquet")
        base, started = _forget_peak(), time.monotonic()
        parts, _ = committed_parts(output, run)
        counted = time.monotonic()
        publish(output, run, parts)
        return {
            "parts": count,
            "counting_s": counted - started,
            "publishing_s": time.monotonic() - counted,
            "publishing_peak_mb": _peak_mb() - base,
        }


def _part(block: int) -> pa.Table:
    generator = np.random.default_rng(block)
    first = block * ROWS_PER_PART
    results = [
        ImageResult(each.path, "ok", None, 200, 200, (_face(*generator.random(3)),)) for each in _names(ROWS_PER_PART)
    ]
    table = arrow_table(results)
    ids = pa.array(range(first, first + ROWS_PER_PART), pa.int64())
    return (
        table.append_column("id", ids)
        .append_column("block", pa.repeat(pa.scalar(block, pa.int64()), len(ids)))
        .select(BLOCK_SCHEMA.names)
        .cast(BLOCK_SCHEMA)
    )


def _face(age: float, width: float, probability: float) -> FacePrediction:
    box = (0.0, 0.0, 200.0, 200.0)
    return FacePrediction(0, box, None, 90 * age, 80 * age, 80 * age + 20 * width, "male", 0.5 + probability / 2)


# The report.


def _print(measurement: Measurement) -> None:
    print(_row(measurement), flush=True)


def _row(each: Measurement) -> str:
    figures = f"{each.images_per_s:.1f} | {each.startup_s:.1f} | {each.driver_mb:.0f} | {each.all_mb:.0f}"
    return f"| {each.inputs:,} | {each.scored:,} | {figures} |"


def _table(measured: Sequence[Measurement]) -> list[str]:
    if not measured:
        return []
    head = "| inputs | scored in this run | images/s | to first result, s | driver, MB | all processes, MB |"
    rates = [each.images_per_s for each in measured]
    apart = f", {max(rates) / min(rates) - 1:.0%} apart" if min(rates) else ""
    return [
        head,
        "|---" * head.count(" | ") + "|---|",
        *map(_row, measured),
        "",
        f"images/s from least to most: {min(rates):.1f} to {max(rates):.1f}{apart}",
    ]


def _extrapolated(simulated: dict[str, float]) -> list[str]:
    names = TARGET / simulated["names"]
    parts = TARGET / (simulated["parts"] * ROWS_PER_PART)
    return [
        f"measured on {simulated['names']:,.0f} names and {simulated['parts']:,.0f} parts; for {TARGET:,} inputs:",
        f"- manifest: {names * simulated['manifest_s'] / 60:.1f} min without the file system's own time, "
        f"{names * simulated['manifest_bytes'] / 1e9:.1f} GB, {simulated['manifest_peak_mb']:.0f} MB of memory "
        "whatever the number",
        f"- names that must be told apart (several sources, a list, --append): "
        f"{names * simulated['digests_mb'] / 1e3:.1f} GB of memory",
        f"- counting the parts, at each start and at the end: {parts * simulated['counting_s'] / 60:.0f} min",
        f"- publishing: {parts * simulated['publishing_s'] / 60:.0f} min, {simulated['publishing_peak_mb']:.0f} MB "
        f"and {TARGET / 1e6:.0f} MB for the inputs seen",
    ]


if __name__ == "__main__":
    main()
