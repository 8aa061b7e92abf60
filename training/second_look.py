"""A network that looks again at the faces whose gender the first is not sure of: slower, and exacter there."""

from pathlib import Path
from typing import Final, NamedTuple

from training.branch import parse_backbones
from training.earlier import read_run, refuse_rounded, restore
from training.network import Network, create_network
from training.options import OPTIONS, TrainOptions

__all__ = ["SecondLook", "load_second_look"]

_ROLE: Final = "second look"


class SecondLook(NamedTuple):
    """The trained network of an earlier run, its backbones' names, and whether it sees each chip's mirror image too."""

    network: Network
    backbone: str
    mirror: bool


def load_second_look(run_dir: Path, options: TrainOptions) -> SecondLook:
    """Loads what `options.second_look` names.

    Args:
        run_dir: out_dir of the earlier run; its options say of which size its chips are.
        options: of the run whose artifact looks twice.

    Raises:
        ValueError: the folder holds no run, or one that does not go with these options.
    """
    earlier, weights = read_run(run_dir, _ROLE)
    if (margin := earlier["margin"]) != options.margin:
        raise ValueError(f"the {_ROLE} {run_dir} was trained with --margin {margin}; give it here too")
    if ((loss := earlier["age_loss"]) != "distribution") != options.mean:
        raise ValueError(f"the {_ROLE} {run_dir} was trained with --age-loss {loss}, which predicts otherwise")
    if earlier["second_look"]:
        raise ValueError(f"the {_ROLE} {run_dir} looks twice itself; give a run without --second-look")
    refuse_rounded(weights, options, f"the {_ROLE} {run_dir} was")
    backbone = "+".join(f"{name}@{side or earlier['size']}" for name, side in parse_backbones(earlier["backbone"]))
    network = create_network(backbone, pretrained=False, dropout=0.0, drop_path=0.0)
    restore(network, weights, options.size, f"the {_ROLE} {run_dir} holds", f"its {OPTIONS} names")
    return SecondLook(network, backbone, earlier["mirror"])
