"""requests -> Predictor -> answers, for TorchServe. No image is touched here: the core does that.

TorchServe collects requests into a batch. Whatever one of them holds, the others get their answers. A batch goes to one
worker even if the others have nothing to do, so a worker that finds itself alone shares its images out over the cores.
"""

import fcntl
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from http import HTTPStatus
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

from agegender import ImageResult, Model, Predictor
from agegender.image import quiet_pillow
from agegender.process import core_count, keep_freed_memory
from agegender.records import to_json
from agegender.result import FacesMode, Item
from handler import ARTIFACT, BUSY_LOCK, DETECTOR_WEIGHTS, DRAINING
from handler.metrics import Metrics
from handler.request import MAX_PIXELS, Options, Request, RequestError, count_pixels, parse_request

__all__ = ["AgeGenderHandler"]

_HTTP_STATUS: Final = {"not_image": 400, "unreadable": 400, "too_large": 413}
_ADVICE: Final = {
    "not_image": "send a JPEG, PNG, WebP, BMP, TIFF or GIF file",
    "unreadable": "check that the file opens elsewhere and was sent whole",
    "too_large": "shrink it",
}

_INTERNAL: Final = RequestError(500, "failed", "the image could not be processed; the server's log says why")
_STOPPING: Final = RequestError(503, "stopping", "the server is being stopped; ask again shortly")

_log = logging.getLogger(__name__)


