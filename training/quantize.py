"""Backbones in 8 bits: rounded as they are trained (Jacob et al. 2018), then converted to integer arithmetic."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.ao.nn.intrinsic.quantized import ConvReLU2d as QuantizedConvReLU2d
from torch.ao.nn.qat import Conv2d
from torch.ao.nn.quantized import Conv2d as QuantizedConv2d
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    disable_fake_quant,
    enable_fake_quant,
    get_default_qat_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_qat_fx
from torch.nn import functional as F

from training.branch import Branch
from training.network import Network
from training.plain import make_plain

__all__ = ["convert", "is_rounded", "round_to_eight_bits"]

_BATCH: Final = 64
_ACTIVATION: Final = {"observer": HistogramObserver, "quant_min": 0, "quant_max": 255, "reduce_range": False}


def is_rounded(state: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a network that went through `round_to_eight_bits`."""
    return any(name.endswith(".fake_quant_enabled") for name in state)


@torch.no_grad()
def round_to_eight_bits(network: Network, sample: Tensor) -> None:
    """Lets the backbones round kernels and activations as `convert` will; they can be trained so.

    Normalizations are folded into the kernels. The ranges of activations stay those of the sample, those of kernels
    follow them.

    Args:
        network: with trained or pretrained weights; changed in place, and left in evaluation mode.
        sample: (N, 3, S, S) uint8 RGB chips, from which the ranges of activations are estimated.
    """
    network.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces a successor of this module, which writes no TorchScript
        for branch in _branches(network):
            branch.upside_down = make_plain(branch.backbone)
            branch.backbone = _with_roundings(branch.backbone, branch.normalize(sample[:1]))
    network.eval().apply(disable_fake_quant)
    for batch in sample.split(_BATCH):
        network(batch)
    network.apply(enable_fake_quant)
    for rounding in _activation_roundings(network):
        rounding.disable_observer()  # type: ignore[no-untyped-call]
    network.requires_grad_(True)


def convert(network: Network) -> None:
    """Turns roundings into integer arithmetic on CPUs; changes the network, which must be `is_rounded`.

    Sums of 8-bit products are exact, so what comes out does not depend on the batch that a chip came in.
    """
    network.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for branch in _branches(network):
            assert isinstance(branch.backbone, fx.GraphModule)
            on_cuda = copy.deepcopy(branch.backbone)
            on_cpu = convert_fx(branch.backbone)
            _share_kernels(on_cpu, on_cuda)
            branch.backbone = _EightBit(on_cpu, on_cuda)


class _EightBit(nn.Module):
    """A backbone that computes in 8 bits on CPUs; on GPUs, where torch cannot, in float32 with the same roundings."""

    here: Tensor

    def __init__(self, on_cpu: nn.Module, on_cuda: nn.Module) -> None:
        super().__init__()
        self.on_cpu, self.on_cuda = on_cpu, on_cuda
        self.register_buffer("here", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.here.is_cuda:  # a constant once the artifact is frozen, so that half of it is never made ready
            return self.on_cuda(x)
        return self.on_cpu(x)


class _Rounding(nn.Module):
    """Activations -> the nearest of the 256 values that 8 bits stand for."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, trained: FakeQuantize) -> None:
        super().__init__()
        self.register_buffer("scale", trained.scale)
        self.register_buffer("zero_point", trained.zero_point)
        self.low, self.high = int(trained.quant_min), int(trained.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)


class _StoredConv2d(nn.Module):
    """A convolution in float32 whose kernels are kept in 8 bits, with a scale for each output channel."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, converted: QuantizedConv2d) -> None:
        super().__init__()
        weight, bias = converted._weight_bias()  # type: ignore[no-untyped-call]  # which torch names so
        self.register_buffer("weight", weight.int_repr())
        self.register_buffer("scale", weight.q_per_channel_scales().float().view(-1, 1, 1, 1))
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.detach())
        self.stride, self.dilation = list(converted.stride), list(converted.dilation)
        self.padding, self.groups = [int(side) for side in converted.padding], converted.groups
        self.rectified = isinstance(converted, QuantizedConvReLU2d)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.weight * self.scale
        y = F.conv2d(x, kernels, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return y.relu() if self.rectified else y


class _PackedConv2d(nn.Module):
    """A convolution in 8 bits, whose kernels are packed for the CPU when it is loaded.

    torch's own saves them packed. This one saves those of a `_StoredConv2d`, the very tensors, which an artifact then
    holds once.
    """

    def __init__(self, converted: QuantizedConv2d, stored: _StoredConv2d) -> None:
        super().__init__()
        self.weight, self.weight_scale, self.bias = stored.weight, stored.scale, stored.bias
        self.shape = [*stored.stride, *stored.padding, *stored.dilation, stored.groups]
        self.rectified = stored.rectified
        self.scale, self.zero_point = float(converted.scale), int(converted.zero_point)
        self.packed = _packed(self.weight, self.weight_scale, self.bias, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.rectified:
            return torch.ops.quantized.conv2d_relu(x, self.packed, self.scale, self.zero_point)
        return torch.ops.quantized.conv2d(x, self.packed, self.scale, self.zero_point)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, Tensor, Tensor, list[int], bool, float, int, bool]:
        return (
            *(self.weight, self.weight_scale, self.bias, self.shape),
            *(self.rectified, self.scale, self.zero_point, self.training),
        )

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor, Tensor, list[int], bool, float, int, bool]) -> None:
        self.weight, self.weight_scale, self.bias, self.shape = state[:4]
        self.rectified, self.scale, self.zero_point, self.training = state[4:]
        self.packed = _packed(self.weight, self.weight_scale, self.bias, self.shape)


