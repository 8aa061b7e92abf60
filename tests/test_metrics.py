"""Figures by value: metrics, calibration, loss, told probabilities and robustness; and what evaluation counts."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

import training.evaluate
import training.robustness
from agegender import Item, decode_image
from agegender.image import Pixels
from agegender.model import Predictions
from training.calibrate import Calibration, _conformal_quantile, _temperature, age_interval, calibrate
from training.data import Labels, Sample
from training.dataset import ARTIFACT, splits_path
from training.evaluate import EvaluateOptions
from training.evaluate import run as evaluation
from training.export import Artifact
from training.loss import Probs, Targets, criterion
from training.metrics import Scored, measure, measure_groups
from training.network import AGE_BINS, Logits
from training.report import _worst
from training.robustness import CORRUPTIONS, robustness

# Labelled age and gender (1 is female); predicted age, low and high end of the interval, probability of female.
PICTURES = (
    (13, 0, 30, 12, 40, 0.08),
    (17, 1, 25, 17, 30, 0.92),  # at the interval's lower end, and told to be just 25
    (15, 1, 20, 16, 24, 0.08),  # an error of just 5
    (12, 0, 26, 20, 32, 0.26),  # no longer in "13 to 17"
    (18, 1, 30, 22, 36, 0.72),  # not yet
    (40, 0, 35, 33, 40, 0.72),  # at the upper end
    (50, 1, 44, 41, 49, 0.28),
    (60, 0, 60, 52, 66, 0.43),
    (70, 1, 68, 62, 75, 0.57),
    (80, 0, 77, 71, 84, 0.50),  # counts as male, as the predictor tells it
)


def _scored(rows: Iterable[tuple[float, ...]]) -> Scored:
    age_true, gender, age, low, high, female = np.array(list(rows), np.float32).T
    labels = [Labels(int(years), int(index), None) for years, index in zip(age_true, gender, strict=True)]
    return Scored.of(labels, Predictions(age, low, high, np.stack([1 - female, female], axis=1)))


def test_every_metric_is_what_a_hand_computes() -> None:
    expected = {
        "age_mae_years": (17 + 8 + 5 + 14 + 12 + 5 + 6 + 0 + 2 + 3) / 10,
        "age_median_error_years": (5 + 6) / 2,  # of 0 2 3 5 5 6 8 12 14 17
        "age_bias_years": (17 + 8 + 5 + 14 + 12 - 5 - 6 + 0 - 2 - 3) / 10,
        "age_within_5_years": 5 / 10,  # errors of 5, 5, 0, 2 and 3
        "age_coverage": 6 / 10,  # the labels 13, 17, 40, 60, 70, 80
        "age_interval_width_years": (28 + 13 + 8 + 12 + 14 + 7 + 8 + 14 + 13 + 13) / 10,
        "gender_accuracy": 7 / 10,  # the 1st, 2nd, 4th, 5th, 8th, 9th, 10th
        # Males at .08 .26 .43 .50 .72 that females at .92 .08 .72 .28 .57 lie above; a half where they are equal.
        "gender_auc": (5 + 0.5 + 4.5 + 2 + 4) / (5 * 5),
        # By bins of 0.05: how many are right against how many should be, where .92, .74 and .72, .57, and .50 are told.
        "gender_calibration_error": (abs(2 - 3 * 0.92) + abs(2 - 0.74 - 3 * 0.72) + abs(2 - 2 * 0.57) + 0.5) / 10,
        "challenge_25_rate": 2 / 3,  # of the labels 13, 15, 17
    }
    figures = measure(_scored(PICTURES))
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected)
    # How many of 10 drawn are among 5: at most 1 in 1.1%, at most 2 in 5.5%. Among 6: at most 2 in 1.2%, at most 3 in
    # 5.5%, at most 8 in 95.4%, at most 9 in 99.4%.
    for name, low, high in (("age_within_5_years", 0.2, 0.8), ("age_coverage", 0.3, 0.9)):
        assert (figures[name].low, figures[name].high) == pytest.approx((low, high))


def test_metrics_and_predictor_choose_the_same_gender() -> None:
    """Even where one of two probabilities is a half and the other one more by a rounding."""
    half, more = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(1))
    probs = np.array([[half, half], [more, half], [half, more]])
    years = np.full(3, 30, np.float32)
    scored = Scored.of([Labels(30, 0, None)] * 3, Predictions(years, years, years, probs))
    assert scored.gender_right.tolist() == [index == 0 for index in probs.argmax(axis=1)] == [True, True, False]


def test_a_group_of_two_traits_has_both_of_them() -> None:
    """A group of 19 is too small; ages lie at the ends of what they count for."""
    ages, genders, races, errors = (
        np.repeat(values, (20, 20, 20, 19)) for values in ((12, 21, 60, 61), (0, 1, 1, 0), (0, 1, 0, 4), (1, 2, 3, 4))
    )
    told = ages + errors
    groups = measure_groups(Scored(ages, genders, races, told, told, told, genders, np.full(79, 0.4)))
    assert {name: count for name, (count, _) in groups.items()} == {
        "all": 79,
        "age 13 and above": 59,
        "age 21-60": 40,
        "age 4-12": 20,
        "age 18-24": 20,
        "age 55-64": 39,
        "male": 39,
        "female": 40,
        "White": 40,
        "Black": 20,
        "age 4-12, male": 20,
        "age 18-24, female": 20,
        "age 55-64, female": 20,
        "age 4-12, White": 20,
        "age 18-24, Black": 20,
        "age 55-64, White": 20,
        "male, White": 20,
        "female, White": 20,
        "female, Black": 20,
    }
    assert groups["female, White"][1]["age_mae_years"].value == 3


@pytest.mark.parametrize(("count", "rank"), [(5, 5), (9, 9), (10, 10), (19, 18), (20, 19), (29, 27), (30, 28)])
def test_nine_tenths_of_the_scores_and_of_a_new_one_are_within_the_quantile(count: int, rank: int) -> None:
    assert _conformal_quantile(torch.arange(float(count), 0, -1)) == rank


def test_a_band_of_few_faces_takes_the_radius_of_all() -> None:
    """A distribution of one year counts as half a year wide, so that an error of a year is a score of 2.

    Of all 65 scores, 0 five times, 2 twenty times and 8 forty times, the 60th is 8.
    """
    ages = torch.tensor([85.0] * 5 + [30.0] * 20 + [50.0] * 40)
    told = torch.tensor([85] * 5 + [31] * 20 + [46] * 40)
    logits = Logits(F.one_hot(told, AGE_BINS) * 50.0, torch.zeros(65, 2))
    for mean in (True, False):
        calibration = calibrate(logits, ages, torch.zeros(65, dtype=torch.int64), mean=mean)
        assert calibration.radii == pytest.approx([2 if 25 <= year <= 34 else 8 for year in range(AGE_BINS)])
        ends = age_interval(logits.age[[0, 5, 25]], torch.tensor(calibration.radii), mean)
        # From 31 one year reaches to 30, where the radius is 2, and four years reach to 35, where it is 8.
        assert [end.tolist() for end in ends] == [[85, 31, 46], [81, 30, 42], [89, 35, 50]]


def test_the_temperature_makes_the_told_probability_the_share_that_is_right() -> None:
    """Three of four are right at a difference of 6 between the logits, and ln 3 is that of a probability of 3/4."""
    logits = torch.tensor([[0.0, 6.0]] * 4)
    assert _temperature(logits, torch.tensor([1, 1, 1, 0])) == pytest.approx(6 / np.log(3), rel=1e-3)


@pytest.mark.parametrize(("right", "margin", "end"), [(19, 0.1, 0.2), (6, 3.0, 10.0), (11, 30.0, 10.0)])
def test_a_temperature_is_never_extreme(right: int, margin: float, end: float) -> None:
    """Of twenty faces: 19 right would have 0.03, 6 right none at all, and 11 right at a margin of 30 would have 150."""
    logits = torch.tensor([[0.0, margin]] * 20)
    assert _temperature(logits, torch.tensor([1] * right + [0] * (20 - right))) == pytest.approx(end)


@pytest.mark.parametrize(("temperature", "logits"), [(1.0, [-1.0, 3.0]), (2.0, [-0.5, 1.5])])
def test_an_artifact_tells_calibrated_genders(temperature: float, logits: list[float]) -> None:
    class Certain(torch.nn.Module):
        def forward(self, chips: torch.Tensor) -> Logits:
            return Logits(torch.zeros(1, AGE_BINS), torch.tensor([[-1.0, 3.0]]))

    artifact = Artifact(Certain(), Calibration((1.0,) * AGE_BINS, temperature, False))  # type: ignore[arg-type]
    assert artifact(torch.zeros(1, 3, 8, 8)).gender_logits.tolist() == [logits]


def test_a_teacher_is_believed_by_its_weight() -> None:
    ages, years = torch.tensor([1.0]), torch.eye(AGE_BINS)
    mixed = Targets(ages, years[:1], torch.tensor([[1.0, 0.0]])).mixed(
        Probs(years[1:2], torch.tensor([[0.2, 0.8]])), 0.25
    )
    assert mixed.age.tolist() == [1]
    assert mixed.age_probs[0, :3].tolist() == [0.75, 0.25, 0]
    assert mixed.gender_probs[0].tolist() == pytest.approx([0.75 * 1 + 0.25 * 0.2, 0.75 * 0 + 0.25 * 0.8])


@pytest.mark.parametrize(
    ("age_loss", "loss"),
    [("l1", 20), ("mse", 20**2), ("distribution", np.log(AGE_BINS) + 0.15 * 20)],
)
def test_a_loss_is_that_of_age_and_its_weight_times_that_of_gender(age_loss: Any, loss: float) -> None:
    """Even logits expect 58 years, and either gender by half."""
    targets = Targets(torch.tensor([38.0]), torch.eye(AGE_BINS)[[38]], torch.tensor([[1.0, 0.0]]))
    logits = Logits(torch.zeros(1, AGE_BINS), torch.zeros(1, 2))
    found = criterion(logits, targets, age_loss=age_loss, gender_weight=3.0)
    assert found.item() == pytest.approx(loss + 3 * np.log(2))


FLAT = np.full((64, 160, 3), 120, np.uint8)
EDGE = np.zeros((32, 96, 3), np.uint8)
EDGE[:, 48:] = 240
BAR = np.zeros((120, 120, 3), np.uint8)
BAR[57:63, 20:100] = 255


def _edge_width(pixels: Pixels) -> float:
    """Standard deviation of what an edge was smoothed with."""
    slope = np.diff(pixels[16, :, 0].astype(float))
    place = np.arange(len(slope))
    return float(np.sqrt(np.average((place - np.average(place, weights=slope)) ** 2, weights=slope)))


def _bar_angle(pixels: Pixels) -> float:
    """How far a horizontal bar was turned against the clock, from 0 to 180 degrees."""
    y, x = np.nonzero(pixels[..., 0] > 127)
    along = np.linalg.eigh(np.cov(x, -y))[1][:, 1]
    return float(np.degrees(np.arctan2(along[1], along[0])) % 180)


@pytest.mark.parametrize(
    ("name", "picture", "strength"),
    [
        ("blur, sigma in px", EDGE, _edge_width),
        ("noise, sigma of 255", FLAT, np.std),
        ("darkness, gain", FLAT, lambda pixels: pixels.mean() / FLAT.mean()),
        ("rotation, degrees", BAR, _bar_angle),
        ("picture's side, px", FLAT, lambda pixels: max(pixels.shape[:2])),
    ],
)
def test_a_corruption_is_as_strong_as_its_level_says(
    name: str, picture: Pixels, strength: Callable[[Pixels], float]
) -> None:
    corrupt, levels = CORRUPTIONS[name]
    assert [strength(corrupt(picture, level)) for level in levels] == pytest.approx(levels, rel=0.05)


def test_a_jpeg_is_as_coarse_as_its_quality_says() -> None:
    """A block's mean has steps of 16/8 grey levels at a quality of 50, and twice as wide ones at half of it (T.81)."""
    corrupt, levels = CORRUPTIONS["JPEG quality"]
    greys = np.zeros((256, 8, 8, 3), np.uint8) + np.arange(256, dtype=np.uint8)[:, None, None, None]
    told = [len({int(corrupt(block, level)[0, 0, 0]) for block in greys}) for level in levels]
    assert told == pytest.approx([256 / 2, 256 / 4, 256 / 10, 256 / 20], abs=2)
    red = np.full((16, 16, 3), (200, 20, 60), np.uint8)
    assert np.abs(corrupt(red, 50).astype(int) - red).max() < 8


