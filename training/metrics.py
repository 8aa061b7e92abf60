"""Predictions + labels -> figures with bootstrap intervals, overall and by group."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agegender.model import Predictions
from training.data import Labels

__all__ = [
    "AGE_BANDS",
    "METRICS",
    "RACES",
    "Figure",
    "Scored",
    "confidence_bins",
    "measure",
    "measure_groups",
    "resamples",
]

Floats = npt.NDArray[np.float64]

AGE_BANDS: Final = ((0, 3), (4, 12), (13, 17), (18, 24), (25, 34), (35, 44), (45, 54), (55, 64), (65, 79), (80, 116))
RACES: Final = ("White", "Black", "Asian", "Indian", "Others")  # UTKFace's race labels 0 to 4
_RESAMPLES: Final = 1000
_WEIGHTS_AT_ONCE: Final = 5_000_000  # 40 MB
_ECE_BINS: Final = 10
_WITHIN_YEARS: Final = 5
_LEAST_PICTURES: Final = 20  # of a group, below which its figures say nothing


@dataclass(frozen=True)
class Scored:
    """Labels and predictions of N pictures, all arrays of shape (N,)."""

    age_true: Floats
    gender_true: npt.NDArray[np.int64]
    race: npt.NDArray[np.int64]  # -1 where unknown
    age: Floats
    age_low: Floats
    age_high: Floats
    gender: npt.NDArray[np.int64]  # the likelier one, as `Predictor` chooses it
    female_prob: Floats

    @classmethod
    def of(cls, labels: Sequence[Labels], predictions: Predictions) -> "Scored":
        """Joins labels with the predictions for the same pictures, in the same order."""
        return cls(
            np.array([label.age_years for label in labels], float),
            np.array([label.gender for label in labels]),
            np.array([-1 if label.race is None else label.race for label in labels]),
            predictions.age.astype(float),
            predictions.age_low.astype(float),
            predictions.age_high.astype(float),
            predictions.gender_probs.argmax(axis=1),
            predictions.gender_probs[:, 1].astype(float),
        )

    def __len__(self) -> int:
        return len(self.age)

    def where(self, mask: npt.NDArray[np.bool_]) -> "Scored":
        """The pictures that a mask selects."""
        return Scored(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    @property
    def error(self) -> Floats:
        """Predicted minus labelled age, years."""
        return self.age - self.age_true

    @property
    def covered(self) -> npt.NDArray[np.bool_]:
        """Whether the interval holds the labelled age."""
        return (self.age_low <= self.age_true) & (self.age_true <= self.age_high)

    @property
    def gender_right(self) -> npt.NDArray[np.bool_]:
        """Whether the likelier gender is the labelled one."""
        return self.gender == self.gender_true

    @property
    def confidence(self) -> Floats:
        """Stated probability of the likelier gender."""
        return np.maximum(self.female_prob, 1 - self.female_prob)

    def aged(self, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Which pictures are labelled with an age from `low` to `high`, both included."""
        return (low <= self.age_true) & (self.age_true <= high)


@dataclass(frozen=True)
class Figure:
    """A metric with its 95% bootstrap interval (percentile method, Efron & Tibshirani 1993)."""

    value: float
    low: float
    high: float


# Each metric takes the pictures and (B, N) weights, one row per resample, and gives (B,) values.
Metric = Callable[[Scored, Floats], Floats]


def _mean(values: npt.NDArray[np.generic], weights: Floats) -> Floats:
    return weights @ values.astype(float) / weights.sum(axis=1)


def _median_error(scored: Scored, weights: Floats) -> Floats:
    error = np.abs(scored.error)
    order = error.argsort()
    below = np.cumsum(weights[:, order], axis=1)
    half, error = below[:, -1:] / 2, error[order]
    return (error[(below >= half).argmax(axis=1)] + error[(below > half).argmax(axis=1)]) / 2


def _auc(scored: Scored, weights: Floats) -> Floats:
    """Area under the ROC curve as the Mann-Whitney statistic; nan where one gender is missing."""
    order = scored.female_prob.argsort()
    _, starts = np.unique(scored.female_prob[order], return_index=True)  # equal scores count half against each other
    female = (scored.gender_true == 1)[order]
    positive, negative = (np.add.reduceat(weights[:, order] * own, starts, axis=1) for own in (female, ~female))
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _calibration_error(scored: Scored, weights: Floats) -> Floats:
    """Expected calibration error of the likelier gender's probability (Guo et al. 2017), ten equal bins.

    Its bootstrap interval lies too high: resampling adds its own noise to each bin, and errors of either sign add up.
    """
    bins = confidence_bins(scored)
    gap = (scored.confidence - scored.gender_right)[None] * weights
    total = sum(np.abs(gap[:, bins == index].sum(axis=1)) for index in range(_ECE_BINS))
    return np.asarray(total) / weights.sum(axis=1)


