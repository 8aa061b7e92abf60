"""Chips + labels -> trained weights: the epochs, their checkpoints and their curves."""

import csv
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from agegender.image import Pixels
from training.augment import augment
from training.cache import ChipCache
from training.data import Sample
from training.loss import criterion, expected_age
from training.network import Network
from training.options import TrainOptions

__all__ = ["EpochResult", "Raw", "predict_logits", "train"]

_GRADIENT_CLIP: Final = 5.0
_WARM_UP_SHARE: Final = 0.1
_EVAL_BATCH: Final = 128

# A tenth more gender errors weighs as much as a year more of age error when the best epoch is chosen.
_YEARS_PER_ERROR_RATE: Final = 10.0


@dataclass(frozen=True)
class Raw:
    """The network's uncalibrated output for N chips: age logits (N, 117) and gender logits (N, 2), float32."""

    age_logits: Tensor
    gender_logits: Tensor


@dataclass(frozen=True)
class EpochResult:
    """One row of the learning curves."""

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


class AugmentedChips(Dataset[tuple[Pixels, float, int]]):
    """The training split of one epoch; what a chip becomes depends on seed, epoch and index alone."""

    def __init__(self, samples: list[Sample], cache: ChipCache, size_px: int, seed: int, epoch: int) -> None:
        self.samples, self.cache, self.size_px, self.seed, self.epoch = samples, cache, size_px, seed, epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Pixels, float, int]:
        sample = self.samples[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        chip = augment(np.asarray(self.cache.chips[self.cache.rows[sample.digest]]), self.size_px, rng)
        return chip, float(sample.labels.age_years), sample.labels.gender


def train(
    network: Network,
    train_samples: list[Sample],
    train_cache: ChipCache,
    val_samples: list[Sample],
    val_chips: npt.NDArray[np.uint8],
    options: TrainOptions,
    device: torch.device,
) -> list[EpochResult]:
    """Trains, writes `last.pt` after each epoch and `best.pt` after each better one, and returns the curves.

    With `options.resume` it goes on behind the last whole epoch found in `out_dir`, with the result of an unbroken run.
    """
    network = network.to(device, memory_format=torch.channels_last)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
    optimizer = torch.optim.AdamW(_parameter_groups(network, options.weight_decay), lr=options.lr, fused=True)
    steps = max(1, len(train_samples) // options.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=steps * options.epochs + 1, pct_start=_WARM_UP_SHARE
    )
    state = _State(network, ema, optimizer, scheduler)
    curve = _resume(state, options) if options.resume else []
    writer = SummaryWriter(str(options.out_dir / "tensorboard"), purge_step=len(curve))
    for epoch in range(len(curve), options.epochs):
        if _out_of_patience(curve, options.patience):
            break
        _seed_everything(options.seed, epoch)
        size_px = options.train_size(epoch)
        batches = _batches(AugmentedChips(train_samples, train_cache, size_px, options.seed, epoch), options)
        loss = _train_one_epoch(state, batches, steps, options, device, f"epoch {epoch + 1}/{options.epochs}")
        result = _validate(ema.module, val_samples, val_chips, device)
        curve.append(EpochResult(epoch, size_px, scheduler.get_last_lr()[0], loss, *result))
        _record(curve, writer, options.out_dir)
        if curve[-1].score <= min(row.score for row in curve):
            _save(ema.module.state_dict(), options.out_dir / "best.pt")
        _save({"state": state.state_dict(), "curve": [asdict(row) for row in curve]}, options.out_dir / "last.pt")
    writer.close()
    return curve


@dataclass(frozen=True)
class _State:
    """Everything that a checkpoint must hold; randomness is drawn anew from the seed in each epoch."""

    network: Network
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def _resume(state: _State, options: TrainOptions) -> list[EpochResult]:
    try:
        checkpoint = torch.load(options.out_dir / "last.pt", weights_only=True)
    except FileNotFoundError:
        return []
    state.load_state_dict(checkpoint["state"])
    return [EpochResult(**row) for row in checkpoint["curve"]]


def _out_of_patience(curve: list[EpochResult], patience: int | None) -> bool:
    if patience is None or not curve:
        return False
    best = min(curve, key=lambda row: row.score)
    return curve[-1].epoch - best.epoch >= patience


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decays matrices and kernels, not biases and normalization parameters."""
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _seed_everything(seed: int, epoch: int) -> None:
    torch.manual_seed(seed * 100_003 + epoch)
    random.seed(seed * 100_003 + epoch)


def _batches(dataset: AugmentedChips, options: TrainOptions) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    loader: DataLoader[tuple[Pixels, float, int]] = DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=len(dataset) >= options.batch_size,
        num_workers=options.num_workers,
        prefetch_factor=4 if options.num_workers else None,
        worker_init_fn=_start_worker,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(options.seed * 100_003 + dataset.epoch),
    )
    return iter(loader)


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the cores belong to the network


def _collate(items: list[tuple[Pixels, float, int]]) -> tuple[Tensor, Tensor, Tensor]:
    chips, ages, genders = zip(*items, strict=True)
    batch = torch.from_numpy(np.stack(chips)).permute(0, 3, 1, 2)  # channels_last without a copy
    return batch, torch.tensor(ages, dtype=torch.float32), torch.tensor(genders)


def _train_one_epoch(
    state: _State,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    options: TrainOptions,
    device: torch.device,
    title: str,
) -> float:
    state.network.train()
    total = 0.0
    with tqdm(batches, desc=title, total=steps, unit="batch", mininterval=2) as bar:
        for step, (chips, age, gender) in enumerate(bar, 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
                logits = state.network(chips.to(device))
            loss = criterion(
                type(logits)(logits.age.float(), logits.gender.float()),
                age.to(device),
                gender.to(device),
                age_loss=options.age_loss,
                gender_weight=options.gender_loss_weight,
            )
            state.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(state.network.parameters(), _GRADIENT_CLIP)
            state.optimizer.step()
            state.scheduler.step()
            state.ema.update_parameters(state.network)
            total += loss.item()
            bar.set_postfix(loss=f"{total / step:.3f}", rate=f"{bar.format_dict['rate'] or 0:.2f}", refresh=False)
    return total / steps


def _validate(
    network: nn.Module, samples: list[Sample], chips: npt.NDArray[np.uint8], device: torch.device
) -> tuple[float, float]:
    raw = predict_logits(network, chips, device)
    ages = torch.tensor([float(sample.labels.age_years) for sample in samples])
    genders = torch.tensor([sample.labels.gender for sample in samples])
    mae = (expected_age(raw.age_logits) - ages).abs().mean().item()
    return mae, (raw.gender_logits.argmax(dim=1) == genders).float().mean().item()


@torch.inference_mode()
def predict_logits(network: nn.Module, chips: npt.NDArray[np.uint8], device: torch.device) -> Raw:
    """Runs the network over (N, S, S, 3) uint8 chips."""
    network.eval()
    parts = []
    for start in range(0, len(chips), _EVAL_BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(chips[start : start + _EVAL_BATCH])).permute(0, 3, 1, 2)
        parts.append(tuple(part.float().cpu() for part in network(batch.to(device))))
    return Raw(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _record(curve: list[EpochResult], writer: SummaryWriter, out_dir: Path) -> None:
    row = curve[-1]
    for name, value in asdict(row).items():
        writer.add_scalar(name, value, row.epoch)
    with (out_dir / "curve.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(row)))
        table.writeheader()
        table.writerows(asdict(each) for each in curve)
    tqdm.write(
        f"epoch {row.epoch + 1}: loss {row.train_loss:.3f}, val age MAE {row.val_age_mae_years:.3f} years, "
        f"val gender accuracy {row.val_gender_accuracy:.2%}"
    )


def _save(value: object, path: Path) -> None:
    """Writes beside and renames, so that a kill leaves the old checkpoint or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)
