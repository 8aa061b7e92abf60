"""How much faster 8-bit arithmetic is with the engine that we choose for torch: `python -m benchmarks.engines`.

Loads each artifact with that engine, as `agegender.Model` does, and with the one that torch takes by itself, and lets
the two take turns on one core. The chips are whole images.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Final
from unittest import mock

import numpy as np
import torch

from agegender import Model, cut_chip, decode_image
from agegender.image import Pixels
from agegender.predictor import DEFAULT_BATCH_SIZE
from agegender.process import keep_freed_memory
from agegender.spec import DEFAULT_MODEL
from benchmarks.command_line import errors_without_traceback, make_parser
from benchmarks.images import add_data_option, make_images

__all__ = ["main"]

_WARM_UP: Final = 5
_BATCHES: Final = 100


@errors_without_traceback("engines")
def main() -> int:
    """Prints chips/s of both, and ours over torch's own."""
    parser = make_parser("engines", __doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[DEFAULT_MODEL], metavar="MODEL", help="artifacts")
    add_data_option(parser)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    print(f"processor: {torch.backends.cpu.get_cpu_capability()}")
    with TemporaryDirectory() as folder:
        images = make_images("whole", options.data_dir, None, Path(folder))
        count = min(_BATCHES, len(images.paths) // DEFAULT_BATCH_SIZE) * DEFAULT_BATCH_SIZE  # whole batches
        faces = [decode_image(path.read_bytes()) for path in images.paths[:count]]
    print(f"chips: {len(faces)} of {images.description}")
    for path in options.models:
        ours, default = _rates(path, faces)
        print(f"{path}: {ours:.0f} chips/s, torch's own choice {default:.0f}, ratio {ours / default:.2f}")
    return 0


def _rates(path: Path, faces: Sequence[Pixels]) -> tuple[float, float]:
    ours = Model(path, device="cpu")
    with mock.patch("agegender.model._fastest_engine", nullcontext):
        default = Model(path, device="cpu")
    spec = ours.spec
    chips = [cut_chip(face, None, spec.chip_size_px, margin=spec.chip_margin) for face in faces]
    batches = cycle([np.stack(chips[at : at + DEFAULT_BATCH_SIZE]) for at in range(0, len(chips), DEFAULT_BATCH_SIZE)])
    for batch in islice(batches, _WARM_UP):
        _seconds(ours, batch)
        _seconds(default, batch)
    seconds = [(_seconds(ours, batch), _seconds(default, batch)) for batch in islice(batches, _BATCHES)]
    first, second = (mean(column) for column in zip(*seconds, strict=True))
    return DEFAULT_BATCH_SIZE / first, DEFAULT_BATCH_SIZE / second


def _seconds(model: Model, chips: Pixels) -> float:
    started = time.perf_counter()
    model.predict(chips)
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
