"""`--dry-run`: what a run would do, counted and estimated, and nothing written."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Final

from agegender import AgeGenderError
from agegender.image import quiet_pillow
from agegender.process import core_count
from batch.errors import RequestError
from batch.listing import Input, Listing
from batch.location import read_bytes
from batch.request import Request
from batch.scorer import score

__all__ = ["preview"]

_SAMPLE: Final = 24
_SUFFIXES: Final = 8
# As measured on two cores that did nothing else: Ray's start, and that of the processes that load the network.
_START_S: Final = 9


def preview(request: Request, listing: Listing, known: set[bytes] | None, say: Callable[[str], None]) -> None:
    """Lists the sources and scores a random handful of files in this process.

    Args:
        request: what the caller asks for.
        listing: of its sources.
        known: see `Listing.inputs`.
        say: takes each message to people.

    Raises:
        RequestError: the model cannot be loaded.
        SourceError: a source cannot be listed.
    """
    sample, suffixes = _draw(listing.inputs(known), random.Random(0))
    total = sum(suffixes.values())
    say(f"{total:,} files in {', '.join(listing.sources)}")
    for suffix, count in suffixes.most_common(_SUFFIXES):
        say(f"  {suffix or 'no suffix':<12} {count:>12,}")
    for reason, count in listing.excluded.items():
        say(f"left out: {count:,} ({reason})")
    if not sample:
        return
    statuses, seconds = _try(request, sample)
    workers = request.resources.workers or core_count()
    say(f"tried {len(sample)}: " + ", ".join(f"{count} {status}" for status, count in statuses.most_common()))
    duration = _duration(seconds / len(sample) * total / workers)
    say(f"about {duration} with {workers} processes, after about {_START_S} s to start")


def _draw(inputs: Iterable[Input], generator: random.Random) -> tuple[list[Input], Counter[str]]:
    """A uniform sample of a stream of unknown length (reservoir sampling), and a count of suffixes."""
    sample: list[Input] = []
    suffixes: Counter[str] = Counter()
    for number, each in enumerate(inputs):
        suffixes[PurePosixPath(each.path).suffix.lower()] += 1
        if len(sample) < _SAMPLE:
            sample.append(each)
        elif (place := generator.randrange(number + 1)) < _SAMPLE:
            sample[place] = each
    return sample, suffixes


def _try(request: Request, sample: list[Input]) -> tuple[Counter[str], float]:
    quiet_pillow()
    try:
        predictor = request.options.predictor(request.model, device="cpu", threads=1)
    except (AgeGenderError, ValueError) as error:
        raise RequestError(str(error)) from error
    paths, errors = [each.path for each in sample], [each.error for each in sample]
    started = time.monotonic()
    results = score(predictor, paths, errors, lambda path: read_bytes(path, max_bytes=request.options.max_bytes))
    statuses = Counter(result.status for result in results)
    return statuses, time.monotonic() - started


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