class _Reader:
    """Stands for a predictor: the red level is the age, green means female, and without blue there is no face."""

    model = SimpleNamespace(spec=SimpleNamespace(labels=("male", "female")))

    def stream(self, items: Iterable[Item]) -> Iterator[SimpleNamespace]:
        for item in items:
            red, green, blue = (int(level) for level in decode_image(item.data)[8, 8])
            face = SimpleNamespace(age=red, gender="female" if green else "male")
            yield SimpleNamespace(faces=[face] if blue else [])


def test_robustness_is_of_the_faces_that_are_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = {(80, 0, 9): (50, 0), (20, 9, 9): (16, 1), (60, 9, 9): (28, 0), (90, 9, 1): (10, 1)}
    samples = []
    for index, (colour, labels) in enumerate(pictures.items()):
        samples.append(Sample(tmp_path / f"{index}.png", Labels(*labels, None), str(index)))
        cv2.imwrite(str(samples[-1].path), np.full((32, 32, 3), colour[::-1], np.uint8))
    monkeypatch.setattr(training.robustness, "Predictor", lambda *_, **__: _Reader())
    darkness = {"darkness": (CORRUPTIONS["darkness, gain"][0], (0.5, 0.0))}
    monkeypatch.setattr(training.robustness, "CORRUPTIONS", darkness)
    curve = robustness(None, samples)["darkness"]  # type: ignore[arg-type]
    # Told are 40, 10 and 30 for 50, 16 and 28, the last of them as female; the fourth keeps half a level of blue.
    assert curve[0.5] == ((10 + 6 + 2) / 3, 2 / 3, 3 / 4)
    assert curve[0.0] == pytest.approx((np.nan, np.nan, 0), nan_ok=True)


