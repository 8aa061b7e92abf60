"""What a caller asks of the batch job."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from agegender import ChipModel, Predictor

__all__ = ["Mode", "Request", "Resources", "ScoreOptions", "same_command"]

Mode = Literal["resume", "append", "overwrite"]


def same_command(mode: Mode) -> str:
    """What goes on with a run that has stopped."""
    return "the same command without --overwrite" if mode == "overwrite" else "the same command"


@dataclass(frozen=True)
class ScoreOptions:
    """What the values depend on, beside the model.

    Attributes:
        faces: see `Predictor`.
        min_score: see `Predictor`.
        max_faces: see `Predictor`.
        max_pixels: see `Predictor`.
        max_bytes: a larger file is not read.
    """

    faces: Literal["detect", "whole"] = "detect"
    min_score: float = 0.6
    max_faces: int = 100
    max_pixels: int = 100_000_000
    max_bytes: int = 512_000_000

    def check(self) -> None:
        """Raises what `Predictor` would raise for these options, in a process without torch.

        Raises:
            ModelLoadError: the detector's weights cannot be used.
            ValueError: an option is out of its range.
        """
        from agegender import FaceDetector
        from agegender.detector import check_options

        check_options(self.min_score, self.max_faces, self.faces)
        if self.max_pixels < 1:
            raise ValueError("max_pixels must be at least 1")
        FaceDetector()  # for its weights

    def affecting_outcomes(self) -> dict[str, Any]:
        """The options that influence outcomes; without the detector's when `faces` is `whole`."""
        values = asdict(self)
        return values if self.faces == "detect" else {**values, "min_score": None, "max_faces": None}

    def predictor(self, model: "str | Path | bytes | ChipModel", **arguments: Any) -> "Predictor":
        """The chain with these options, and more arguments of `Predictor`."""
        from agegender import Predictor  # takes a second, in which others can look at the call

        values = {name: value for name, value in asdict(self).items() if name != "max_bytes"}
        return Predictor(model, **values, **arguments)


@dataclass(frozen=True)
class Resources:
    """Where the job runs.

    Attributes:
        address: of a Ray cluster; None starts a private one on this machine.
        workers: processes that read, decode, detect and cut; 0 takes one a core.
        gpus: processes that only predict, each with a GPU, for the others to share; 0 lets each predict for itself.
        device: where those processes predict, and of no meaning without them; `cpu` tries the two stages without a GPU.
    """

    address: str | None = None
    workers: int = 0
    gpus: int = 0
    device: Literal["cuda", "cpu"] = "cuda"


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
        resources: where the job runs.
    """

    sources: tuple[str, ...]
    out: str
    model: str | Path
    options: ScoreOptions = field(default_factory=ScoreOptions)
    mode: Mode = "resume"
    follow_links: bool = False
    dry_run: bool = False
    max_bad: str | None = None
    resources: Resources = field(default_factory=Resources)
