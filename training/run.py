"""One training run, from the folder to the artifact."""

import csv
import dataclasses
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agegender import Model, ModelSpec
from agegender.model import find_device
from agegender.process import core_count, directory_lock, keep_freed_memory
from agegender.spec import FORMAT_VERSION
from training.backbones import FOLDED
from training.branch import join, parse_backbones
from training.calibrate import COVERAGE, LEAST_TO_COVER, calibrate
from training.data import Rejected, check_data_dir, evenly_chosen
from training.dataset import ARTIFACT, Faces, load_faces, read_splits, splits_path, write_splits
from training.deploy import Deployed, TwoLooks, deploy
from training.distill import TAUGHT, check_teacher, taught
from training.earlier import earlier_options, refuse_rounded, restore
from training.evaluate import METRICS_FILE, REPORT_FILE, evaluate, keep_fonts_in, predict_chips
from training.export import check_exportable, export
from training.files import written_whole
from training.loop import (
    BEST,
    CURVE,
    LAST,
    START_OVER,
    load_weights,
    make_deterministic,
    predict_logits,
    read_curve,
    save_whole,
    train,
)
from training.loss import Targets, label_targets
from training.metrics import Scored, measure
from training.network import Logits, Network, create_network
from training.normalization import standardize
from training.options import OPTIONS, TrainOptions, read_options
from training.quantize import is_rounded, round_to_eight_bits
from training.second_look import SecondLook, load_second_look

__all__ = ["run"]

_LABELS: Final = "labels_sha256"  # stands beside the options
_STATISTICS: Final = 512  # chips that statistics of activations are estimated from

# Options that tell of this machine alone.
_PATHS: Final = ("cache_dir", "checkpoint", "data_dir", "out_dir", "second_look", "teacher", "weights")

# Options that change where or how fast a run goes, or how its result is exported, but not the training.
_FREE: Final = (
    *("cache_dir", "data_dir", "device", "num_workers", "out_dir", "patience", "resume", "threads"),
    *("data_licence", "data_name", "mirror", "model_version", "precision", "second_look", "second_look_below"),
)


def run(options: TrainOptions) -> Path:
    """Trains, calibrates, measures on the test split, and exports.

    Returns:
        Path of the artifact in `options.out_dir`.

    Raises:
        ValueError: options or data that cannot be trained with, or another run is writing to `options.out_dir`.
        ModelLoadError: there is no such device.
    """
    options = _with_absolute_paths(options)
    keep_fonts_in(options.cache_dir)
    with _alone_in(options.out_dir):
        return _run(options)


@contextmanager
def _alone_in(out_dir: Path) -> Iterator[None]:
    """Makes and locks the folder: of two runs in it, one could be tested on what the other was trained on."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(directory_lock(out_dir.resolve()))
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {out_dir}; wait for it, or give another --out-dir") from error
        except OSError:  # storage without locks, which is no reason not to train
            pass
        yield


def _run(options: TrainOptions) -> Path:
    """`run` in a folder of its own."""
    resumed = _resumed_options(options)
    device = _prepare(options)
    _check_sources(options)
    second_look = load_second_look(options.second_look, options) if options.second_look else None
    network = _created_network(options, second_look)
    faces = load_faces(options)
    print(_summary(faces), flush=True)
    if len(faces.samples["train"]) < options.workers:
        raise ValueError(
            f"{len(faces.samples['train'])} training pictures for {options.workers} workers; lower --workers"
        )
    if resumed is not None:
        _check_faces(faces, options, resumed)
    _initialize(network, faces, options)
    _record_beginning(options, faces, anew=resumed is None)
    if options.epochs == 0:
        save_whole(network.state_dict(), options.out_dir / BEST)
    elif options.workers > 1:
        _set_up_ray()
        from training.distributed import train_on_workers

        train_on_workers(network, faces, _targets(faces, options, device), options)
    else:
        train(network, faces, _targets(faces, options, device), options, device)
    network.load_state_dict(load_weights(options.out_dir / BEST))
    return _finish(network, faces, options, second_look)


def _with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """Paths that mean the same in the directories of Ray's workers, and read the same wherever a run is resumed."""
    return dataclasses.replace(
        options,
        out_dir=options.out_dir.absolute(),
        cache_dir=options.cache_dir.absolute(),
        weights=options.weights and options.weights.resolve(),
        checkpoint=tuple(path.parent.resolve() / path.name for path in options.checkpoint),  # splits lie beside a link
        teacher=tuple(path.resolve() for path in options.teacher),
        second_look=options.second_look and options.second_look.resolve(),
    )


def _check_sources(options: TrainOptions) -> None:
    """Finds out before hours of cutting whether what is given to read is there."""
    check_data_dir(options.data_dir)
    for run_dir in options.teacher:
        check_teacher(run_dir)


