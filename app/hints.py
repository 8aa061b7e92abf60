"""What speaks against trusting a prediction: too few pixels, blur, a gender that is nearly even."""

from typing import Final

import cv2
import numpy as np
from PIL import Image

from agegender import FacePrediction

__all__ = ["SHARP", "SMALL_PX", "hints_of", "is_undecided", "sharpness"]

# The age error of the shipped model begins to grow where faces are narrower (docs/MODEL_CARD.md, robustness).
SMALL_PX: Final = 32

# Of 250 UTKFace pictures, none was below as it is, 13% were when blurred with a sigma of 2 px and 97% with one of 4 px,
# from which on the age error grows.
SHARP: Final = 12.0

_SEEN_PX: Final = 128


def sharpness(face: Image.Image) -> float:
    """Variance of the Laplacian of a face at one fixed size (Pech-Pacheco et al., ICPR 2000); it falls with blur."""
    grey = face.convert("L").resize((_SEEN_PX, _SEEN_PX), Image.Resampling.BILINEAR)
    return float(cv2.Laplacian(np.asarray(grey), cv2.CV_32F).var())


def is_undecided(face: FacePrediction, least_probability: float) -> bool:
    """Whether the gender's probability is below what the viewer asks for, in the per cent that both are shown in."""
    return round(100 * face.gender_probability) < round(100 * least_probability)


def hints_of(face: FacePrediction, sharpness: float) -> list[str]:
    """Sentences on a face's picture; none where it is large and sharp enough."""
    x1, y1, x2, y2 = face.box
    hints = []
    if (side := min(x2 - x1, y2 - y1)) < SMALL_PX:
        hints.append(f"Small: {side:.0f} px wide. Below {SMALL_PX} px, errors grow.")
    if sharpness < SHARP:
        hints.append("Blurred: errors grow.")
    return hints
