"""`python -m benchmarks`: every benchmark in turn -> RESULTS.md and its plots.

Each benchmark is a script of its own, with more options. What it wrote is kept in --keep-dir. Of the scripts that
`--only` leaves out, the page keeps the sections that it has, each under its own date. Where a script fails, the page
says so, and the next one runs.
"""

import argparse
import hashlib
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Final

import psutil
import torch

from agegender import Model
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import errors_without_traceback
from benchmarks.environment import make_environment
from benchmarks.peer import PEER
from benchmarks.plots import PLOTS, draw

_LOOKED_S: Final = 3
FOLDERS: Final = ("--data-dir", "--photos-dir")  # the page shows their names without where they are
VERSIONS: Final = (
    "torch",
    "onnxruntime",
    "opencv-python-headless",
    "pillow",
    "numpy",
    "pyarrow",
    "ray",
    "torchserve",
    "streamlit",
)


@dataclass(frozen=True)
class Script:
    """A benchmark.

    Attributes:
        title: of its section.
        quick: options for a run of a minute.
        takes: which options of this program are handed to it.
    """

    title: str
    quick: Sequence[str]
    takes: Sequence[str] = ()


SCRIPTS: Final = {
    "accuracy": Script("How right it is", ("--limit", "200"), ("data_dir", "also", "peer_python")),
    "chain": Script(
        "Where an image's time goes",
        ("--rounds", "1", "--seconds", "4", "--limit", "100"),
        ("data_dir", "photos_dir"),
    ),
    "footprint": Script("What it takes to have it", ("--rounds", "1"), ("photos_dir", "peer_python", "setup")),
    "batch": Script(
        "The batch job beside others",
        ("--rounds", "1", "--seconds", "3", "--limit", "200", "--workloads", "whole"),
        ("data_dir", "photos_dir", "peer_python"),
    ),
    "serve": Script(
        "The server beside others",
        ("--images", "chip", "--clients", "1", "8", "--paced", "Poisson", "--seconds", "2"),
    ),
    "growth": Script(
        "How the batch job grows",
        ("--sizes", "500", "2000", "--slice", "0", "--names", "100000", "--parts", "20"),
    ),
    "app": Script("The app", ("--uploads", "3", "--rows", "20000")),
}


@errors_without_traceback("benchmarks")
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when every script ran, 1 when one failed."""
    options = _options(arguments)
    for folder in (options.keep_dir, options.out_dir):
        folder.mkdir(parents=True, exist_ok=True)
    page = options.out_dir / "RESULTS.md"
    page.open("a").close()  # what cannot be written fails now, not after an hour of measuring
    with tempfile.TemporaryDirectory(prefix="bench-") as environments:
        if any("peer_python" in SCRIPTS[name].takes for name in options.only):
            python = options.peer_python or make_environment(Path(environments) / "peer", PEER)
            options.peer_python = python if isinstance(python, Path) else None
        failed = [name for name in options.only if not _measured(name, options, page)]
    print(f"{page}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=_names, default=list(SCRIPTS), metavar="NAME,...", help=", ".join(SCRIPTS))
    parser.add_argument(
        "--quick", action="store_true", help="little of each, to see that all of it works, with a page in --keep-dir"
    )
    parser.add_argument("--setup", action="store_true", help="measure the installation into fresh environments too")
    parser.add_argument("--data-dir", type=Path, help="UTKFace's aligned chips, which accuracy needs")
    parser.add_argument("--photos-dir", type=Path, help="JPEG photographs (default: samples)")
    parser.add_argument("--peer-python", type=Path, help=f"an interpreter that has {PEER} (default: makes one)")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=COMMAND", help="one more contestant of accuracy"
    )
    parser.add_argument("--out-dir", type=Path, help="of the page (default: benchmarks)")
    parser.add_argument(
        "--keep-dir", type=Path, default=Path("runs/benchmarks"), help="of what each wrote (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    options.out_dir = options.out_dir or (options.keep_dir if options.quick else Path("benchmarks"))
    return options


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCRIPTS]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; choose from {', '.join(SCRIPTS)}")
    return [name for name in SCRIPTS if name in names]


def _measured(name: str, options: argparse.Namespace, page: Path) -> bool:
    """Runs a script, and puts its section into the page. Returns whether it went well."""
    print(f"{name} ...", flush=True)
    code, section = _run(name, SCRIPTS[name], options)
    before = page.read_text()
    sections = {**_sections(before), SCRIPTS[name].title: section}
    anew = not before or len(options.only) == len(SCRIPTS)
    page.write_text("\n".join(_page(_head() if anew else before.partition("## ")[0].rstrip(), sections)))
    return code == 0


def _run(name: str, script: Script, options: argparse.Namespace) -> tuple[int, str]:
    """A script's exit code and its section of the page."""
    kept = {kind: options.keep_dir / f"{name}.{kind}" for kind in ("md", "json", "out", "log")}
    call = ["-m", f"benchmarks.{name}", *_settings(script, options)]
    busy, started = psutil.cpu_percent(interval=_LOOKED_S) / 100, time.monotonic()
    with kept["out"].open("w") as out, kept["log"].open("w") as log:
        command = [sys.executable, *call, *_hidden(script, options, kept["md"], kept["json"])]
        code = subprocess.run(command, stdout=out, stderr=log).returncode
    shown = [f"path/to/{Path(part).name}" if before in FOLDERS else part for before, part in pairwise(["", *call])]
    lines = [f"## {script.title}", "", f"`python {shlex.join(shown)}`", ""]
    lines += [f"{_now()}, {time.monotonic() - started:.0f} s, {_commit()}, model {_sha256()}, {_busy(busy)}"]
    lines += [_machine(), ""]
    if code:
        lines += [f"**Not measured**: it ended with {code}: {_last_line(kept['log'])}", ""]
    else:
        lines += [kept["md"].read_text(), *_plot(name, kept["json"], options.out_dir)]
    return code, "\n".join(lines)


