"""chips -> predictions: the TorchScript artifact and the description that travels inside it.

Every call of torch.jit outside `training.export` is in this file, so that torch.export can take its place in one edit.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from agegender.errors import ModelLoadError
from agegender.image import Pixels

__all__ = ["DEFAULT_MODEL", "FORMAT_VERSION", "SPEC_FILE", "Model", "ModelSpec", "Predictions", "find_device"]

DEFAULT_MODEL: Final = Path("model_store/agegender.pt")
FORMAT_VERSION: Final = 1
SPEC_FILE: Final = "spec.json"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelSpec:
    """What an artifact says of itself.

    Attributes:
        format_version: version of the artifact's interface; this package reads `FORMAT_VERSION`.
        name: name of the model.
        version: version of the weights.
        chip_size_px: side of the chips that it takes.
        chip_margin: margin that its chips were cut with, see `cut_chip`.
        labels: names of the two gender classes, in the order of the logits.
        coverage: nominal coverage of the age interval, 0 to 1.
        backbone: name of the network.
        training_data: name of the data that it was trained on.
        licence: licence of the weights, as the data allow.
        metrics: figures on the test split, by name.
        commit: commit of the code that made it.
        options: resolved options of the training run.
    """

    format_version: int
    name: str
    version: str
    chip_size_px: int
    chip_margin: float
    labels: tuple[str, str]
    coverage: float
    backbone: str
    training_data: str
    licence: str
    metrics: dict[str, float] = field(default_factory=dict)
    commit: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.chip_size_px, int) or self.chip_size_px < 1:
            raise ValueError(f"chip_size_px must be a whole number of pixels, not {self.chip_size_px!r}")
        if not 0 <= self.chip_margin < 10:
            raise ValueError(f"chip_margin must lie between 0 and 10, not {self.chip_margin!r}")
        if len(self.labels) != 2 or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be two names, not {self.labels!r}")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, not {self.coverage!r}")

    def to_json(self) -> str:
        """The text of `SPEC_FILE`."""
        return json.dumps(asdict(self), indent=1, default=str)

    @classmethod
    def from_json(cls, text: str) -> "ModelSpec":
        """Reads `SPEC_FILE`.

        Raises:
            ModelLoadError: not a description, or one of another format version.
        """
        try:
            values = json.loads(text)
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise ModelLoadError(
                    f"the model has format version {version}, this package reads {FORMAT_VERSION}; "
                    "retrain it with `make train` or install the matching version of agegender"
                )
            known = {each.name for each in fields(cls)}
            values["labels"] = tuple(values.get("labels", ()))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"the model's {SPEC_FILE} is damaged: {error}") from error


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


class Model:
    """A loaded artifact. Safe to share between threads."""

    def __init__(self, path: str | Path = DEFAULT_MODEL, *, device: str = "auto") -> None:
        """Loads the artifact and checks that it is one.

        Args:
            path: the TorchScript file.
            device: cpu, cuda, cuda:N, or auto for CUDA where there is one.

        Raises:
            ModelLoadError: missing, not TorchScript, without description, of another format, or no such device.
        """
        self.path = Path(path)
        self.device = find_device(device)
        self.sha256 = _sha256(self.path)
        self.spec, self._module = _load(self.path, self.device)
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
        own = np.require(chips, requirements=["C", "W"])  # torch warns of memory that it could not write to
        batch = torch.from_numpy(own).permute(0, 3, 1, 2)  # channels_last without a copy
        with torch.inference_mode():
            output = self._module(batch.to(self.device))
            probs = output.gender_logits.softmax(dim=1)
            values = [each.cpu().numpy() for each in (output.age, output.age_low, output.age_high, probs)]
        return Predictions(*values)

    def _try_out(self) -> None:
        side = self.spec.chip_size_px
        try:
            shapes = [column.shape for column in self.predict(np.zeros((1, side, side, 3), np.uint8))]
            fits = shapes == [(1,), (1,), (1,), (1, 2)]
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{self.path} does not run on {self.device} ({type(error).__name__}); train one with `make train`"
            ) from error
        if not fits:
            raise ModelLoadError(
                f"{self.path} answers in another form than format version {FORMAT_VERSION}; train one with `make train`"
            )


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


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelLoadError(f"cannot read the model {path}: {error.strerror}; train one with `make train`") from error


def _load(path: Path, device: torch.device) -> tuple[ModelSpec, Any]:
    extra = {SPEC_FILE: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and still runs it
            _hear_out_quantization()
            # First to the CPU: 8-bit weights can be unpacked nowhere else, and only the others move on.
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
            if not extra[SPEC_FILE]:
                raise ModelLoadError(f"{path} holds no {SPEC_FILE}: it was not made by `make train`")
            spec = ModelSpec.from_json(extra[SPEC_FILE])
            return spec, torch.jit.freeze(module.to(device).eval())
    except RuntimeError as error:
        raise ModelLoadError(f"{path} is not a TorchScript file that this torch can load") from error


def _hear_out_quantization() -> None:
    """Lets torch deprecate its 8-bit tensors where it is not heard.

    It does so once in a process, and from inside TorchScript it would write to stderr, past Python's filters.
    """
    warnings.simplefilter("ignore", UserWarning)
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
