"""`python -m batch SOURCE... OUT`: the command line of the batch job."""

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from batch.interrupts import INTERRUPTED, exit_if_stuck, heed_interrupts
from batch.progress import tell
from batch.request import Request, Resources, ScoreOptions

# Ray and torch read these when they are imported.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # there is a process for each core
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nothing listens beyond this machine
    "RAY_prestart_worker_first_driver": "0",  # Ray would wait for ever for such a process that dies at its start
    "RAY_worker_niceness": "0",  # at Ray's 15, workers stand still beside anything else that is busy
}

_DONE, _WRONG_CALL = 0, 2

_EPILOG = """\
a source is
  a directory         all files below it, hidden ones too; images are told by content, not by name
  a quoted glob       'photos/**/*.jpg'
  a list              LIST.txt with a path in each line, or LIST.parquet with a column `path`
  a file              any other file is itself an image
  a URI               s3://bucket/prefix or gs://bucket/prefix, and lists there
links to files are followed, links to directories only with --follow-links

what OUT may be
  new or empty        the run begins
  an unfinished run   of the same sources, model and options: it goes on, nothing is done twice or lost
  a finished run      nothing is done; see --append and --overwrite

`python -m batch report OUT` writes OUT/_report.html (a directory of that name is ./report).
exit code: 0 done, 1 the run stopped, 2 wrong call, 3 more than --max-bad failed, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, see the epilog of --help."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    reporting = given[:1] == ["report"]
    options = _report_parser().parse_args(given[1:]) if reporting else _parse(given)
    _open_streams()
    _prepare_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr does, it tells of names in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    handled = heed_interrupts()
    try:
        with exit_if_stuck(handled):
            return _run(_report if reporting else _score, options)
    except Exception:
        if not handled.is_set():  # or it comes of the interrupt, as an ImportError does of one inside of a library
            raise
        tell(sys.stderr, "\nbatch: interrupted\n")
        return INTERRUPTED
    except KeyboardInterrupt as interrupt:
        tell(sys.stderr, "\nbatch: " + "; ".join(["interrupted", *interrupt.args]) + "\n")
        return INTERRUPTED


def _prepare_environment() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The libraries use what is deprecated, and a caller may have made errors of that, here and in Ray's processes.
    os.environ.pop("PYTHONWARNINGS", None)
    warnings.simplefilter("ignore", DeprecationWarning)


def _open_streams() -> None:
    """Opens to nowhere what the caller has closed, as daemons do: other files would take the places of these."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", errors="backslashreplace"))


def _parse(given: Sequence[str]) -> argparse.Namespace:
    """Accepts options between positionals, except after `--`, which `parse_intermixed_args` ignores."""
    parser = _parser()
    options = parser.parse_args(given) if "--" in given else parser.parse_intermixed_args(given)
    if options.device and not options.gpus:
        parser.error("--device is for the processes of --gpus N; without them, the workers predict on the CPU")
    return options


