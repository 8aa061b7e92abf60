"""Samples -> chips, cut by the core's own code once and kept on disk.

A chip is kept under the SHA-256 of its picture's bytes, in a folder named after everything that decides how it is cut:
the chip's geometry, the source of the core's modules, the detector's weights and the versions of the libraries.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import PIL
import torch
from tqdm import tqdm

import agegender.chips
import agegender.detector
import agegender.image
from agegender import AgeGenderError, FaceDetector, cut_chip
from agegender.detector import DECODE_SIDE_PX
from agegender.image import read_header
from agegender.process import core_count
from training.data import Rejected, Sample
from training.files import written_whole

__all__ = ["ChipCache", "cutting_version", "load_chips"]

_LOG: Final = logging.getLogger(__name__)
_CUTTERS: Final = (agegender.image, agegender.detector, agegender.chips)
_FEW: Final = 512  # pictures that are cut faster than processes start


@dataclass(frozen=True)
class ChipCache:
    """Where the chips of many pictures lie.

    Attributes:
        path: NumPy file of the chips, (N, S, S, 3) uint8 RGB.
        rows: digest of a picture -> its row.
    """

    path: Path
    rows: dict[str, int]

    def open(self) -> npt.NDArray[np.uint8]:
        """The chips, memory-mapped."""
        chips: npt.NDArray[np.uint8] = np.load(self.path, mmap_mode="r")
        return chips

    def read(self, samples: Sequence[Sample]) -> npt.NDArray[np.uint8]:
        """The chips of some samples, in memory and in their order."""
        return self.open()[[self.rows[sample.digest] for sample in samples]]


def cutting_version(size_px: int, margin: float) -> str:
    """Sixteen hex digits that change whenever a chip could come out otherwise."""
    libraries = f"{PIL.__version__} {cv2.__version__} {torch.__version__} {version('onnxruntime')}"
    state = hashlib.sha256(f"{size_px} {margin} {libraries}".encode())
    state.update(agegender.detector.detector_weights())
    for module in _CUTTERS:
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]


def load_chips(
    samples: Sequence[Sample], size_px: int, margin: float, cache_dir: Path, rejected: Rejected
) -> tuple[list[Sample], ChipCache]:
    """Cuts the chips that are missing.

    Args:
        samples: the pictures.
        size_px: side S of the chips.
        margin: how far they reach beyond the face template on each side, as a share of its side.
        cache_dir: keeps them, in a folder for each `cutting_version`.
        rejected: gets the samples that have no chip.

    Returns:
        The samples that have a chip, in their order, and where the chips lie.

    Raises:
        OSError: the disk cannot take them.
        ValueError: a process that cuts them died.
    """
    folder = cache_dir / f"chips-{size_px}-{cutting_version(size_px, margin)}"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        known = _read_index(folder)
        missing = [sample for sample in samples if sample.digest not in known]
        if missing:
            known = _extend(folder, known, missing, size_px, margin)
    rows = {digest: row for digest, row in known.items() if isinstance(row, int)}
    for sample in samples:
        if sample.digest not in rows:
            rejected.reasons[sample.path] = str(known.get(sample.digest, "could not be read or cut this time"))
    return [sample for sample in samples if sample.digest in rows], ChipCache(folder / "chips.npy", rows)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one run at a time read and extend a folder; the kernel unlocks it when a run is killed."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_index(folder: Path) -> dict[str, int | str]:
    """Digest -> row in the array, or the reason why there is none."""
    try:
        index: dict[str, int | str] = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        return {}
    return index


def _extend(
    folder: Path, known: dict[str, int | str], missing: Sequence[Sample], size_px: int, margin: float
) -> dict[str, int | str]:
    """Writes a larger array and index beside the old ones, then puts them in place: array first, index last.

    Old chips keep their rows, so that a run that knows only those goes on reading them rightly. What was cut before an
    interrupt is kept.
    """
    old = sum(isinstance(row, int) for row in known.values())
    chips = np.lib.format.open_memmap(
        folder / "chips.tmp.npy", mode="w+", dtype=np.uint8, shape=(old + len(missing), size_px, size_px, 3)
    )
    _reserve(folder / "chips.tmp.npy")
    if old:
        chips[:old] = np.load(folder / "chips.npy", mmap_mode="r")[:old]
    index, row = dict(known), old
    cut = partial(_cut, size_px=size_px, margin=margin)
    try:
        for sample, chip in zip(missing, _cut_all(missing, cut), strict=True):
            if isinstance(chip, str):
                index[sample.digest] = chip
            elif chip is not None:
                chips[row] = chip
                index[sample.digest] = row
                row += 1
    finally:
        chips.flush()
        os.replace(folder / "chips.tmp.npy", folder / "chips.npy")
        with written_whole(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(index))
    return index


def _reserve(path: Path) -> None:
    """Takes the disk space of a sparse file: where a mapped one finds the disk full, the kernel ends the process."""
    if not hasattr(os, "posix_fallocate"):  # as macOS does not
        return
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink()
        raise OSError(
            f"{path.parent} cannot take {size / 1e6:.0f} MB of chips ({error.strerror}); give another --cache-dir"
        ) from error


# The chip of a picture's largest face, or the reason why there is none; None where the next run should try again.
_Outcome = npt.NDArray[np.uint8] | str | None


def _cut_all(samples: Sequence[Sample], cut: "partial[_Outcome]") -> Iterator[_Outcome]:
    paths = [sample.path for sample in samples]
    bar = partial(tqdm, total=len(samples), desc="cutting chips", unit="img", mininterval=1)
    if len(samples) <= _FEW:
        yield from bar(map(cut, paths))
        return
    # Spawned, not forked: this process may have threads of torch, whose locks a fork would copy as they are.
    with ProcessPoolExecutor(core_count(), get_context("spawn"), initializer=_take_one_thread) as pool:
        try:
            yield from bar(pool.map(cut, paths, chunksize=64))
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that cuts chips died, mostly for lack of memory; the same command goes on with the rest"
            ) from error


def _take_one_thread() -> None:
    """There is a process for each core."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _cut(path: Path, *, size_px: int, margin: float) -> _Outcome:
    try:
        pixels = read_header(path.read_bytes()).decode(min_side_px=DECODE_SIDE_PX)
        faces = _detector().detect(pixels)
        return cut_chip(pixels, faces[0], size_px, margin=margin) if faces else "no face found"
    except (AgeGenderError, ValueError) as error:
        return f"unreadable: {error}"
    except (OSError, MemoryError):  # which may be over when the next run tries again
        return None
    except Exception:  # a fault of the code, for whose sake hours of cutting do not end
        _LOG.exception("%s could not be cut", path)
        return None


@cache
def _detector() -> FaceDetector:
    return FaceDetector(max_faces=1)