def _set_up_ray() -> None:
    """For Ray to read when it is imported: nothing is sent anywhere, and nothing listens beyond this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS") == "local":  # Ray's word for a private one
        del os.environ["RAY_ADDRESS"]
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray keeps one in the home directory


def _resumed_options(options: TrainOptions) -> dict[str, Any] | None:
    """What the run that this one goes on with began with; None where this one begins anew."""
    if not options.resume or not (options.out_dir / LAST).exists():
        return None
    try:
        resumed = read_options(options.out_dir)
    except FileNotFoundError:
        raise ValueError(f"{options.out_dir} holds a run that has lost its {OPTIONS}; {START_OVER}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {START_OVER}") from None
    _check_options(options, resumed)
    return resumed


def _check_options(options: TrainOptions, resumed: dict[str, Any]) -> None:
    """Refuses to go on with other options than the run in `out_dir` began with."""
    resolved = _resolved(options)
    changed = [name for name in resolved if name not in _FREE and resumed.get(name) != resolved[name]]
    if changed:
        raise ValueError(f"{options.out_dir} holds a run with other options ({', '.join(changed)}); {START_OVER}")


def _resolved(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON has them."""
    resolved: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return resolved


def _check_faces(faces: Faces, options: TrainOptions, resumed: dict[str, Any]) -> None:
    """Refuses to go on with other splits or labels: what was trained on could come to be tested on."""
    changes = read_splits(splits_path(options.out_dir / ARTIFACT)).changes(faces.splits())
    if changes:
        raise ValueError(f"{options.out_dir} holds a run with other pictures ({changes}); {START_OVER}")
    if resumed.get(_LABELS) != faces.labels_digest():
        raise ValueError(f"{options.out_dir} holds a run with other labels of these pictures; {START_OVER}")


def _record_beginning(options: TrainOptions, faces: Faces, *, anew: bool) -> None:
    """Records what the run trains on and how; what an earlier run left goes, unless this one goes on with it."""
    if anew:
        for name in (LAST, BEST, CURVE, ARTIFACT, METRICS_FILE, REPORT_FILE):
            (options.out_dir / name).unlink(missing_ok=True)
    if not options.resume:
        (options.out_dir / TAUGHT).unlink(missing_ok=True)
    _write_rejected(faces.rejected, options.out_dir / "rejected.csv")
    write_splits(faces, splits_path(options.out_dir / ARTIFACT))
    with written_whole(options.out_dir / OPTIONS) as temporary:
        temporary.write_text(json.dumps({**_resolved(options), _LABELS: faces.labels_digest()}, indent=1) + "\n")


def _prepare(options: TrainOptions) -> torch.device:
    device = find_device(options.device)
    keep_freed_memory(most_bytes=None)  # a step's activations come anew with the next
    torch.set_num_threads(options.threads or core_count())
    make_deterministic(options.seed)
    return device


def _summary(faces: Faces) -> str:
    sizes = ", ".join(f"{len(part)} {side}" for side, part in faces.samples.items())
    few = len(faces.samples["val"]) < LEAST_TO_COVER
    note = f"\nnote: age intervals that cover {COVERAGE:.0%} need {LEAST_TO_COVER} val faces or more" if few else ""
    return f"faces: {sizes}; left out: {faces.rejected.counts() or 'none'}{note}"


