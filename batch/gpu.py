"""chips -> predictions in processes that hold a GPU and do nothing else, shared by those that work on images.

The chain stays one: `Predictor` runs as ever, with a model that is elsewhere. A block stays in one process from its
names to its records, so what holds for checkpoints and order holds here.
"""

import faulthandler
import random
from typing import TYPE_CHECKING, Any, Final

import ray

from agegender import ModelSpec
from agegender.image import Pixels
from agegender.process import keep_freed_memory
from batch.request import Resources

if TYPE_CHECKING:
    from agegender.model import Predictions

__all__ = ["BATCH_SIZE", "RemoteModel", "start_models"]

# Large enough that the network's time on a GPU is short against what it takes to fill a batch.
BATCH_SIZE: Final = 256


class _ModelProcess:
    """A model in a process of its own."""

    def __init__(self, model: bytes, device: str) -> None:
        from agegender import Model  # here, for the driver has no use for torch

        keep_freed_memory()
        self._model = Model(model, device=device)

    def about(self) -> tuple[ModelSpec, str]:
        return self._model.spec, self._model.sha256

    def predict(self, chips: Pixels) -> "Predictions":
        return self._model.predict(chips)


class RemoteModel:
    """Stands for a `Model` in `Predictor`; each call goes to one of several processes.

    Attributes:
        spec: see `ChipModel`.
        sha256: see `ChipModel`.
    """

    def __init__(self, processes: list[Any]) -> None:
        """Takes the actors of `start_models`, and waits until one answers."""
        self._processes = processes
        about: tuple[ModelSpec, str] = ray.get(random.choice(processes).about.remote())
        self.spec, self.sha256 = about

    def predict(self, chips: Pixels) -> "Predictions":
        """See `Model.predict`."""
        faulthandler.cancel_dump_traceback_later()  # of `Scorer`: a GPU that stands still is not the input's fault
        predictions: Predictions = ray.get(random.choice(self._processes).predict.remote(chips))
        return predictions


def start_models(model: "ray.ObjectRef[bytes]", resources: Resources) -> list[Any]:
    """Starts the processes that predict; they start again when they die, and repeat what they had in hand.

    Args:
        model: the artifact, which the caller must hold as long as they may start again.
        resources: how many, and where they predict.
    """
    on_gpu = resources.device != "cpu"
    actor = ray.remote(num_cpus=0, num_gpus=int(on_gpu), max_restarts=-1, max_task_retries=-1)(_ModelProcess)
    return [actor.remote(model, resources.device) for _ in range(resources.gpus)]
