"""Trained network -> the network that is exported: its convolutions in 8 bits, and with a second look, if asked."""

import copy
from typing import Final

import torch
from torch import Tensor, nn

from training.network import Logits, Network
from training.options import Precision, TrainOptions
from training.quantize import convert, is_rounded, round_to_eight_bits
from training.second_look import SecondLook

__all__ = ["Deployed", "TwoLooks", "deploy"]


def deploy(
    network: Network, sample: Tensor, options: TrainOptions, second_look: SecondLook | None
) -> "Deployed | TwoLooks":
    """The network as the artifact has it.

    Args:
        network: trained, with 8-bit roundings or without.
        sample: see `Deployed`.
        options: of the run.
        second_look: as the options name it.
    """
    first = Deployed(network, sample, precision=options.precision, mirror=options.mirror)
    if second_look is None:
        return first
    second = Deployed(second_look.network, sample, precision=options.precision, mirror=second_look.mirror)
    return TwoLooks(first, second, options.second_look_below)


class Deployed(nn.Module):
    """(N, 3, S, S) uint8 RGB chips -> logits, as the artifact computes them."""

    mirror: Final[bool]  # so that TorchScript leaves out the branch that is not taken, half of what it has to load

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


class TwoLooks(nn.Module):
    """A network for all faces, and another one that answers in its place for those whose gender it is not sure of.

    The exacter network is worth its time where the first would guess, and hardly elsewhere (a cascade, as in Viola &
    Jones 2001).
    """

    def __init__(self, first: Deployed, second: Deployed, below: float) -> None:
        """Args: below: gender probability of the first, from its logits as they are, below which it is not sure."""
        super().__init__()
        self.first, self.second = first, second
        self.below = below

    def forward(self, chips: Tensor) -> Logits:
        """Returns float32 logits."""
        age, gender = self.first(chips)
        unsure = self.unsure(gender)
        if unsure.numel() > 0:
            again = self.second(chips.index_select(0, unsure))
            age, gender = age.index_copy(0, unsure, again[0]), gender.index_copy(0, unsure, again[1])
        return Logits(age, gender)

    def unsure(self, gender_logits: Tensor) -> Tensor:
        """(N, 2) logits of the first network -> the indices of the faces that the second looks at."""
        return (gender_logits.softmax(dim=1).amax(dim=1) < self.below).nonzero().squeeze(1)
