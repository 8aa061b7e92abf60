"""Logits of the validation split -> calibration of the age interval and of the gender probability."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from training.loop import Raw
from training.loss import expected_age
from training.network import AGE_BINS

__all__ = ["COVERAGE", "Calibration", "calibrate"]

COVERAGE: Final = 0.9


@dataclass(frozen=True)
class Calibration:
    """Numbers that turn the network's raw output into calibrated predictions.

    Attributes:
        edges_years: predicted ages that separate the groups calibrated each by itself.
        quantiles: per group, how many spreads the interval reaches below and above the predicted age.
        spread_floor_years: added in quadrature to the standard deviation of the predicted distribution.
        gender_temperature: divides the gender logits.
    """

    edges_years: tuple[float, ...]
    quantiles: tuple[tuple[float, float], ...]
    spread_floor_years: float
    gender_temperature: float


_EDGES: Final = (3.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0)
_FLOOR: Final = 0.5


def calibrate(raw: Raw, ages: Tensor, genders: Tensor) -> Calibration:
    age = expected_age(raw.age_logits)
    probs = raw.age_logits.softmax(dim=1)
    years = torch.arange(AGE_BINS, dtype=torch.float32)
    spread = ((probs * (years - age[:, None]) ** 2).sum(dim=1) + _FLOOR**2).sqrt()
    score = (ages - age) / spread
    group = torch.bucketize(age, torch.tensor(_EDGES))
    quantiles = []
    for index in range(len(_EDGES) + 1):
        own = score[group == index] if (group == index).sum() > 50 else score
        quantiles.append((float(-own.quantile(0.05)), float(own.quantile(0.95))))
    return Calibration(_EDGES, tuple(quantiles), _FLOOR, _temperature(raw.gender_logits, genders))


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature scaling (Guo et al. 2017): the one number that minimizes the validation cross-entropy."""
    log_temperature = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_temperature.exp())