def _write_rejected(rejected: Rejected, path: Path) -> None:
    with written_whole(path) as temporary, temporary.open("w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(("path", "reason"))
        table.writerows((str(name), reason) for name, reason in rejected.reasons.items())


def _created_network(options: TrainOptions, second_look: SecondLook | None) -> Network:
    """The network with its published weights or the checkpoint's, which can be trained and exported as asked."""
    state = _checkpoint_state(options)
    network = create_network(
        options.backbone,
        pretrained=options.pretrained and state is None,
        dropout=options.dropout,
        drop_path=options.drop_path,
        weights=options.weights,
    )
    check_exportable(network, options, second_look)
    if state is not None:
        restore(network, state, options.size, f"{_checkpoint_names(options)}:", options.backbone)
    return network


def _initialize(network: Network, faces: Faces, options: TrainOptions) -> None:
    """Gives published weights the statistics of the faces that folding lost, and rounds to 8 bits if asked."""
    if options.pretrained and not options.checkpoint:
        for branch, (name, _) in zip(network.branches, parse_backbones(options.backbone), strict=True):
            if name in FOLDED:
                standardize(branch, _sample(faces, options))
    if options.quantization_aware and not is_rounded(network.state_dict()):
        round_to_eight_bits(network, _sample(faces, options))


def _checkpoint_state(options: TrainOptions) -> dict[str, Any] | None:
    if not options.checkpoint:
        return None
    names = _checkpoint_names(options)
    try:
        if options.epochs == 0:
            _check_trained_alike(options)
        states = [_read_weights(path) for path in options.checkpoint]
        if len({is_rounded(state) for state in states}) > 1:
            raise ValueError(f"{names}: some were trained in 8 bits and others not; give all of one kind")
        state = join(states) if len(states) > 1 else states[0]
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(f"{names}: no weights of a training ({error})") from error
    refuse_rounded(state, options, f"{names}:")
    return state


def _checkpoint_names(options: TrainOptions) -> str:
    return ", ".join(map(str, options.checkpoint))


def _read_weights(path: Path) -> dict[str, Any]:
    state = load_weights(path)
    if "curve" in state:
        raise ValueError(f"{path} is the state that a run is resumed from; give {BEST} beside it")
    return state


def _check_trained_alike(options: TrainOptions) -> None:
    """Without an epoch, margin and predictions must be those that the checkpoint was trained with."""
    told = [path for path in options.checkpoint if (path.parent / OPTIONS).exists()]
    for path in told:
        trained = earlier_options(path.parent)
        for name in ("age_loss", "margin"):
            if trained[name] != getattr(options, name):
                flag = name.replace("_", "-")
                raise ValueError(f"{path} was trained with --{flag} {trained[name]}; give it here too")


def _sample(faces: Faces, options: TrainOptions) -> Tensor:
    """(N, 3, S, S) uint8 chips of the training split at the network's size, for statistics of activations."""
    chips = faces.train_chips.read(evenly_chosen(faces.samples["train"], _STATISTICS))
    sized = [cv2.resize(chip, (options.size, options.size), interpolation=cv2.INTER_AREA) for chip in chips]
    return torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2)


def _targets(faces: Faces, options: TrainOptions, device: torch.device) -> Targets:
    samples = faces.samples["train"]
    targets = label_targets([s.labels.age_years for s in samples], [s.labels.gender for s in samples])
    if not options.teacher:
        return targets
    return targets.mixed(taught(options.teacher, samples, options, device), options.teacher_weight)


def _finish(network: Network, faces: Faces, options: TrainOptions, second_look: SecondLook | None) -> Path:
    """Calibrates on validation, exports, measures the exported file on test, and puts the figures into it."""
    val, test = faces.samples["val"], faces.samples["test"]
    deployed = deploy(network, _sample(faces, options), options, second_look)
    logits = _validation_logits(deployed, faces.chips.read(val))
    ages = torch.tensor([float(sample.labels.age_years) for sample in val])
    calibration = calibrate(logits, ages, torch.tensor([sample.labels.gender for sample in val]), mean=options.mean)
    path, spec = options.out_dir / ARTIFACT, _spec(options, second_look)
    export(deployed, calibration, spec, path)
    predictions = predict_chips(Model(path, device="cpu"), test, faces.chips)
    figures = measure(Scored.of([sample.labels for sample in test], predictions))
    metrics = {name: round(figure.value, 5) for name, figure in figures.items()}
    export(deployed, calibration, dataclasses.replace(spec, metrics={"pictures": len(test), **metrics}), path)
    curve = read_curve(options.out_dir)
    print("test split:")
    evaluate(Model(path, device="cpu"), test, faces.chips, options.out_dir, curve=curve)
    print(f"artifact: {path}")
    return path


def _validation_logits(deployed: Deployed | TwoLooks, chips: npt.NDArray[np.uint8]) -> Logits:
    """What the artifact's network says of the validation faces, with a line on how many it looks at twice."""
    device = torch.device("cpu")
    if not isinstance(deployed, TwoLooks):
        return predict_logits(deployed, chips, device)
    seen: list[int] = []
    counter = deployed.second.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    logits = predict_logits(deployed, chips, device)
    counter.remove()  # TorchScript would compile it
    print(f"second look: {sum(seen) / len(chips):.1%} of the validation faces")
    return logits


def _spec(options: TrainOptions, second_look: SecondLook | None) -> ModelSpec:
    return ModelSpec(
        format_version=FORMAT_VERSION,
        name="agegender",
        version=options.model_version,
        chip_size_px=options.size,
        chip_margin=options.margin,
        labels=("male", "female"),
        coverage=COVERAGE,
        backbone=f"{options.backbone}, then {second_look.backbone}" if second_look else options.backbone,
        training_data=options.data_name or options.data_dir.resolve().name,
        licence=options.data_licence,
        commit=_commit(),
        options={name: value for name, value in asdict(options).items() if name not in _PATHS},
    )


def _commit() -> str:
    """The commit of this code, or nothing outside a checkout."""
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
