"""Functions stay short: a rule that is lost a line at a time, so it is counted."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("agegender", "training", "handler", "batch", "app", "benchmarks")


def lengths() -> Iterator[tuple[int, str]]:
    """Lines of each function, its docstring included."""
    for path in (path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}: {node.name}"


def test_functions_are_short() -> None:
    counted = sorted(lengths())
    lines = [count for count, _ in counted]
    assert len(lines) > 500
    assert statistics.median(lines) < 10
    assert lines[int(0.9 * len(lines))] < 25, counted[int(0.9 * len(lines)) :]
    assert lines[-1] <= 64, counted[-3:]
