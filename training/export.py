"""Trained network + calibration -> the TorchScript artifact."""

import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from agegender.model import SPEC_FILE, ModelSpec
from training.calibrate import Calibration
from training.network import AGE_BINS, Network

__all__ = ["Artifact", "export"]


class Output(NamedTuple):
    """What the artifact returns for N chips; the fields are described in `Artifact.forward`."""

    age: Tensor
    age_low: Tensor
    age_high: Tensor
    gender_logits: Tensor


class Artifact(nn.Module):
    """Network and calibration in one module: chips in, calibrated predictions out."""

    def __init__(self, network: Network, calibration: Calibration) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("years", torch.arange(AGE_BINS, dtype=torch.float32))
        self.register_buffer("quantiles", torch.tensor(calibration.quantiles, dtype=torch.float32))
        self.register_buffer("edges", torch.tensor(calibration.edges_years, dtype=torch.float32))
        self.spread_floor = calibration.spread_floor_years
        self.gender_temperature = calibration.gender_temperature

    def forward(self, chips: Tensor) -> Output:
        """Predicts.

        Args:
            chips: (N, 3, S, S) uint8 RGB.

        Returns:
            age, age_low, age_high: (N,) float32, years, within 0 to 116; gender_logits: (N, 2) float32, calibrated.
        """
        age_logits, gender_logits = self.network(chips)
        probs = age_logits.softmax(dim=1)
        age = probs @ self.years
        variance = (probs * (self.years[None, :] - age[:, None]) ** 2).sum(dim=1)
        spread = torch.sqrt(variance + self.spread_floor**2)
        quantiles = self.quantiles[torch.bucketize(age, self.edges)]
        last = float(self.years.shape[0] - 1)
        age_low = (age - quantiles[:, 0] * spread).clamp(0.0, last)
        age_high = (age + quantiles[:, 1] * spread).clamp(0.0, last)
        return Output(age, age_low, age_high, gender_logits / self.gender_temperature)


def export(network: Network, calibration: Calibration, spec: ModelSpec, path: Path) -> None:
    """Writes the artifact beside `path` and renames it into place."""
    artifact = Artifact(network.cpu().to(memory_format=torch.contiguous_format), calibration).eval()
    temporary = path.with_suffix(".tmp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript, and still runs it
        scripted = torch.jit.script(artifact)
        torch.jit.save(scripted, str(temporary), _extra_files={SPEC_FILE: spec.to_json()})
    os.replace(temporary, path)
