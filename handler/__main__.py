"""`python -m handler COMMAND`: the server's commands, for people and orchestrators."""

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from handler import MODEL_NAME
from handler.server import ENDING, Server, ServingError, java_home
from handler.stubs import build_stubs

_COMMANDS = {
    "archive": "build the archive that the server loads",
    "start": "start the server; returns when it answers predictions",
    "run": "start the server and stay until it ends or SIGTERM asks to stop it, as service managers like it",
    "stop": "let running requests finish, then stop the server",
    "status": "show versions, workers and queue",
    "live": "exit code 0 where the server answers at all",
    "ready": "exit code 0 where every worker answers predictions",
    "java": "print the Java that `start` runs",
    "stubs": "build the Python stubs of the gRPC API",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done or yes, 1 no, 2 an error that is told."""
    parser = argparse.ArgumentParser(
        prog="python -m handler",
        description="The TorchServe that serves the model.",
        epilog="commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    parser.add_argument(
        "--config", type=Path, default=Path("config.properties"), help="TorchServe's settings (default %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="start, run: wait at most this long (default 120)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="archive: the artifact (default: model_store/agegender.pt); start, run: build its archive first",
    )
    parser.add_argument("--output", type=Path, help="archive: the file to write (default: model_store/agegender.mar)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "archive":
            return _archive(options.model, options.output)
        if options.command == "java":
            print(java_home() / "bin" / "java")
            return 0
        if options.command == "stubs":
            print(f"{build_stubs()}: put it on PYTHONPATH")
            return 0
        return _serve(options)
    except (ServingError, OSError, ValueError) as error:
        print(f"handler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _archive(model: Path | None, target: Path | None) -> int:
    from agegender import AgeGenderError  # here, since torch is no small thing to load for a probe
    from agegender.spec import DEFAULT_MODEL
    from handler.archive import ARCHIVE, build_archive

    target = target or ARCHIVE
    try:
        version = build_archive(model or DEFAULT_MODEL, target)
    except (AgeGenderError, OSError) as error:
        raise ServingError(f"no archive can be built: {error}") from error
    print(f"{target}: model {MODEL_NAME}, version {version}, {target.stat().st_size / 1e6:.1f} MB")
    return 0


def _serve(options: argparse.Namespace) -> int:
    _heed_signals()
    server = Server(options.config)
    if options.command in ("run", "start") and options.model:
        server.check_stopped()  # or a restart would serve what this call has built
        _archive(options.model, options.output)
    if options.command == "run":
        return _run(server, options.timeout)
    if options.command == "start":
        server.start(options.timeout)
        print(f"{server.describe()}\nserving on {server.address('inference')}; the keys are in key_file.json")
    elif options.command == "stop":
        print("stopped" if server.stop() else "no server was running")
    elif options.command == "status":
        print(server.describe())
    else:
        answer = server.ready() if options.command == "ready" else server.live()
        print("yes" if answer else "no")
        return 0 if answer else 1
    return 0


def _heed_signals() -> None:
    """Those that end a process act as Ctrl-C does, so that no server is left half started or half stopped."""
    heeded = [each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup lets one be ignored

    def interrupt(*_: object) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)  # a second one would find the server half ended
        raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, interrupt)


def _run(server: Server, timeout_s: float) -> int:
    try:
        server.start(timeout_s)
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
