"""The server's commands by themselves: what they refuse and how they end, without a TorchServe."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from handler.server import Server, ServingError, copy_settings


@pytest.fixture
def stopped(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with an archive that is none, and a directory for temporary files of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "agegender.mar").touch()
    return Server(copy_settings(repository / "config.properties", tmp_path), tmp_path)


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


@pytest.mark.parametrize("make", [open_to_all, link, Path.touch], ids=["open to all", "link", "file"])
def test_a_temporary_directory_that_is_not_private_is_not_used(stopped: Server, make: Callable[[Path], None]) -> None:
    make(stopped.temporary)
    with pytest.raises(ServingError, match="is not this user's own; remove it"):
        stopped.start()
    assert stopped.temporary.exists()
    assert not (stopped.directory / "logs").exists()


def test_the_temporary_directory_of_another_user_is_not_used(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped.temporary.mkdir(mode=0o700)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(ServingError, match="is not this user's own; remove it"):
        stopped.start()
