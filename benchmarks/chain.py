"""Where the time of one image goes: decode, detect, cut, predict, in one process with one thread.

`python -m benchmarks.chain` takes chips of 200 x 200 pixels, as they are (`whole`) and with the detector (`detect`),
and photographs of 1 and 12 megapixels. Each round predicts some images one at a time, as a server does, and
then a stream of images, so that the network's batches are full. Figures are medians over the rounds, of wall time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agegender import Item, Predictor
from agegender.predictor import STAGES
from agegender.process import keep_freed_memory
from agegender.result import FacesMode
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import duration, errors_without_traceback, make_parser, positive
from benchmarks.images import PHOTOGRAPHS, add_image_options, make_images
from benchmarks.outputs import add_output_options, write_outputs

WORKLOADS: Final = ("whole", "detect", *PHOTOGRAPHS)


@dataclass(frozen=True)
class Measurement:
    """One round of one workload; times in ms per image.

    Attributes:
        workload: one of `WORKLOADS`.
        round: from 0.
        images: how many were streamed.
        faces: how many were found in them.
        stages_ms: by stage.
        rest_ms: what no stage accounts for.
        alone_ms: median of one image alone, in a batch of its own.
    """

    workload: str
    round: int
    images: int
    faces: int
    stages_ms: dict[str, float]
    rest_ms: float
    alone_ms: float


@errors_without_traceback("chain")
def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-chain-") as name:
        images = {
            workload: make_images(workload, options.data_dir, options.photos_dir, Path(name))
            for workload in options.workloads
        }
        sources = {
            workload: [Item(path.read_bytes()) for path in found.paths[: options.limit]]
            for workload, found in images.items()
        }
    rounds = itertools.product(range(options.rounds), sources.items())
    results = [_measure(options, round_, workload, items) for round_, (workload, items) in rounds]
    described = (f"{workload}, {found.description}" for workload, found in images.items())
    report = "\n".join([f"Images: {'; '.join(described)}.", *_report(results)])
    print(report)
    write_outputs(options, report, results)


def _options() -> argparse.Namespace:
    parser = make_parser("chain", __doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="kinds of images")
    parser.add_argument("--rounds", type=positive, default=3, help="of all workloads")
    parser.add_argument("--seconds", type=duration, default=10, help="per workload and round, for the stream")
    parser.add_argument("--limit", type=positive, default=500, help="at most so many different images")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the artifact")
    add_image_options(parser)
    add_output_options(parser)
    return parser.parse_args()


def _measure(options: argparse.Namespace, round_: int, workload: str, items: Sequence[Item]) -> Measurement:
    stages_s: defaultdict[str, float] = defaultdict(float)

    def add(stage: str, seconds: float) -> None:
        stages_s[stage] += seconds

    faces: FacesMode = "whole" if workload == "whole" else "detect"
    keep_freed_memory()
    predictor = Predictor(options.model, faces=faces, device="cpu", threads=1, on_stage=add)
    for _ in predictor.stream(_until(time.perf_counter() + options.seconds / 4, items)):
        pass  # torch optimizes for the sizes of batches that it meets first
    alone_ms = statistics.median(_alone_ms(predictor, items, options.seconds / 4))
    stages_s.clear()
    started = time.perf_counter()
    results = list(predictor.stream(_until(started + options.seconds, items)))
    spent_s = time.perf_counter() - started
    per_image = {stage: 1000 * stages_s[stage] / len(results) for stage in STAGES}
    rest_ms = 1000 * spent_s / len(results) - sum(per_image.values())
    faces_found = sum(len(result.faces) for result in results)
    print(f"round {round_} {workload:7} {len(results) / spent_s:8.1f} images/s", flush=True)
    return Measurement(workload, round_, len(results), faces_found, per_image, rest_ms, alone_ms)


def _until(deadline: float, items: Sequence[Item]) -> Iterator[Item]:
    return itertools.takewhile(lambda _: time.perf_counter() < deadline, itertools.cycle(items))


def _alone_ms(predictor: Predictor, items: Sequence[Item], seconds: float) -> list[float]:
    times = []
    for item in _until(time.perf_counter() + seconds, items):
        started = time.perf_counter()
        predictor.predict([item])
        times.append(1000 * (time.perf_counter() - started))
    return times


def _report(results: Sequence[Measurement]) -> Iterator[str]:
    yield f"One thread, {len({each.round for each in results})} rounds; ms per image, and share of a stage."
    yield ""
    yield f"| images | faces per image | {' | '.join(STAGES)} | rest | all | images/s | one image alone |"
    yield "|---" * (len(STAGES) + 6) + "|"
    for workload in dict.fromkeys(each.workload for each in results):
        own = [each for each in results if each.workload == workload]
        stages = {stage: statistics.median(each.stages_ms[stage] for each in own) for stage in STAGES}
        rest = statistics.median(each.rest_ms for each in own)
        total = sum(stages.values()) + rest
        cells = [f"{value:.2f} ({value / total:.0%})" for value in (*stages.values(), rest)]
        faces = sum(each.faces for each in own) / sum(each.images for each in own)
        alone = statistics.median(each.alone_ms for each in own)
        yield f"| {workload} | {faces:.1f} | {' | '.join(cells)} | {total:.2f} | {1000 / total:.3g} | {alone:.2f} |"


if __name__ == "__main__":
    main()
