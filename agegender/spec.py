"""What an artifact says of itself, read without loading it.

TorchScript files are zip archives; what this project adds to them is JSON. So whoever only asks which model it is, or
whether it is one, waits for no network and needs no torch.
"""

import io
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from agegender.errors import ModelLoadError

__all__ = [
    "DEFAULT_MODEL",
    "FORMAT_VERSION",
    "MAX_MARGIN",
    "SPEC_FILE",
    "ModelSpec",
    "interval_name",
    "read_artifact",
    "read_spec",
]

DEFAULT_MODEL: Final = Path("model_store/agegender.pt")
FORMAT_VERSION: Final = 1
MAX_MARGIN: Final = 10
SPEC_FILE: Final = "spec.json"
_SPEC_MEMBER: Final = f"extra/{SPEC_FILE}"


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
        if not 0 <= self.chip_margin < MAX_MARGIN:
            raise ValueError(f"chip_margin must lie between 0 and {MAX_MARGIN}, not {self.chip_margin!r}")
        if len(self.labels) != 2 or not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be two names, not {self.labels!r}")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage must lie between 0 and 1, not {self.coverage!r}")

    def identity(self, sha256: str) -> dict[str, Any]:
        """What outputs and answers say of the model that they come from, whose bytes have this SHA-256."""
        return {"name": self.name, "version": self.version, "sha256": sha256, "coverage": self.coverage}

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


def interval_name(coverage: float | None) -> str:
    """What people call an interval of this nominal coverage; None where it is not known."""
    return "interval" if coverage is None else f"{100 * coverage:g}% interval"


def read_artifact(path: str | Path) -> tuple[ModelSpec, bytes]:
    """Returns the spec and the bytes after checking every CRC, without loading the network.

    Raises:
        ModelLoadError: missing, damaged, not TorchScript, without description, or of another format version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelLoadError(
            f"cannot read the model {path}: {error.strerror}; give the path of one, or train one with `make train`"
        ) from error
    return read_spec(data, name=str(path)), data


def read_spec(data: bytes, *, name: str) -> ModelSpec:
    """The spec in an artifact's bytes, after checking every CRC; errors call them `name`.

    Raises:
        ModelLoadError: see `read_artifact`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {member.partition("/")[2]: member for member in archive.namelist()}
            if archive.testzip() is not None or "constants.pkl" not in members:
                raise zipfile.BadZipFile
            text = archive.read(members[_SPEC_MEMBER]).decode(errors="replace") if _SPEC_MEMBER in members else ""
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{name} is not a TorchScript file, or a damaged one") from error
    if not text:
        raise ModelLoadError(f"{name} holds no {SPEC_FILE}: it was not made by `make train`")
    return ModelSpec.from_json(text)
