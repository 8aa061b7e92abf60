"""What the network sees of a picture: its chip in the cache, augmented, and normalized as each backbone takes it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import agegender.chips
import agegender.detector
import agegender.image
import training.augment
from training.augment import augment
from training.backbones import create_branch
from training.cache import cutting_version

HALVES = np.full((120, 120, 3), 60, np.uint8)
HALVES[:, 60:] = 200


def test_half_of_the_chips_are_mirrored_and_none_stands_on_its_head() -> None:
    seeds = range(60)
    lit = [augment(HALVES, 96, np.random.default_rng(seed)).mean(axis=(0, 2)) for seed in seeds]
    mirrored = [bool(columns[:48].mean() > columns[48:].mean()) for columns in lit]
    assert 20 <= sum(mirrored) <= 40
    upright = HALVES.transpose(1, 0, 2)
    for seed in seeds:
        rows = augment(upright, 96, np.random.default_rng(seed)).mean(axis=(1, 2))
        assert rows[:48].mean() < rows[48:].mean()


def test_a_chip_is_turned_by_up_to_eight_degrees_either_way() -> None:
    bar = np.zeros((120, 120, 3), np.uint8)
    bar[58:62, 20:100] = 255
    angles = []
    for seed in range(100):
        y, x = np.nonzero(training.augment._warp(bar, 120, np.random.default_rng(seed))[..., 0] > 127)
        angles.append(np.degrees(np.arctan(np.polyfit(x, y, 1)[0])))
    assert -8.2 < min(angles) < -7
    assert 7 < max(angles) < 8.2


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [
        ("face_resnet", [122.782, 117.001, 104.298], [256, 256, 256]),
        ("efficientnet_lite0", [127, 127, 127], [128, 128, 128]),
        ("mobilenet_v1", [123.68, 116.779, 103.939], [1, 1, 1]),
        ("resnet18", [255 * 0.485, 255 * 0.456, 255 * 0.406], [255 * 0.229, 255 * 0.224, 255 * 0.225]),
    ],
)
def test_each_backbone_sees_the_colours_that_it_was_trained_with(
    backbone: str, mean: list[float], std: list[float]
) -> None:
    branch = create_branch(backbone, side=None, pretrained=False, drop_path=0.0)
    chips = torch.tensor([[0, 255, 10], [200, 100, 50], [7, 7, 7], [90, 160, 30]], dtype=torch.uint8)
    seen = branch.normalize(chips.T.reshape(1, 3, 2, 2))
    expected = (chips.double() - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(seen[0].flatten(1).T.double(), expected, atol=1e-4, rtol=1e-5)


def test_chips_of_another_size_or_margin_are_cut_anew() -> None:
    versions = [cutting_version(size_px, margin) for size_px, margin in ((96, 0.0), (96, 0.1), (112, 0.0))]
    assert len(set(versions)) == 3
    assert cutting_version(96, 0.0) == versions[0]


def test_chips_are_cut_anew_when_the_code_or_the_detector_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [cutting_version(96, 0.0)]
    (tmp_path / "other.py").write_text("# other code")
    for module in (agegender.image, agegender.detector, agegender.chips):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(tmp_path / "other.py"))
            versions.append(cutting_version(96, 0.0))
    monkeypatch.setattr(agegender.detector, "detector_weights", lambda: b"other weights")
    versions.append(cutting_version(96, 0.0))
    monkeypatch.setattr("torch.__version__", "0")
    versions.append(cutting_version(96, 0.0))
    assert len(set(versions)) == 6


def test_a_chip_made_smaller_for_a_branch_keeps_the_mean_of_all_its_pixels() -> None:
    """Without antialiasing, of each four columns the middle two would count alone."""
    branch = create_branch("mobilenet_v1", side=32, pretrained=False, drop_path=0.0)
    chips = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    chips[..., 0::4] = chips[..., 3::4] = 200
    seen = branch.normalize(chips) + branch.mean.view(3, 1, 1)
    assert seen.shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen[..., 4:-4], torch.full((1, 3, 32, 24), 100.0), atol=30, rtol=0)
