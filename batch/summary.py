"""Counting outcomes, and telling people of them."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch.progress import GOOD, bad_count

__all__ = ["GOOD", "Counts", "bad_text", "is_input", "summary_text", "time_text", "value_counts"]

_DECADES: Final = 12
_BAR: Final = 30

# In less, the end of a run weighs more than its images.
_STEADY_S: Final = 5


@dataclass
class Counts:
    """Counts over records.

    Attributes:
        statuses: inputs by status.
        ages: faces by decade of age, from 0-9 to 110 and above.
        genders: faces by perceived gender.
    """

    COLUMNS: ClassVar = ["status", "face", "age", "gender"]

    statuses: Counter[str] = field(default_factory=Counter)
    ages: Any = field(default_factory=lambda: np.zeros(_DECADES, np.int64))
    genders: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table) -> None:
        """Adds records; all of an input, or none."""
        self.statuses.update(value_counts(table["status"].filter(is_input(table["face"]))))
        self.genders.update(value_counts(table["gender"].drop_null()))
        ages = table["age"].drop_null().to_numpy()
        decades = np.clip(ages // 10, 0, _DECADES - 1).astype(np.int64)
        self.ages += np.bincount(decades, minlength=_DECADES)

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return sum(self.statuses.values())

    def as_dict(self) -> dict[str, Any]:
        """For `_summary.json`."""
        ages = {f"{10 * decade}-{10 * decade + 9}": int(count) for decade, count in enumerate(self.ages)}
        return {
            "inputs": self.inputs,
            "faces": int(self.ages.sum()),
            "statuses": dict(self.statuses.most_common()),
            "genders": dict(self.genders.most_common()),
            "ages": ages,
        }


def is_input(face: pa.ChunkedArray) -> pa.ChunkedArray:
    """Column `face` of some records -> marks one record of each input."""
    return pc.fill_null(pc.equal(face, 0), True)


def value_counts(column: pa.ChunkedArray) -> dict[Any, int]:
    """How often each value comes, in the order of their first places."""
    return {row["values"]: row["counts"] for row in column.value_counts().to_pylist()}


def summary_text(summary: dict[str, Any], where: str) -> str:
    """The summary for people, from what `_summary.json` says."""
    lines = [f"{summary['inputs']:,} files, {summary['faces']:,} faces"]
    lines += _bars("status", summary["statuses"])
    lines += _bars("age", {decade: count for decade, count in summary["ages"].items() if count})
    lines += _bars("gender", summary["genders"])
    if summary["run"].get("excluded"):
        left_out = (f"{count:,} {reason}" for reason, count in summary["run"]["excluded"].items())
        lines.append(f"left out  {', '.join(left_out)}")
    if summary.get("seconds"):
        lines.append(f"time      {time_text(summary)}")
    lines.append(f"output    {where}")
    return "\n".join(lines)


def time_text(summary: dict[str, Any]) -> str:
    """How long the last call took, and how fast it was if that can be told."""
    text = f"{summary['seconds']:,.1f} s"
    if summary["startup_s"]:
        text += f", of which {summary['startup_s']:,.1f} s to start"
    if summary["images_per_s"] and summary["seconds"] - summary["startup_s"] > _STEADY_S:
        text += f", then {summary['images_per_s']:,.1f} images/s"
    return text


def bad_text(statuses: dict[str, int], inputs: int) -> str:
    """How many of all inputs of a run have failed, in words."""
    bad = bad_count(statuses)
    reasons = ", ".join(f"{count:,} {status}" for status, count in statuses.items() if status not in GOOD)
    return f"{bad:,} of {inputs:,} inputs could not be looked at ({reasons})"


def _bars(title: str, counts: dict[str, int]) -> list[str]:
    total = sum(counts.values())
    lines: list[str] = []
    for label, count in counts.items():
        bar = "#" * max(1, round(_BAR * count / total))
        lines.append(f"{title if not lines else '':<9} {label:<11} {count:>9,} {count / total:>6.1%}  {bar}")
    return lines
