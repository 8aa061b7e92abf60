"""Trained network -> the network that is exported: its convolutions in 8 bits, if asked."""

import copy

import torch
from torch import Tensor, nn

from training.network import Logits, Network
from training.options import Precision
from training.quantize import convert, is_rounded, round_to_eight_bits

__all__ = ["Deployed"]


class Deployed(nn.Module):
    """(N, 3, S, S) uint8 RGB chips -> logits, as the artifact computes them."""

    def __init__(self, network: Network, sample: Tensor, *, precision: Precision, mirror: bool) -> None:
        """Converts a copy of the network.

        Args:
            network: trained, with 8-bit roundings or without.
            sample: (N, 3, S, S) uint8 RGB chips, from which the ranges of 8-bit activations are estimated, unless the
                network was trained with them.
            precision: see `TrainOptions`.
            mirror: average each chip with its mirror image.
        """
        super().__init__()
        network = copy.deepcopy(network).cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if precision == "int8":
            if not is_rounded(network.state_dict()):
                round_to_eight_bits(network, sample)
            convert(network)
        self.mirror = mirror
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
