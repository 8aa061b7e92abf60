"""The images that are timed: those of data sets, or made from sample photographs where these are absent."""

from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from batch.samples import write_samples

PHOTOGRAPHS: Final = {"1 MP": (1155, 866), "12 MP": (4000, 3000)}


def make_images(workload: str, data_dir: Path, photos_dir: Path, folder: Path) -> list[Path]:
    """Image files: photographs of a size that `PHOTOGRAPHS` names, and faces of 200 x 200 pixels for other workloads.

    Args:
        data_dir: aligned chips of faces.
        photos_dir: photographs of any size.
        folder: where what has to be made is written.
    """
    if workload in PHOTOGRAPHS:
        return _photographs(_found(photos_dir) or _samples(folder), PHOTOGRAPHS[workload], folder / workload)
    return _found(data_dir) or _chips(folder)


def _found(folder: Path) -> list[Path]:
    return sorted(path.resolve() for path in folder.glob("*.jpg")) if folder.is_dir() else []


def _samples(folder: Path) -> list[Path]:
    write_samples(folder / "samples")
    return [folder / "samples" / name for name in ("astronaut.png", "grace_hopper.jpg")]


def _chips(folder: Path) -> list[Path]:
    """Variants of one face, where no data set is there."""
    face = Image.open(_samples(folder)[1]).convert("RGB").crop((106, 30, 406, 330))
    (folder / "chips").mkdir(exist_ok=True)
    paths = [folder / "chips" / f"{number:03}.jpg" for number in range(100)]
    for number, path in enumerate(paths):
        face.rotate(number % 20 - 10).resize((200, 200)).save(path, quality=90)
    return paths


def _photographs(sources: list[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """Each enlarged to a size, with noise as a sensor has, so that its file is about as large as a camera's."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    paths = []
    for source in sources:
        pixels = np.asarray(Image.open(source).convert("RGB").resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + noise.integers(-6, 7, pixels.shape, np.int16), 0, 255).astype(np.uint8)
        paths.append(folder / f"{source.stem}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths
