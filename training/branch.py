"""A backbone with what it wants of its input; a network has one, or several side by side.

Networks that start from ImageNet, from face recognition and from ages err differently, so that the mean of their logits
is better than each (Lakshminarayanan et al. 2017). Linear heads over the features of all branches have that mean as a
special case, from which they can be trained on.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Branch", "join", "parse_backbones"]


class Branch(nn.Module):
    """A backbone behind the size and the normalization of chips that it was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        mean: list[float],
        std: list[float],
        side: int | None = None,
    ) -> None:
        """Puts a backbone behind its preprocessing.

        Args:
            backbone: normalized float chips -> features.
            mean, std: of each channel, in grey levels.
            side: of its chips in pixels, or None for any.
        """
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.backbone = backbone
        self.side: int = side or 0
        self.upside_down = False

    def forward(self, chips: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB chips -> the backbone's features."""
        return self.backbone(self.normalize(chips))

    def normalize(self, chips: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB chips -> float, as the backbone takes them."""
        if chips.is_cuda:
            chips = chips.to(self.mean.dtype)  # CUDA cannot resize bytes, which on CPUs is ten times as fast
        if self.side > 0 and self.side != chips.shape[-1]:
            size = [self.side, self.side]
            chips = F.interpolate(chips, size=size, mode="bilinear", align_corners=False, antialias=True)
        if self.upside_down:
            chips = chips.flip(2, 3)
        # Whole rows at once: over an innermost dimension of three, broadcasting costs five times as much.
        batch, side = chips.shape[0], chips.shape[-1]
        rows = chips.permute(0, 2, 3, 1).reshape(batch * side, side * 3).to(self.mean.dtype)
        rows = rows.sub_(self.mean.repeat(side)).div_(self.std.repeat(side))
        return rows.view(batch, side, side, 3).permute(0, 3, 1, 2)


def parse_backbones(name: str) -> list[tuple[str, int | None]]:
    """`one@128+other` -> [("one", 128), ("other", None)]: names, and the sides of their chips where they are given.

    Raises:
        ValueError: a name is missing, or what follows an @ is no number of pixels that a backbone takes.
    """
    parts = []
    for part in name.split("+"):
        backbone, at, side = part.partition("@")
        if not backbone:
            raise ValueError(f"--backbone {name!r} lacks a name; give one, or several with plus signs between")
        if at and (not side.isdecimal() or int(side) % 16 or int(side) < 32):
            raise ValueError(f"{part}: the size of a branch must be a multiple of 16 from 32 on, as in {backbone}@128")
        parts.append((backbone, int(side) if at else None))
    return parts


def join(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """State of a network with the branches of several networks, whose logits are the mean of theirs.

    Args:
        states: of trained networks, in the order of the branches.
    """
    joined: dict[str, Any] = {}
    for state in states:
        shift = len({name.split(".")[1] for name in joined})
        for name, value in state.items():
            if name.startswith("branches."):
                _, index, rest = name.split(".", 2)
                joined[f"branches.{int(index) + shift}.{rest}"] = value
    for head in ("age_head", "gender_head"):
        joined[f"{head}.weight"] = torch.cat([state[f"{head}.weight"] for state in states], dim=1) / len(states)
        joined[f"{head}.bias"] = torch.stack([state[f"{head}.bias"] for state in states]).mean(dim=0)
    return joined
