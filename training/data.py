"""Labelled folder -> samples -> splits, with nothing silently dropped and no picture on two sides."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import cv2
import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_AGE_YEARS",
    "Labels",
    "Rejected",
    "Sample",
    "Split",
    "check_data_dir",
    "evenly_chosen",
    "near_duplicate_groups",
    "parse_name",
    "perceptual_hash",
    "scan",
    "split_samples",
]

MAX_AGE_YEARS: Final = 116
_MAX_RACE: Final = 4
_IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

Split = Literal["train", "val", "test"]

# UTKFace: age_gender_race_date.jpg; a few files lack the race, and people label their own folders age_gender_x.jpg.
_NAME: Final = re.compile(r"(?P<age>\d+)_(?P<gender>\d+)_(?:(?P<race>\d)_)?[^_]*", re.ASCII)

# Two pictures are taken for the same one when at most this many of the 256 bits of their hashes differ. Among the
# aligned UTKFace chips pairs within 44 bits are the same photograph by eye; from 50 on, other people appear.
_NEAR_BITS: Final = 46

_PAIRS: Final = 2**24  # of hashes, compared at once in 64 MB


@dataclass(frozen=True)
class Labels:
    """What a file's name says: apparent age in whole years, 0 to 116; gender (0 male, 1 female); UTKFace's race label,
    0 to 4, for the audit only."""

    age_years: int
    gender: int
    race: int | None


@dataclass(frozen=True)
class Sample:
    """One labelled picture; `digest` is the SHA-256 of its bytes."""

    path: Path
    labels: Labels
    digest: str


@dataclass
class Rejected:
    """Files that are not trained on: path -> reason."""

    reasons: dict[Path, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Number of files per kind of reason, most frequent first."""
        return dict(Counter(reason.split(":")[0] for reason in self.reasons.values()).most_common())


def parse_name(name: str) -> Labels:
    """Reads the labels out of a UTKFace file name.

    Raises:
        ValueError: the name is not `age_gender_race_date`, or a label is out of its range.
    """
    match = _NAME.fullmatch(name.split(".")[0].strip())
    if match is None:
        raise ValueError(f"unparsable name: expected age_gender_race_date.jpg, got {name}")
    age, gender = int(match["age"]), int(match["gender"])
    if age > MAX_AGE_YEARS:
        raise ValueError(f"age out of range: {age} is not in 0-{MAX_AGE_YEARS}")
    if gender not in (0, 1):
        raise ValueError(f"gender out of range: {gender} is neither 0 nor 1")
    race = int(match["race"]) if match["race"] else None
    if race is not None and race > _MAX_RACE:
        raise ValueError(f"race out of range: {race} is not in 0-{_MAX_RACE}")
    return Labels(age, gender, race)


def scan(data_dir: Path) -> tuple[list[Sample], Rejected]:
    """Lists the labelled pictures below a directory, in the order of their paths.

    Returns:
        The first of each group of pictures with the same bytes, and the files that were left out.

    Raises:
        ValueError: there is no such directory, or not one usable picture in it.
    """
    check_data_dir(data_dir)
    samples: dict[str, Sample] = {}
    rejected = Rejected()
    for path in _pictures(data_dir, rejected):
        try:
            labels = parse_name(path.name)
            digest = _digest(path)
        except (ValueError, OSError) as error:
            rejected.reasons[path] = str(error)
            continue
        first = samples.setdefault(digest, Sample(path, labels, digest))
        if first.path != path:
            other = "" if first.labels == labels else " with other labels"
            rejected.reasons[path] = f"same bytes as another file{other}: {first.path.name}"
    if not samples:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in rejected.counts().items())
        left_out = f"; left out: {reasons}" if reasons else ""
        raise ValueError(f"no usable picture in {data_dir}; expected files named age_gender_race_date.jpg{left_out}")
    return list(samples.values()), rejected


def check_data_dir(data_dir: Path) -> None:
    """Finds out before other work whether there is a folder to scan.

    Raises:
        ValueError: there is no such directory.
    """
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir} is not a directory; give the folder that holds the labelled faces")


def _pictures(data_dir: Path, rejected: Rejected) -> list[Path]:
    """The files below a directory that are named like pictures, in the order of their paths; links are not entered."""

    def unreadable(error: OSError) -> None:
        rejected.reasons[Path(error.filename)] = f"directory that cannot be read: {error.strerror}"

    pictures = []
    for folder, folders, names in os.walk(data_dir, onerror=unreadable):
        for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
            rejected.reasons[Path(link)] = "link to a directory, which is not entered: give the directory itself"
        pictures += [Path(folder, name) for name in names if Path(name).suffix.lower() in _IMAGE_SUFFIXES]
    return sorted(pictures)


def _digest(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("no regular file")  # reading a pipe would wait for ever
    return hashlib.sha256(path.read_bytes()).hexdigest()


def perceptual_hash(chip: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """pHash with 256 bits: signs of the 16x16 lowest DCT coefficients against their median (Zauner 2010).

    Args:
        chip: (S, S, 3) uint8 RGB.

    Returns:
        (256,) bool.
    """
    grey = cv2.resize(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
    low = cv2.dct(grey.astype(np.float32))[:16, :16]
    return (low > np.median(low)).ravel()


def near_duplicate_groups(hashes: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Joins pictures whose hashes nearly agree, transitively.

    Args:
        hashes: (N, 256) bool.

    Returns:
        (N,) the index of each picture's group, named by its first member.
    """
    signs = hashes.astype(np.float32) * 2 - 1
    parents = np.arange(len(signs))
    rows = max(1, _PAIRS // max(1, len(signs)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = int(parents[index])
        return index

    for start in range(0, len(signs), rows):
        differing = (signs.shape[1] - signs[start : start + rows] @ signs.T) / 2
        for row, other in np.argwhere(differing <= _NEAR_BITS):
            low, high = sorted((root(start + int(row)), root(int(other))))
            parents[high] = low
    return np.array([root(index) for index in range(len(parents))])


def split_samples(
    samples: Sequence[Sample], groups: npt.NDArray[np.int64], *, val_frac: float, test_frac: float, seed: int
) -> list[Split]:
    """Deals whole groups of near-duplicates into train, val and test.

    A group goes where the SHA-256 of the seed and the digest of its first member by path says, so that a picture stays
    on its side when others are added to the folder: unless one of them is its near-duplicate and sorts before it, or
    joins two groups into one.

    Args:
        samples: N pictures in the order of their paths.
        groups: (N,) see `near_duplicate_groups`.
        val_frac, test_frac: shares of the groups; the rest is trained on.
        seed: which groups go where.

    Returns:
        The split of each picture.
    """
    return [_side(samples[int(group)].digest, val_frac, test_frac, seed) for group in groups]


def _side(digest: str, val_frac: float, test_frac: float, seed: int) -> Split:
    draw = int(hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()[:13], 16) / 16**13
    if draw < test_frac:
        return "test"
    return "val" if draw < test_frac + val_frac else "train"


def evenly_chosen(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """At most `count` samples, evenly from first to last.

    In the order of names, which begin with the age, the first pictures are of children and the very old.
    """
    count = min(count, len(samples))
    return [samples[place * len(samples) // count] for place in range(count)]
