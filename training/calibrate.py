"""Logits of the validation split -> calibration of the age interval and of the gender probability.

The interval is label-conditional (Mondrian) conformal prediction with normalized residuals (Vovk, Gammerman & Shafer,
Algorithmic Learning in a Random World, 2005, section 4.5; Papadopoulos et al. 2008). An age y belongs to a face's
prediction set when |y - prediction| is at most r(y) times the spread of the face's predicted distribution, where r(y)
is the conformal quantile of the validation faces of y's age band. The interval is the set's hull. So coverage holds in
each age band, for the very old too, whom the network takes for younger, and the width adapts to the face.
"""

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from training.metrics import AGE_BANDS
from training.network import AGE_BINS, Logits

__all__ = ["COVERAGE", "LEAST_TO_COVER", "Calibration", "age_interval", "calibrate", "predicted_age"]

COVERAGE: Final = 0.9

# A band with fewer validation faces than this takes the quantile of all faces.
_LEAST_FACES: Final = 20

# The shipped models have 0.86 and 0.88. A network that has learnt nothing would get one so high that float32 rounds
# every probability to a half, and a dozen faces one so low that every gender is certain.
_TEMPERATURES: Final = (0.2, 10.0)

LEAST_TO_COVER: Final = math.ceil(COVERAGE / (1 - COVERAGE) - 1e-9)
"""Faces below which even the largest of their scores is no quantile that covers `COVERAGE`."""


@dataclass(frozen=True)
class Calibration:
    """Numbers that turn the network's raw output into calibrated predictions.

    Attributes:
        radii: r(y) for each year from 0 to 116, in spreads.
        gender_temperature: divides the gender logits; within 0.2 to 10.
        mean: predict the mean of the distribution over the years instead of its median.
    """

    radii: tuple[float, ...]
    gender_temperature: float
    mean: bool


def age_interval(age_logits: Tensor, radii: Tensor, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Point prediction and interval, in code that TorchScript compiles.

    Args:
        age_logits: (N, 117) float32.
        radii: (117,) float32, see `Calibration`.
        mean: see `Calibration`.

    Returns:
        age, age_low, age_high: (N,) float32, years, with age_low <= age <= age_high.
    """
    age, spread = _age_and_spread(age_logits, mean)
    years = torch.arange(age_logits.shape[1], device=age_logits.device).to(age_logits.dtype)
    inside = (years[None, :] - age[:, None]).abs() <= radii[None, :] * spread[:, None]
    low = torch.where(inside, years, age[:, None]).min(dim=1).values
    high = torch.where(inside, years, age[:, None]).max(dim=1).values
    return age, low, high


def calibrate(logits: Logits, ages: Tensor, genders: Tensor, *, mean: bool) -> Calibration:
    """Fits the calibration.

    Args:
        logits: of N validation faces.
        ages: (N,) float32, labelled, years.
        genders: (N,) int64, labelled.
        mean: see `Calibration`.

    With fewer than `LEAST_TO_COVER` faces the intervals are too narrow.
    """
    age, spread = _age_and_spread(logits.age, mean)
    scores = (ages - age).abs() / spread
    radii = [0.0] * AGE_BINS
    for low, high in AGE_BANDS:
        own = scores[(ages >= low) & (ages <= high)]
        radius = _conformal_quantile(own if len(own) >= _LEAST_FACES else scores)
        radii[low : high + 1] = [radius] * (high + 1 - low)
    return Calibration(tuple(radii), _temperature(logits.gender, genders), mean)


def predicted_age(age_logits: Tensor, mean: bool) -> Tensor:
    """(N, 117) logits -> (N,) what the artifact predicts, years; for `mean` see `Calibration`."""
    return _age_and_spread(age_logits, mean)[0]


def _age_and_spread(age_logits: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """(N, 117) logits -> age and standard deviation in years, the latter at least half a year or so."""
    probs = age_logits.softmax(dim=1)
    years = torch.arange(age_logits.shape[1], device=age_logits.device).to(age_logits.dtype)
    expected = probs @ years
    variance = (probs * (years[None, :] - expected[:, None]) ** 2).sum(dim=1)
    return expected if mean else _median(probs), torch.sqrt(variance + 0.25)


def _median(probs: Tensor) -> Tensor:
    """Where half of the distribution lies below, which is what has the least absolute error.

    The year n reaches from n - 0.5 to n + 0.5, with its probability spread evenly over it.
    """
    below = torch.cumsum(probs, dim=1)
    year = (below < 0.5).sum(dim=1, keepdim=True).clamp(max=probs.shape[1] - 1)
    own = probs.gather(1, year)
    rest = 0.5 - (below.gather(1, year) - own)
    return (year.to(probs.dtype) - 0.5 + rest / own.clamp(min=1e-6)).squeeze(1).clamp(0, probs.shape[1] - 1)


def _conformal_quantile(scores: Tensor) -> float:
    """The ceil((n + 1) coverage)-th smallest score, which covers a new one with at least that probability."""
    rank = math.ceil((len(scores) + 1) * COVERAGE)
    return scores.sort().values[min(rank, len(scores)) - 1].item()


def _temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature scaling (Guo et al. 2017): the one number that minimizes the validation cross-entropy.

    Where no label is missed, that number would be 0, and every gender certain; then the logits stay as they are. It is
    kept within 0.2 to 10, of which, since the loss has one minimum, the nearer end is the best.
    """
    if bool((logits.argmax(dim=1) == labels).all()):
        return 1.0
    log_temperature = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_temperature.detach().exp().clamp(*_TEMPERATURES))
