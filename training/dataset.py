"""Folder -> the samples and chips of the three splits."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from training.cache import ChipCache, load_chips
from training.data import Rejected, Sample, Split, near_duplicate_groups, perceptual_hash, scan, split_samples
from training.files import written_whole
from training.options import TrainOptions

__all__ = ["ARTIFACT", "Faces", "Splits", "load_faces", "read_splits", "splits_path", "write_splits"]

ARTIFACT: Final = "agegender.pt"  # its name in a run's folder
_DIGITS: Final = 16
_HEADER: Final = "digest,split"
_LINE: Final = re.compile(rf"([0-9a-f]{{{_DIGITS}}}),(train|val|test)")


@dataclass(frozen=True)
class Faces:
    """Labelled faces, dealt into splits.

    Attributes:
        samples: of each split.
        train_chips: a quarter larger than the network's chips, so that augmentation has something to cut from.
        chips: of the validation and test splits, cut as in inference.
        rejected: what was left out.
        trained_on: first digits of the SHA-256 of every picture that must not be tested on: what earlier runs trained
            or validated on, near-duplicates of those, and the training split before balancing.
    """

    samples: dict[Split, list[Sample]]
    train_chips: ChipCache
    chips: ChipCache
    rejected: Rejected
    trained_on: frozenset[str]

    def splits(self) -> "Splits":
        """Which picture is on which side."""
        own = {each.digest[:_DIGITS]: side for side, part in self.samples.items() for each in part}
        return Splits({**dict.fromkeys(self.trained_on, "train"), **own})

    def labels_digest(self) -> str:
        """SHA-256 of what is trained and validated on, in its order: a run that goes on needs the same."""
        lines = [
            f"{each.digest} {each.labels.age_years} {each.labels.gender}\n"
            for side in ("train", "val")
            for each in self.samples[side]
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Splits:
    """Which pictures a run trained, validated and tested on, by the first digits of their SHA-256."""

    sides: dict[str, str]

    def of(self, sample: Sample) -> str | None:
        """The split of a picture, or None if the run did not have it."""
        return self.sides.get(sample.digest[:_DIGITS])

    def changes(self, other: "Splits") -> str:
        """How others differ from these, in words; empty if they do not."""
        own, others = self.sides, other.sides
        counts = {
            "added": len(others.keys() - own.keys()),
            "gone": len(own.keys() - others.keys()),
            "on another side": sum(own[digest] != others[digest] for digest in own.keys() & others.keys()),
        }
        return ", ".join(f"{count} {change}" for change, count in counts.items() if count)


def load_faces(options: TrainOptions) -> Faces:
    """Scans, cuts and deals.

    Raises:
        ValueError: a split would be empty, or the training split's pictures of one gender where both are to be
            balanced; no usable picture was found; or it is not known what an earlier run was trained on.
    """
    inherited = _inherited(options)
    samples, rejected = scan(options.data_dir)
    samples = _some(samples, options.max_samples, options.seed)
    samples, train_chips = load_chips(
        samples, options.size * 5 // 4, margin=options.margin, cache_dir=options.cache_dir, rejected=rejected
    )
    groups = _groups(samples, train_chips)
    sides = split_samples(
        samples,
        groups,
        val_frac=options.val_frac,
        test_frac=options.test_frac,
        seed=options.seed,
    )
    splits: dict[Split, list[Sample]] = {"train": [], "val": [], "test": []}
    for sample, side in zip(samples, sides, strict=True):
        splits[side].append(sample)
    trained = _with_doubles(samples, groups, {digest for digest, side in inherited.items() if side == "train"})
    chosen = _with_doubles(samples, groups, {digest for digest, side in inherited.items() if side != "test"})
    splits["val"] = _unseen(splits["val"], trained, rejected)
    splits["test"] = _unseen(splits["test"], chosen, rejected)
    trained_on = chosen | {sample.digest[:_DIGITS] for sample in splits["train"]}
    if options.balanced_by_gender:
        splits["train"] = _balanced(splits["train"], options.max_per_gender, options.seed)
    _, chips = load_chips(
        splits["val"] + splits["test"],
        options.size,
        margin=options.margin,
        cache_dir=options.cache_dir,
        rejected=rejected,
    )
    for side in ("val", "test"):
        splits[side] = [sample for sample in splits[side] if sample.digest in chips.rows]
    if not all(splits.values()):
        sizes = ", ".join(f"{side} {len(part)}" for side, part in splits.items())
        left_out = f"; left out: {counts}" if (counts := rejected.counts()) else ""
        raise ValueError(
            f"too few usable pictures in {options.data_dir} for three splits: {sizes}{left_out}; "
            "give more pictures, or larger --val-frac and --test-frac"
        )
    return Faces(splits, train_chips, chips, rejected, trained_on)


def _inherited(options: TrainOptions) -> dict[str, str]:
    """The split of each picture in the earlier runs; where they disagree, train wins over val, val over test."""
    runs = options.earlier_runs
    paths = [splits_path(run / ARTIFACT) for run in runs]
    for path in paths:
        if path.parent.is_dir() and not path.exists():
            raise ValueError(
                f"{path} is missing, which says what the weights beside it were trained on; "
                "an empty file says that it was none of these pictures"
            )
    all_sides = [read_splits(path).sides for path in paths]
    order = ("test", "val", "train")
    return {digest: side for least in order for sides in all_sides for digest, side in sides.items() if side == least}


def _with_doubles(samples: list[Sample], groups: npt.NDArray[np.int64], inherited: set[str]) -> frozenset[str]:
    """What was inherited, and the near-duplicates of it that are here."""
    known = {group for sample, group in zip(samples, groups, strict=True) if sample.digest[:_DIGITS] in inherited}
    doubles = {s.digest[:_DIGITS] for s, group in zip(samples, groups, strict=True) if group in known}
    return frozenset(inherited | doubles)


def _unseen(samples: list[Sample], seen: frozenset[str], rejected: Rejected) -> list[Sample]:
    """Leaves out what an earlier run has seen: the network would be judged by what it was told."""
    kept = []
    for sample in samples:
        if sample.digest[:_DIGITS] in seen:
            rejected.reasons[sample.path] = "an earlier run that this one builds on has seen it"
        else:
            kept.append(sample)
    return kept


def write_splits(faces: Faces, path: Path) -> None:
    """Writes which picture was on which side, so that nobody tests on what was trained on: lines of `digest,split`."""
    lines = [f"{digest},{side}\n" for digest, side in faces.splits().sides.items()]
    with written_whole(path) as temporary:
        temporary.write_text(f"{_HEADER}\n" + "".join(sorted(lines)))


def splits_path(artifact: Path) -> Path:
    """Where the splits of an artifact's training run lie: beside it."""
    return artifact.with_suffix(".splits.csv")


