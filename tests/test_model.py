"""chips -> predictions: what an artifact must be, what is refused with which words, what predictions keep to."""

import dataclasses
import json
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch

from agegender import Model, ModelLoadError, ModelSpec
from agegender.spec import FORMAT_VERSION, SPEC_FILE, interval_name

SPEC = ModelSpec(
    format_version=FORMAT_VERSION,
    name="brightness",
    version="1.2.3",
    chip_size_px=16,
    chip_margin=0.1,
    labels=("male", "female"),
    coverage=0.9,
    backbone="none",
    training_data="none",
    licence="Apache-2.0",
    metrics={"age_mae_years": 4.5},
    commit="abc",
    options={"epochs": 3, "nested": {"a": [1, 2]}},
)
SPEC_TEXT = SPEC.to_json()


class Output(NamedTuple):
    age: torch.Tensor
    age_low: torch.Tensor
    age_high: torch.Tensor
    gender_logits: torch.Tensor


class Brightness(torch.nn.Module):
    """An artifact of the right form whose answers can be computed by hand."""

    def forward(self, chips: torch.Tensor) -> Output:
        mean = chips.float().mean(dim=[1, 2, 3])
        return Output(mean / 10, mean / 20, mean / 5, torch.stack([mean / 100, torch.zeros_like(mean)], dim=1))


class OneTensor(torch.nn.Module):
    def forward(self, chips: torch.Tensor) -> torch.Tensor:
        return chips.float().mean()


class Scalars(torch.nn.Module):
    def forward(self, chips: torch.Tensor) -> Output:
        mean = chips.float().mean()
        return Output(mean, mean, mean, torch.zeros(1, 2))


@pytest.fixture
def save(tmp_path):
    """save(module, text of the description or None) -> path of the artifact."""

    def save_(module=None, spec=SPEC_TEXT):
        path = tmp_path / "model.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            scripted = torch.jit.script(module or Brightness())
            torch.jit.save(scripted, str(path), _extra_files={} if spec is None else {SPEC_FILE: spec})
        return path

    return save_


@pytest.fixture(scope="module")
def shipped(model_path):
    return Model(model_path, device="cpu")


def chips(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def refused(path, device="cpu"):
    """The sentence with which a model is refused."""
    with pytest.raises(ModelLoadError) as caught:
        Model(path, device=device)
    message = str(caught.value)
    assert message.isprintable(), "one line"
    assert len(message) < 400
    return message


# --- the description -------------------------------------------------------------------------------------------------


def test_the_description_survives_its_file():
    assert ModelSpec.from_json(SPEC.to_json()) == SPEC
    assert isinstance(ModelSpec.from_json(SPEC.to_json()).labels, tuple)


def test_the_description_survives_the_artifact(save):
    model = Model(save(), device="cpu")
    assert model.spec == SPEC
    assert len(model.sha256) == 64


def test_the_coverage_is_told_as_the_description_has_it():
    spec = dataclasses.replace(SPEC, coverage=0.8)
    assert spec.identity("f" * 64) == {"name": "brightness", "version": "1.2.3", "sha256": "f" * 64, "coverage": 0.8}
    assert [interval_name(each) for each in (0.8, 0.975, None)] == ["80% interval", "97.5% interval", "interval"]


def test_fields_of_a_later_minor_version_are_ignored():
    assert ModelSpec.from_json(json.dumps({**json.loads(SPEC_TEXT), "new": 1})) == SPEC


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        ('"text"', "damaged"),
        ("{}", "format version None"),
        (json.dumps({"format_version": FORMAT_VERSION}), "missing"),
        (
            json.dumps({"format_version": FORMAT_VERSION + 1}),
            f"format version {FORMAT_VERSION + 1}, this package reads",
        ),
        (json.dumps({"format_version": "1"}), "format version 1, this"),
    ],
)
def test_a_damaged_description(text, message):
    with pytest.raises(ModelLoadError, match=message):
        ModelSpec.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chip_size_px", 0),
        ("chip_size_px", -128),
        ("chip_size_px", "128"),
        ("chip_size_px", 128.5),
        ("chip_margin", -0.1),
        ("chip_margin", None),
        ("labels", []),
        ("labels", None),
        ("labels", ["male"]),
        ("labels", ["male", "female", "other"]),
        ("labels", [0, 1]),
        ("coverage", 0),
        ("coverage", 90),
    ],
)
def test_a_description_with_a_wrong_value(name, value):
    with pytest.raises(ModelLoadError, match=r"the model's spec\.json is damaged"):
        ModelSpec.from_json(json.dumps({**json.loads(SPEC_TEXT), name: value}))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    message = refused(tmp_path / "none.pt")
    assert "none.pt: No such file or directory; give the path of one, or train one with `make train`" in message


