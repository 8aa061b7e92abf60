"""How much longer an epoch takes than the network's forward and backward: `python -m benchmarks.training DATA_DIR`.

In turns, trains one epoch as `make train` does, and runs the network forward and backward over the same batches, which
are ready beforehand. Arguments behind DATA_DIR go to the training, such as `--backbone resnet18` or
`--max-samples 20000`.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import psutil
import torch
import tyro

from agegender.process import core_count, keep_freed_memory
from benchmarks.command_line import errors_without_traceback
from training.dataset import load_faces
from training.loop import AugmentedChips, Batch, epoch_batches, initial_state, train_one_epoch
from training.loss import Targets, criterion, label_targets
from training.network import Logits, Network, create_network
from training.options import TrainOptions

__all__ = ["main"]

_PICTURES: Final = 1200
_ROUNDS: Final = 3
_CPU: Final = torch.device("cpu")


@errors_without_traceback("training")
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both times, their ratio, and how busy the cores were during the epoch."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 0 if "--help" in given else 2
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        default = TrainOptions(
            Path(given[0]), cache_dir=Path(folder), epochs=1, progressive=False, max_samples=_PICTURES
        )
        _measure(tyro.cli(TrainOptions, args=given[1:], default=default, prog="python -m benchmarks.training DATA_DIR"))
    return 0


def _measure(options: TrainOptions) -> None:
    keep_freed_memory(most_bytes=None)  # as `training.run` does
    torch.set_num_threads(options.threads or core_count())
    faces = load_faces(options)
    samples = faces.samples["train"]
    network = create_network(options.backbone, pretrained=False, dropout=options.dropout, drop_path=options.drop_path)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    targets = label_targets([s.labels.age_years for s in samples], [s.labels.gender for s in samples])
    chips = AugmentedChips(samples, faces.train_chips, options.size, options.seed, 0)
    ready = list(epoch_batches(chips, options, _CPU))
    epochs, networks, busy = [], [], []
    for _ in range(_ROUNDS):
        state = initial_state(network, len(samples), options)
        psutil.cpu_percent()
        batches = epoch_batches(chips, options, _CPU)
        epochs.append(_seconds(train_one_epoch, network, state, batches, targets, options, _CPU, 0))
        busy.append(psutil.cpu_percent())
        networks.append(_seconds(_forward_and_backward, network, ready, targets, options))
    ratio = median(epoch / own for epoch, own in zip(epochs, networks, strict=True))
    print(
        f"{options.backbone} at {options.size} pixels, {len(ready)} batches of {options.batch_size}: "
        f"epoch {median(epochs):.1f} s, forward and backward {median(networks):.1f} s, ratio {ratio:.2f}; "
        f"cores busy {median(busy):.0f}%"
    )


def _forward_and_backward(network: Network, ready: list[Batch], targets: Targets, options: TrainOptions) -> None:
    for chips, rows in ready:
        loss = criterion(
            Logits(*network(chips)),
            targets.at(rows),
            age_loss=options.age_loss,
            gender_weight=options.gender_loss_weight,
        )
        network.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
