"""What every benchmark writes: its tables in Markdown, and each of its figures in JSON."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["add_output_options", "write_outputs"]


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--json` and `--markdown`."""
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")


def write_outputs(options: argparse.Namespace, tables: str, figures: Sequence[Any] | dict[str, Any]) -> None:
    """Writes what was asked for.

    Args:
        options: with those of `add_output_options`.
        tables: Markdown.
        figures: instances of dataclasses, or what JSON takes as it is.
    """
    if options.markdown:
        options.markdown.write_text(tables + "\n")
    if options.json:
        plain = figures if isinstance(figures, dict) else [asdict(each) for each in figures]
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
