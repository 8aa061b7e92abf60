"""The predictor behind TorchServe: the handler, its archive, and the commands that start and stop the server."""

from typing import Final

MODEL_NAME: Final = "agegender"

# What the archive holds beside the code.
ARTIFACT: Final = "agegender.pt"
DETECTOR_WEIGHTS: Final = "face_detection_yunet.onnx"

# Both lie in the directory of the unpacked archive. A worker holds the lock while it works on a batch; whoever stops
# the server writes the other file, which turns new requests away, and then waits for the lock.
DRAINING: Final = "draining"
BUSY_LOCK: Final = "busy.lock"