def _run(action: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    from batch.errors import BatchError

    try:
        action(options)
    except BatchError as error:
        return _complain(error, error.exit_code)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        return _complain(error, _WRONG_CALL)
    return _DONE


def _score(options: argparse.Namespace) -> None:
    from batch.errors import RequestError
    from batch.run import run_batch

    if sys.flags.optimize > 1:
        raise RequestError("Ray does not work without docstrings; unset PYTHONOPTIMIZE, or leave -OO out")
    if options.samples:
        _write_samples(options.sources[0], dry_run=options.dry_run)
    stream = sys.stdout  # while the engine runs, `sys.stdout` is for its libraries
    run_batch(_request(options), lambda text: tell(stream, f"{text}\n"))


def _write_samples(source: str, *, dry_run: bool) -> None:
    from batch.location import filesystem_of, is_pattern, is_remote, normalize
    from batch.samples import write_samples

    if is_remote(source):
        raise ValueError(f"the samples go into a directory of this machine, not to {source}")
    if is_pattern(os.fsencode(source)):
        raise ValueError(f"the samples go into one directory, and {source} is a glob")
    folder = Path(filesystem_of(normalize(source))[1])
    if not dry_run:
        write_samples(folder)
    elif not folder.exists():
        raise ValueError(f"{source} has no samples yet, and a dry run writes nothing; leave out --dry-run once")


def _report(options: argparse.Namespace) -> None:
    from batch.location import normalize
    from batch.output import Output
    from batch.report import write_report

    tell(sys.stdout, f"wrote {write_report(Output(normalize(options.out)))}\n")


def _complain(error: Exception, exit_code: int) -> int:
    tell(sys.stderr, f"batch: {error}\n")
    return exit_code


def _request(options: argparse.Namespace) -> Request:
    return Request(
        sources=tuple(options.sources),
        out=options.out,
        model=options.model,
        options=ScoreOptions(
            faces=options.faces,
            min_score=options.min_score,
            max_faces=options.max_faces,
            max_pixels=options.max_pixels,
            max_bytes=options.max_bytes,
        ),
        mode=options.mode,
        follow_links=options.follow_links,
        max_bad=options.max_bad,
        dry_run=options.dry_run,
        resources=Resources(
            address=_address(options.address),
            workers=options.workers,
            gpus=options.gpus,
            device=options.device or Resources.device,
        ),
    )


def _address(given: str | None) -> str | None:
    address = (given or os.environ.get("RAY_ADDRESS", "")).strip()
    return None if address in ("", "local") else address  # Ray's word for a private one


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batch",
        description="Scores every face of every image of some sources into Parquet, one outcome for each input.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="what to score, see below")
    parser.add_argument("out", metavar="OUT", help="directory for the output, local or a URI")
    defaults = ScoreOptions()
    what = parser.add_argument_group("what the values depend on")
    what.add_argument(
        "--faces", choices=("detect", "whole"), default=defaults.faces, help="whole: each image is one face"
    )
    what.add_argument("--model", default="model_store/agegender.pt", help="the artifact (default %(default)s)")
    for name, kind, text in (
        ("min_score", float, "least detector score, 0 to 1"),
        ("max_faces", int, "most faces an image"),
        ("max_pixels", int, "larger images are refused"),
        ("max_bytes", _count, "larger files are not read"),
    ):
        option, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        what.add_argument(option, type=kind, default=default, help=f"{text} (default {default:,})")
    how = parser.add_argument_group("how it runs")
    mode = how.add_mutually_exclusive_group()
    mode.add_argument(
        "--append", dest="mode", action="store_const", const="append", help="add the files that a finished OUT lacks"
    )
    mode.add_argument(
        "--overwrite",
        dest="mode",
        action="store_const",
        const="overwrite",
        help="start anew: once all is listed, delete what this program wrote to OUT",
    )
    how.add_argument(
        "--max-bad",
        type=_max_bad,
        metavar="LIMIT",
        help="stop when more inputs than this fail: a number, such as 20, or a share of all, such as 5%% "
        "(default: never)",
    )
    how.add_argument("--follow-links", action="store_true", help="enter links to directories, each directory once")
    how.add_argument("--dry-run", action="store_true", help="list and estimate, and write nothing")
    how.add_argument("--workers", type=_positive, default=0, help="processes that work on images (default: one a core)")
    how.add_argument(
        "--gpus",
        type=_count,
        default=0,
        metavar="N",
        help="N processes with a GPU each predict for the others (default: 0)",
    )
    how.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="where those predict (default: cuda); cpu tries them without a GPU",
    )
    how.add_argument("--address", help="a Ray cluster to run on (default: RAY_ADDRESS, or a private one here)")
    how.add_argument("--samples", action="store_true", help="first put sample photographs into SOURCE")
    parser.set_defaults(mode="resume")
    return parser


def _report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m batch report", description="Writes OUT/_report.html, a page about a finished output."
    )
    parser.add_argument("out", metavar="OUT", help="directory of the output, local or a URI")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _max_bad(text: str) -> str:
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of inputs, such as 20, nor a share, such as 5%")
    return text


if __name__ == "__main__":
    sys.exit(main())