def test_a_directory(tmp_path):
    assert "Is a directory" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(1000)])
def test_a_file_of_something_else(content, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refused(path).endswith("model.pt is not a TorchScript file, or a damaged one")


def test_a_state_dict_and_another_zip(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    for name in ("state.pt", "other.pt"):
        assert "not a TorchScript file" in refused(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_artifact(share, model_path, tmp_path):
    data = model_path.read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: int(len(data) * share)])
    assert "not a TorchScript file" in refused(tmp_path / "model.pt")


def test_a_bit_that_has_changed(model_path, tmp_path):
    data = bytearray(model_path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(data)
    assert "or a damaged one" in refused(tmp_path / "model.pt")


def test_torchscript_without_a_description(save):
    assert "holds no spec.json: it was not made by `make train`" in refused(save(spec=None))
    assert "holds no spec.json" in refused(save(spec=""))


@pytest.mark.parametrize("spec", ["{", b"\xff\xfe\x00", '{"format_version": 99}'])
def test_torchscript_with_a_description_that_is_none(spec, save):
    assert "damaged" in refused(save(spec=spec)) or "format version 99" in refused(save(spec=spec))


@pytest.mark.parametrize("module", [OneTensor(), Scalars()])
def test_an_artifact_of_another_form(module, save):
    assert "make train" in refused(save(module))


@pytest.mark.parametrize("device", ["gpu", "", "cpu ", "meta", "mps", "cuda:x"])
def test_an_unknown_device(device, save):
    assert "take auto, cpu, cuda or cuda:N" in refused(save(), device)


def test_a_cuda_device_that_is_not_there(save):
    count = torch.cuda.device_count()
    assert f"torch finds {count} CUDA devices" in refused(save(), f"cuda:{count}")
    if not count:
        assert "torch finds 0 CUDA devices; take cpu" in refused(save(), "cuda")


def test_auto_takes_what_there_is(save):
    assert Model(save(), device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_loading_says_nothing(model_path, save, recwarn, capfd):
    Model(model_path, device="cpu")
    Model(save(), device="cpu")
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


# --- predictions -----------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_artifact(save):
    model = Model(save(), device="cpu")
    batch = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 255)])
    predictions = model.predict(batch)
    assert predictions.age == pytest.approx([0, 10, 25.5])
    assert predictions.age_low == pytest.approx([0, 5, 12.75])
    assert predictions.age_high == pytest.approx([0, 20, 51])
    first = 1 / (1 + np.exp(-np.array([0, 1, 2.55])))
    assert predictions.gender_probs == pytest.approx(np.stack([first, 1 - first], axis=1))


def test_shapes_and_types(shipped):
    for count in (0, 1, 5):
        predictions = shipped.predict(chips(count, shipped.spec.chip_size_px))
        assert [column.shape for column in predictions] == [(count,), (count,), (count,), (count, 2)]
        assert {column.dtype for column in predictions} == {np.dtype(np.float32)}


def test_predictions_keep_their_range(shipped):
    side = shipped.spec.chip_size_px
    plain = np.stack([np.full((side, side, 3), value, np.uint8) for value in (0, 127, 255)])
    predictions = shipped.predict(np.concatenate([chips(13, side), plain]))
    assert (predictions.age_low >= 0).all()
    assert (predictions.age_low <= predictions.age).all()
    assert (predictions.age <= predictions.age_high).all()
    assert (predictions.age_high <= 116).all()
    assert predictions.gender_probs.sum(axis=1) == pytest.approx(1)
    assert (predictions.gender_probs >= 0).all()


def test_the_batch_does_not_matter(shipped):
    """Sums are taken in another order; years agree to a thousandth."""
    batch = chips(16, shipped.spec.chip_size_px)
    together = shipped.predict(batch)
    for size in (1, 5):
        pieces = [shipped.predict(batch[start : start + size]) for start in range(0, 16, size)]
        for name in together._fields:
            apart = np.concatenate([getattr(piece, name) for piece in pieces])
            assert np.abs(apart - getattr(together, name)).max() < 1e-3, name


