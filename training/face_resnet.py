"""The 29-layer residual network that dlib recognizes faces with, as a backbone, and its published weights.

Architecture and weights: King, dlib 19.3, `dnn_face_recognition_ex.cpp`; trained to tell three million photographs of
7,485 people apart, in the public domain (CC0). Features of faces start closer to age and gender than ImageNet's do.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from training.normalization import normalized_convolutions

__all__ = ["FACE_MEAN", "FACE_STD", "FaceResNet", "load_packaged_weights"]

# What the packaged weights were trained with, in grey levels of red, green and blue.
FACE_MEAN: Final = [122.782, 117.001, 104.298]
FACE_STD: Final = [256.0] * 3

_STAGES: Final = ((32, 1, 1, 1), (64, 2, 1, 1, 1), (128, 2, 1, 1), (256, 2, 1, 1, 2))  # width, stride of each block


class FaceResNet(nn.Module):
    """(N, 3, S, S) float32 chips -> (N, 256) features, like a timm backbone without classifier."""

    head_hidden_size: Final = 256

    def __init__(self, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
        )
        shapes = [(width, stride) for width, *strides in _STAGES for stride in strides]
        inputs = [32, *(width for width, _ in shapes)]
        rates = torch.linspace(0, drop_path, len(shapes)).tolist()
        self.blocks = nn.Sequential(
            *(_Block(before, *shape, rate) for before, shape, rate in zip(inputs[:-1], shapes, rates, strict=True))
        )

        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, chips: Tensor) -> Tensor:
        """Returns the features, averaged over the chip."""
        return self.pool(self.blocks(self.stem(chips))).flatten(1)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which halves by averaging."""

    def __init__(self, before: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        # dlib pads no strided convolution; a row and a column of zeros at the far edges keep both ways of one size.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=int(stride == 1), bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.drop_path = DropPath(drop_path)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.AvgPool2d(stride))
        if width > before:
            self.shortcut.append(_widening(before, width))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(self.pad(x))))))
        return F.relu(self.shortcut(x) + self.drop_path(residual))


def _widening(before: int, width: int) -> nn.Conv2d:
    """Appends empty channels, as dlib does; as a convolution it can be trained, and quantized."""
    convolution = nn.Conv2d(before, width, 1, bias=False)
    nn.init.dirac_(convolution.weight)
    return convolution


def load_packaged_weights(backbone: FaceResNet) -> None:
    """Copies the weights that the package face_recognition_models carries.

    dlib's file holds each convolution and each normalization as one run of float32 behind a header, from the input on:
    kernels and biases, then scales and shifts. Its normalization is already folded into a scale and a shift.

    Raises:
        ValueError: the package is missing, or its file holds other weights.
    """
    try:
        package = distribution("face_recognition_models")
    except PackageNotFoundError as error:
        raise ValueError("face_resnet needs the package face_recognition_models; run `make setup`") from error
    path = Path(str(package.locate_file("face_recognition_models/models/dlib_face_recognition_resnet_model_v1.dat")))
    data, position = path.read_bytes(), 0
    for convolution, norm in normalized_convolutions(backbone):
        width = convolution.out_channels
        kernels, position = _next_run(data, position, convolution.weight.numel() + width)
        scales, position = _next_run(data, position, 2 * width)
        with torch.no_grad():
            convolution.weight.copy_(kernels[:-width].view_as(convolution.weight))
            norm.weight.copy_(scales[:width])
            norm.bias.copy_(scales[width:])
        norm.running_mean = -kernels[-width:]
        norm.running_var = torch.full((width,), 1 - norm.eps)


def _next_run(data: bytes, start: int, count: int) -> tuple[Tensor, int]:
    """The next tensor of `count` values, and where it ends; a header is a version (2) and four sizes."""
    size = count.to_bytes((count.bit_length() + 7) // 8, "little")
    header = b"\x01\x02" + bytes([len(size)]) + size + b"\x01\x01" * 3
    begin = data.find(header, start) + len(header)
    if begin < len(header):
        raise ValueError("the package face_recognition_models does not hold the weights of face_resnet")
    end = begin + 4 * count
    return torch.from_numpy(np.frombuffer(data[begin:end], "<f4").copy()), end
