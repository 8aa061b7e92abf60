"""The directory of a private Ray."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from batch.engine import _scratch, running_engine
from batch.errors import JobError
from batch.request import Resources


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_killed_runs_have_left_goes_and_what_others_use_stays(temporary: Path) -> None:
    left = temporary / "agegender-ray-left"
    left.mkdir()
    with _scratch() as one, _scratch() as other:
        assert sorted(map(str, temporary.iterdir())) == sorted([one, other])
    assert not list(temporary.iterdir())


def test_a_directory_that_another_run_takes_for_left_behind_is_replaced(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens between the moment when it is made and the one when it is locked."""
    real, made = tempfile.mkdtemp, []

    def mkdtemp(**options: Any) -> str:
        made.append(real(**options))
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    with _scratch() as folder:
        assert folder == made[1]
        assert os.path.isdir(folder)


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "127.0.0.1:99999"])
def test_a_cluster_that_does_not_answer_is_told_of_at_once(address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    started = time.monotonic()
    with (
        pytest.raises(JobError, match="no Ray cluster answers at"),
        running_engine(Resources(address.format(port=port))),
    ):
        pass
    assert time.monotonic() - started < 5


def test_a_directory_of_too_long_a_name_for_sockets_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(JobError, match="set TMPDIR to a shorter one"), running_engine(Resources()):
        pass