def read_splits(path: Path) -> "Splits":
    """What `write_splits` wrote; none where there is no such file, or an empty one, as people may write it.

    Raises:
        ValueError: there is something else.
    """
    try:
        header, *lines = path.read_text(encoding="ascii").splitlines() or [_HEADER]
        if header != _HEADER:
            raise ValueError
        return Splits(dict(_parse_line(line) for line in lines))
    except FileNotFoundError:
        return Splits({})
    except (IsADirectoryError, ValueError):
        raise ValueError(
            f"{path} does not hold lines of {_HEADER} as a training writes them; bring back that of the run, or else "
            "what it was trained on would be taken for new"
        ) from None


def _parse_line(line: str) -> tuple[str, str]:
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError
    return match[1], match[2]


def _some(samples: list[Sample], count: int | None, seed: int) -> list[Sample]:
    """At most `count` samples; which ones depends on seed and content, not on the others."""
    if count is None or count >= len(samples):
        return samples
    chosen = sorted(samples, key=lambda sample: hashlib.sha256(f"some {seed} {sample.digest}".encode()).digest())
    return sorted(chosen[:count], key=lambda sample: sample.path)


def _balanced(samples: list[Sample], most: int | None, seed: int) -> list[Sample]:
    genders = [[sample for sample in samples if sample.labels.gender == gender] for gender in (0, 1)]
    if samples and not all(genders):
        missing = "female" if genders[0] else "male"
        raise ValueError(f"there are no training pictures labelled {missing}; leave out --balanced-by-gender")
    count = min(len(part) for part in genders)
    count = count if most is None else min(count, most)
    return sorted((sample for part in genders for sample in _some(part, count, seed)), key=lambda sample: sample.path)


def _groups(samples: Sequence[Sample], chips: ChipCache) -> npt.NDArray[np.int64]:
    pixels = chips.open()
    return near_duplicate_groups(np.array([perceptual_hash(pixels[chips.rows[each.digest]]) for each in samples]))
