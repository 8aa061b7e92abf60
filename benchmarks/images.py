"""The images that are timed: those of data sets, or made from sample photographs where these are absent."""

import argparse
import random
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from batch.samples import package_file, write_samples

__all__ = [
    "PHOTOGRAPHS",
    "Images",
    "add_data_option",
    "add_image_options",
    "add_photos_option",
    "make_images",
    "sample_face",
]

PHOTOGRAPHS: Final = {"1 MP": (1155, 866), "12 MP": (4000, 3000)}


class Images(NamedTuple):
    """Files that are timed, and what they are, for the page."""

    paths: list[Path]
    description: str


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--data-dir`."""
    parser.add_argument("--data-dir", type=Path, help="JPEG chips of aligned faces (default: variants of a sample)")


def add_photos_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--photos-dir`."""
    parser.add_argument("--photos-dir", type=Path, help="JPEG photographs (default: two samples)")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--data-dir` and `--photos-dir`."""
    add_data_option(parser)
    add_photos_option(parser)


def make_images(workload: str, data_dir: Path | None, photos_dir: Path | None, folder: Path) -> Images:
    """Photographs of a size that `PHOTOGRAPHS` names, and faces of 200 x 200 pixels for other workloads.

    Faces come in an order that is always the same and has nothing to do with their names, which in UTKFace begin with
    the age: some faces take longer than others, and whoever does few of them must have the same mixture.

    Args:
        data_dir: aligned chips of faces; without it, variants of a sample are made.
        photos_dir: photographs of any size; without it, the samples are taken.
        folder: where what has to be made is written.

    Raises:
        ValueError: a folder was given that holds no JPEG file.
    """
    if workload in PHOTOGRAPHS:
        sources = _found(photos_dir) if photos_dir else _samples(folder)
        paths = _photographs(sources, PHOTOGRAPHS[workload], folder / workload)
        return Images(paths, f"{len(paths)} photographs, enlarged to {workload}")
    if data_dir is None:
        paths = _chips(folder)
        return Images(paths, f"{len(paths)} variants of a sample, 200 px")
    paths = _found(data_dir)
    random.Random(0).shuffle(paths)
    return Images(paths, f"{len(paths):,} files of {data_dir.resolve().name}")


def sample_face() -> Image.Image:
    """The face of a public-domain photograph, 300 x 300 pixels."""
    portrait = Image.open(package_file("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))
    return portrait.convert("RGB").crop((106, 30, 406, 330))


def _found(folder: Path) -> list[Path]:
    if paths := sorted(path.resolve() for path in folder.glob("*.jpg")):
        return paths
    raise ValueError(f"{folder} holds no .jpg file; give a folder that does, or leave it out for samples")


def _samples(folder: Path) -> list[Path]:
    write_samples(folder / "samples")
    return [folder / "samples" / name for name in ("astronaut.png", "grace_hopper.jpg")]


def _chips(folder: Path) -> list[Path]:
    """Variants of one face, where no data set is there."""
    face = sample_face()
    (folder / "chips").mkdir(exist_ok=True)
    paths = [folder / "chips" / f"{number:03}.jpg" for number in range(100)]
    for number, path in enumerate(paths):
        face.rotate(number % 20 - 10).resize((200, 200)).save(path, quality=90)
    return paths


def _photographs(sources: list[Path], size: tuple[int, int], folder: Path) -> list[Path]:
    """Each at one size, with noise as of a sensor, so that its file is about as large as a camera's."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    paths = []
    for source in sources:
        pixels = np.asarray(Image.open(source).convert("RGB").resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + noise.integers(-6, 7, pixels.shape, np.int16), 0, 255).astype(np.uint8)
        paths.append(folder / f"{source.stem}.jpg")
        Image.fromarray(noisy).save(paths[-1], quality=90)
    return paths