def _settings(script: Script, options: argparse.Namespace) -> Iterator[str]:
    """Options that belong to the call as people repeat it."""
    if options.quick:
        yield from script.quick
    for name in ("data_dir", "photos_dir"):
        if name in script.takes and (folder := getattr(options, name)):
            yield from (f"--{name.replace('_', '-')}", str(folder))
    if "also" in script.takes:
        yield from (part for contestant in options.also for part in ("--also", contestant))
    if options.setup and "setup" in script.takes:
        yield "--setup"


def _hidden(script: Script, options: argparse.Namespace, tables: Path, figures: Path) -> Iterator[str]:
    """Options that the page does not show, since they name files of this machine."""
    yield from ("--markdown", str(tables), "--json", str(figures))
    if options.peer_python and "peer_python" in script.takes:
        yield from ("--peer-python", str(options.peer_python))


def _plot(name: str, figures: Path, out_dir: Path) -> list[str]:
    if name not in PLOTS:
        return []
    target = out_dir / "figures" / f"{name}.svg"
    try:
        draw(name, json.loads(figures.read_text()), target)
    except Exception as error:  # a plot that fails does not lose the tables
        return [f"No plot: {type(error).__name__}: {error}", ""]
    return [f"![{SCRIPTS[name].title}](figures/{name}.svg)", ""]


# The page.


def _head() -> str:
    """What holds for all sections, unless they say otherwise."""
    return "\n".join(
        [
            "# What was measured",
            "",
            "Each table names the command that made it, with its options; `make bench` runs the scripts one after the "
            f"other. {_machine()}",
            "",
            f"Model: {_model()}. Versions: Python {platform.python_version()}, {_versions()}.",
        ]
    )


def _page(head: str, sections: Mapping[str, str]) -> Iterator[str]:
    yield from (head, "")
    for script in SCRIPTS.values():
        yield sections.get(script.title, f"## {script.title}\n\nNot measured yet.\n")


def _sections(page: str) -> dict[str, str]:
    """Title -> section, its title included, of a page that was written before."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0].removeprefix("## "): part.rstrip() + "\n" for part in parts}


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"Machine: {_processor()} with {_vectors()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}."
    )


def _vectors() -> str:
    """The instructions for vectors, on which the speed of 8-bit arithmetic depends."""
    flags = _cpuinfo("flags").split()
    more = [name for flag, name in (("avx512_vnni", "VNNI"), ("amx_int8", "AMX")) if flag in flags]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *more])


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _model() -> str:
    spec = Model(DEFAULT_MODEL, device="cpu").spec
    return f"{spec.name} {spec.version}, {spec.backbone}, SHA-256 {_sha256()}"


def _sha256() -> str:
    return hashlib.sha256(DEFAULT_MODEL.read_bytes()).hexdigest()[:12]


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in VERSIONS)


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return f"commit {done.stdout.strip() or 'unknown'}"


def _now() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"


def _busy(share: float) -> str:
    return f"{share:.0%} of the processors busy at its start" + (
        "; **other programs were running**" if share > 0.2 else ""
    )


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]


if __name__ == "__main__":
    sys.exit(main())
