"""`python -m handler COMMAND`: the server's commands, for people and orchestrators."""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from handler import MODEL_NAME
from handler.server import ENDING, Server, ServingError, java_home
from handler.stubs import build_stubs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done or yes, 1 no, 2 an error that is told."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except (ServingError, OSError, ValueError) as error:
        print(f"handler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m handler", description="The TorchServe that serves the model.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    archive = add("archive", _build_archive, "build the archive that the server loads")
    archive.add_argument("--model", type=Path, help="the artifact (default: model_store/agegender.pt)")
    archive.add_argument("--output", type=Path, help="the file to write (default: model_store/agegender.mar)")
    starting = [
        add("start", _start, "start the server; returns when it answers predictions"),
        add("run", _run, "start the server and stay until it ends or SIGTERM asks to stop it, for service managers"),
    ]
    for each in starting:
        each.add_argument("--model", type=Path, help="build the archive of this artifact first")
        each.add_argument(
            "--timeout", type=_seconds, default=120.0, metavar="S", help="wait at most this long (default %(default)g)"
        )
    asking = [
        add("stop", _stop, "let running requests finish, then stop the server"),
        add("status", _status, "show versions, workers and queue"),
        add("live", _live, "exit code 0 where the server answers at all"),
        add("ready", _ready, "exit code 0 where every worker answers predictions"),
    ]
    for each in (*starting, *asking):
        each.add_argument(
            "--config", type=Path, default=Path("config.properties"), help="TorchServe's settings (default %(default)s)"
        )
    add("java", _show_java, "print the Java that `start` runs")
    add("stubs", _build_stubs, "build the Python stubs of the gRPC API")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be over 0 seconds, not {text}")
    return seconds


def _show_java(_: argparse.Namespace) -> int:
    print(java_home() / "bin" / "java")
    return 0


def _build_stubs(_: argparse.Namespace) -> int:
    print(f"{build_stubs()}: put it on PYTHONPATH")
    return 0


def _build_archive(options: argparse.Namespace) -> int:
    _archive(options.model, options.output)
    return 0


def _archive(model: Path | None, target: Path | None = None) -> None:
    from agegender import AgeGenderError  # here, since torch is no small thing to load for a probe
    from agegender.spec import DEFAULT_MODEL
    from handler.archive import ARCHIVE, build_archive

    target = target or ARCHIVE
    try:
        version = build_archive(model or DEFAULT_MODEL, target)
    except (AgeGenderError, OSError) as error:
        raise ServingError(f"no archive can be built: {error}") from error
    print(f"{target}: model {MODEL_NAME}, version {version}, {target.stat().st_size / 1e6:.1f} MB")


def _server(options: argparse.Namespace) -> Server:
    _heed_signals()
    return Server(options.config)


def _build(options: argparse.Namespace) -> Callable[[], None] | None:
    return partial(_archive, options.model) if options.model else None


def _start(options: argparse.Namespace) -> int:
    server = _server(options)
    server.start(options.timeout, _build(options))
    print(f"{server.describe()}\nserving on {server.address('inference')}; the keys are in key_file.json")
    return 0


def _stop(options: argparse.Namespace) -> int:
    print("stopped" if _server(options).stop() else "no server was running")
    return 0


def _status(options: argparse.Namespace) -> int:
    print(_server(options).describe())
    return 0


def _live(options: argparse.Namespace) -> int:
    return _say(_server(options).live())


def _ready(options: argparse.Namespace) -> int:
    return _say(_server(options).ready())


def _say(answer: bool) -> int:
    print("yes" if answer else "no")
    return 0 if answer else 1


def _heed_signals() -> None:
    """Those that end a process act as Ctrl-C does, so that no server is left half started or half stopped."""
    heeded = [each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup lets one be ignored

    def interrupt(*_: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)  # a second one would find the server half ended
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, interrupt)


def _run(options: argparse.Namespace) -> int:
    server = _server(options)
    try:
        server.start(options.timeout, _build(options))
        print(server.describe(), flush=True)
        while process := server.process():
            with suppress(psutil.TimeoutExpired):  # looks again, since of a zombie it would wait for ever
                process.wait(timeout=5)
    except KeyboardInterrupt:
        server.stop()
        return 0
    server.stop(drain_s=0)
    raise ServingError("the server ended by itself; its log in logs/torchserve.log says why")


if __name__ == "__main__":
    sys.exit(main())
