"""Logits + labels -> loss."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from training.network import AGE_BINS, Logits
from training.options import AgeLoss

__all__ = ["criterion", "expected_age"]

# Spread of the label distribution in years: apparent ages of adults are known less exactly than those of infants.
_SIGMA_AT_BIRTH: Final = 0.8
_SIGMA_PER_YEAR: Final = 0.045
_L1_WEIGHT: Final = 0.15
_GENDER_SMOOTHING: Final = 0.02


def criterion(logits: Logits, age: Tensor, gender: Tensor, *, age_loss: AgeLoss, gender_weight: float) -> Tensor:
    """Mean loss of a batch.

    Args:
        logits: of the network.
        age: (N,) float32, years.
        gender: (N,) int64, 0 or 1.
        age_loss: `distribution` is label distribution learning (Gao et al. 2017), the cross-entropy to a discretized
            Gaussian around the label, with a little L1 of the expected age (Gao et al. 2018).
        gender_weight: weight of the gender cross-entropy.
    """
    expected = expected_age(logits.age)
    if age_loss == "l1":
        loss = F.l1_loss(expected, age)
    elif age_loss == "mse":
        loss = F.mse_loss(expected, age)
    else:
        loss = F.cross_entropy(logits.age, label_distribution(age)) + _L1_WEIGHT * F.l1_loss(expected, age)
    return loss + gender_weight * F.cross_entropy(logits.gender, gender, label_smoothing=_GENDER_SMOOTHING)


def expected_age(age_logits: Tensor) -> Tensor:
    """(N, 117) logits -> (N,) expectation in years."""
    years = torch.arange(AGE_BINS, dtype=age_logits.dtype, device=age_logits.device)
    return age_logits.softmax(dim=1) @ years


def label_distribution(age: Tensor) -> Tensor:
    """(N,) years -> (N, 117) probabilities."""
    years = torch.arange(AGE_BINS, dtype=age.dtype, device=age.device)
    sigma = (_SIGMA_AT_BIRTH + _SIGMA_PER_YEAR * age)[:, None]
    return torch.softmax(-0.5 * ((years - age[:, None]) / sigma) ** 2, dim=1)
