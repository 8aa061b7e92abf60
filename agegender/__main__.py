"""`python -m agegender PHOTO...`: a table for people, JSON for programs, annotated copies for the eye."""

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agegender import AgeGenderError, ImageResult, Item, decode_image
from agegender.client import DEFAULT_KEY_FILE, Client
from agegender.detector import DEFAULT_MAX_FACES, DEFAULT_MIN_SCORE
from agegender.draw import annotate
from agegender.image import quiet_pillow
from agegender.process import keep_freed_memory
from agegender.records import to_json
from agegender.spec import DEFAULT_MODEL

if TYPE_CHECKING:
    from agegender import Predictor

__all__ = ["main"]

_NOT_FETCHED = OSError(errno.ENOENT, "no photo is fetched from an address; download it first")
_DIRECTORY = OSError(errno.EISDIR, "it is a directory; give its files, or score all of it with `python -m batch`")
_NAME_WIDTH = 32
_COLUMNS = f"{{:<{_NAME_WIDTH}}} {{:>4}} {{:>8}} {{:>9}}  {{:<7}} {{:>5}} {{:>6}}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 when every photo was looked at, 1 when one was not, 2 for a wrong call."""
    options = _options(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # like stderr, it prints names in any encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    quiet_pillow()
    keep_freed_memory()
    try:
        if options.draw:
            _make_directory(options.draw)
        return _run(_predictor(options), options)
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (AgeGenderError, ValueError, OSError) as error:
        print(f"agegender: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.key_file and not options.server:
        parser.error("argument --key-file: not allowed without argument --server")
    if options.device and options.server:
        parser.error("argument --device: not allowed with argument --server, which has its own")
    return options


def _make_directory(path: Path) -> None:
    if path.is_file():
        raise ValueError(f"{path} is a file; give --draw a directory")
    path.mkdir(parents=True, exist_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m agegender",
        description="Tells perceived age and gender of the faces in photographs.",
        epilog="Exit code: 0 all photos were looked at, 1 one could not be, or a copy not be written, 2 wrong call, "
        "model or server, 130 interrupted.",
    )
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="JPEG, PNG, WebP, BMP, TIFF or GIF file")
    parser.add_argument("--json", action="store_true", help="one JSON object per photo and line, instead of a table")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="write annotated copies there, as NAME-faces.png")
    parser.add_argument("--faces", choices=("detect", "whole"), default="detect", help="whole: each photo is one face")
    parser.add_argument(
        "--min-score", type=float, default=DEFAULT_MIN_SCORE, help="least detector score, 0 to 1 (default %(default)s)"
    )
    parser.add_argument(
        "--max-faces", type=int, default=DEFAULT_MAX_FACES, help="most faces per photo (default %(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", default=DEFAULT_MODEL, help=f"the artifact (default {DEFAULT_MODEL})")
    where.add_argument("--server", metavar="URL", help="let a running server predict, such as http://127.0.0.1:8080")
    parser.add_argument(
        "--key-file", type=Path, help=f"the server's tokens (default: {DEFAULT_KEY_FILE}, for a server on this machine)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    return parser


def _predictor(options: argparse.Namespace) -> "Predictor | Client":
    chosen: dict[str, Any] = {"faces": options.faces, "min_score": options.min_score, "max_faces": options.max_faces}
    if options.server:
        return Client(options.server, key_file=options.key_file, **chosen)
    from agegender import Predictor  # which imports torch; a server has its own

    return Predictor(options.model, device=options.device or "auto", **chosen)


def _run(predictor: "Predictor | Client", options: argparse.Namespace) -> int:
    exit_code, headed, taken = 0, options.json, {os.path.realpath(photo) for photo in options.photos}
    for path, result in _results(predictor, options.photos):
        if not (headed or result.failed):  # by now a server has told of its model
            headed = True
            print(_COLUMNS.format("photo", "face", "age", _interval_heading(predictor), "gender", "prob", "score"))
        if result.failed:
            exit_code = 1
            print(f"agegender: {_printable(path)}: {result.error}", file=sys.stderr)
        _show(result, as_json=options.json)
        if options.draw and result.faces:
            target = _new_name(options.draw / f"{Path(path).stem}-faces.png", taken)
            exit_code = max(exit_code, _draw(Path(path), result, target))
    return exit_code


def _results(predictor: "Predictor | Client", paths: Sequence[str]) -> Iterator[tuple[str, ImageResult]]:
    """Photo by photo, so that the first line appears at once."""
    for path in paths:
        try:
            item = Item(Path(path).read_bytes(), path)
        except OSError as error:
            yield path, ImageResult.from_error(path, _plain(path, error))
        else:
            yield path, predictor.predict([item])[0]


def _plain(path: str, error: OSError) -> OSError:
    """The error, or what people should know instead."""
    if isinstance(error, IsADirectoryError):
        return _DIRECTORY
    return _NOT_FETCHED if "://" in path else error


def _interval_heading(predictor: "Predictor | Client") -> str:
    """By the coverage that the model was made for; a server whose first answer is an error has not told it."""
    coverage = predictor.about.get("coverage") if isinstance(predictor, Client) else predictor.model.spec.coverage
    return "interval" if coverage is None else f"{100 * coverage:g}% from"


def _show(result: ImageResult, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(result)), flush=True)
        return
    name = _printable(result.path)
    if len(name) > _NAME_WIDTH and sys.stdout.isatty():  # a pipe has room
        name = "..." + name[3 - _NAME_WIDTH :]
    if not result.faces and not result.failed:
        print(_COLUMNS.format(name, "-", "no face", "", "", "", ""), flush=True)
    for face in result.faces:
        interval = f"{face.age_low:.0f}-{face.age_high:.0f}"
        score = "" if face.score is None else f"{face.score:.2f}"
        row = (name, face.index, f"{face.age:.1f}", interval, face.gender, f"{face.gender_probability:.0%}", score)
        print(_COLUMNS.format(*row), flush=True)


def _printable(path: str) -> str:
    """Names of files may hold line breaks and bytes that are no text."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in path)


def _new_name(target: Path, taken: set[str]) -> Path:
    """Photos of the same name, from two directories, get copies of their own, and no copy takes a photo's place."""
    stem, number = target.stem, 1
    while os.path.realpath(target) in taken:
        number += 1
        target = target.with_stem(f"{stem}-{number}")
    taken.add(os.path.realpath(target))
    return target


def _draw(path: Path, result: ImageResult, target: Path) -> int:
    try:
        annotate(decode_image(path.read_bytes()), result).save(target)
    except (AgeGenderError, OSError, MemoryError) as error:
        reason = error if str(error) else "there is not enough memory"
        print(f"agegender: {_printable(str(path))}: no annotated copy: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