def test_chips_are_told_apart(shipped):
    """Else the test above could pass on an artifact that ignores its input."""
    predictions = shipped.predict(chips(16, shipped.spec.chip_size_px))
    assert predictions.age.std() > 1e-3


def test_views_and_read_only_chips_will_do(shipped, recwarn):
    side = shipped.spec.chip_size_px
    wide = chips(3, side + 10)
    view = wide[::-1, 5:-5, 10:]
    expected = shipped.predict(view.copy())
    read_only = view.copy()
    read_only.flags.writeable = False
    for batch in (view, read_only):
        assert np.array_equal(shipped.predict(batch).age, expected.age)
    assert np.array_equal(shipped.predict(view[:1][::-1]).age, shipped.predict(view[:1].copy()).age)
    assert not recwarn.list


def test_the_chips_are_left_as_they_were(shipped):
    batch = chips(2, shipped.spec.chip_size_px)
    shipped.predict(batch)
    assert np.array_equal(batch, chips(2, shipped.spec.chip_size_px))


@pytest.mark.parametrize(
    "shape", [(1, 3, 16, 16), (1, 16, 16), (16, 16, 3), (1, 16, 16, 4), (1, 15, 16, 3), (0, 5, 5, 3)]
)
def test_chips_of_another_shape_are_refused(shape, save):
    with pytest.raises(ValueError, match=r"chips must be \(N, 16, 16, 3\) uint8"):
        Model(save(), device="cpu").predict(np.zeros(shape, np.uint8))


def test_chips_of_another_type_are_refused(save):
    with pytest.raises(ValueError, match=r"uint8, not .* float32"):
        Model(save(), device="cpu").predict(np.zeros((1, 16, 16, 3), np.float32))


def test_no_gradients_are_kept(shipped):
    shipped.predict(chips(1, shipped.spec.chip_size_px))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_libraries_for_8_bits_agree(shipped, model_path, monkeypatch):
    before = torch.backends.quantized.engine
    fastest = Model(model_path, device="cpu")
    assert torch.backends.quantized.engine == before
    monkeypatch.setattr("agegender.model._fastest_engine", nullcontext)
    default = Model(model_path, device="cpu")
    faces = chips(8, shipped.spec.chip_size_px)
    for theirs, ours in zip(default.predict(faces), fastest.predict(faces), strict=True):
        assert np.abs(theirs - ours).mean() < (1 if theirs.ndim == 1 else 0.05), "they round elsewhere, but little"


def test_models_that_load_at_once_leave_the_process_as_it_was(model_path):
    before = torch.backends.quantized.engine
    data = model_path.read_bytes()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Model(data, device="cpu"), range(8)))
    assert torch.backends.quantized.engine == before


def test_threads_share_a_model(shipped):
    batches = [chips(count, shipped.spec.chip_size_px, seed=count) for count in (1, 2, 3, 4)]
    expected = [shipped.predict(batch).age for batch in batches]
    wrong = []

    def work(index):
        for _ in range(5):
            if np.abs(shipped.predict(batches[index]).age - expected[index]).max() > 1e-3:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- the artifact that ships -----------------------------------------------------------------------------------------


def test_an_artifact_loads_from_its_bytes_as_from_its_file(shipped, model_path):
    loaded = Model(model_path.read_bytes(), device="cpu")
    assert (loaded.spec, loaded.sha256) == (shipped.spec, shipped.sha256)
    with pytest.raises(ModelLoadError, match="the model is not a TorchScript file"):
        Model(model_path.read_bytes()[:-100])


def test_the_shipped_artifact_says_what_it_is(shipped, model_path):
    spec = dataclasses.asdict(shipped.spec)
    assert spec["labels"] == ("male", "female")
    for name in ("name", "version", "backbone", "training_data", "licence"):
        assert spec[name], name
    assert model_path.stat().st_size <= 25e6


def test_a_full_gpu_is_not_told_as_a_damaged_artifact(save, monkeypatch):
    def full(*_):
        raise RuntimeError("The following operation failed in the TorchScript interpreter.\nCUDA out of memory.")

    monkeypatch.setattr(Model, "predict", full)
    assert "cpu has no memory left for" in refused(save())


@pytest.mark.parametrize("name", ["agegender.pt", "agegender-fast.pt"])
def test_the_shipped_artifacts_do_not_tell_where_their_code_lay(model_path, name):
    with zipfile.ZipFile(model_path.with_name(name)) as archive:
        assert not [member for member in archive.namelist() if b"site-packages" in archive.read(member)]
