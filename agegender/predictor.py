"""The whole chain: items in, results out, one for each and in order."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch

from agegender.chips import cut_chip
from agegender.detector import DECODE_SIDE_PX, DEFAULT_MAX_FACES, DEFAULT_MIN_SCORE, Face, FaceDetector, check_options
from agegender.errors import AgeGenderError
from agegender.image import DEFAULT_MAX_PIXELS, Pixels, read_header
from agegender.model import ChipModel, Model
from agegender.result import Box, FacePrediction, FacesMode, ImageResult, Item, as_items, scale_box
from agegender.spec import DEFAULT_MODEL

__all__ = ["DEFAULT_BATCH_SIZE", "STAGES", "Predictor"]

DEFAULT_BATCH_SIZE: Final = 32  # chips; larger ones gain little, and the first result of a run waits for them

STAGES: Final = ("decode", "detect", "cut", "predict")
"""What `on_stage` is told of, in the order of the chain."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Cut:
    """An item that has been decoded, looked at and cut; its faces wait for their predictions."""

    result: ImageResult
    boxes: tuple[Box, ...] = ()
    scores: tuple[float | None, ...] = ()
    chips: tuple[Pixels, ...] = ()


class Predictor:
    """Loads detector and model once, then turns encoded images into results. Safe to share between threads."""

    def __init__(
        self,
        model: str | Path | bytes | ChipModel = DEFAULT_MODEL,
        *,
        faces: FacesMode = "detect",
        min_score: float = DEFAULT_MIN_SCORE,
        max_faces: int = DEFAULT_MAX_FACES,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        batch_size: int = DEFAULT_BATCH_SIZE,
        device: str = "auto",
        threads: int | None = None,
        detector_weights: bytes | None = None,
        on_stage: Callable[[str, float], None] | None = None,
    ) -> None:
        """Loads the model.

        Args:
            model: the artifact's path, its bytes, or a loaded model.
            faces: `detect` finds the faces of each image; `whole` takes each image as one face, for directories that
                are already cut.
            min_score: faces that the detector scores below this are dropped, 0 to 1.
            max_faces: at most this many faces per image, the largest first.
            max_pixels: an image that announces more is refused before it is decoded.
            batch_size: at most this many chips go through the network at once.
            device: where the network runs: auto, cpu, cuda or cuda:N.
            threads: bounds those of torch, OpenCV and detector, for this whole process; None leaves them as they are.
            detector_weights: see `FaceDetector`.
            on_stage: called with one of `STAGES` and its seconds, whenever one has run.

        Raises:
            ModelLoadError: the artifact or the detector's weights cannot be used.
            TypeError: the model is none of what it may be.
            ValueError: an option is out of its range.
        """
        check_options(min_score, max_faces, faces)
        if max_pixels < 1 or batch_size < 1:
            raise ValueError("max_pixels and batch_size must be at least 1")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        if not isinstance(model, str | Path | bytes | ChipModel):
            raise TypeError(f"a model is given as its path, its bytes, or loaded, not as {type(model).__name__}")
        if threads is not None:
            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)
        self.model: ChipModel = Model(model, device=device) if isinstance(model, str | Path | bytes) else model
        self.max_pixels = max_pixels
        self.batch_size = batch_size
        self._on_stage = on_stage
        self._detector = (
            FaceDetector(min_score=min_score, max_faces=max_faces, weights=detector_weights)
            if faces == "detect"
            else None
        )

    def predict(self, items: Iterable[Item | bytes]) -> list[ImageResult]:
        """Predicts every face of every item; an item that fails carries its error, the others their faces.

        Args:
            items: encoded images; bare bytes are an item without a path.

        Returns:
            One result per item, in order.

        Raises:
            TypeError: one item was given instead of several.
        """
        return list(self.stream(items))

    def stream(self, items: Iterable[Item | bytes]) -> Iterator[ImageResult]:
        """Like `predict`, but yields results as batches of chips fill, with bounded memory."""
        return self._stream(as_items(items))

    def _stream(self, items: Iterator[Item]) -> Iterator[ImageResult]:
        pending: list[_Cut] = []
        waiting = 0
        for item in items:
            pending.append(self._cut(item))
            waiting += len(pending[-1].chips)
            if waiting >= self.batch_size or len(pending) >= 4 * self.batch_size:
                yield from self._predict(pending)
                pending, waiting = [], 0
        yield from self._predict(pending)

    def _cut(self, item: Item) -> _Cut:
        """data -> image -> faces -> chips."""
        try:
            with self._timed("decode"):
                encoded = read_header(item.data, max_pixels=self.max_pixels)
                pixels = encoded.decode(min_side_px=DECODE_SIDE_PX)
            with self._timed("detect"):
                faces = self._faces(pixels)
            spec = self.model.spec
            with self._timed("cut"):
                chips = tuple(cut_chip(pixels, face, spec.chip_size_px, margin=spec.chip_margin) for face in faces)
        except Exception as error:  # whatever one item does, the others get their results
            if not isinstance(error, AgeGenderError):
                _log.exception("unexpected failure on %r", item.path)
            return _Cut(ImageResult.from_error(item.path, error))
        width, height = encoded.width, encoded.height
        result = ImageResult(item.path, "ok" if faces else "no_face", None, width, height)
        back = (width / pixels.shape[1], height / pixels.shape[0])
        boxes = tuple(scale_box(face.box, *back) if face else (0.0, 0.0, float(width), float(height)) for face in faces)
        return _Cut(result, boxes, tuple(face.score if face else None for face in faces), chips)

    def _faces(self, pixels: Pixels) -> Sequence[Face | None]:
        """The faces of an image; None stands for the whole image."""
        return self._detector.detect(pixels) if self._detector else (None,)

    def _predict(self, pending: Sequence[_Cut]) -> Iterator[ImageResult]:
        """chips -> predictions, the faces of many images together."""
        chips = [chip for cut in pending for chip in cut.chips]
        faces = iter([face for start in range(0, len(chips), self.batch_size) for face in self._batch(chips, start)])
        for cut in pending:
            predictions = tuple(
                FacePrediction(index, box, score, *next(faces))
                for index, (box, score) in enumerate(zip(cut.boxes, cut.scores, strict=True))
            )
            yield replace(cut.result, faces=predictions)

    def _batch(self, chips: Sequence[Pixels], start: int) -> Iterator[tuple[float, float, float, str, float]]:
        """Age, interval, gender and its probability of one batch of chips."""
        with self._timed("predict"):
            output = self.model.predict(np.stack(chips[start : start + self.batch_size]))
        classes = output.gender_probs.argmax(axis=1)
        for row, best in enumerate(classes):
            age, low, high = (float(column[row]) for column in (output.age, output.age_low, output.age_high))
            yield age, low, high, self.model.spec.labels[best], float(output.gender_probs[row, best])

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._on_stage:
            self._on_stage(stage, time.perf_counter() - started)
