"""The same loop on several Ray Train workers: cores, GPUs or machines."""

import os
import signal
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer, get_device

from agegender.process import core_count
from training.dataset import Faces
from training.loop import make_deterministic, train
from training.loss import Targets
from training.network import Network
from training.options import TrainOptions

__all__ = ["train_on_workers"]


def train_on_workers(network: Network, faces: Faces, targets: Targets, options: TrainOptions) -> None:
    """Runs `train` with `options.workers` processes that average their gradients.

    On several machines `out_dir` and `cache_dir` must lie on storage that all of them share. Both must be absolute:
    each worker runs in a directory of its own.

    Raises:
        ValueError: a worker failed, or there are fewer processors than workers.
    """
    config = {"network": network, "faces": faces, "targets": targets, "options": options}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=True)
        on_gpus = _on_gpus(options)
        _require("GPU" if on_gpus else "CPU", options.workers)
        TorchTrainer(
            _work,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=on_gpus),
            run_config=RunConfig(storage_path=str(options.out_dir / "ray")),
        ).fit()
    except TrainingFailedError as error:
        raise ValueError(f"training on {options.workers} workers failed: {_reason(error)}") from error
    except SystemExit as ended:  # which Ray Train's own handler makes of an interrupt
        raise KeyboardInterrupt from ended
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray and Ray Train leave their own behind
        ray.shutdown()


def _on_gpus(options: TrainOptions) -> bool:
    """Of a cluster it is the machines that work that matter, not the one where training was called."""
    if options.device != "auto":
        return options.device.startswith("cuda")
    if "RAY_ADDRESS" not in os.environ:
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= options.workers)


def _require(kind: str, workers: int) -> None:
    """Ray would wait for ever; a cluster may grow, and is left to do so."""
    there = int(ray.cluster_resources().get(kind, 0))
    if "RAY_ADDRESS" not in os.environ and there < workers:
        raise ValueError(f"{workers} workers need a {kind} each, and there are {there}; lower --workers")


def _reason(error: TrainingFailedError) -> str:
    """What Ray says in a traceback, in its last line."""
    cause = next(iter(error.worker_failures.values()), error) if isinstance(error, WorkerGroupError) else error
    return str(cause).strip().splitlines()[-1]


def _work(config: dict[str, Any]) -> None:
    options: TrainOptions = config["options"]
    torch.set_num_threads(options.threads or max(1, core_count() // options.workers))
    make_deterministic(options.seed)
    train(config["network"], config["faces"], config["targets"], options, get_device())
