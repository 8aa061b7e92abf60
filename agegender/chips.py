"""image + face -> chip: one similarity transform onto a fixed template, antialiased."""

import math
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from agegender.detector import Face
from agegender.image import Pixels, check_rgb

__all__ = ["TEMPLATE", "cut_chip"]

# Mean YuNet landmarks of the 200 px aligned UTKFace chips as (x, y), as shares of the chip's side. The chip of a
# detected face thus shows what an aligned UTKFace chip shows: the face with its forehead and chin.
TEMPLATE: Final = (
    np.array([[58.5, 57.5], [136.7, 58.6], [95.1, 100.2], [63.6, 136.0], [128.9, 137.0]], np.float64) / 200
)

# Smallest accepted scale, chip pixels per image pixel. Below it, a face would be larger than any image.
_LEAST_SCALE: Final = 1e-6


def cut_chip(pixels: Pixels, face: Face | None, size_px: int, *, margin: float = 0.0) -> Pixels:
    """Cuts the square chip that the network sees.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        face: a face in pixels of that image, or None to take the whole image as the chip.
        size_px: side S of the chip, at least 1.
        margin: how far a face's chip reaches beyond the template on each side, as a share of the template's side.

    Returns:
        (S, S, 3) uint8 RGB; zeros where the chip reaches outside the image.

    Raises:
        ValueError: the pixels are of another shape or type, or there are none; the chip has no size; or the landmarks
            are all in one point, too far apart, or not finite.
    """
    check_rgb(pixels)
    if size_px < 1:
        raise ValueError(f"size_px must be at least 1, not {size_px}")
    if face is None:
        matrix = _whole_image(pixels, size_px)
    else:
        matrix = _similarity(face.landmarks, (TEMPLATE + margin) / (1 + 2 * margin) * size_px)
    return _warp(pixels, matrix, size_px)


def _whole_image(pixels: Pixels, size_px: int) -> npt.NDArray[np.float64]:
    """Fits the longer side to the chip and centres the shorter one, so that nothing is stretched."""
    height, width = pixels.shape[:2]
    scale = size_px / max(height, width)
    return np.array([[scale, 0, (size_px - width * scale) / 2], [0, scale, (size_px - height * scale) / 2]])


def _similarity(source: npt.NDArray[np.float32], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least-squares rotation, uniform scale and shift (Umeyama, TPAMI 1991; in the plane, as complex numbers).

    Landmarks are taken as continuous coordinates: the centre of the first pixel is (0.5, 0.5).

    Raises:
        ValueError: see `cut_chip`.
    """
    source_z = source[:, 0].astype(np.float64) + 1j * source[:, 1].astype(np.float64)
    target_z = target[:, 0] + 1j * target[:, 1]
    centred = source_z - source_z.mean()
    spread = float(np.sum(np.abs(centred) ** 2))
    factor = complex(np.sum((target_z - target_z.mean()) * centred.conj())) / spread if spread else 0j
    if not abs(factor) >= _LEAST_SCALE:  # written so that NaN is refused too
        raise ValueError("the landmarks cannot be used: all in one point, too far apart, or not finite")
    shift = complex(target_z.mean() - factor * source_z.mean())
    return np.array([[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]])


def _warp(pixels: Pixels, matrix: npt.NDArray[np.float64], size_px: int) -> Pixels:
    """Applies a 2x3 similarity without aliasing.

    A strong reduction first averages whole blocks of source pixels, down to between one and two of them per chip
    pixel; what is left is sampled bilinearly at twice the chip's size and averaged two by two.
    """
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    block = max(1, math.ceil(1 / (2 * scale)))
    part, matrix = _reduce(pixels, matrix, size_px, block)
    finer = 2 if scale * block < 0.99 else 1  # the rounding of landmarks must not blur a face of the chip's own size
    side = size_px * finer
    chip = cv2.warpAffine(
        part, _pixel_centres(matrix * finer), (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )
    if finer > 1:
        chip = cv2.resize(chip, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return chip.astype(np.uint8, copy=False)


def _reduce(
    pixels: Pixels, matrix: npt.NDArray[np.float64], size_px: int, block: int
) -> tuple[Pixels, npt.NDArray[np.float64]]:
    """Averages blocks of block x block pixels in the part of the image that the chip covers.

    OpenCV warps no image of 32,767 pixels or more on a side, but the part is small whatever the image is.
    """
    height, width = pixels.shape[:2]
    corners = np.array([[0, 0], [size_px, 0], [0, size_px], [size_px, size_px]], np.float64)
    seen = (corners - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
    left, top = np.clip(np.floor(seen.min(axis=0)) - block, 0, (width - 1, height - 1)).astype(int)
    right, bottom = np.clip(np.ceil(seen.max(axis=0)) + block, (left + 1, top + 1), (width, height)).astype(int)
    columns, rows = max(1, (right - left) // block), max(1, (bottom - top) // block)
    part = pixels[top : top + min(rows * block, bottom - top), left : left + min(columns * block, right - left)]
    reduced = cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA)
    step = np.array([part.shape[1] / columns, part.shape[0] / rows])
    linear = matrix[:, :2] * step
    shift = matrix[:, :2] @ np.array([left, top], np.float64) + matrix[:, 2]
    return reduced.astype(np.uint8, copy=False), np.column_stack([linear, shift])


def _pixel_centres(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From continuous coordinates to OpenCV's, in which the centre of the first pixel is (0, 0)."""
    shift = matrix[:, :2] @ np.array([0.5, 0.5]) + matrix[:, 2] - 0.5
    return np.column_stack([matrix[:, :2], shift])
