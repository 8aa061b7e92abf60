"""Two networks that began differently as the two branches of one backbone, with one head for each task.

Networks that start from ImageNet and from face recognition err differently, so that the mean of their logits is
better than either (Lakshminarayanan et al. 2017). A linear head over both branches' features has that mean as a
special case, from which it can be trained on.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.face_resnet import FACE_MEAN, FACE_STD, FaceResNet

__all__ = ["TwinBackbone", "join"]

_LITE_SIZE: Final = 128  # pixels; more costs speed, and less exactness


class TwinBackbone(nn.Module):
    """Chips, normalized for EfficientNet-Lite0, -> its features beside those of face_resnet, (N, 1280 + 256)."""

    gain: Tensor
    shift: Tensor

    def __init__(self, lite: nn.Module, face: FaceResNet, *, mean: list[float], std: list[float]) -> None:
        """Args: mean, std: what the chips are normalized with."""
        super().__init__()
        self.lite, self.face = lite, face
        self.lite_size: int = _LITE_SIZE
        self.head_hidden_size = int(lite.head_hidden_size) + face.head_hidden_size  # type: ignore[arg-type]  # timm's
        own_mean, own_std, to_mean, to_std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std, FACE_MEAN, FACE_STD)
        )
        self.register_buffer("gain", own_std / to_std, persistent=False)
        self.register_buffer("shift", (own_mean - to_mean) / to_std, persistent=False)

    def forward(self, chips: Tensor) -> Tensor:
        """Returns the features of both branches, EfficientNet-Lite0's first."""
        size = [self.lite_size, self.lite_size]
        small = F.interpolate(chips, size=size, mode="bilinear", align_corners=False, antialias=True)
        return torch.cat((self.lite(small), self.face((chips * self.gain).add_(self.shift))), dim=1)


def join(lite: dict[str, Any], face: dict[str, Any]) -> dict[str, Any]:
    """State of a network with a `TwinBackbone` whose logits are the mean of two networks'.

    Args:
        lite: state of a trained network with EfficientNet-Lite0.
        face: state of a trained network with face_resnet.
    """
    state = {name: value for name, value in lite.items() if name in ("mean", "std")}
    for branch, part in (("lite", lite), ("face", face)):
        for name, value in part.items():
            if name.startswith("backbone."):
                state[f"backbone.{branch}.{name.removeprefix('backbone.')}"] = value
    for head in ("age_head", "gender_head"):
        state[f"{head}.weight"] = torch.cat((lite[f"{head}.weight"], face[f"{head}.weight"]), dim=1) / 2
        state[f"{head}.bias"] = (lite[f"{head}.bias"] + face[f"{head}.bias"]) / 2
    return state