def _packed(weight: Tensor, scale: Tensor, bias: Tensor, shape: list[int]):  # type: ignore[no-untyped-def]
    """Kernels as torch's 8-bit convolutions take them; without the type of what it returns, which Python cannot name.

    Args:
        weight: (channels, inputs, height, width) int8.
        scale: (channels, 1, 1, 1) float32.
        bias: (channels,) float32.
        shape: stride, padding and dilation, two numbers each, and groups.
    """
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    kernels = torch._make_per_channel_quantized_tensor(weight, scale.flatten().double(), zeros, 0)
    return torch.ops.quantized.conv2d_prepack(kernels, bias, shape[0:2], shape[2:4], shape[4:6], shape[6])


class _UpToSix(FakeQuantize):
    """What ReLU6 does beyond a ReLU; 8 bits whose range ends at six do it by themselves."""

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803  # torch's name
        return super().forward(X.clamp(max=6))  # type: ignore[no-any-return, no-untyped-call]


def _branches(network: Network) -> list[Branch]:
    return [branch for branch in network.branches if isinstance(branch, Branch)]  # which nn.ModuleList does not know


def _with_roundings(backbone: nn.Module, example: Tensor) -> fx.GraphModule:
    traced = _without_identities(fx.symbolic_trace(backbone))
    capped = _replace_relu6(traced)
    rounded: fx.GraphModule = prepare_qat_fx(fuse_fx(traced).train(), _mapping(), (example,))
    for node in rounded.graph.nodes:
        if node.op == "call_module" and node.target in capped:
            for user in node.users:
                rounded.set_submodule(str(user.target), _UpToSix(**_ACTIVATION))
    return rounded


def _without_identities(traced: fx.GraphModule) -> fx.GraphModule:
    """Drops what computes nothing, but would be rounded after."""
    for node in traced.graph.nodes:
        if _is(nn.Identity, node, traced):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _replace_relu6(traced: fx.GraphModule) -> set[str]:
    """Takes a ReLU for each ReLU6 behind a convolution, since torch computes only the former within it.

    Returns:
        The convolutions that they follow.
    """
    convolutions = set()
    for node in traced.graph.nodes:
        if _is(nn.ReLU6, node, traced):
            before = node.args[0]
            if _is(nn.BatchNorm2d, before, traced):
                before = before.args[0]
            if _is(nn.Conv2d, before, traced):
                convolutions.add(before.target)
                traced.set_submodule(node.target, nn.ReLU().eval())
    return convolutions


def _is(kind: type[nn.Module], node: fx.Node, traced: fx.GraphModule) -> bool:
    return node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), kind)


def _mapping() -> QConfigMapping:
    """torch's own mapping, with 8 bits for activations and 7 for kernels instead of the reverse.

    CPUs without VNNI add pairs of products in 16 bits, which hold only 15 bits of both factors together. Activations
    share one scale in a tensor, kernels have one for each channel, so the latter can spare the bit.
    """
    kernel = FakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        averaging_constant=1.0,  # the range of the kernels as they are now
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        quant_min=-63,  # with a value more below, torch would convert the largest kernel to what it was not rounded to
        quant_max=63,
    )
    mapping = get_default_qat_qconfig_mapping("x86")
    mapping.set_global(QConfig(activation=FakeQuantize.with_args(**_ACTIVATION), weight=kernel))
    return mapping.set_object_type(nn.AdaptiveAvgPool2d, None)  # means of many values lie between the 256


def _activation_roundings(network: nn.Module) -> Iterator[FakeQuantize]:
    for name, module in network.named_modules():
        if isinstance(module, FakeQuantize) and not name.endswith(".weight_fake_quant"):
            yield module


def _share_kernels(on_cpu: fx.GraphModule, on_cuda: fx.GraphModule) -> None:
    """Turns a backbone with roundings into one for GPUs, and lets the converted one have its kernels."""
    for node in on_cuda.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            module = on_cuda.get_submodule(name)
            if isinstance(module, Conv2d):
                converted = on_cpu.get_submodule(name)
                assert isinstance(converted, QuantizedConv2d)
                stored = _StoredConv2d(converted)
                on_cuda.set_submodule(name, stored)
                on_cpu.set_submodule(name, _PackedConv2d(converted, stored))
            elif isinstance(module, FakeQuantize):
                on_cuda.set_submodule(name, _Rounding(module))
