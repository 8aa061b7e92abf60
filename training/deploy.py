"""Trained network -> the network that is exported: 8 bits where they pay, half precision elsewhere."""

import copy
import warnings
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from training.network import Logits, Network
from training.options import Precision
from training.twin import TwinBackbone

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
        self.stored_in_half = precision == "int8"
        if precision == "int8":
            network = _with_eight_bits(network.half().float(), sample).half().float()
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
    """A module in 8 bits on CPUs, and as it is on GPUs, which cannot compute with torch's 8-bit tensors."""

    def __init__(self, on_cpu: nn.Module, on_cuda: nn.Module) -> None:
        super().__init__()
        self.on_cpu, self.on_cuda = on_cpu, on_cuda

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return self.on_cuda(x)
        return self.on_cpu(x)


def check_precision(network: Network, precision: Precision) -> None:
    """Finds out before a training whether its network can be exported.

    Raises:
        ValueError: torch cannot trace the backbone, which it must to quantize it.
    """
    if precision == "int8":
        try:
            fx.symbolic_trace(_part(network))
        except Exception as error:  # whatever the backbone's code raises when it is given symbols
            raise ValueError(
                "this backbone cannot be quantized to 8 bits; add --precision float32, or take face_resnet"
            ) from error


def _part(network: Network) -> nn.Module:
    """What is quantized: the backbone, or of a twin the branch that can be."""
    return network.backbone.face if isinstance(network.backbone, TwinBackbone) else network.backbone


def _with_eight_bits(network: Network, sample: Tensor) -> Network:
    """Static post-training quantization (Jacob et al. 2018), with ranges from a sample; changes the network.

    Sums of 8-bit products are exact, so what comes out does not depend on the batch that a chip came in.
    """
    part = _part(network)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch announces a successor of this module, which writes no TorchScript
        prepared = prepare_fx(copy.deepcopy(part), get_default_qconfig_mapping("x86"), (network.normalize(sample[:1]),))
        _put_part(network, prepared)
        for batch in sample.split(_BATCH):
            network(batch)
        _put_part(network, _EightBit(convert_fx(prepared), part))
    return network


def _put_part(network: Network, part: nn.Module) -> None:
    if isinstance(network.backbone, TwinBackbone):
        network.backbone.face = part  # type: ignore[assignment]
    else:
        network.backbone = part
