"""Pictures made worse, through the whole chain: how the figures change with blur, noise, compression and the like."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import cv2
import numpy as np
from PIL import Image

from agegender import Item, Model, Predictor, decode_image
from agegender.image import Pixels
from training.data import Sample

__all__ = ["CORRUPTIONS", "Curve", "robustness"]

Corruption = Callable[[Pixels, float], Pixels]

# Level -> (age MAE in years, gender accuracy from 0 to 1, share of pictures in which a face was found).
Curve = dict[float, tuple[float, float, float]]


def _blur(pixels: Pixels, sigma_px: float) -> Pixels:
    return _uint8(cv2.GaussianBlur(pixels, (0, 0), sigma_px))


def _noise(pixels: Pixels, sigma: float) -> Pixels:
    return _uint8(pixels + np.random.default_rng(0).normal(0, sigma, pixels.shape))


def _jpeg(pixels: Pixels, quality: float) -> Pixels:
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, int(quality)))
    return decode_image(data.tobytes())


def _darken(pixels: Pixels, gain: float) -> Pixels:
    return _uint8(pixels * gain)


def _rotate(pixels: Pixels, degrees: float) -> Pixels:
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BICUBIC, expand=True))


def _shrink(pixels: Pixels, side_px: float) -> Pixels:
    scale = side_px / max(pixels.shape[:2])
    return _uint8(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))


def _uint8(values: np.ndarray) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# Name with the unit of its levels -> what it does and how strongly, from mild to severe.
CORRUPTIONS: Final[Mapping[str, tuple[Corruption, Sequence[float]]]] = {
    "blur, sigma in px": (_blur, (1, 2, 4, 6)),
    "noise, sigma of 255": (_noise, (10, 20, 40, 60)),
    "JPEG quality": (_jpeg, (50, 25, 10, 5)),
    "darkness, gain": (_darken, (0.5, 0.25, 0.12, 0.06)),
    "rotation, degrees": (_rotate, (15, 30, 60, 90)),
    "picture's side, px": (_shrink, (100, 64, 48, 32)),
}


def robustness(model: Model, samples: Sequence[Sample]) -> dict[str, Curve]:
    """Runs each corruption at each level over the pictures.

    Age MAE and gender accuracy are taken over those pictures in which a face was still found.

    Returns:
        Corruption -> its curve; without a face, age MAE and gender accuracy are nan.
    """
    predictor = Predictor(model, max_faces=1)
    return {
        name: {level: _score(predictor, samples, corrupt, level) for level in levels}
        for name, (corrupt, levels) in CORRUPTIONS.items()
    }


def _score(
    predictor: Predictor, samples: Sequence[Sample], corrupt: Corruption, level: float
) -> tuple[float, float, float]:
    results = list(predictor.stream(_items(samples, corrupt, level)))
    found = [(result.faces[0], each.labels) for result, each in zip(results, samples, strict=True) if result.faces]
    if not found:
        return float("nan"), float("nan"), 0.0
    error = float(np.mean([abs(face.age - labels.age_years) for face, labels in found]))
    names = predictor.model.spec.labels
    right = float(np.mean([face.gender == names[labels.gender] for face, labels in found]))
    return error, right, len(found) / len(samples)


def _items(samples: Sequence[Sample], corrupt: Corruption, level: float) -> Iterator[Item]:
    for sample in samples:
        pixels = corrupt(decode_image(sample.path.read_bytes()), level)
        _, data = cv2.imencode(".bmp", pixels[..., ::-1])  # without loss, and fast
        yield Item(data.tobytes(), str(sample.path))
