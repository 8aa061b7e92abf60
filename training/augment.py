"""Chip -> augmented chip: warp, blur, light, colour, grain, compression and a hole, all drawn from one generator."""

import math
from typing import Final

import cv2
import numpy as np

from agegender.image import Pixels

__all__ = ["augment"]

# Common practice, so mild that faces stay as they look in use; docs/decisions/training.md compares no other values.
_ROTATION_DEG: Final = 8.0  # either way
_ZOOM: Final = (0.84, 1.04)  # share of the chip's side that is shown
_SHIFT: Final = 0.04  # share of the chip's side, either way
_LIGHT: Final = 0.3  # how far gains of brightness and contrast lie from 1, either way
_GREY_SHARE: Final = 0.1
_BLUR_SHARE: Final = 0.15
_NOISE_SHARE: Final = 0.2
_NOISE_SIGMA: Final = (2.0, 20.0)  # in grey levels, on a logarithmic scale
_JPEG_SHARE: Final = 0.1
_JPEG_QUALITY: Final = (10, 60)
_ERASE_SHARE: Final = 0.25


def augment(chip: Pixels, size_px: int, rng: np.random.Generator) -> Pixels:
    """Draws one variation of a chip.

    One cv2 warp per chip costs a tenth of what the same steps cost as torchvision transforms, which matters where the
    network itself runs on the same cores.

    Args:
        chip: (H, H, 3) uint8 RGB.
        size_px: side S of the result.
        rng: source of all randomness.

    Returns:
        (S, S, 3) uint8 RGB.
    """
    warped = _warp(chip, size_px, rng)
    if rng.random() < _BLUR_SHARE:
        warped = _coarsen(warped, rng)
    coloured = _colour(warped, rng)
    if rng.random() < _NOISE_SHARE:
        coloured = _noise(coloured, rng)
    if rng.random() < _JPEG_SHARE:
        coloured = _recompress(coloured, rng)
    if rng.random() < _ERASE_SHARE:
        _erase(coloured, rng)
    return coloured


def _warp(chip: Pixels, size_px: int, rng: np.random.Generator) -> Pixels:
    """Rotation, zoom, shift and mirror image about the chip's centre."""
    angle = math.radians(rng.uniform(-_ROTATION_DEG, _ROTATION_DEG))
    scale = size_px / (chip.shape[0] * rng.uniform(*_ZOOM))
    mirror = -1 if rng.random() < 0.5 else 1
    linear = scale * np.array(
        [[mirror * math.cos(angle), -mirror * math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    centre = (chip.shape[0] - 1) / 2 + rng.uniform(-_SHIFT, _SHIFT, 2) * chip.shape[0]
    shift = (size_px - 1) / 2 - linear @ centre
    matrix = np.column_stack([linear, shift])
    return cv2.warpAffine(chip, matrix, (size_px, size_px), flags=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def _coarsen(chip: Pixels, rng: np.random.Generator) -> Pixels:
    """What a face of fewer pixels looks like."""
    side = chip.shape[0]
    small = max(16, round(side * rng.uniform(0.25, 0.8)))
    shrunk = cv2.resize(chip, (small, small), interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (side, side), interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def _colour(chip: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast and a gain per channel as one table per channel; sometimes grey."""
    if rng.random() < _GREY_SHARE:
        chip = cv2.cvtColor(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.uint8, copy=False)
    levels = np.arange(256, dtype=np.float32)[:, None]
    brightness, contrast = rng.uniform(1 - _LIGHT, 1 + _LIGHT, 2)
    gains = brightness * rng.uniform(0.92, 1.08, 3)
    mean = float(chip.mean())
    table = np.clip(((levels - mean) * contrast + mean) * gains, 0, 255).astype(np.uint8)
    return cv2.LUT(chip, table[None]).astype(np.uint8, copy=False)


def _noise(chip: Pixels, rng: np.random.Generator) -> Pixels:
    """Grain of film or sensor: Gaussian, as often grey as coloured."""
    sigma = math.exp(rng.uniform(*np.log(_NOISE_SIGMA)))
    grain = rng.standard_normal((*chip.shape[:2], int(rng.choice((1, 3)))), np.float32)
    return np.clip(np.rint(chip + sigma * grain), 0, 255).astype(np.uint8)


def _recompress(chip: Pixels, rng: np.random.Generator) -> Pixels:
    """The blocks of a strongly compressed JPEG."""
    quality = int(rng.integers(*_JPEG_QUALITY))
    _, coded = cv2.imencode(".jpg", chip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)


def _erase(chip: Pixels, rng: np.random.Generator) -> None:
    """Random erasing (Zhong et al. 2020) with the chip's mean colour."""
    side = chip.shape[0]
    height, width = (rng.uniform(0.15, 0.45, 2) * side).astype(int)
    top, left = int(rng.integers(0, side - height)), int(rng.integers(0, side - width))
    chip[top : top + height, left : left + width] = chip.mean(axis=(0, 1))
