"""`python -m training --data-dir FOLDER`: the command line of `train`."""

import signal
import sys

import tyro

from agegender import AgeGenderError
from training.options import TrainOptions, refuse_repeated
from training.run import run


def main() -> int:
    """Returns the process's exit code."""
    command = "the same command"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt
    try:
        refuse_repeated(sys.argv[1:])
        options = tyro.cli(TrainOptions, prog="python -m training")
        if not options.resume:
            command += " without --no-resume"
        run(options)
    except (AgeGenderError, ValueError, OSError) as error:
        print(f"training: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"training: stopped; {command} goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
