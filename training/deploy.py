"""Trained network -> the network that is exported: 8-bit on CPUs, half precision on GPUs, mirror images averaged."""

import copy
import warnings
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from training.network import Logits, Network
from training.options import Precision

__all__ = ["Deployed", "check_precision"]

_BATCH: Final = 64


class Deployed(nn.Module):
    """(N, 3, S, S) uint8 RGB chips -> logits, as the artifact computes them."""

    def __init__(self, network: Network, sample: Tensor, *, precision: Precision, mirror: bool) -> None:
        """Converts a copy of the network.

        Args:
            network: trained.
            sample: (N, 3, S, S) uint8 RGB chips, from which the ranges of 8-bit activations are estimated.
            precision: of CPUs; see `TrainOptions`.
            mirror: average each chip with its mirror image.
        """
        super().__init__()
        network = copy.deepcopy(network).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.mirror = mirror
        self.on_cpu = quantized(network, sample) if precision == "int8" else network
        self.on_cuda = copy.deepcopy(network).half() if precision == "int8" else network

    def forward(self, chips: Tensor) -> Logits:
        """Returns float32 logits."""
        if not self.mirror:
            return self.logits(chips)
        age, gender = self.logits(torch.cat((chips, chips.flip(3))))
        count = chips.shape[0]
        return Logits((age[:count] + age[count:]) / 2, (gender[:count] + gender[count:]) / 2)

    def logits(self, chips: Tensor) -> Logits:
        """What the network says of the chips as they are."""
        age, gender = self.on_cuda(chips) if chips.is_cuda else self.on_cpu(chips)
        return Logits(age.float(), gender.float())


def check_precision(network: Network, precision: Precision) -> None:
    """Finds out before a training whether its network can be exported.

    Raises:
        ValueError: torch cannot trace the backbone, which it must to quantize it.
    """
    if precision == "int8":
        try:
            fx.symbolic_trace(network.backbone)
        except Exception as error:  # whatever the backbone's code raises when it is given symbols
            raise ValueError(
                "this backbone cannot be quantized to 8 bits; add --precision float32, or take face_resnet"
            ) from error


def quantized(network: Network, sample: Tensor) -> Network:
    """A copy with an 8-bit backbone (static post-training quantization: Jacob et al. 2018), its heads left as they are.

    Sums of 8-bit products are exact, so a chip's result does not depend on the batch that it came in.
    """
    result = copy.deepcopy(network)
    chips = result.normalize(sample)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter(
            "ignore"
        )  # torch announces the successor of this module, which does not write TorchScript
        prepared = prepare_fx(result.backbone, get_default_qconfig_mapping("x86"), (chips[:1],))
        for batch in chips.split(_BATCH):
            prepared(batch)
        result.backbone = convert_fx(prepared)
    return result
