"""Builds the Python stubs of TorchServe's gRPC API from the definitions inside its jar: none are shipped."""

import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

from handler.server import ServingError

__all__ = ["STUBS", "build_stubs"]

STUBS: Final = Path("build/grpc")
_DEFINITIONS: Final = ("inference.proto", "google/rpc/status.proto")  # the second is imported by the first


def build_stubs(target: Path = STUBS) -> Path:
    """Writes inference_pb2.py, inference_pb2_grpc.py and what they import.

    Args:
        target: the directory, to be put on the Python path by whoever uses them.

    Returns:
        The directory.

    Raises:
        ServingError: the generator is not installed, or fails.
    """
    try:
        from grpc_tools import protoc
    except ModuleNotFoundError as error:
        raise ServingError("grpcio-tools is missing; run `pip install grpcio-tools`") from error
    target.mkdir(parents=True, exist_ok=True)
    jar = Path(str(distribution("torchserve").locate_file("ts/frontend/model-server.jar")))
    with zipfile.ZipFile(jar) as archive:
        for name in _DEFINITIONS:
            archive.extract(name, target)
    well_known = Path(protoc.__file__).parent / "_proto"
    output = [f"--python_out={target}", f"--grpc_python_out={target}"]
    if protoc.main(["protoc", f"-I{target}", f"-I{well_known}", *output, *_DEFINITIONS]):
        raise ServingError(f"the stubs could not be generated from {jar}")
    return target
