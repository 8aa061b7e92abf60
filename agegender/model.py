"""chips -> predictions: the TorchScript artifact.

Every call of torch.jit outside `training.export`, tests and benchmarks is in this file, so that torch.export can take
its place in one edit.
"""

import hashlib
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from agegender.errors import ModelLoadError
from agegender.image import Pixels, as_torch_takes_it
from agegender.spec import DEFAULT_MODEL, FORMAT_VERSION, ModelSpec, read_artifact, read_spec

__all__ = ["ChipModel", "Model", "Predictions", "find_device"]

Floats = npt.NDArray[np.float32]

# Warning filters and torch's engine belong to the whole process, so one thread loads at a time.
_LOADING: Final = threading.Lock()


class Predictions(NamedTuple):
    """Predictions for N chips.

    Attributes:
        age: (N,) float32, years.
        age_low: (N,) float32, years; lower end of the calibrated interval.
        age_high: (N,) float32, years; upper end.
        gender_probs: (N, 2) float32, calibrated, in the order of the spec's labels.
    """

    age: Floats
    age_low: Floats
    age_high: Floats
    gender_probs: Floats


@runtime_checkable
class ChipModel(Protocol):
    """What predicts chips: a `Model`, or what stands for one that is elsewhere.

    Attributes:
        spec: the artifact's description.
        sha256: the artifact's SHA-256, in hexadecimal digits.
    """

    spec: ModelSpec
    sha256: str

    def predict(self, chips: Pixels) -> Predictions:
        """See `Model.predict`."""


class Model:
    """A loaded artifact, see `ChipModel`. Safe to share between threads."""

    def __init__(self, artifact: str | Path | bytes = DEFAULT_MODEL, *, device: str = "auto") -> None:
        """Loads the artifact and checks that it is one.

        Args:
            artifact: the TorchScript file, or what is in it.
            device: cpu, cuda, cuda:N, or auto for CUDA where there is one.

        Raises:
            ModelLoadError: missing, not TorchScript, without description, of another format, or no such device.
        """
        self.device = find_device(device)
        if isinstance(artifact, bytes):
            self._name, data = "the model", artifact
            self.spec = read_spec(data, name=self._name)
        else:
            self._name = str(artifact)
            self.spec, data = read_artifact(artifact)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._module = self._load(data)
        self._try_out()

    def predict(self, chips: Pixels) -> Predictions:
        """Runs the network.

        Args:
            chips: (N, S, S, 3) uint8 RGB with S = `spec.chip_size_px`; N may be 0.

        Raises:
            ValueError: the chips are of another shape or type.
        """
        side = self.spec.chip_size_px
        if chips.shape[1:] != (side, side, 3) or chips.dtype != np.uint8:
            raise ValueError(f"chips must be (N, {side}, {side}, 3) uint8, not {chips.shape} {chips.dtype}")
        if len(chips) == 0:
            nothing = np.empty(0, np.float32)
            return Predictions(nothing, nothing, nothing, np.empty((0, 2), np.float32))
        batch = torch.from_numpy(as_torch_takes_it(chips)).permute(0, 3, 1, 2)  # channels_last without a copy
        # TorchScript fuses operations on CUDA only; on a CPU the optimizer costs seconds and gains nothing.
        with torch.inference_mode(), torch.jit.optimized_execution(self.device.type == "cuda"):
            output = self._module(batch.to(self.device))
            probs = output.gender_logits.softmax(dim=1)
            values = [each.cpu().numpy() for each in (output.age, output.age_low, output.age_high, probs)]
        return Predictions(*values)

    def _load(self, artifact: bytes) -> Any:
        try:
            with _LOADING, warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and still runs it
                _ignore_quantization_warning()
                # First to the CPU: 8-bit weights can be unpacked nowhere else, and only the others move on.
                with _fastest_engine():
                    module = torch.jit.load(io.BytesIO(artifact), map_location="cpu")  # type: ignore[no-untyped-call]
                return torch.jit.freeze(module.to(self.device).eval())
        except RuntimeError as error:
            self._tell_of_memory(error)
            raise ModelLoadError(f"{self._name} is not a TorchScript file that this torch can load") from error

    def _try_out(self) -> None:
        side = self.spec.chip_size_px
        try:
            shapes = [column.shape for column in self.predict(np.zeros((1, side, side, 3), np.uint8))]
            fits = shapes == [(1,), (1,), (1,), (1, 2)]
        except (RuntimeError, AttributeError, TypeError) as error:
            self._tell_of_memory(error)
            raise ModelLoadError(
                f"{self._name} does not run on {self.device} ({type(error).__name__}); train one with `make train`"
            ) from error
        if not fits:
            raise ModelLoadError(
                f"{self._name} answers in another form than format version {FORMAT_VERSION}; train one with "
                "`make train`"
            )

    def _tell_of_memory(self, error: Exception) -> None:
        """Recognised by its text: inside TorchScript, torch's own kind of error becomes a bare RuntimeError."""
        if "out of memory" in str(error):
            raise ModelLoadError(
                f"{self.device} has no memory left for {self._name}; free some, or take another device"
            ) from error


def find_device(name: str) -> torch.device:
    """The device that is called auto (CUDA where there is one), cpu, cuda or cuda:N.

    Raises:
        ModelLoadError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"unknown device {name!r}; take auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"unsupported device {name!r}; take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ModelLoadError(
            f"device {name} was asked for, but torch finds {count} CUDA devices; take cpu or another one"
        )
    return device


@contextmanager
def _fastest_engine() -> Iterator[None]:
    """8-bit weights that are unpacked in this context run on the library that is fastest on this processor.

    On x86 that is oneDNN alone; torch's own choice there leaves part of a network, or without AVX-512 all of it, to
    FBGEMM. `benchmarks.engines` has the ratio.
    """
    backend = torch.backends.quantized
    before = backend.engine
    if before == "x86" and "onednn" in backend.supported_engines:
        backend.engine = "onednn"
    try:
        yield
    finally:
        backend.engine = before


def _ignore_quantization_warning() -> None:
    """Triggers torch's once-per-process deprecation warning of quantized tensors here, where it is filtered.

    From inside TorchScript it would go to stderr.
    """
    warnings.simplefilter("ignore", UserWarning)
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
