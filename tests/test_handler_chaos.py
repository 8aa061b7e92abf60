"""TorchServe under abuse and change: killed workers, rolled versions, restarts, hostile bodies, minutes of load."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import urllib3

from agegender import ServerError
from agegender.client import Client
from agegender.spec import SPEC_FILE
from handler.archive import build_archive
from handler.server import KEY_FILE, Server, ServingError, _runs
from tests.hostile import PREDICTIONS, Ask, assert_survives, hostile_requests

pytestmark = pytest.mark.slow


@pytest.fixture
def own_server(new_server: Callable[[], Server]) -> Iterator[Server]:
    """A server that a test may maltreat, ready."""
    server = new_server()
    server.start(timeout_s=300)
    yield server
    server.stop(drain_s=0)


@contextmanager
def load(ask: Ask, image: bytes, clients: int = 4) -> Iterator[Counter[Any]]:
    """Keeps so many clients busy; counts their answers by status, or by what went wrong."""
    outcomes: Counter[Any] = Counter()
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            try:
                status, answer = ask(PREDICTIONS, body=image)
                outcomes["worker died" if "Worker died" in str(answer) else status] += 1
            except urllib3.exceptions.HTTPError as error:
                outcomes[type(error).__name__] += 1
                time.sleep(0.05)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=130)
        assert not any(thread.is_alive() for thread in threads), "a request was never answered"


def wait_for(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def manage(server: Server, method: str, path: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {server.key('management')}"}
    address = server.settings["management_address"] + path
    response = urllib3.request(method, address, headers=headers, timeout=180, retries=False)
    return response.status, json.loads(response.data)


def test_300_hostile_bodies(server: Server, ask: Ask, group_jpeg: bytes) -> None:
    assert_survives(hostile_requests(group_jpeg, 300, seed=2), ask, server)


def test_a_flood_of_large_bodies_is_answered_or_refused(own_server: Server, asking: Any, group_jpeg: bytes) -> None:
    """More bytes at once than the heap holds without a bounded queue."""
    with load(asking(own_server), bytes(15 * 2**20), clients=24) as outcomes:
        time.sleep(20)
    assert set(outcomes) <= {400, 503}
    assert outcomes[400] > 0
    assert asking(own_server)(PREDICTIONS, body=group_jpeg)[0] == 200


def test_a_killed_worker_costs_its_own_requests_alone(own_server: Server, asking: Any, grace_hopper: bytes) -> None:
    process = own_server.process()
    with load(asking(own_server), grace_hopper) as outcomes:
        wait_for(lambda: outcomes[200] > 20, 60)
        victim = process.children(recursive=True)[0]
        victim.send_signal(signal.SIGKILL)
        wait_for(lambda: not victim.is_running(), 10)
        wait_for(own_server.ready, 120)
        served = outcomes[200]
        wait_for(lambda: outcomes[200] > served + 20, 60)
    # Every request was answered; the victim's own, a batch at most, by what TorchServe says of a killed worker.
    assert set(outcomes) <= {200, 507, "worker died"}, outcomes
    assert outcomes[507] + outcomes["worker died"] <= 4, outcomes


def test_a_version_is_rolled_in_and_back_under_load(
    own_server: Server, asking: Any, model_path: Path, grace_hopper: bytes
) -> None:
    ask = asking(own_server)
    old = ask(PREDICTIONS, body=grace_hopper)[1]["model"]["version"]
    new_model = _with_version(model_path, own_server.directory / "new.pt", "999.0")
    build_archive(new_model, own_server.directory / "model_store" / "agegender-999.0.mar")
    with load(ask, grace_hopper, clients=3) as outcomes:
        path = "/models?url=agegender-999.0.mar&initial_workers=1&synchronous=true"
        assert manage(own_server, "POST", path)[0] == 200
        assert ask(f"{PREDICTIONS}/999.0", body=grace_hopper)[1]["model"]["version"] == "999.0"
        assert ask(PREDICTIONS, body=grace_hopper)[1]["model"]["version"] == old
        assert manage(own_server, "PUT", "/models/agegender/999.0/set-default")[0] == 200
        assert ask(PREDICTIONS, body=grace_hopper)[1]["model"]["version"] == "999.0"
        assert manage(own_server, "PUT", f"/models/agegender/{old}/set-default")[0] == 200
        assert ask(PREDICTIONS, body=grace_hopper)[1]["model"]["version"] == old
        wait_for(lambda: not _waiting(own_server, "999.0"), 30)
        time.sleep(1)  # what is in work ends
        assert manage(own_server, "DELETE", "/models/agegender/999.0")[0] == 200
        served = outcomes[200]
        wait_for(lambda: outcomes[200] > served + 10, 60)
    assert set(outcomes) == {200}


def _with_version(model: Path, target: Path, version: str) -> Path:
    """The same artifact under another version."""
    extra = {SPEC_FILE: ""}
    module = torch.jit.load(str(model), _extra_files=extra)
    spec = {**json.loads(extra[SPEC_FILE]), "version": version}
    torch.jit.save(module, str(target), _extra_files={SPEC_FILE: json.dumps(spec)})
    return target


def _waiting(server: Server, version: str) -> int:
    return int(manage(server, "GET", f"/models/agegender/{version}")[1][0]["jobQueueStatus"]["pendingRequests"])


def test_stopping_lets_running_requests_finish_and_leaves_nothing(
    new_server: Callable[[], Server], asking: Any, grace_hopper: bytes
) -> None:
    server = new_server()
    for _ in range(2):
        server.start(timeout_s=300)
        family = [server.process(), *server.process().children(recursive=True)]
        with ThreadPoolExecutor() as pool:
            slow = pool.submit(asking(server), PREDICTIONS, fields=_many(grace_hopper))
            time.sleep(0.5)
            assert server.stop()
            assert slow.result(timeout=60)[0] == 200
        assert not any(map(_runs, family))
        assert not server.temporary.exists()
        assert not (server.directory / KEY_FILE).exists()
    assert not server.stop()


def _many(image: bytes) -> dict[str, tuple[str, bytes]]:
    """Work for a second or more."""
    return {f"image{index}": (f"{index}.jpg", image) for index in range(60)}


def test_stopping_under_load_turns_requests_away_without_an_error(
    own_server: Server, asking: Any, grace_hopper: bytes
) -> None:
    with load(asking(own_server), grace_hopper) as outcomes:
        wait_for(lambda: outcomes[200] > 20, 60)
        assert own_server.stop()
        time.sleep(0.5)
    answered = {status for status in outcomes if isinstance(status, int)}
    assert answered <= {200, 503}, outcomes
    # The server's end itself may cut off a refusal on its way, one per client at most.
    assert outcomes["ProtocolError"] <= 4, outcomes


def test_a_broken_archive_is_told_and_leaves_nothing(new_server: Callable[[], Server]) -> None:
    server = new_server()
    (server.directory / "model_store" / "agegender.mar").write_bytes(b"no archive")
    with pytest.raises(ServingError, match=r"no worker was ready within 10 s: .*"):
        server.start(timeout_s=10)
    assert server.process() is None


def test_a_new_token_is_taken_up_by_the_client(own_server: Server, grace_hopper: bytes) -> None:
    client = Client(own_server.settings["inference_address"], key_file=own_server.directory / KEY_FILE)
    before = client.predict([grace_hopper])
    headers = {"Authorization": f"Bearer {own_server.key('API')}"}
    address = own_server.settings["management_address"] + "/token?type=inference"
    assert urllib3.request("GET", address, headers=headers).status == 200
    assert client.predict([grace_hopper]) == before
    fixed = Client(own_server.settings["inference_address"], key="old", key_file=None)
    with pytest.raises(ServerError, match="refuses the token"):
        fixed.predict([grace_hopper])
    client.close()
    fixed.close()


def test_two_minutes_of_load_keep_the_memory(own_server: Server, asking: Any, grace_hopper: bytes) -> None:
    workers = own_server.process().children(recursive=True)
    with load(asking(own_server), grace_hopper) as outcomes:
        time.sleep(20)  # buffers and caches fill
        before = _memory(workers)
        time.sleep(100)
        growth = _memory(workers) / before - 1
    assert set(outcomes) == {200}
    assert growth < 0.03, f"{growth:.1%}"


def _memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_full_info().uss for process in processes)
