"""How much faster the face detector is with ONNX Runtime than with OpenCV: `python -m benchmarks.detectors`.

Both look for faces in the same images in turn, on one core; only the library that runs the network, YuNet, differs.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch

from agegender import Face, FaceDetector
from agegender.detector import DECODE_SIDE_PX, DEFAULT_MIN_SCORE, detector_weights
from agegender.image import Pixels, read_header
from benchmarks.command_line import errors_without_traceback, make_parser
from benchmarks.images import add_image_options, make_images

__all__ = ["main"]

_WORKLOADS: Final = ("chips", "1 MP", "12 MP")
_IMAGES: Final = 100
_ROUNDS: Final = 3


class _OpenCV(FaceDetector):
    """Our detector, whose network OpenCV runs."""

    def __init__(self) -> None:
        super().__init__()
        weights, no_config = np.frombuffer(detector_weights(), np.uint8), np.empty(0, np.uint8)
        self._yunet = cv2.FaceDetectorYN.create("onnx", weights, no_config, (320, 320), DEFAULT_MIN_SCORE)

    def _look(self, seen: npt.NDArray[np.uint8], width: int, height: int) -> Any:
        bgr = np.ascontiguousarray(seen[::-1].transpose(1, 2, 0))
        self._yunet.setInputSize((bgr.shape[1], bgr.shape[0]))
        _, found = self._yunet.detect(bgr)
        rows: Any = np.empty((0, 15), np.float32) if found is None else np.array(found)
        rows[:, 2:4] += rows[:, 0:2]
        rows[:, 0:14:2] *= width / bgr.shape[1]
        rows[:, 1:14:2] *= height / bgr.shape[0]
        return rows


@errors_without_traceback("detectors")
def main() -> int:
    """Prints ms per image of both, OpenCV's over ours, and by how much the faces differ."""
    parser = make_parser("detectors", __doc__)
    add_image_options(parser)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for workload in _WORKLOADS:
            images = make_images(workload, args.data_dir, args.photos_dir, Path(folder))
            paths = images.paths[:: max(1, len(images.paths) // _IMAGES)]
            decoded = [read_header(path.read_bytes()).decode(min_side_px=DECODE_SIDE_PX) for path in paths]
            print(f"{workload}, {len(decoded)} images: {_compared(decoded)}")
    return 0


def _compared(images: Sequence[Pixels]) -> str:
    ours, opencv = FaceDetector(), _OpenCV()
    times: list[tuple[float, float]] = []
    differences: list[float] = []
    other = 0
    for _ in range(_ROUNDS):
        for pixels in images:
            (first, found), (second, theirs) = _timed(ours, pixels), _timed(opencv, pixels)
            times.append((first, second))
            if len(found) == len(theirs):
                differences += map(_difference, found, theirs)
            else:
                other += 1
    mine, its = (1000 * sum(column) / len(times) for column in zip(*times, strict=True))
    ratio = median(second / first for first, second in times)
    return (
        f"{mine:.1f} ms an image, OpenCV {its:.1f}, ratio {ratio:.2f}; "
        f"the landmarks of {len(differences) // _ROUNDS} faces differ by up to {max(differences, default=0.0):.4f} px; "
        f"{other // _ROUNDS} images with another number of faces"
    )


def _timed(detector: FaceDetector, pixels: Pixels) -> tuple[float, list[Face]]:
    started = time.perf_counter()
    faces = detector.detect(pixels)
    return time.perf_counter() - started, faces


def _difference(one: Face, other: Face) -> float:
    return float(np.abs(one.landmarks - other.landmarks).max())


if __name__ == "__main__":
    raise SystemExit(main())
