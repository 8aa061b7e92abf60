"""Folder of an earlier run -> its options, and a network with its best weights."""

from pathlib import Path
from typing import Any, Final

import torch

from training.loop import BEST, load_weights
from training.network import Network
from training.options import OPTIONS, TrainOptions, read_options
from training.quantize import is_rounded, round_to_eight_bits

__all__ = ["earlier_options", "read_run", "refuse_rounded", "restore"]

# What runs did that are older than these options.
_BEFORE: Final = {"age_loss": "distribution", "margin": 0.0, "mirror": True, "second_look": None}


def earlier_options(run_dir: Path) -> dict[str, Any]:
    """The options of a run, also those of `_BEFORE` that it is older than; for what it raises see `read_options`."""
    return {**_BEFORE, **read_options(run_dir)}


def read_run(run_dir: Path, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options, see `earlier_options`, and the best weights of a run.

    Args:
        run_dir: its out_dir.
        role: what errors call it.

    Raises:
        ValueError: it is no folder of a run with whole epochs.
    """
    try:
        options, weights = earlier_options(run_dir), load_weights(run_dir / BEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"the {role} {run_dir} is not the folder of a run: no {error.filename}") from error
    if not {"backbone", "size"} <= options.keys():
        raise ValueError(f"{run_dir / OPTIONS} is damaged: it names no backbone, or no size of its chips")
    return options, weights


def refuse_rounded(weights: dict[str, Any], options: TrainOptions, subject: str) -> None:
    """Finds out whether weights are of a precision that the artifact can have.

    Args:
        weights: of an earlier run.
        options: of this one.
        subject: how an error begins.

    Raises:
        ValueError: they were trained in 8 bits, and float32 is asked for.
    """
    if is_rounded(weights) and options.precision != "int8":
        raise ValueError(f"{subject} trained in 8 bits; leave out --precision float32")


def restore(network: Network, weights: dict[str, Any], size: int, subject: str, backbone: str) -> None:
    """Gives a network the weights of a run, and first the roundings to 8 bits that these were trained with.

    Args:
        network: as it was created; changed in place.
        weights: of the run.
        size: side of its chips, in pixels.
        subject: how an error begins.
        backbone: what an error says that the weights should be of.

    Raises:
        ValueError: they are of another backbone.
    """
    if is_rounded(weights):
        any_chips = torch.arange(3 * size**2).view(1, 3, size, size).to(torch.uint8)
        round_to_eight_bits(network, any_chips)  # the ranges are among the weights
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{subject} weights of another backbone than {backbone}") from error