class AgeGenderHandler:
    """TorchServe's entry: `initialize` once per worker, then `handle` once per batch of requests."""

    def initialize(self, context: Any) -> None:
        """Loads detector and model from the unpacked archive.

        Args:
            context: TorchServe's context of this worker.
        """
        quiet_pillow()
        keep_freed_memory()
        self._directory = Path(context.system_properties["model_dir"])
        self._busy_lock = (self._directory / BUSY_LOCK).open("w")
        self._metrics = Metrics(context.metrics)
        self._weights = (self._directory / DETECTOR_WEIGHTS).read_bytes()
        self._model = Model(self._directory / ARTIFACT, device=_device(context.system_properties.get("gpu_id")))
        self._predictor = lru_cache(maxsize=8)(self._new_predictor)  # bounded: callers choose min_score freely
        self._cores = core_count()
        self._threads = ThreadPoolExecutor(self._cores)
        self._about = self._model.spec.identity(self._model.sha256)
        self._predictor(*_detection(Options()))
        _quiet_log()

    def handle(self, rows: Sequence[Mapping[str, Any]], context: Any) -> list[str]:
        """Answers a batch.

        Args:
            rows: one mapping per request, as TorchServe read it.
            context: takes each answer's status and content type.

        Returns:
            One JSON text per request, in order.
        """
        with self._busy() as alone:  # take the lock before looking: `stop` treats a worker without it as idle
            stopping = (self._directory / DRAINING).exists()
            answers = [_STOPPING] * len(rows) if stopping else self._answers(rows, context, alone)
        texts = [self._finish(answer, index, context) for index, answer in enumerate(answers)]
        self._metrics.emit()
        return texts

    def _answers(self, rows: Sequence[Mapping[str, Any]], context: Any, alone: bool) -> list[Any]:
        """A JSON value or a RequestError for each request, in order."""
        answers = [_parse(row, _headers(context, index)) for index, row in enumerate(rows)]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(answers):
            if isinstance(request, Request):
                groups.setdefault(_detection(request.options), []).append(index)
        for detection, indices in groups.items():
            group = [answers[index] for index in indices]
            for index, answer in zip(indices, self._predict(detection, group, alone), strict=True):
                answers[index] = answer
        return answers

    def _predict(self, detection: tuple[Any, ...], requests: Sequence[Request], alone: bool) -> list[Any]:
        """Answers requests that want the same detection, with all their images in one go through the chain."""
        try:
            items = [item for request in requests for item in request.items]
            results = iter(self._results(self._predictor(*detection), items, alone))
            return [self._answer(request, [next(results) for _ in request.items]) for request in requests]
        except Exception:  # nobody else's answer may depend on it, and no caller may see it
            _log.exception("unexpected failure")
            return [_INTERNAL] * len(requests)

    def _results(self, predictor: Predictor, items: Sequence[Item], alone: bool) -> list[ImageResult]:
        """One for each image, in order; a core takes a share of them, unless other workers want the cores.

        Nor where the images, decoded at once, could take more memory than a single one may.
        """
        is_shared = alone and len(items) > 1 and sum(map(count_pixels, items)) <= MAX_PIXELS
        share = max(1, math.ceil(len(items) / (self._cores if is_shared else 1)))
        others = [
            self._threads.submit(predictor.predict, items[at : at + share]) for at in range(share, len(items), share)
        ]
        return [*predictor.predict(items[:share]), *chain.from_iterable(each.result() for each in others)]

    def _answer(self, request: Request, results: Sequence[ImageResult]) -> Any:
        self._metrics.count_faces(results)
        if error := _error(request, results):
            return error
        about = {"options": asdict(request.options), "model": self._about}
        records = [{**to_json(_for_callers(result)), **about} for result in results]
        if request.form == "predictions":
            return {"predictions": records}
        return records[0] if request.form == "object" else records

    def _finish(self, answer: Any, index: int, context: Any) -> str:
        """The answer's text; its status and type go to the context."""
        status = 200
        if isinstance(answer, RequestError):
            error = {"code": answer.code, "message": answer.message, **answer.details}
            status, answer = answer.status, {"error": error}
        self._metrics.count_answer(status)
        context.set_response_status(code=status, phrase=HTTPStatus(status).phrase, idx=index)
        context.set_response_content_type(index, "application/json")
        if not _headers(context, index):  # gRPC, whose StreamPredictions kills the worker unless told that this is all
            context.set_response_header(index, "ts_stream_next", "false")
        return json.dumps(answer)

    def _new_predictor(self, faces: FacesMode, min_score: float, max_faces: int) -> Predictor:
        return Predictor(
            self._model,
            faces=faces,
            min_score=min_score,
            max_faces=max_faces,
            max_pixels=MAX_PIXELS,
            threads=1,
            detector_weights=self._weights,
            on_stage=self._metrics.time,
        )

    @contextmanager
    def _busy(self) -> Iterator[bool]:
        """Holds the lock that tells of work; yields whether no other worker had it."""
        alone = _tries_lock(self._busy_lock)
        fcntl.flock(self._busy_lock, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            fcntl.flock(self._busy_lock, fcntl.LOCK_UN)


def _tries_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _quiet_log() -> None:
    """Once the model is loaded: warnings, and the metrics, which are lines of the log to TorchServe."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ts.metrics").setLevel(logging.INFO)


def _device(gpu_id: Any) -> str:
    return "cpu" if gpu_id is None or int(gpu_id) < 0 else f"cuda:{gpu_id}"


def _headers(context: Any, index: int) -> dict[str, str]:
    """Under lower-case names: they come as the caller wrote them."""
    headers = context.get_all_request_header(index)
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def _parse(row: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
    try:
        return parse_request(row, headers)
    except RequestError as error:  # without its traceback, which would keep the request's parsed JSON
        return RequestError(error.status, error.code, error.message)
    except Exception:  # see AgeGenderHandler._predict
        _log.exception("unexpected failure while a request was read")
        return _INTERNAL


def _detection(options: Options) -> tuple[FacesMode, float, int]:
    return options.faces, options.min_score, options.max_faces


def _error(request: Request, results: Sequence[ImageResult]) -> RequestError | None:
    """The error that answers a whole request: all of its images failed, or a face was asked for and is missing."""
    if all(result.failed for result in results):
        return _image_error(results[0])
    if request.options.require_face:
        for result in results:
            if result.status == "no_face":
                which = repr(_cut(result.path)) if result.path else "the image"
                return RequestError(422, "no_face", f"no face was found in {which}; send one, or lower min_score")
    return None


def _image_error(result: ImageResult) -> RequestError:
    result = _for_callers(result)
    advice = None if ": save it as" in (result.error or "") else _ADVICE.get(result.status)  # one is enough
    where = f"{_cut(result.path)}: " if result.path else ""
    message = f"{where}{result.error}; {advice}" if advice else f"{where}{result.error}"
    size = {"width": result.width, "height": result.height} if result.width else {}
    return RequestError(_HTTP_STATUS.get(result.status, 500), result.status, message, **size)


def _cut(path: str) -> str:
    """Callers send any text as a name, and people read the message."""
    return path if len(path) <= 80 else f"{path[:80]}..."


def _for_callers(result: ImageResult) -> ImageResult:
    """The same result; of a failure of ours, the log tells more than the caller is told."""
    return replace(result, error=_INTERNAL.message) if result.status == "failed" else result
