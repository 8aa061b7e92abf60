"""What predicts: the model in this process or a running TorchServe, as chosen in the sidebar."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import streamlit as st

from agegender import ModelLoadError, ModelSpec, Predictor
from agegender.client import DEFAULT_KEY_FILE, DEFAULT_SERVER, Client
from agegender.spec import read_artifact
from app.messages import plain

__all__ = ["Engine", "choose_engine", "describe_model", "local_predictor"]

_LOCAL, _SERVER = "This process", "TorchServe"
_HASH_DIGITS: Final = 12


@dataclass(frozen=True)
class Engine:
    """A predictor and its name.

    Attributes:
        predictor: the model in this process, or the client of a server.
        name: tells results of one engine from those of another. A server that takes up another model keeps its name:
            what it has answered before stays.
    """

    predictor: Predictor | Client
    name: str

    @property
    def coverage(self) -> float | None:
        """Nominal coverage of the age intervals; None where a server has not told it."""
        if isinstance(self.predictor, Predictor):
            return self.predictor.model.spec.coverage
        return self.predictor.about.get("coverage")


def choose_engine(model: Path) -> Engine:
    """Widgets for the choice.

    Args:
        model: the artifact for predictions in this process.

    Raises:
        ModelLoadError: the artifact cannot be used.
        ValueError: the server's address is none.
    """
    where = st.segmented_control(
        "Predict with", [_LOCAL, _SERVER], default=_LOCAL, required=True, key="engine", persist_state="session"
    )
    if where == _LOCAL:
        predictor = local_predictor(model)
        return Engine(predictor, predictor.model.sha256)
    return _choose_server()


def local_predictor(model: Path) -> Predictor:
    """The chain with this artifact, loaded once for all sessions, and anew when the file has changed.

    Raises:
        ModelLoadError: the artifact cannot be used.
    """
    return _load(model, _changed_ns(model))


def _changed_ns(model: Path) -> int:
    try:
        return model.stat().st_mtime_ns
    except OSError:  # whoever reads it says why
        return 0


@st.cache_resource(max_entries=2, show_spinner="Loading the model")
def _load(model: Path, changed_ns: int) -> Predictor:
    return Predictor(model)


def _choose_server() -> Engine:
    address = (st.text_input("Address", DEFAULT_SERVER, key="address", persist_state="session") or "").strip()
    token = st.text_input("Token", type="password", placeholder="from the key file", key="token")
    key_file = st.text_input(
        "Key file",
        placeholder=str(DEFAULT_KEY_FILE),
        disabled=bool(token),
        help="TorchServe writes it into the directory that it was started in. For a server on this machine, "
        f"{DEFAULT_KEY_FILE} in the app's directory is read when nothing is given.",
        key="key_file",
        persist_state="session",
    )
    # `Path.expanduser` raises for a user that is not known.
    path = None if token or not key_file else Path(os.path.expanduser(key_file.strip()))
    client = _connect(address, token or None, path)
    return Engine(client, f"{address} {token} {key_file}")


@st.cache_resource(scope="session", max_entries=2, show_spinner=False)
def _connect(address: str, token: str | None, key_file: Path | None) -> Client:
    return Client(address, key=token, key_file=key_file)


def describe_model(engine: Engine, local: Path) -> None:
    """Name, version, hash and figures of the engine's model, and where it errs.

    Args:
        engine: what predicts.
        local: the artifact in this process, whose figures hold for a server with the same bytes.
    """
    predictor = engine.predictor
    if isinstance(predictor, Predictor):
        _describe(predictor.model.spec, predictor.model.sha256)
        return
    if not predictor.about:
        st.caption("The server names its model with the first answer.")
        return
    about = predictor.about
    here = _read(local, _changed_ns(local))
    if here and here[1] == about["sha256"]:
        _describe(*here)
        return
    st.table(_identity(about["name"], about["version"], about["sha256"]), border="horizontal")
    st.caption("The server's model is not the one here, so its test figures are not known here.")


@st.cache_resource(max_entries=2, show_spinner=False)
def _read(model: Path, changed_ns: int) -> tuple[ModelSpec, str] | None:
    """An artifact's spec and SHA-256, for which no network is loaded; None where it cannot be read."""
    try:
        spec, data = read_artifact(model)
    except ModelLoadError:
        return None
    return spec, hashlib.sha256(data).hexdigest()


def _describe(spec: ModelSpec, sha256: str) -> None:
    figures = {
        **_identity(spec.name, spec.version, sha256),
        "Age error (mean)": _figure(spec, "age_mae_years", "{:.1f} years"),
        "Gender correct": _figure(spec, "gender_accuracy", "{:.1%}"),
        f"{spec.coverage:.0%} intervals that hold": _figure(spec, "age_coverage", "{:.1%}"),
        "Test pictures": _figure(spec, "pictures", "{:,.0f}"),
    }
    st.table({name: figure for name, figure in figures.items() if figure}, border="horizontal")
    st.caption(
        f"It guesses as {spec.training_data} was labelled, and errs more with small children, the very old, and "
        "turned, dark, grainy or blurred pictures."
    )


def _identity(name: str, version: str, sha256: str) -> dict[str, str]:
    return {"Name": plain(name), "Version": plain(version), "SHA-256": f"`{sha256[:_HASH_DIGITS]}`"}


def _figure(spec: ModelSpec, name: str, form: str) -> str | None:
    return form.format(spec.metrics[name]) if name in spec.metrics else None
