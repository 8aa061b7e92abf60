"""Trained network -> the network that is exported: its convolutions in 8 bits, if asked."""

import copy
import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import (
    HistogramObserver,
    QConfig,
    QConfigMapping,
    default_per_channel_weight_observer,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torch.nn import functional as F

from training.branch import Branch
from training.network import Logits, Network
from training.options import Precision
from training.plain import make_plain

__all__ = ["Deployed", "check_precision"]

_BATCH: Final = 64


class Deployed(nn.Module):
    """(N, 3, S, S) uint8 RGB chips -> logits, as the artifact computes them."""

    def __init__(self, network: Network, sample: Tensor, *, precision: Precision, mirror: bool) -> None:
        """Converts a copy of the network.

        Args:
            network: trained.
            sample: (N, 3, S, S) uint8 RGB chips, from which the ranges of 8-bit activations are estimated.
            precision: see `TrainOptions`.
            mirror: average each chip with its mirror image.
        """
        super().__init__()
        network = copy.deepcopy(network).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.mirror = mirror
        if precision == "int8":
            network = _with_eight_bits(network, sample)
        self.network = network

    def forward(self, chips: Tensor) -> Logits:
        """Returns float32 logits."""
        if not self.mirror:
            return self.logits(chips)
        age, gender = self.logits(torch.cat((chips, chips.flip(3))))
        count = chips.shape[0]
        return Logits((age[:count] + age[count:]) / 2, (gender[:count] + gender[count:]) / 2)

    def logits(self, chips: Tensor) -> Logits:
        """What the network says of the chips as they are."""
        age, gender = self.network(chips)
        return Logits(age.float(), gender.float())


class _EightBit(nn.Module):
    """A backbone that computes in 8 bits on CPUs; on GPUs, where torch cannot, it only keeps its kernels in them."""

    def __init__(self, on_cpu: nn.Module, on_cuda: nn.Module) -> None:
        super().__init__()
        self.on_cpu, self.on_cuda = on_cpu, on_cuda

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self.on_cuda(x)
        return self.on_cpu(x)


class _EightBitConv2d(nn.Module):
    """A convolution whose kernels are kept in 8 bits, with a scale for each output channel."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        kernels, bias = convolution.weight.detach(), convolution.bias
        scale = kernels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (kernels / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.zeros(len(kernels)) if bias is None else bias.detach())
        self.stride, self.groups = list(convolution.stride), convolution.groups
        self.padding = [int(side) for side in convolution.padding]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding, groups=self.groups)


def check_precision(network: Network, precision: Precision) -> None:
    """Finds out before a training whether its network can be exported.

    Raises:
        ValueError: torch cannot trace the backbone, which it must to quantize it.
    """
    if precision == "int8":
        try:
            for branch in _branches(copy.deepcopy(network)):
                make_plain(branch.backbone)
                fx.symbolic_trace(branch.backbone)
        except Exception as error:  # whatever the backbone's code raises when it is given symbols
            raise ValueError(
                "this backbone cannot be quantized to 8 bits; add --precision float32, or take face_resnet"
            ) from error


def _with_eight_bits(network: Network, sample: Tensor) -> Network:
    """Static post-training quantization (Jacob et al. 2018), with ranges from a sample; changes the network.

    Sums of 8-bit products are exact, so what comes out does not depend on the batch that a chip came in.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch announces a successor of this module, which writes no TorchScript
        branches = _branches(network)
        plain = [branch.backbone for branch in branches]
        for branch in branches:
            branch.upside_down = make_plain(branch.backbone)
            example = (branch.normalize(sample[:1]),)
            branch.backbone = prepare_fx(copy.deepcopy(branch.backbone), _mapping(branch.in_float), example)
        for batch in sample.split(_BATCH):
            network(batch)
        for branch, backbone in zip(branches, plain, strict=True):
            assert isinstance(branch.backbone, fx.GraphModule)
            branch.backbone = _EightBit(convert_fx(branch.backbone), _with_eight_bit_kernels(fuse_fx(backbone)))
    return network


def _branches(network: Network) -> list[Branch]:
    return [branch for branch in network.branches if isinstance(branch, Branch)]  # which nn.ModuleList does not know


def _mapping(in_float: Sequence[str]) -> QConfigMapping:
    """torch's own mapping, with 8 bits for activations and 7 for kernels instead of the reverse.

    CPUs without VNNI add pairs of products in 16 bits, which hold only 15 bits of both factors together. Activations
    share one scale in a tensor, kernels have one for each channel, so the latter can spare the bit.
    """
    mapping = get_default_qconfig_mapping("x86")
    activation = HistogramObserver.with_args(reduce_range=False)
    kernel = default_per_channel_weight_observer.with_args(quant_min=-64, quant_max=63)
    mapping.set_global(QConfig(activation=activation, weight=kernel))
    for name in in_float:
        mapping.set_module_name(name, None)
    return mapping


def _with_eight_bit_kernels(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _EightBitConv2d(child))
        else:
            _with_eight_bit_kernels(child)
    return module
