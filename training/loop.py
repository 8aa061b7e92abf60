"""Chips + labels -> trained weights: the epochs, their checkpoints and their curves."""

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from agegender.image import Pixels
from agegender.process import core_count
from training.augment import augment
from training.cache import ChipCache
from training.calibrate import predicted_age
from training.data import Sample
from training.dataset import Faces
from training.files import written_whole
from training.loss import Targets, criterion
from training.network import Logits, Network
from training.options import TrainOptions

__all__ = [
    "BEST",
    "CURVE",
    "EVAL_BATCH",
    "LAST",
    "START_OVER",
    "AugmentedChips",
    "Batch",
    "EpochResult",
    "TrainState",
    "epoch_batches",
    "initial_state",
    "lacks_memory",
    "load_weights",
    "make_deterministic",
    "predict_logits",
    "read_curve",
    "save_whole",
    "train",
    "train_one_epoch",
]

BEST: Final = "best.pt"
LAST: Final = "last.pt"
CURVE: Final = "curve.csv"

# Common practice; docs/decisions/training.md compares no other values: the norm over all parameters that gradients are
# clipped to (Pascanu et al. 2013), and the share of steps that the one-cycle schedule rises in (Smith & Topin 2017).
_GRADIENT_CLIP: Final = 5.0
_WARM_UP_SHARE: Final = 0.1

EVAL_BATCH: Final = 128
START_OVER: Final = "give another --out-dir, or --no-resume to start over"

_SMALLER: Final = "lower --batch-size or --size, and give another --out-dir"

# One more error per ten genders weighs as much as one more year of age error when the best epoch is chosen.
_YEARS_PER_ERROR_RATE: Final = 10.0

Batch = tuple[Tensor, Tensor]  # chips (N, 3, S, S) uint8, rows (N,) of the targets


@dataclass(frozen=True)
class EpochResult:
    """One row of the learning curves; the validation figures are those of the averaged weights."""

    epoch: int
    size_px: int
    lr: float
    train_loss: float
    val_age_mae_years: float
    val_gender_accuracy: float

    @property
    def score(self) -> float:
        """What the best epoch has least of."""
        return self.val_age_mae_years + _YEARS_PER_ERROR_RATE * (1 - self.val_gender_accuracy)


_CURVE_FIGURES: Final = ("lr", "train_loss", "val_age_mae_years", "val_gender_accuracy")


class AugmentedChips(Dataset[tuple[Pixels, int]]):
    """The training split in one epoch: what a chip becomes depends on seed, epoch and index alone."""

    def __init__(self, samples: Sequence[Sample], cache: ChipCache, size_px: int, seed: int, epoch: int) -> None:
        self._cache = cache
        self.rows = [cache.rows[sample.digest] for sample in samples]
        self.size_px, self.seed, self.epoch = size_px, seed, epoch

    @cached_property
    def chips(self) -> Pixels:
        """Opened by the process that reads them: pickled for another, a memory map is all of its bytes."""
        return self._cache.open()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Pixels, int]:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        return augment(self.chips[self.rows[index]], self.size_px, rng), index


def train(network: Network, faces: Faces, targets: Targets, options: TrainOptions, device: torch.device) -> None:
    """Trains, and leaves `best.pt` and the learning curves in `options.out_dir`.

    Each epoch ends with a checkpoint. With `options.resume` the run goes on behind the last one, with the result of an
    unbroken run. Inside a torch.distributed process group, each process takes its share of every batch, and the first
    one validates and writes.

    Args:
        network: where to start; changed in place.
        faces: the splits.
        targets: of the training split, in its order.
        options: of the run.
        device: where the network runs.

    Raises:
        ValueError: the training diverged, or there was not enough memory for it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    state = initial_state(network, len(faces.samples["train"]), options)
    curve = _resume(state, options) if options.resume else []
    replica = DistributedDataParallel(network) if world > 1 else network
    val_chips = faces.chips.read(faces.samples["val"]) if rank == 0 else None
    for epoch in range(len(curve), options.epochs):
        if _out_of_patience(curve, options.patience):
            break
        torch.manual_seed(options.seed * 100_003 + epoch)
        size_px = options.train_size(epoch)
        chips = AugmentedChips(faces.samples["train"], faces.train_chips, size_px, options.seed, epoch)
        batches = epoch_batches(chips, options, device, rank, world)
        with _lack_of_memory_told():
            loss = train_one_epoch(replica, state, batches, targets, options, device, epoch)
            row = None
            if val_chips is not None:
                lr = float(state.scheduler.get_last_lr()[0])
                mae, accuracy = _validate(state.ema.module, faces.samples["val"], val_chips, options.mean, device)
                row = EpochResult(epoch, size_px, lr, loss, mae, accuracy)
        curve.append(_shared(row, device))
        _check_finite(curve[-1])
        if rank == 0:
            _keep(state, curve, options.out_dir)


@contextmanager
def _lack_of_memory_told() -> Iterator[None]:
    """Says in a sentence what torch raises where memory is full, some of it as bare RuntimeErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the GPU has no memory left for a batch; {_SMALLER}") from error
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            raise ValueError(
                "a process that augments chips died, mostly for lack of memory; the same command goes on, "
                "--num-workers 0 without such processes"
            ) from error
        if lacks_memory(error):
            raise ValueError(f"there is no memory left for a batch; {_SMALLER}") from error
        raise


