"""The directory of a private Ray."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from batch.engine import _scratch


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
