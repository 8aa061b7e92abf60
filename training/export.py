"""Trained network + calibration -> the TorchScript artifact."""

import copy
import io
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import torch
from torch import Tensor, nn

from agegender.spec import SPEC_FILE, ModelSpec
from training.calibrate import Calibration, age_interval
from training.deploy import Deployed, TwoLooks, deploy
from training.files import written_whole
from training.network import AGE_BINS, Network
from training.options import TrainOptions
from training.second_look import SecondLook

__all__ = ["Artifact", "Output", "check_exportable", "export"]


# Lines of TorchScript's code such as `  stride : Final[Tuple[int, int]] = (1, 1)`.
_CONSTANTS: Final = re.compile(rb"(?:^ +\w+ : Final\[.*\] = .*\n)+", re.MULTILINE)


class Output(NamedTuple):
    """What the artifact returns for N chips; the fields are described in `Artifact.forward`."""

    age: Tensor
    age_low: Tensor
    age_high: Tensor
    gender_logits: Tensor


class Artifact(nn.Module):
    """Network and calibration in one module: chips in, calibrated predictions out."""

    radii: Tensor

    def __init__(self, network: Deployed | TwoLooks, calibration: Calibration) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("radii", torch.tensor(calibration.radii))
        self.gender_temperature = calibration.gender_temperature
        self.mean = calibration.mean

    def forward(self, chips: Tensor) -> Output:
        """Predicts.

        Args:
            chips: (N, 3, S, S) uint8 RGB.

        Returns:
            age, age_low, age_high: (N,) float32, years, within 0 to 116; gender_logits: (N, 2) float32, calibrated.
        """
        age_logits, gender_logits = self.network(chips)
        age, age_low, age_high = age_interval(age_logits, self.radii, self.mean)
        return Output(age, age_low, age_high, gender_logits / self.gender_temperature)


@torch.no_grad()
def check_exportable(network: Network, options: TrainOptions, second_look: SecondLook | None = None) -> None:
    """Finds out before a training whether its network takes the chips of all epochs and can be exported.

    Args:
        network: as it will be trained; stays as it is.
        options: of the run.
        second_look: as the options name it.

    Raises:
        ValueError: it cannot.
    """
    sizes = sorted({options.train_size(epoch) for epoch in range(options.epochs)} | {options.size})
    try:
        trained = copy.deepcopy(network).eval()
        chips = [torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8) for size in sizes]
        for batch in chips:
            trained(batch)
        deployed = deploy(network, chips[-1], options, second_look)
        with _ignoring_torchscript_deprecation():
            torch.jit.script(Artifact(deployed, Calibration((1.0,) * AGE_BINS, 1.0, options.mean)))
    except Exception as error:  # whatever the backbone's code raises at other sizes, or when it is traced or compiled
        said = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        reason = f"{type(error).__name__}: {said}".rstrip(".: ")
        precision = ", --precision float32" if options.precision == "int8" else ""
        raise ValueError(
            f"{options.backbone} cannot be trained on chips of {sizes[0]} to {sizes[-1]} pixels and exported in "
            f"{options.precision} ({reason}); try --backbone face_resnet{precision} or another --size with "
            "--no-progressive"
        ) from error


def export(network: Deployed | TwoLooks, calibration: Calibration, spec: ModelSpec, path: Path) -> None:
    """Writes the artifact, see `written_whole`.

    Args:
        network: as it is deployed.
        calibration: of this network.
        spec: goes into the artifact as it is.
        path: of the artifact.

    Raises:
        OSError: it cannot be written.
    """
    saved = io.BytesIO()
    with _ignoring_torchscript_deprecation():
        scripted = torch.jit.script(Artifact(network, calibration).eval())
        torch.jit.save(scripted, saved, _extra_files={SPEC_FILE: spec.to_json()})
    with written_whole(path) as temporary:
        _write_reproducibly(saved, temporary)


def _write_reproducibly(saved: BinaryIO, path: Path) -> None:
    """Keeps what the artifact is, and nothing of the process that wrote it: the same network gives the same bytes.

    Left out are the lines of the files that each operation came from, and torch's id of the archive, which nothing
    reads but its statistics. Constants stand in the order of a set, which differs from process to process.
    """
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            if member.filename.endswith(".py"):
                new.writestr(member, _CONSTANTS.sub(_sorted_lines, old.read(member)))
            elif not member.filename.endswith((".debug_pkl", "/.data/serialization_id")):
                new.writestr(member, old.read(member))


def _sorted_lines(found: re.Match[bytes]) -> bytes:
    return b"".join(sorted(found[0].splitlines(keepends=True)))


@contextmanager
def _ignoring_torchscript_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and still runs it
        yield