def lacks_memory(error: Exception) -> bool:
    """Whether this is how Python or torch say that memory is full, the latter in bare RuntimeErrors too."""
    told = "not enough memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and told)


def make_deterministic(seed: int) -> None:
    """Lets this process compute the same from the same seed, again and again."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def read_curve(out_dir: Path) -> list[EpochResult]:
    """The learning curves of a run; none where its folder has no such file, or one of something else."""
    try:
        with (out_dir / CURVE).open(newline="") as file:
            return [
                EpochResult(int(row["epoch"]), int(row["size_px"]), *(float(row[name]) for name in _CURVE_FIGURES))
                for row in csv.DictReader(file)
            ]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return []


@dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint must hold; randomness is drawn anew from the seed in each epoch.

    Attributes:
        network: as it is trained.
        ema: the exponential average of its weights, which is what is evaluated and exported.
        optimizer: of the network.
        scheduler: of the optimizer's learning rate, step by step.
    """

    network: Network
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name).load_state_dict(state[name])


def initial_state(network: Network, samples: int, options: TrainOptions) -> TrainState:
    """The state before the first epoch.

    Args:
        network: to be trained; its device and memory format are settled.
        samples: number of pictures in an epoch.
        options: of the run.
    """
    steps = max(1, samples // options.batch_size) * options.epochs
    total = steps + 1
    if total * _WARM_UP_SHARE == 1:  # of a warm-up of one step torch divides by zero
        total += 1
    optimizer = torch.optim.AdamW(_parameter_groups(network, options.weight_decay), lr=options.lr, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total, pct_start=_WARM_UP_SHARE)
    ema = AveragedModel(network, multi_avg_fn=_warmed_up_average(options.ema_decay), use_buffers=True)
    return TrainState(network, ema, optimizer, scheduler)


def _warmed_up_average(decay: float) -> Callable[..., None]:
    """Exponential average whose memory grows with the steps, so that the initial weights do not linger in it."""

    def update(averaged: Any, current: Any, count: Tensor | int) -> None:
        steps = int(count)
        if not averaged[0].is_floating_point():  # counters, and the zeros of 8-bit ranges
            torch._foreach_copy_(averaged, current)
            return
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averaged, current, count)

    return update


def _resume(state: TrainState, options: TrainOptions) -> list[EpochResult]:
    path = options.out_dir / LAST
    try:
        checkpoint = load_weights(path)
    except FileNotFoundError:
        return []
    try:
        state.load_state_dict(checkpoint["state"])
        return [EpochResult(**row) for row in checkpoint["curve"]]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        if lacks_memory(error):
            raise
        raise ValueError(
            f"{path} is of another version of this code or its libraries ({type(error).__name__}); {START_OVER}"
        ) from error


def _out_of_patience(curve: list[EpochResult], patience: int | None) -> bool:
    if patience is None or not curve:
        return False
    best = min(curve, key=lambda row: row.score)
    return curve[-1].epoch - best.epoch >= patience


def _shared(row: EpochResult | None, device: torch.device) -> EpochResult:
    """The first process's row, in every process: all of them must decide alike when to stop."""
    rows = [row]
    if dist.is_initialized():
        dist.broadcast_object_list(rows, device=device)
    assert rows[0] is not None
    return rows[0]


