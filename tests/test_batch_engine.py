"""The directory of a private Ray."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from batch.engine import _check_gpus, _private_cluster, _scratch, _start, running_engine, worker_count
from batch.errors import BatchError, JobError, RequestError
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


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "127.0.0.1:99999"])
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


@pytest.mark.parametrize("address", ["LOCAL", "x:y"])
def test_what_is_no_address_is_a_wrong_call(address: str) -> None:
    with pytest.raises(RequestError, match="is no address of a Ray cluster; give"), running_engine(Resources(address)):
        pass


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "ray://x"])
def test_the_client_of_ray_behind_which_its_data_does_not_run_is_a_wrong_call(address: str) -> None:
    told = f"Ray Data does not run behind {address}; on a node of the cluster give HOST:PORT"
    with pytest.raises(RequestError, match=told), running_engine(Resources(address)):
        pass


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        ("auto", ConnectionError("none"), "no Ray cluster runs on this machine, as auto asks for"),
        ("127.0.0.1:{port}", RuntimeError("another version"), "Ray does not join 127.* another version"),
        (None, UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "set TMPDIR to an ASCII name"),
    ],
)
def test_a_start_is_not_tried_again_where_that_cannot_help(
    address: str | None, error: Exception, told: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[object] = []

    def init(**options: object) -> None:
        starts.append(options)
        raise error

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        resources = Resources(address and address.format(port=server.getsockname()[1]))
        with pytest.raises(BatchError, match=told) as raised:
            _start(resources, str(temporary))
    assert len(starts) == 1
    assert "try again" not in str(raised.value)


def test_what_ends_this_process_beside_python_is_told_of(temporary: Path) -> None:
    """As Ray does when one of its own processes dies."""
    code = (
        "import os, batch.engine as engine\n"
        "from batch.request import Resources\n"
        "engine._start = lambda *_: os._exit(1)\n"
        "with engine.running_engine(Resources()): pass\n"
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    call = [sys.executable, "-c", code]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("\nbatch: this process was ended by its engine or killed; what is done stays done")
    assert done.stderr.count("\n") == 2


def test_a_directory_of_too_long_a_name_for_sockets_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("t" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(JobError, match="set TMPDIR to a shorter one"), running_engine(Resources()):
        pass


@pytest.mark.parametrize(("cpus", "workers"), [(8, 5), (4, 1), (2, 1)])
def test_three_processors_of_a_cluster_are_left_to_what_is_no_work_on_images(
    cpus: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    assert worker_count(Resources("auto")) == workers
    assert worker_count(Resources("auto", workers=7)) == 7
    assert _private_cluster(Resources(workers=2), "folder")["num_cpus"] == 5


@pytest.mark.parametrize(("failures", "told"), [(2, False), (3, True)])
def test_a_start_that_fails_is_tried_a_third_time(
    failures: int, told: bool, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []

    def init(**_: object) -> None:
        starts.append("start")
        if len(starts) <= failures:
            raise RuntimeError("busy")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(JobError, match=r"Ray did not start: .*busy") if told else contextlib.nullcontext():
        _start(Resources(), str(temporary))
    assert len(starts) == 3


def test_as_many_gpus_as_there_are_will_do_and_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    _check_gpus(Resources(device="cuda", gpus=2))
    with pytest.raises(RequestError, match="--gpus 3 was asked for, but Ray finds 2"):
        _check_gpus(Resources(device="cuda", gpus=3))
    _check_gpus(Resources(device="cpu", gpus=3))


def test_each_private_ray_has_a_token_of_its_own_and_one_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    for given in ({}, {}, {"RAY_AUTH_TOKEN": "theirs"}):
        monkeypatch.setattr(os, "environ", given)
        _private_cluster(Resources(workers=1), "folder")
        tokens.append(given["RAY_AUTH_TOKEN"])
    assert min(map(len, tokens[:2])) >= 32
    assert tokens[0] != tokens[1]
    assert tokens[2] == "theirs"
