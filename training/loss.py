"""Logits + targets -> loss."""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.network import AGE_BINS, Logits
from training.options import AgeLoss

__all__ = ["Probs", "Targets", "criterion", "expected_age", "label_targets"]

# Spread of the label distribution in years: apparent ages of adults are known less exactly than those of infants.
_SIGMA_AT_BIRTH: Final = 0.8
_SIGMA_PER_YEAR: Final = 0.045

# Common practice; docs/decisions/training.md compares no other values: an L1 that does not outweigh the distribution
# (Gao et al. 2018), and label smoothing (Szegedy et al. 2016, who take 0.1 for a thousand classes).
_L1_WEIGHT: Final = 0.15
_GENDER_SMOOTHING: Final = 0.02


class Targets(NamedTuple):
    """What the network shall say of N chips.

    Attributes:
        age: (N,) float32, years.
        age_probs: (N, 117) float32, a distribution over the years.
        gender_probs: (N, 2) float32.
    """

    age: Tensor
    age_probs: Tensor
    gender_probs: Tensor

    def at(self, rows: Tensor) -> "Targets":
        """The targets of some rows."""
        return Targets(*(each[rows] for each in self))

    def to(self, device: torch.device) -> "Targets":
        """The same on a device."""
        return Targets(*(each.to(device) for each in self))

    def mixed(self, taught: "Probs", weight: float) -> "Targets":
        """These with a share of what teachers say (distillation: Hinton et al. 2015)."""
        age_probs = torch.lerp(self.age_probs, taught.age, weight)
        return Targets(self.age, age_probs, torch.lerp(self.gender_probs, taught.gender, weight))


class Probs(NamedTuple):
    """age: (N, 117), gender: (N, 2), float32 probabilities in the order of the logits."""

    age: Tensor
    gender: Tensor


def label_targets(ages: list[int], genders: list[int]) -> Targets:
    """Targets of N chips from their labels: a Gaussian around the age, and a slightly smoothed gender.

    Args:
        ages: whole years, 0 to 116.
        genders: 0 male, 1 female.
    """
    age = torch.tensor(ages, dtype=torch.float32)
    years = torch.arange(AGE_BINS, dtype=torch.float32)
    sigma = (_SIGMA_AT_BIRTH + _SIGMA_PER_YEAR * age)[:, None]
    age_probs = torch.softmax(-0.5 * ((years - age[:, None]) / sigma) ** 2, dim=1)
    one_hot = F.one_hot(torch.tensor(genders), 2).float()
    return Targets(age, age_probs, torch.lerp(one_hot, torch.full_like(one_hot, 0.5), _GENDER_SMOOTHING))


def criterion(logits: Logits, targets: Targets, *, age_loss: AgeLoss, gender_weight: float) -> Tensor:
    """Mean loss of a batch.

    Args:
        logits: of the network, float32.
        targets: of the same chips.
        age_loss: `distribution` is label distribution learning (Gao et al. 2017), the cross-entropy to the target
            distribution, with a little L1 of the expected age (Gao et al. 2018).
        gender_weight: weight of the gender cross-entropy.

    Returns:
        A scalar.
    """
    expected = expected_age(logits.age)
    if age_loss == "l1":
        loss = F.l1_loss(expected, targets.age)
    elif age_loss == "mse":
        loss = F.mse_loss(expected, targets.age)
    else:
        loss = F.cross_entropy(logits.age, targets.age_probs) + _L1_WEIGHT * F.l1_loss(expected, targets.age)
    return loss + gender_weight * F.cross_entropy(logits.gender, targets.gender_probs)


def expected_age(age_logits: Tensor) -> Tensor:
    """(N, 117) logits -> (N,) expectation in years."""
    years = torch.arange(AGE_BINS, dtype=age_logits.dtype, device=age_logits.device)
    return age_logits.softmax(dim=1) @ years
