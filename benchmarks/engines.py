"""How much faster 8-bit arithmetic is with the engine that we choose for torch: `python -m benchmarks.engines`.

Loads each artifact with that engine, as `agegender.Model` does, and with the one that torch takes by itself, and lets
the two take turns on one core.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Final
from unittest import mock

import numpy as np
import torch

from agegender import Model
from agegender.image import Pixels
from agegender.predictor import DEFAULT_BATCH_SIZE
from agegender.process import keep_freed_memory
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import errors_without_traceback, make_parser

__all__ = ["main"]

_WARM_UP: Final = 5
_ROUNDS: Final = 60


@errors_without_traceback("engines")
def main() -> int:
    """Prints chips/s of both, and ours over torch's own."""
    parser = make_parser("engines", __doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[DEFAULT_MODEL], metavar="MODEL", help="artifacts")
    models = parser.parse_args().models
    keep_freed_memory()
    torch.set_num_threads(1)
    print(f"processor: {torch.backends.cpu.get_cpu_capability()}")
    for path in models:
        ours, default = _rates(path)
        print(f"{path}: {ours:.0f} chips/s, torch's own choice {default:.0f}, ratio {ours / default:.2f}")
    return 0


def _rates(path: Path) -> tuple[float, float]:
    ours = Model(path, device="cpu")
    with mock.patch("agegender.model._fastest_engine", nullcontext):
        default = Model(path, device="cpu")
    side = ours.spec.chip_size_px
    chips = np.random.default_rng(0).integers(0, 256, (DEFAULT_BATCH_SIZE, side, side, 3), np.uint8)
    seconds = [(_seconds(ours, chips), _seconds(default, chips)) for _ in range(_WARM_UP + _ROUNDS)][_WARM_UP:]
    first, second = (median(column) for column in zip(*seconds, strict=True))
    return DEFAULT_BATCH_SIZE / first, DEFAULT_BATCH_SIZE / second


def _seconds(model: Model, chips: Pixels) -> float:
    started = time.perf_counter()
    model.predict(chips)
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
