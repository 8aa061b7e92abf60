"""Chips -> age logits and gender logits: backbones side by side, two linear heads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from training.backbones import create_branch
from training.branch import Branch, parse_backbones
from training.data import MAX_AGE_YEARS

__all__ = ["AGE_BINS", "Logits", "Network", "create_network"]

AGE_BINS: Final = MAX_AGE_YEARS + 1  # one per year, 0 to 116


class Logits(NamedTuple):
    """age: (N, 117) logits of one bin per year; gender: (N, 2) logits, male then female."""

    age: Tensor
    gender: Tensor


class Network(nn.Module):
    """One backbone or several, with an age head and a gender head over the features of all, on raw uint8 chips."""

    def __init__(self, branches: Sequence[Branch], *, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.dropout = nn.Dropout(dropout)
        widths = [int(branch.backbone.head_hidden_size) for branch in branches]  # type: ignore[arg-type]  # timm's
        self.age_head = nn.Linear(sum(widths), AGE_BINS)
        self.gender_head = nn.Linear(sum(widths), 2)

    def forward(self, chips: Tensor) -> Logits:
        """Args: chips: (N, 3, S, S) uint8 RGB. Returns: the logits of both heads."""
        features = self.dropout(torch.cat([branch(chips) for branch in self.branches], dim=1))
        return Logits(self.age_head(features), self.gender_head(features))


def create_network(
    name: str, *, pretrained: bool, dropout: float, drop_path: float, weights: Path | None = None
) -> Network:
    """Builds the network.

    Args:
        name: of a backbone, or of several with plus signs between (see `parse_backbones`).
        pretrained: load the backbones' published weights.
        dropout: rate before the heads.
        drop_path: rate of stochastic depth in the backbones.
        weights: folder of the weights that no package carries.

    Raises:
        ValueError: no such backbone, or its weights cannot be had.
    """
    branches = [
        create_branch(backbone, side=side, pretrained=pretrained, drop_path=drop_path, weights=weights)
        for backbone, side in parse_backbones(name)
    ]
    return Network(branches, dropout=dropout)
