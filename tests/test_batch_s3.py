"""The batch job from and to an object store, through a real S3 API."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pyarrow import fs

pytestmark = pytest.mark.slow

TIMEOUT_S = 280


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not _answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def environment(endpoint: str) -> dict[str, str]:
    return {
        **os.environ,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture
def store(endpoint: str, group_jpeg: bytes, blank_png: bytes) -> fs.FileSystem:
    """A bucket with sixty images and twenty files that are none."""
    store = fs.S3FileSystem(
        endpoint_override=endpoint, access_key="test", secret_key="test", allow_bucket_creation=True
    )
    store.create_dir("bucket")
    for number in range(80):
        data = (group_jpeg, blank_png, blank_png, b"words")[number % 4]
        with store.open_output_stream(f"bucket/in/{number // 40}/photo {number:02} 100%.jpg") as stream:
            stream.write(data)
    return store


def test_a_bucket_is_scored_killed_and_finished(
    store: fs.FileSystem, environment: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "batch", "s3://bucket/in", "s3://bucket/out"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    selector = fs.FileSelector("bucket/out/_run", allow_not_found=True, recursive=True)
    while process.poll() is None and not any("/checkpoint/" in info.path for info in store.get_file_info(selector)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert "Nothing to do" in again.stdout
    names = sorted(info.base_name for info in store.get_file_info(fs.FileSelector("bucket/out")))
    assert names[:2] == ["_SUCCESS", "_summary.json"]
    assert len(names) == 3
    table = pq.read_table(f"bucket/out/{names[2]}", filesystem=store).to_pandas()
    expected = [f"s3://bucket/in/{number // 40}/photo {number:02} 100%.jpg" for number in range(80)]
    assert sorted(table["path"].unique()) == expected
    assert table.drop_duplicates("path")["status"].value_counts().to_dict() == {
        "no_face": 40,
        "ok": 20,
        "not_image": 20,
    }
