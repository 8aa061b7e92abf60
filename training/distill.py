"""Runs + training chips -> what their networks say of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from training.cache import load_chips
from training.data import Rejected, Sample
from training.earlier import read_run, restore
from training.loop import BEST, EVAL_BATCH, load_weights, predict_logits, save_whole
from training.loss import Probs
from training.network import Network, create_network
from training.options import OPTIONS, TrainOptions
from training.quantize import is_rounded

__all__ = ["TAUGHT", "average", "check_teacher", "taught", "teacher_probs"]

TAUGHT: Final = "taught.pt"
_ROLE: Final = "teacher"
_PART: Final = 8 * EVAL_BATCH  # chips in memory at once; batches stay as they would be of all


def check_teacher(run_dir: Path) -> None:
    """Finds out before the work whether a folder holds a run that can teach; its backbone is only tried by teaching.

    Raises:
        ValueError: it does not.
    """
    _read_run(run_dir)


def _read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the best weights of a run that can teach."""
    options, weights = read_run(run_dir, _ROLE)
    if (loss := options["age_loss"]) != "distribution":
        raise ValueError(f"the teacher {run_dir} was trained with --age-loss {loss}, so its ages are no distribution")
    if is_rounded(weights):
        raise ValueError(f"the teacher {run_dir} was trained in 8 bits; give the run that it went on from")
    return options, weights


def teacher_probs(run_dir: Path, samples: Sequence[Sample], cache_dir: Path, device: torch.device) -> Probs:
    """What the best weights of a run say of N pictures, averaged over each chip and its mirror image.

    Args:
        run_dir: out_dir of the teacher's training; its options say how the chips are cut.
        samples: the pictures.
        cache_dir: where cut chips are kept.
        device: where the network runs.

    Returns:
        The probabilities, on the CPU and in the order of the samples.

    Raises:
        ValueError: the folder holds no run with whole epochs, or its chips cannot be cut.
    """
    options, weights = _read_run(run_dir)
    network = create_network(options["backbone"], pretrained=False, dropout=0.0, drop_path=0.0)
    restore(network, weights, options["size"], f"the {_ROLE} {run_dir} holds", f"its {OPTIONS} names")
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    size_px, margin = options["size"], options["margin"]
    cut, cache = load_chips(samples, size_px, margin=margin, cache_dir=cache_dir, rejected=Rejected())
    if len(cut) != len(samples):
        raise ValueError(f"the teacher {run_dir} finds no face in {len(samples) - len(cut)} of the training pictures")
    parts = [samples[start : start + _PART] for start in range(0, len(samples), _PART)]
    probs = [_probs_both_ways(network, cache.read(part), device) for part in parts]
    return Probs(*(torch.cat(column) for column in zip(*probs, strict=True)))


def _probs_both_ways(network: Network, chips: npt.NDArray[np.uint8], device: torch.device) -> Probs:
    straight = predict_logits(network, chips, device)
    mirrored = predict_logits(network, np.ascontiguousarray(chips[:, :, ::-1]), device)
    return average([Probs(*(each.softmax(dim=1) for each in logits)) for logits in (straight, mirrored)])


def taught(runs: Sequence[Path], samples: Sequence[Sample], options: TrainOptions, device: torch.device) -> Probs:
    """What several teachers say on average; kept in the run's folder, since it takes minutes and a resume asks again.

    Args:
        runs: folders that `check_teacher` takes.
        samples: of the training split.
        options: of the pupil's run.
        device: where the teachers run.

    Returns:
        The probabilities, on the CPU and in the order of the samples.

    Raises:
        ValueError: see `teacher_probs`.
    """
    path = options.out_dir / TAUGHT
    key = [sample.digest for sample in samples] + [_digest(run / BEST) for run in runs]
    if options.resume and path.exists():
        kept = load_weights(path)
        if kept["key"] == key:
            return Probs(kept["age"], kept["gender"])
    probs = average([teacher_probs(run, samples, options.cache_dir, device) for run in runs])
    save_whole({"key": key, **probs._asdict()}, path)
    return probs


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def average(probs: Sequence[Probs]) -> Probs:
    """The mean of several predictions of the same N chips."""
    return Probs(*(torch.stack(same).mean(dim=0) for same in zip(*probs, strict=True)))
