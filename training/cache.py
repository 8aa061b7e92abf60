"""Samples -> chips, cut by the core's own code once and kept on disk.

A chip is kept under the SHA-256 of its picture's bytes, in a file named after everything that decides how it is cut:
the chip's size, the source of the core's modules, the detector's weights and the versions of Pillow and OpenCV.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt
import PIL
from tqdm import tqdm

import agegender.chips
import agegender.detector
import agegender.image
from agegender import AgeGenderError
from training.data import Rejected, Sample

__all__ = ["ChipCache", "cutting_version", "load_chips"]

_CUTTERS: Final = (agegender.image, agegender.detector, agegender.chips)


@dataclass(frozen=True)
class ChipCache:
    """Chips in a memory-mapped array.

    Attributes:
        chips: (N, S, S, 3) uint8 RGB.
        rows: digest of a picture -> its row.
    """

    chips: npt.NDArray[np.uint8]
    rows: dict[str, int]


def cutting_version(size_px: int) -> str:
    """Sixteen hex digits that change whenever a chip could come out otherwise."""
    state = hashlib.sha256(f"{size_px} {PIL.__version__} {cv2.__version__}".encode())
    state.update(agegender.detector.detector_weights())
    for module in _CUTTERS:
        state.update(Path(str(module.__file__)).read_bytes())
    return state.hexdigest()[:16]


def load_chips(
    samples: Sequence[Sample], size_px: int, cache_dir: Path, rejected: Rejected, *, processes: int | None = None
) -> tuple[list[Sample], ChipCache]:
    """Returns the samples that gave a chip, with their chips; the others are added to `rejected`."""
    folder = cache_dir / f"chips-{size_px}-{cutting_version(size_px)}"
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_index(folder)
    missing = [sample for sample in samples if sample.digest not in known]
    if missing:
        known = _extend(folder, known, missing, size_px, processes)
    failed = {sample.digest: known[sample.digest] for sample in samples if isinstance(known[sample.digest], str)}
    for sample in samples:
        if sample.digest in failed:
            rejected.reasons[sample.path] = str(failed[sample.digest])
    chips = np.load(folder / "chips.npy", mmap_mode="r")
    rows = {digest: row for digest, row in known.items() if isinstance(row, int)}
    return [sample for sample in samples if sample.digest not in failed], ChipCache(chips, rows)


def _read_index(folder: Path) -> dict[str, int | str]:
    """Digest -> row in the array, or the reason why there is none."""
    try:
        index: dict[str, int | str] = json.loads((folder / "index.json").read_text())
    except FileNotFoundError:
        return {}
    return index


def _extend(
    folder: Path, known: dict[str, int | str], missing: Sequence[Sample], size_px: int, processes: int | None
) -> dict[str, int | str]:
    """Writes a larger array and index beside the old ones, then puts them in place: array first, index last."""
    old = sum(isinstance(row, int) for row in known.values())
    chips = np.lib.format.open_memmap(
        folder / "chips.tmp.npy", mode="w+", dtype=np.uint8, shape=(old + len(missing), size_px, size_px, 3)
    )
    if old:
        chips[:old] = np.load(folder / "chips.npy", mmap_mode="r")[:old]
    index, row = dict(known), old
    for sample, cut in zip(missing, _cut_all(missing, size_px, processes), strict=True):
        index[sample.digest] = cut if isinstance(cut, str) else row
        if not isinstance(cut, str):
            chips[row] = cut
            row += 1
    chips.flush()
    (folder / "index.tmp.json").write_text(json.dumps(index))
    os.replace(folder / "chips.tmp.npy", folder / "chips.npy")
    os.replace(folder / "index.tmp.json", folder / "index.json")
    return index


def _cut_all(samples: Sequence[Sample], size_px: int, processes: int | None) -> Iterator[npt.NDArray[np.uint8] | str]:
    with ProcessPoolExecutor(processes, initializer=_start_cutter, initargs=(size_px,)) as pool:
        chips = pool.map(_cut, [sample.path for sample in samples], chunksize=64)
        yield from tqdm(chips, total=len(samples), desc="cutting chips", unit="img")


_cutter: tuple[agegender.detector.FaceDetector, int] | None = None  # set in the pool's processes alone


def _start_cutter(size_px: int) -> None:
    global _cutter
    cv2.setNumThreads(1)
    _cutter = (agegender.detector.FaceDetector(max_faces=1), size_px)


def _cut(path: Path) -> npt.NDArray[np.uint8] | str:
    assert _cutter is not None
    detector, size_px = _cutter
    try:
        pixels = agegender.image.decode_image(path.read_bytes())
    except (AgeGenderError, OSError) as error:
        return f"unreadable: {error}"
    faces = detector.detect(pixels)
    return agegender.chips.cut_chip(pixels, faces[0], size_px) if faces else "no face found"
