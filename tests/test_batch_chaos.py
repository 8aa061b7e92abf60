"""The batch job under fire: whatever dies, the end is that of an unbroken run, to the last bit."""

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

INPUTS = 1500
TIMEOUT_S = 280
DIED = "the process that worked on this file died, each time"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "batch", *map(str, arguments), "--faces", "whole"]


def finish(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def outcomes(out: Path) -> pa.Table:
    assert (out / "_SUCCESS").exists()
    return pq.read_table(out).sort_by([("id", "ascending"), ("face", "ascending")])


@pytest.fixture(scope="module")
def chips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small images, and some files that are none."""
    folder = tmp_path_factory.mktemp("chips")
    generator = np.random.default_rng(0)
    for number in range(INPUTS):
        path = folder / f"{number:05}.jpg"
        if number % 100 == 99:
            path.write_bytes(b"no image")
            continue
        noise = generator.integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def unbroken(chips: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    done = finish(chips, out)
    assert done.returncode == 0, done.stderr
    table = outcomes(out)
    assert table.num_rows == INPUTS
    return table


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the job aside; what is left of it is ended after the test."""
    started = []

    def start_(*arguments: object, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=stderr)
        started.append(process)
        return process

    yield start_
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def committed(out: Path) -> int:
    return len([path for path in (out / "_run").glob("*/checkpoint/*.parquet") if ".pending." not in path.name])


def wait_for_a_part(process: subprocess.Popen[bytes], out: Path) -> None:
    """Waits until the job has written one more part, or ended."""
    before = committed(out)
    assert wait_for(lambda: process.poll() is not None or committed(out) > before)


def test_the_driver_killed_at_20_random_moments(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    moments = random.Random(7)
    out = tmp_path / "0"
    finished = interrupted = 0
    for kill in range(20):
        process = start(chips, out)
        if kill % 4 == 0:
            time.sleep(moments.uniform(0.2, 4))  # while it starts
        else:
            wait_for_a_part(process, out)
            time.sleep(moments.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        interrupted += process.wait() == -signal.SIGKILL
        if (out / "_SUCCESS").exists():
            finished += 1
            assert outcomes(out).equals(unbroken)
            out = tmp_path / str(finished)
    done = finish(chips, out)
    assert done.returncode == 0, done.stderr
    assert outcomes(out).equals(unbroken)
    assert interrupted >= 15
    assert not (out / "_run").exists()


def actors(root: int, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_workers_killed_while_they_score(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    out = tmp_path / "out"
    process = start(chips, out)
    killed = 0
    while killed < 4:
        wait_for_a_part(process, out)
        if process.poll() is not None:
            break
        for victim in [*actors(process.pid, "Scorer")[:1], *actors(process.pid, "Tally")[:1]]:
            victim.kill()
            killed += 1
    assert process.wait(TIMEOUT_S) == 0
    assert killed >= 2
    assert outcomes(out).equals(unbroken)


STALLED = """
import sys, time
import batch.job, batch.scorer
from batch.__main__ import main

class Stalled(batch.scorer.Scorer):
    def __init__(self, **options):
        super().__init__(**options)
        batch.scorer._STUCK_S = 3

    def _read(self, block, path, careful):
        data = super()._read(block, path, careful)
        while path.endswith("00007.jpg"):
            time.sleep(60)
        return data

batch.job.Scorer = Stalled
sys.exit(main(sys.argv[1:]))
"""


def test_an_input_on_which_processes_stand_still_is_given_up(chips: Path, unbroken: pa.Table, tmp_path: Path) -> None:
    arguments = [chips, tmp_path / "out", "--faces", "whole"]
    ended = subprocess.run([sys.executable, "-c", STALLED, *map(str, arguments)], timeout=TIMEOUT_S, check=False)
    assert ended.returncode == 0
    rows = outcomes(tmp_path / "out")
    (stalled,) = rows.filter(pc.equal(rows["status"], "failed")).to_pylist()
    assert (Path(stalled["path"]).name, stalled["error"]) == ("00007.jpg", DIED)
    others = pc.not_equal(rows["id"], stalled["id"])
    assert rows.filter(others)["path"].equals(unbroken.filter(others)["path"])


def test_a_model_in_a_process_of_its_own_starts_again_when_it_is_killed(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    out = tmp_path / "out"
    process = start(chips, out, "--gpus", 1, "--device", "cpu")
    wait_for_a_part(process, out)
    victims = actors(process.pid, "ray::_ModelProcess")
    for victim in victims:
        victim.kill()
    assert len(victims) == 1
    assert process.wait(TIMEOUT_S) == 0
    assert outcomes(out)["path"].equals(unbroken["path"])


def test_an_end_by_the_engine_is_told_of_and_the_rest_follows(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Ray ends this process too when its own on this machine dies, or raises an error first."""
    out = tmp_path / "out"
    process = start(chips, out, stderr=subprocess.PIPE)
    assert wait_for(lambda: committed(out) > 0)
    (raylet,) = [child for child in psutil.Process(process.pid).children() if child.name() == "raylet"]
    raylet.kill()
    _, told = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    ended = rb"(this process was ended by its engine or killed|the engine stopped: .*[^.]); what is done stays done"
    assert re.search(b"batch: " + ended, told)
    assert finish(chips, out).returncode == 0
    assert outcomes(out).equals(unbroken)


def test_ctrl_c_stops_within_seconds_and_the_rest_follows(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    out = tmp_path / "out"
    process = start(chips, out)
    assert wait_for(lambda: committed(out) > 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 130
    assert not (out / "_SUCCESS").exists()
    done = finish(chips, out)
    assert "were done before" in done.stdout
    assert outcomes(out).equals(unbroken)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB; the job's files come to 370."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_resumed(chips: Path, unbroken: pa.Table, small_disk: Path) -> None:
    out = small_disk / "out"
    full = finish(chips, out)
    assert full.returncode == 1
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    done = finish(chips, out)
    assert done.returncode == 0, done.stderr
    assert outcomes(out).equals(unbroken)


def test_parts_that_a_power_cut_has_damaged_are_done_again(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    out = tmp_path / "out"
    process = start(chips, out)
    assert wait_for(lambda: committed(out) > 8)
    process.kill()
    process.wait()
    parts = sorted((out / "_run").glob("*/parts/*.parquet"))
    os.truncate(parts[0], parts[0].stat().st_size // 2)
    os.truncate(parts[1], 0)
    parts[2].unlink()
    checkpoints = sorted((out / "_run").glob("*/checkpoint/*.parquet"))
    os.truncate(checkpoints[3], 0)
    shutil.copy(parts[4], parts[4].with_name("stray-0.parquet"))
    assert finish(chips, out).returncode == 0
    assert outcomes(out).equals(unbroken)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of three nodes on this machine, which the environment names."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # short, since it holds sockets
    os.mkdir(os.path.join(folder, "ray"))  # where it also keeps the cluster's address, and does not make it
    monkeypatch.setenv("RAY_TMPDIR", folder)
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=3)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_node_of_a_cluster_killed_midway(
    chips: Path, unbroken: pa.Table, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]], cluster: Any
) -> None:
    out = tmp_path / "out"
    process = start(chips, out)

    def busy() -> list[Any]:
        raylets = {node: node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes}
        return [node for node, raylet in raylets.items() if actors(raylet, "Scorer")]

    assert wait_for(lambda: process.poll() is not None or (committed(out) > 4 and bool(busy())))
    assert process.poll() is None
    cluster.remove_node(busy()[0], allow_graceful=False)
    assert process.wait(TIMEOUT_S) == 0
    assert outcomes(out).equals(unbroken)
    assert "Nothing to do" in finish(chips, out).stdout
