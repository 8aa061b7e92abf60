"""The same predictor under LitServe and under FastAPI with uvicorn, as their own guides show it.

`python -m benchmarks.rivals litserve|fastapi PORT WORKERS`; benchmarks.serve starts them.
"""

import sys
from functools import cache
from typing import Annotated, Any

import litserve
import uvicorn
from fastapi import FastAPI, File, Request
from fastapi.concurrency import run_in_threadpool

from agegender import ImageResult, Predictor
from agegender.process import keep_freed_memory
from agegender.records import to_json
from agegender.spec import DEFAULT_MODEL


@cache
def predictor() -> Predictor:
    """One per process, with one thread, as of all contestants."""
    keep_freed_memory()
    return Predictor(DEFAULT_MODEL, device="cpu", threads=1)


def app() -> FastAPI:
    """FastAPI: takes the body as the image, gives JSON, and predicts in a thread so that the event loop goes on."""
    api = FastAPI()
    predictor()

    @api.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        result = await run_in_threadpool(predictor().predict, [await request.body()])
        return to_json(result[0])

    return api


def serve_fastapi(port: int, workers: int) -> None:
    uvicorn.run(
        "benchmarks.rivals:app",
        factory=True,
        host="127.0.0.1",
        port=port,
        workers=workers,
        access_log=False,
        log_level="warning",
    )


class API(litserve.LitAPI):
    """LitServe: the image as a form's file, which it hands to its worker as bytes; it has no raw bodies."""

    def setup(self, device: str) -> None:
        self.predictor = predictor()

    def decode_request(self, request: Annotated[bytes, File()]) -> bytes:
        return request

    def predict(self, data: bytes) -> ImageResult:
        return self.predictor.predict([data])[0]

    def encode_response(self, output: ImageResult) -> dict[str, Any]:
        return to_json(output)


def serve_litserve(port: int, workers: int) -> None:
    server = litserve.LitServer(API(), accelerator="cpu", devices=1, workers_per_device=workers, timeout=120)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    name, port, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    {"litserve": serve_litserve, "fastapi": serve_fastapi}[name](port, workers)
