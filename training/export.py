"""Trained network + calibration -> the TorchScript artifact."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agegender.model import SPEC_FILE, ModelSpec
from training.calibrate import Calibration, age_interval
from training.deploy import Deployed

__all__ = ["Artifact", "export"]


class Output(NamedTuple):
    """What the artifact returns for N chips; the fields are described in `Artifact.forward`."""

    age: Tensor
    age_low: Tensor
    age_high: Tensor
    gender_logits: Tensor


class Artifact(nn.Module):
    """Network and calibration in one module: chips in, calibrated predictions out."""

    radii: Tensor

    def __init__(self, network: Deployed, calibration: Calibration) -> None:
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


def export(network: Deployed, calibration: Calibration, spec: ModelSpec, path: Path) -> None:
    """Writes the artifact beside `path` and renames it into place."""
    artifact = Artifact(network, calibration).eval()
    temporary = path.with_suffix(".tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and still runs it
        scripted = torch.jit.script(artifact)
        torch.jit.save(scripted, str(temporary), _extra_files={SPEC_FILE: spec.to_json()})
    os.replace(temporary, path)