def _check_finite(row: EpochResult) -> None:
    if not math.isfinite(row.score):
        raise ValueError(
            f"the training diverged in epoch {row.epoch + 1}; lower --lr, with another --out-dir or --no-resume"
        )


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decays matrices and kernels, not biases and normalization parameters."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def epoch_batches(
    dataset: AugmentedChips, options: TrainOptions, device: torch.device, rank: int = 0, world: int = 1
) -> "DataLoader[Batch]":
    """This process's share of each batch of the epoch, in an order drawn from the seed.

    Args:
        dataset: of the epoch.
        options: of the run.
        device: of the network; beside a GPU, cores are free for augmentation.
        rank: of this process, 0 to world - 1.
        world: number of processes.
    """
    size = min(options.batch_size, len(dataset) // world * world)
    generator = torch.Generator().manual_seed(options.seed * 100_003 + dataset.epoch)
    order = torch.randperm(len(dataset), generator=generator)[: len(dataset) // size * size]
    beside_gpu = min(8, max(1, core_count() // world)) if device.type == "cuda" else 0
    processes = beside_gpu if options.num_workers is None else options.num_workers
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # _collate makes batches of its items
        batch_sampler=order.view(-1, size)[:, rank::world].tolist(),
        num_workers=processes,
        prefetch_factor=4 if processes else None,
        worker_init_fn=_start_worker,
        collate_fn=_collate,
    )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the cores belong to the network


def _collate(items: list[tuple[Pixels, int]]) -> Batch:
    chips, rows = zip(*items, strict=True)
    return torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2), torch.tensor(rows)  # channels_last without a copy


def train_one_epoch(
    replica: nn.Module,
    state: TrainState,
    batches: "DataLoader[Batch]",
    targets: Targets,
    options: TrainOptions,
    device: torch.device,
    epoch: int,
) -> float:
    """Takes an optimizer step for each batch.

    Args:
        replica: the network of `state`, or what shares its gradients among processes.
        state: changed in place.
        batches: of the epoch, see `epoch_batches`.
        targets: of the training split, which the batches give rows of.
        options: of the run.
        device: of the network.
        epoch: counted from 0, for the progress bar.

    Returns:
        The mean loss of this process's share.
    """
    replica.train()
    total = 0.0
    quiet = dist.is_initialized() and dist.get_rank() > 0
    title = f"epoch {epoch + 1}/{options.epochs}"
    with tqdm(batches, desc=title, unit="batch", mininterval=1, disable=quiet) as bar:
        for step, (chips, rows) in enumerate(bar, 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                age, gender = replica(chips.to(device))
            loss = criterion(
                Logits(age.float(), gender.float()),
                targets.at(rows).to(device),
                age_loss=options.age_loss,
                gender_weight=options.gender_loss_weight,
            )
            _step(state, loss)
            total += loss.item()
            bar.set_postfix(loss=f"{total / step:.3f}", refresh=False)
    return total / len(batches)


def _step(state: TrainState, loss: Tensor) -> None:
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.network.parameters(), _GRADIENT_CLIP)
    state.optimizer.step()
    state.scheduler.step()
    state.ema.update_parameters(state.network)


def _validate(
    network: nn.Module, samples: Sequence[Sample], chips: npt.NDArray[np.uint8], mean: bool, device: torch.device
) -> tuple[float, float]:
    """Age MAE in years, of what the artifact would predict, and gender accuracy."""
    logits = predict_logits(network, chips, device)
    ages = torch.tensor([float(sample.labels.age_years) for sample in samples])
    genders = torch.tensor([sample.labels.gender for sample in samples])
    mae = (predicted_age(logits.age, mean) - ages).abs().mean().item()
    return mae, (logits.gender.argmax(dim=1) == genders).float().mean().item()


@torch.no_grad()
def predict_logits(network: nn.Module, chips: npt.NDArray[np.uint8], device: torch.device) -> Logits:
    """Runs the network, in evaluation mode, over (N, S, S, 3) uint8 chips; N logits come back on the CPU in float32."""
    network.eval()
    parts = []
    for start in range(0, len(chips), EVAL_BATCH):
        batch = torch.from_numpy(chips[start : start + EVAL_BATCH]).permute(0, 3, 1, 2)
        parts.append([part.float().cpu() for part in network(batch.to(device))])
    return Logits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _keep(state: TrainState, curve: list[EpochResult], out_dir: Path) -> None:
    """Writes the curves, the weights if they are the best so far, and last the checkpoint."""
    row = curve[-1]
    with SummaryWriter(str(out_dir / "tensorboard"), purge_step=row.epoch) as writer:
        for name, value in asdict(row).items():
            writer.add_scalar(name, value, row.epoch)
    with written_whole(out_dir / CURVE) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(row)))
        table.writeheader()
        table.writerows(asdict(each) for each in curve)
    tqdm.write(
        f"epoch {row.epoch + 1}: loss {row.train_loss:.3f}, validation age MAE {row.val_age_mae_years:.3f} years, "
        f"gender accuracy {row.val_gender_accuracy:.2%}"
    )
    if row.score <= min(each.score for each in curve):
        save_whole(state.ema.module.state_dict(), out_dir / BEST)
    save_whole({"state": state.state_dict(), "curve": [asdict(each) for each in curve]}, out_dir / LAST)


def save_whole(value: object, path: Path) -> None:
    """torch.save, see `written_whole`.

    Raises:
        OSError: it cannot be written.
    """
    with written_whole(path) as temporary:
        try:
            torch.save(value, temporary)
        except RuntimeError as error:  # whatever the system says, torch says only where in its own code it was
            raise OSError(f"{temporary} cannot be written; is the disk full?") from error


def load_weights(path: Path) -> dict[str, Any]:
    """What `save_whole` wrote, on the CPU wherever it was when it was saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            raise TypeError(f"{type(state).__name__} instead of a dictionary")
    except OSError:
        raise
    except Exception as error:  # whatever the bytes of another file make a pickle do
        raise ValueError(f"{path} holds no weights of a training ({type(error).__name__})") from error
    return state
