"""What one worker counts and times, in the form that TorchServe hands to Prometheus.

TorchServe reads metrics from the worker's output, a line each. Every write wakes its reader, which takes turns with the
workers on the same cores, so the lines of a batch are written at once, and counts are added up over it. The buckets of
its histograms are fixed, from 0.005 to 10: durations are therefore in seconds.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ts.metrics.metric_type_enum import MetricTypes

from agegender import ImageResult
from agegender.predictor import STAGES

__all__ = ["Metrics"]

_lines = logging.getLogger("ts.metrics.caching_metric")  # where TorchServe's metrics write themselves


class Metrics:
    """Counters and histograms of one worker; `emit` once per batch sends them."""

    def __init__(self, cache: Any) -> None:
        """Declares the metrics.

        Args:
            cache: TorchServe's metrics cache, `context.metrics`.
        """
        declare = cache.add_metric_to_cache
        self._seconds = {
            stage: declare(f"agegender_{stage}_seconds", "Seconds", ["Model"], MetricTypes.HISTOGRAM)
            for stage in STAGES
        }
        self._faces_per_image = declare("agegender_faces_per_image", "Count", ["Model"], MetricTypes.HISTOGRAM)
        self._answers = declare("agegender_answers", "Count", ["Model", "Status"], MetricTypes.COUNTER)
        self._images = declare("agegender_images", "Count", ["Model", "Status"], MetricTypes.COUNTER)
        self._faces = declare("agegender_faces", "Count", ["Model", "Gender", "Decade"], MetricTypes.COUNTER)
        self._samples: list[tuple[Any, float]] = []
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._model = cache.model_name

    def time(self, stage: str, seconds: float) -> None:
        """Records the duration of one of `STAGES`."""
        self._samples.append((self._seconds[stage], round(seconds, 6)))

    def count_answer(self, status: int) -> None:
        """Counts one answered request by its HTTP status."""
        self._counts[self._answers, str(status)] += 1

    def count_faces(self, results: Sequence[ImageResult]) -> None:
        """Counts images by status and faces by predicted gender and decade, so that a drift shows."""
        for result in results:
            self._counts[self._images, result.status] += 1
            if not result.failed:
                self._samples.append((self._faces_per_image, len(result.faces)))
            for face in result.faces:
                self._counts[self._faces, face.gender, f"{int(face.age // 10) * 10}"] += 1

    def emit(self) -> None:
        """Sends what was recorded since the last call."""
        with _written_at_once():
            for metric, value in self._samples:
                metric.add_or_update(value, [self._model])
            for (metric, *labels), count in self._counts.items():
                metric.add_or_update(count, [self._model, *labels])
        self._samples.clear()
        self._counts.clear()


@contextmanager
def _written_at_once() -> Iterator[None]:
    text = io.StringIO()
    collector = logging.StreamHandler(text)
    _lines.addHandler(collector)
    _lines.propagate = False
    try:
        yield
    finally:
        _lines.propagate = True
        _lines.removeHandler(collector)
        if lines := text.getvalue():
            _lines.info(lines.removesuffix("\n"))
