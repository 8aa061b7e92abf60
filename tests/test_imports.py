"""The core stands alone: it imports nothing of what is built on it, and is changed by nothing but calls."""

import importlib
import inspect
import json
import os
import pickle
import pkgutil
import subprocess
import sys
import typing

import pytest

import agegender
import app
import batch
import handler
import training
from agegender import AgeGenderError, ImageDecodeError, ImageTooLargeError, ModelLoadError, NotAnImageError, ServerError

MODULES = ["agegender", *(f"agegender.{each.name}" for each in pkgutil.iter_modules(agegender.__path__))]
OTHERS = [
    f"{package.__name__}.{each.name}"
    for package in (app, batch, handler, training)
    for each in pkgutil.iter_modules(package.__path__)
    if not each.name.startswith("__") and each.name not in ("streamlit_app", "results_page", "try_page")
]
FOREIGN = ["ts", "torchserve", "ray", "streamlit", "training", "handler", "batch", "app", "torchvision", "timm"]

LOOK_AROUND = """
import importlib, json, logging, os, sys, threading, warnings
import cv2, numpy, PIL.Image, torch, urllib3  # they may do as they like
def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads(), torch.is_grad_enabled(),
        warnings.filters[:], logging.getLogger().handlers[:], logging.getLogger().level, logging.getLogger("PIL").level,
        dict(os.environ), os.getcwd(), sys.path[:], threading.active_count(), sorted(os.listdir("."))]
before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert state() == before, [b for a, b in zip(before, state()) if a != b]
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error:::agegender", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
    )


def test_the_core_imports_alone_and_changes_nothing(tmp_path):
    """In a process of its own, away from the repository, without a word."""
    done = python("-c", LOOK_AROUND, json.dumps(MODULES), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not set(json.loads(done.stdout)) & set(FOREIGN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["agegender", "agegender.client", "agegender.__main__", "batch.job"])
def test_what_needs_no_network_waits_for_no_torch(module, repository):
    done = python("-c", f"import sys, {module}; sys.exit('torch' in sys.modules)", cwd=repository)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_home_directory_stays_empty_and_no_library_calls_home(tmp_path, repository, grace_hopper_path):
    """ONNX Runtime would put the number of this machine and what it wants to tell its maker there."""
    code = (
        "import sys, training.cache; from agegender import Predictor; "
        "print(Predictor('model_store/agegender.pt').predict([open(sys.argv[1], 'rb').read()])[0].status)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("ORT_")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(grace_hopper_path)],
        cwd=repository,
        env={**environment, "HOME": str(tmp_path), "XDG_CACHE_HOME": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout == "ok\n"
    assert not list(tmp_path.iterdir())


def test_a_name_that_the_package_has_not():
    with pytest.raises(AttributeError, match="has no attribute 'Perdictor'"):
        agegender.Perdictor  # noqa: B018


@pytest.mark.parametrize("name", [*MODULES, *OTHERS])
def test_all_is_true_and_complete(name):
    """What a module defines in public is listed, sorted, there, and has a docstring."""
    module = importlib.import_module(name)
    assert module.__doc__
    listed = module.__all__
    assert list(listed) == sorted(listed, key=lambda each: (not each.isupper(), not each[0].isupper(), each))
    assert len(set(listed)) == len(listed)
    for each in listed:
        value = getattr(module, each)
        assert not (inspect.isclass(value) or inspect.isfunction(value)) or inspect.getdoc(value), each
    if name != "agegender":
        defined = {each for each, value in vars(module).items() if getattr(value, "__module__", None) == name}
        constants = {each for each in vars(module) if each.isupper() and _is_assigned(module, each)}
        assert {each for each in defined | constants if not each.startswith("_")} <= set(listed)


def _is_assigned(module, name):
    return any(line.startswith((f"{name}:", f"{name} =")) for line in inspect.getsource(module).splitlines())


def test_what_the_package_exports_is_what_its_modules_export():
    for name in agegender.__all__:
        value = getattr(agegender, name)
        home = "agegender.result" if name in ("Box", "FacesMode") else value.__module__  # aliases have no home
        module = importlib.import_module(home)
        assert name in module.__all__
        assert getattr(module, name) is value


def test_what_public_calls_take_and_give_is_exported():
    exported = [getattr(agegender, name) for name in agegender.__all__]
    members = [each for value in exported if inspect.isclass(value) for each in vars(value).items()]
    calls = [call for name, call in members if name == "__init__" or not name.startswith("_")]
    named = {
        each.__name__
        for call in filter(inspect.isfunction, exported + calls)
        for annotation in inspect.get_annotations(call).values()
        for each in _parts(annotation)
        if inspect.isclass(each) and each.__module__.startswith("agegender")
    }
    assert {"ChipModel", "Face", "Item", "Predictions"} <= named <= set(agegender.__all__)


def _parts(annotation):
    return [annotation, *(part for each in typing.get_args(annotation) for part in _parts(each))]


def test_the_tree_of_errors():
    assert issubclass(NotAnImageError, ImageDecodeError)
    for error in (ImageDecodeError, ImageTooLargeError, ModelLoadError, ServerError):
        assert error.__bases__ == (AgeGenderError,)
    assert AgeGenderError.__bases__ == (Exception,)
    statuses = {each.__name__: each.status for each in (AgeGenderError, ImageDecodeError, NotAnImageError)}
    assert statuses == {"AgeGenderError": "failed", "ImageDecodeError": "unreadable", "NotAnImageError": "not_image"}
    assert ImageTooLargeError.status == "too_large"
    assert ModelLoadError.status == ServerError.status == "failed"


def test_the_docstring_draws_every_error():
    from agegender import errors

    drawn = errors.__doc__.split("Every error")[0]
    assert {name for name in errors.__all__ if name in drawn} == set(errors.__all__)


@pytest.mark.parametrize("error", [ImageTooLargeError("large", width=3, height=4), NotAnImageError("none")])
def test_errors_travel_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_the_package_is_typed(repository):
    assert (repository / "agegender" / "py.typed").exists()