@pytest.mark.parametrize(
    ("option", "folder", "known", "measured", "said"),
    [
        ("unseen", "train val test", "train val test", "test", None),
        ("unseen", "train test new", "train val test", "test new", "1 pictures are new to the model, unless"),
        ("unseen", "train test", "", "train test", "may have seen these pictures"),
        (
            "all",
            "train val test",
            "train val test",
            "train val test",
            "seen 2 of these 3 pictures in training or validation",
        ),
        ("all", "test", "train val test", "test", None),
    ],
)
def test_a_model_is_measured_on_what_it_has_not_seen(
    option: Any,
    folder: str,
    known: str,
    measured: str,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each picture is named after its split, which is also its bytes."""
    for side in folder.split():
        (tmp_path / f"30_0_0_{side}.jpg").write_text(side)
    if known:
        lines = [f"{hashlib.sha256(side.encode()).hexdigest()[:16]},{side}" for side in known.split()]
        splits_path(tmp_path / ARTIFACT).write_text("\n".join(["digest,split", *lines]))
    model = SimpleNamespace(spec=SimpleNamespace(chip_size_px=96, chip_margin=0.0))
    monkeypatch.setattr("training.evaluate.Model", lambda *_, **__: model)
    monkeypatch.setattr("training.evaluate.load_chips", lambda samples, *_, **__: (samples, None))
    evaluate = Mock()
    monkeypatch.setattr("training.evaluate.evaluate", evaluate)
    evaluation(EvaluateOptions(tmp_path, tmp_path / ARTIFACT, pictures=option))
    assert {sample.path.stem.removeprefix("30_0_0_") for sample in evaluate.call_args.args[1]} == set(measured.split())
    warning = evaluate.call_args.kwargs["warning"]
    assert warning is None if said is None else said in warning


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_figures_of_an_earlier_evaluation_outlive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.json").write_text("earlier")
    (tmp_path / "metrics.tmp").symlink_to("/dev/full")
    years = np.full(1, 30, np.float32)
    told = Predictions(years, years, years, np.array([[0.5, 0.5]], np.float32))
    monkeypatch.setattr("training.evaluate.predict_chips", lambda *_: told)
    model: Any = SimpleNamespace(spec=SimpleNamespace(name="", version=""), sha256="")
    with pytest.raises(OSError, match="No space left"):
        training.evaluate.evaluate(model, [Sample(Path("30_0_0_a.jpg"), Labels(30, 0, 0), "")], Mock(), tmp_path)
    assert (tmp_path / "metrics.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_report_shows_the_largest_errors_first() -> None:
    errors = np.array([0, 3, -30, 10, -2, 21, -20, *[1] * 30], float)
    samples = [Sample(Path(f"{error:g}.jpg"), Labels(50, 0, None), "") for error in errors]
    scored = _scored((50, 0, 50 + error, 0, 0, 0) for error in errors)
    page = _worst(SimpleNamespace(samples=samples, scored=scored))  # type: ignore[arg-type]
    names = re.findall(r"<small>([^<]*)\.jpg</small>", page)
    assert names == ["-30", "21", "-20", "10", "3", "-2", *["1"] * 18]
