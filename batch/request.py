"""What a caller asks of the batch job."""

from dataclasses import dataclass, field
from typing import Literal

from batch.scorer import ScoreOptions

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """What a caller asks for.

    Attributes:
        sources: see `Listing`.
        out: the output directory, local or a URI.
        model: path of the artifact.
        options: what the values depend on, beside the model.
        mode: what to do with an output that is there: go on with the same run, add the inputs that it lacks, or start
            anew.
        follow_links: see `Listing`.
        dry_run: lists and estimates, and writes nothing.
        max_bad: the largest share (with %) or number of inputs that may fail, or None.
        address: of a Ray cluster, or None.
        workers: see `batch.job.Resources`.
    """

    sources: tuple[str, ...]
    out: str
    model: str
    options: ScoreOptions = field(default_factory=ScoreOptions)
    mode: Literal["resume", "append", "overwrite"] = "resume"
    follow_links: bool = False
    dry_run: bool = False
    max_bad: str | None = None
    address: str | None = None
    workers: int = 0
