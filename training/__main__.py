"""`python -m training --data-dir FOLDER`: the command line of `train`."""

import signal
import sys

import tyro

from agegender import AgeGenderError
from training.loop import LAST, lacks_memory
from training.options import TrainOptions, refuse_repeated
from training.run import run


def main() -> int:
    """Returns the process's exit code."""
    options, earlier = None, None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt
    try:
        refuse_repeated(sys.argv[1:])
        options = tyro.cli(TrainOptions, prog="python -m training")
        earlier = _checkpoint_time_ns(options)
        run(options)
    except (AgeGenderError, ValueError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        again = f"free some, and {_same_command(options, earlier)}, or lower --size or --max-samples"
        print(f"training: no memory is left; {again}, with another --out-dir", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"training: stopped; {_same_command(options, earlier)}", file=sys.stderr)
        return 130
    return 0


def _checkpoint_time_ns(options: TrainOptions) -> int | None:
    """When the checkpoint that the same command would go on from was written; None where there is none."""
    try:
        return (options.out_dir / LAST).stat().st_mtime_ns
    except OSError:
        return None


def _same_command(options: TrainOptions | None, earlier: int | None) -> str:
    """What the same command does once more.

    Args:
        options: as far as they are known.
        earlier: see `_checkpoint_time_ns`; before this call.
    """
    if options is None or (latest := _checkpoint_time_ns(options)) is None:
        return "the same command begins again"
    if options.resume:
        return "the same command goes on from the last checkpoint"
    if latest == earlier:  # that of an earlier run was to be thrown away
        return "the same command begins again"
    return "the same command without --no-resume goes on from the last checkpoint"


if __name__ == "__main__":
    sys.exit(main())
