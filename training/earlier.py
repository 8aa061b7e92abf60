"""Folder of an earlier run -> its options and its best weights."""

from pathlib import Path
from typing import Any, Final

from training.loop import BEST, load_weights
from training.network import Network
from training.options import OPTIONS, read_options

__all__ = ["read_run", "restore"]

# What runs did that are older than these options.
_BEFORE: Final = {"age_loss": "distribution", "margin": 0.0, "mirror": True, "second_look": None}


def read_run(run_dir: Path, role: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options, also those of `_BEFORE` that it is older than, and the best weights of a run.

    Args:
        run_dir: its out_dir.
        role: what errors call it.

    Raises:
        ValueError: it is no folder of a run with whole epochs.
    """
    try:
        options, weights = read_options(run_dir), load_weights(run_dir / BEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"the {role} {run_dir} is not the folder of a run: no {error.filename}") from error
    if not {"backbone", "size"} <= options.keys():
        raise ValueError(f"{run_dir / OPTIONS} is damaged: it names no backbone, or no size of its chips")
    return {**_BEFORE, **options}, weights


def restore(network: Network, weights: dict[str, Any], run_dir: Path, role: str) -> None:
    """Gives a network the weights of a run; for the arguments see `read_run`.

    Raises:
        ValueError: they are of another backbone.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the {role} {run_dir} holds weights of another backbone than its {OPTIONS} names") from error