def confidence_bins(scored: Scored) -> npt.NDArray[np.int64]:
    """(N,) which of ten equal bins from 0.5 to 1 the likelier gender's probability falls into, 0 to 9."""
    return np.minimum(((scored.confidence - 0.5) * 2 * _ECE_BINS).astype(np.int64), _ECE_BINS - 1)


def _challenge_25(scored: Scored, weights: Floats) -> Floats:
    """Share of 13 to 17-year-olds who are told to be 25 or older; nan where there are none."""
    minors = scored.aged(13, 17)
    with np.errstate(invalid="ignore"):
        return weights @ (minors & (scored.age >= 25)) / (weights @ minors)


METRICS: Final[Mapping[str, Metric]] = {
    "age_mae_years": lambda s, w: _mean(np.abs(s.error), w),
    "age_median_error_years": _median_error,
    "age_bias_years": lambda s, w: _mean(s.error, w),
    "age_within_5_years": lambda s, w: _mean(np.abs(s.error) <= _WITHIN_YEARS, w),
    "age_coverage": lambda s, w: _mean(s.covered, w),
    "age_interval_width_years": lambda s, w: _mean(s.age_high - s.age_low, w),
    "gender_accuracy": lambda s, w: _mean(s.gender_right, w),
    "gender_auc": _auc,
    "gender_calibration_error": _calibration_error,
    "challenge_25_rate": _challenge_25,
}


def resamples(count: int) -> Iterator[Floats]:
    """How often each of so many pictures is drawn, with replacement, in each of the bootstrap's 1,000 resamples.

    Yields:
        (B, count), for a few resamples at a time: all of them would fill the memory beside many pictures.
    """
    generator, shares = np.random.default_rng(0), np.full(count, 1 / count)
    at_once = max(1, min(_RESAMPLES, _WEIGHTS_AT_ONCE // count))
    for done in range(0, _RESAMPLES, at_once):
        yield generator.multinomial(count, shares, min(at_once, _RESAMPLES - done)).astype(float)


def measure(scored: Scored) -> dict[str, Figure]:
    """Every metric that is defined for these pictures.

    Raises:
        ValueError: there are no pictures.
    """
    if len(scored) == 0:
        raise ValueError("there are no pictures to measure")
    count = len(scored)
    values = {name: float(metric(scored, np.ones((1, count)))[0]) for name, metric in METRICS.items()}
    defined = [name for name, value in values.items() if not np.isnan(value)]
    resampled: dict[str, list[Floats]] = {name: [] for name in defined}
    for weights in resamples(count):
        for name in defined:
            resampled[name].append(METRICS[name](scored, weights))
    ends = {name: np.nanquantile(np.concatenate(resampled[name]), (0.025, 0.975)) for name in defined}
    return {name: Figure(values[name], float(low), float(high)) for name, (low, high) in ends.items()}


def _groups(scored: Scored) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks by age band, gender and race label, and by their crossings in pairs."""
    bands = {f"age {low}-{high}": scored.aged(low, high) for low, high in AGE_BANDS}
    genders = {name: scored.gender_true == index for index, name in enumerate(("male", "female"))}
    races = {name: scored.race == index for index, name in enumerate(RACES)}
    wide = {
        "all": np.ones(len(scored), bool),
        "age 13 and above": scored.age_true >= 13,
        "age 21-60": scored.aged(21, 60),
    }
    crossings = {
        f"{one}, {other}": first & second
        for left, right in ((bands, genders), (bands, races), (genders, races))
        for one, first in left.items()
        for other, second in right.items()
    }
    return {**wide, **bands, **genders, **races, **crossings}


def measure_groups(scored: Scored) -> dict[str, tuple[int, dict[str, Figure]]]:
    """Size and metrics of each group that is not too small for them."""
    masks = {name: mask for name, mask in _groups(scored).items() if mask.sum() >= _LEAST_PICTURES or name == "all"}
    return {name: (int(mask.sum()), measure(scored.where(mask))) for name, mask in masks.items()}
